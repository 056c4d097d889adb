"""The authors' TensorFlow code, run on the weights, batches and noise that equal_tf.py asks for.

    TF_ENV/bin/python benchmark/authors_tf.py DIR QUESTION.npz ANSWER.npz    equal_tf.py calls it

TF_ENV is an environment made as requirements-tf.txt says. DIR is a checkout of

github.com/danijar/dreamerv2    agent.py, common/ and configs.yaml run as they are
github.com/alexlee-gk/slac      agent and networks run with the edits that are listed below

Nothing in DIR is changed. What is replaced in memory is printed: modules that are imported and not
needed here, names that newer libraries no longer have, and the random numbers.
"""

import collections
import contextlib
import itertools
import json
import logging
import os
import re
import sys
import tempfile
import types
from pathlib import Path

os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
os.environ["MUJOCO_GL"] = "disable"  # TensorFlow and Mesa have versions of LLVM that clash

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow.python.framework import ops

logging.getLogger().setLevel("ERROR")
tfd = tfp.distributions
queues = collections.defaultdict(list)  # noise by kind, in the order in which it is used


def note(text):
    """Prints what is replaced."""
    print(f"    replaced: {text}")


class Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stub(*names):
    """Stubs in place of modules that are imported and not needed here."""
    for name in names:
        sys.modules[name] = Stub(name)
    note(f"stubs for {', '.join(names)}")


def correct_bias_as_torch(optimizer, update, epsilon):
    """TensorFlow adds Adam's epsilon to sqrt(v) before v is corrected for its bias, PyTorch does so
    after that. This gives PyTorch's result for the update with this number, from 0 on. In the place
    of powers of the betas, which AdamOptimizer keeps in single precision, it puts exact ones."""
    beta1, beta2 = (float(np.float32(beta)) for beta in (0.9, 0.999))
    scaled = epsilon * (1 - beta2 ** (update + 1)) ** 0.5
    if isinstance(optimizer, tf.compat.v1.train.AdamOptimizer):
        powers = [tf.Variable(beta ** (update + 1), dtype=tf.float64) for beta in (beta1, beta2)]
        optimizer._epsilon = scaled
        optimizer._get_beta_accumulators = lambda: powers
        optimizer._finish = lambda *_: None  # it would raise the powers
    else:
        optimizer.epsilon = scaled


def settings(optimizer, clip=0, decay=0):
    """Learning rate, both betas, epsilon, clipping, decay of weights, as an optimizer has them."""
    found = {k.strip("_").replace("_", ""): v for k, v in vars(optimizer).items()}
    found |= {k.replace("_", ""): v for k, v in getattr(optimizer, "_hyper", {}).items()}
    found.setdefault("lr", found.get("learningrate"))
    adam = [float(np.asarray(found[name])) for name in ("lr", "beta1", "beta2", "epsilon")]
    return np.array([*adam, clip or 0, decay or 0])


def parts_of(layer):
    """(name, variable) of each weight of a Keras layer: kernel, bias, gamma or beta."""
    return [(re.sub(r":\d+$", "", v.name).split("/")[-1], v) for v in layer.weights]


def initial(layers):
    """{initial/name: numbers} of Keras layers {name: layer} as they are initialised: the largest
    weight and sqrt(3) standard deviations, both over the bound of Glorot's uniform distribution,
    and the largest bias. A layer with that distribution has about 1, about 1, 0."""
    answer = {}
    for name, layer in layers.items():
        if hasattr(layer, "kernel"):
            kernel = layer.kernel.numpy()
            bound = (6 / (np.prod(kernel.shape[:-2]) * sum(kernel.shape[-2:]))) ** 0.5
            largest, deviation = np.abs(kernel).max() / bound, 3**0.5 * kernel.std() / bound
            answer[f"initial/{name}"] = largest, deviation, np.abs(layer.bias.numpy()).max()
    return answer


def give_weights(layers, question):
    """Gives Keras layers {name: layer} our weights."""
    for name, layer in layers.items():
        for part, variable in parts_of(layer):
            variable.assign(question[f"weights/{name}/{part}"])


def take_weights(layers, update, answer, optimizers):
    """Puts the weights of Keras layers {name: layer} after an update into the answer, and what Adam
    has gathered of their gradients."""
    for name, layer in layers.items():
        for part, variable in parts_of(layer):
            answer[f"{update}/weights/{name}/{part}"] = variable.numpy()
            for optimizer in optimizers:
                with contextlib.suppress(KeyError):  # an optimizer of other weights
                    moment = optimizer.get_slot(variable, "m")
                    if moment is not None:
                        answer[f"{update}/gradients/{name}/{part}"] = moment.numpy()


def show_what_is_rendered(physics):
    """Lets physics.render give height, width, camera and all positions in place of an image."""

    def render(height, width, camera_id):
        return np.array([height, width, camera_id, *physics.data.qpos])

    physics.render = render
    note("images by what they are rendered from: size, camera, positions")


# ---- DreamerV2 ---------------------------------------------------------------------------------
def one_hot(self, *_):
    """In place of OneHotCategorical.sample for one sample: argmax p / Exp(1), of the next noise."""
    probs = self.probs_parameter()
    noise = -tf.math.log(queues["classes"].pop(0))
    return tf.one_hot(tf.argmax(probs / noise, -1), probs.shape[-1])[None]


def truncated_normal(shape, seed, means, stddevs, minvals, maxvals, **_):
    """In place of tf.random.stateless_parameterized_truncated_normal: the inverse CDF of the next
    noise. Its gradient is the one that TensorFlow has registered for that operation."""
    gradient = ops.gradient_registry.lookup("StatelessParameterizedTruncatedNormal")
    uniform = tf.reshape(queues["uniform"].pop(0), shape)

    @tf.custom_gradient
    def sample(mean, std):
        low, high = (minvals - mean) / std, (maxvals - mean) / std
        below, above = (0.5 * (1 + tf.math.erf(bound * 0.5**0.5)) for bound in (low, high))
        p = tf.clip_by_value(below + uniform * (above - below), 1e-6, 1 - 1e-6)
        x = mean + std * 2**0.5 * tf.math.erfinv(2 * p - 1)

        def backward(upstream):
            inputs = [shape, seed, mean, std, minvals, maxvals]
            return gradient(types.SimpleNamespace(inputs=inputs, outputs=[x]), upstream)[2:4]

        return x, backward

    return sample(means, stddevs)


def dreamer_layers(agent):
    """{name: Keras layer} of all their networks."""

    def named(module, prefix):
        for name, child in module._modules.items():
            if hasattr(child, "_modules"):
                yield from named(child, f"{prefix}/{name}")
            elif isinstance(child, tf.keras.layers.Layer):
                yield f"{prefix}/{name}", child

    behavior = agent._task_behavior
    modules = {"encoder": agent.wm.encoder, "rssm": agent.wm.rssm, **agent.wm.heads}
    modules |= {"actor": behavior.actor, "critic": behavior.critic}
    modules["target"] = behavior._target_critic
    cell = agent.wm.rssm._cell
    layers = {"rssm/gru": cell._layer, "rssm/gru_norm": cell._norm}
    return layers | {k: v for name, module in modules.items() for k, v in named(module, name)}


def dreamer_import(folder):
    """Their modules agent and common."""
    experimental = types.ModuleType("tensorflow.keras.mixed_precision.experimental")
    experimental.global_policy = tf.keras.mixed_precision.global_policy
    sys.modules[experimental.__name__] = experimental
    note("keras.mixed_precision.experimental by keras.mixed_precision, its name today")
    tf.optimizers.Adam = tf.keras.optimizers.legacy.Adam
    note("optimizers.Adam by optimizers.legacy.Adam, its name today")
    stub("gym")
    sys.path.insert(0, str(folder / "dreamerv2"))
    import agent
    import common

    tfd.OneHotCategorical.sample = one_hot
    random = sys.modules[tfd.TruncatedNormal.__module__].tf.random
    random.stateless_parameterized_truncated_normal = truncated_normal
    note("random classes and uniform numbers by ours, with TensorFlow's registered gradients")
    tf.config.run_functions_eagerly(True)
    return agent, common


def dreamer_updates(folder, question):
    """Some updates and some steps of acting by their Agent."""
    their_agent, common = dreamer_import(folder)
    import ruamel.yaml

    configs = ruamel.yaml.YAML(typ="safe").load((folder / "dreamerv2/configs.yaml").read_text())
    config = common.Config(configs["defaults"]).update(configs["dmc_vision"])
    config = config.update({"precision": 32, **json.loads(str(question["config"]))})
    keys = ("image", "action", "reward", "is_first", "is_terminal")
    updates, _, T, actions = question["action"].shape
    spaces = {"image": (64, 64, 3), **dict.fromkeys(("reward", "is_first", "is_terminal"), ())}
    spaces = {name: types.SimpleNamespace(shape=shape) for name, shape in spaces.items()}
    action_space = {"action": types.SimpleNamespace(shape=(actions,))}
    agent = their_agent.Agent(config, spaces, action_space, common.Counter(0))
    behavior = agent._task_behavior
    optimizers = {"model": agent.wm.model_opt}
    optimizers |= {"actor": behavior.actor_opt, "critic": behavior.critic_opt}
    answer = {}
    for name, optimizer in optimizers.items():
        given = settings(optimizer._opt, optimizer._clip, optimizer._wd)
        answer[f"optimizer/{name}"] = given
    names = "eval_eps", "eval_every", "eval_noise", "eval_state_mean"
    answer["evaluation"] = ", ".join(f"{name} {config[name]}" for name in names)

    def queue_noise(k):
        for t in range(T):  # their prior draws a state that nothing uses, then the posterior
            queues["classes"] += [question["model_noise"][k][:, t]] * 2
        queues["classes"] += list(question["imagined_noise"][k])
        queues["uniform"] += list(question["uniform"][k])

    def batch(k):
        return {name: tf.constant(question[name][k]) for name in keys}

    # The networks make their weights when they are first called. Then they get ours.
    queue_noise(0)
    *_, outputs, _ = agent.wm.loss(batch(0))
    states = {k: tf.reshape(v, [-1, *v.shape[2:]]) for k, v in outputs["post"].items()}
    for network in (behavior.actor, behavior.critic, behavior._target_critic):
        network(agent.wm.rssm.get_feat(states))
    queues.clear()
    layers = dreamer_layers(agent)
    answer |= initial(layers)
    give_weights(layers, question)
    for k in range(updates):
        for optimizer in optimizers.values():
            correct_bias_as_torch(optimizer._opt, k, epsilon=1e-5)
        queue_noise(k)
        _, metrics = agent.train(batch(k))
        assert not any(queues.values()), "noise is left"
        answer |= {f"{k}/metrics/{name}": value for name, value in metrics.items()}
        take_weights(layers, k, answer, [o._opt for o in optimizers.values()])
    for mode in ("train", "eval"):
        state = None
        for k, image in enumerate(question["acting/image"]):
            queues["classes"] += [question["acting/noise"][k][None]] * 2
            if mode == "train":
                queues["uniform"].append(question["acting/uniform"][k][None])
            obs = {"image": image[None], "reward": np.zeros(1, np.float32)}
            obs["is_first"] = question["acting/is_first"][k][None]
            obs["is_terminal"] = np.zeros(1, bool)
            output, state = agent.policy(obs, state, mode)
            answer[f"acting/{mode}/{k}"] = output["action"][0]
    return answer


def dreamer_data(folder, question):
    """What their replay buffer and their environment give."""
    _, common = dreamer_import(folder)
    starts = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        replay = common.Replay(Path(directory), minlen=50, maxlen=50)  # of dmc_vision
        rows = np.split(np.arange(sum(question["rows"])), np.cumsum(question["rows"])[:-1])
        for numbers in rows:
            last = np.arange(len(numbers)) == len(numbers) - 1
            replay.add_episode({"action": list(numbers[:, None] * 1.0), "is_last": list(last)})
        for chunk in itertools.islice(replay._generate_chunks(50), int(question["draws"])):
            numbers = chunk["action"][:, 0]
            assert (np.diff(numbers) == 1).all()
            starts[int(numbers[0])] += 1
    from dm_control import suite

    load = suite.load
    suite.load = lambda *task: load(*task, task_kwargs={"random": int(question["seed"])})
    note("suite.load by one with a seed")
    env = common.DMC("cheetah_run", action_repeat=2)
    show_what_is_rendered(env._env.physics)
    steps = [env.reset()] + [env.step({"action": action}) for action in question["actions"]]
    return {
        "starts": list(starts.items()),
        "images": [step["image"] for step in steps],
        "rewards": [step["reward"] for step in steps],
    }


# ---- SLAC --------------------------------------------------------------------------------------
EDITS = [  # (pattern, replacement), in all files of theirs
    (r"import tensorflow as tf\b", "import tensorflow.compat.v1 as tf"),
    (r"(\.shape\[-?\d+\])\.value", r"\1"),
    (r"import gin\.tf\b", "import gin"),
    (r"tf_policy\.Base", "tf_policy.TFPolicy"),
    (r"np\.product", "np.prod"),
    (r"tf\.contrib\.framework\.nest", "tf.nest"),
    (r"tf\.(contrib|compat\.v2)\.summary\.\w+\(", "(lambda *_, **__: None)("),
    (r"(?<!def )\b_gif_summary\(", "(lambda *_, **__: None)("),
    (r"tfp\.bijectors\.AffineScalar\(\s*shift=(.*?), scale=(.*?)\)",
     r"tfp.bijectors.Shift(\1.astype(float)), tfp.bijectors.Scale(\2.astype(float))"),
    (r"\b(tf|np)\.float32", r"\1.float64"),
    (r"tf\.(zeros|ones)\(shape\)", r"tf.\1(shape, tf.float64)"),
]  # fmt: skip


def slac_import(folder):
    """Makes their modules from the edited texts. Gives {last word of the name: module}."""
    stub("gym", "gym.spaces", "pygame", "slac.utils.gif_utils")
    print("    edited in their files:")
    for pattern, replacement in EDITS:
        print(f"        {pattern}  ->  {replacement}")
    import tf_agents.policies.greedy_policy  # noqa: F401  theirs imports it by another name

    words = "model_distribution_network", "ablation_model_distribution_network"
    words += ("actor_distribution_network", "critic_network", "slac_agent")
    names = ["slac", "slac.utils", "slac.utils.common", "slac.utils.nest_utils"]
    names += ["slac.environments", "slac.environments.dm_control_wrappers", "slac.agents"]
    names += ["slac.agents.slac", *(f"slac.agents.slac.{word}" for word in words)]
    for name in names:
        path = folder.joinpath(*name.split("."))
        module = sys.modules[name] = types.ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        if path.is_dir():
            module.__path__ = [str(path)]
            continue
        text = path.with_suffix(".py").read_text()
        for pattern, replacement in EDITS:
            text = re.sub(pattern, replacement, text, flags=re.S)
        exec(compile(text, str(path), "exec"), vars(module))
    return {name.split(".")[-1]: sys.modules[name] for name in names}


def normal(self, *_, **__):
    """In place of MultivariateNormalDiag.sample: made of the next noise."""
    return self.mean() + self.stddev() * queues["normal"].pop(0)


def slac_layers(agent):
    """{name: Keras layer} of all their networks."""
    names = "latent1_first_posterior latent1_posterior latent1_prior latent2_first_prior"
    names += " latent2_prior latent_first_posterior latent_posterior latent_prior"
    names += " reward_predictor compressor decoder"
    layers = {}
    for name in names.split():
        part = getattr(agent._model_network, name, None)
        for word, child in vars(part).items() if isinstance(part, tf.Module) else ():
            if isinstance(child, tf.keras.layers.Layer):
                layers[f"{name}/{word}"] = child
    heads = {"actor": agent._actor_network._mlp_layers}
    for name, i in itertools.product(("critic", "target_critic"), (1, 2)):
        heads[f"{name}{i}"] = getattr(agent, f"_{name}_network{i}")._joint_layers
    for name, head in heads.items():
        dense = [layer for layer in head if hasattr(layer, "kernel")]
        layers |= {f"{name}/{i}": layer for i, layer in enumerate(dense)}
    return layers


def slac_config(folder, question):
    """Path of the configuration."""
    return folder / f"slac/agents/slac/configs/{question['config']}.gin"


def slac_agent(folder, modules, question, optimizers):
    """Their agent, made as their train_eval.py makes it."""
    import gin
    from tf_agents.specs import tensor_spec
    from tf_agents.trajectories import time_step

    path = slac_config(folder, question)
    gin.parse_config_file(str(path), skip_unknown=True)
    A = question["action"].shape[-1]
    observation = collections.OrderedDict(
        state=tensor_spec.TensorSpec((1,), tf.float64),
        pixels=tensor_spec.BoundedTensorSpec((64, 64, 3), tf.uint8, 0, 255),
    )
    action = tensor_spec.BoundedTensorSpec((A,), tf.float64, -1, 1)
    names = "model_distribution_network", "ablation_model_distribution_network"
    network = str(question["network"])
    kinds = [getattr(modules[name], network, None) for name in names]
    model = (kinds[0] or kinds[1])(observation, action)
    sizes = {"latent": model.state_size, "sequence_action_feature": 256 * 8 + A * 7}
    inputs = {name: str(question[f"{name}_input"]) for name in ("actor", "critic")}
    seen = {k: tensor_spec.TensorSpec((sizes[v],), tf.float64) for k, v in inputs.items()}
    Actor = modules["actor_distribution_network"].ActorDistributionNetwork
    Critic = modules["critic_network"].CriticNetwork
    agent = modules["slac_agent"].SlacAgent(
        time_step.time_step_spec(observation),
        action,
        actor_network=Actor(seen["actor"], action),
        critic_network=Critic((seen["critic"], action), joint_fc_layer_params=(256, 256)),
        model_network=model,
        compressor_network=model.compressor,
        **{f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()},
        **{f"{name}_input": value for name, value in inputs.items()},
        sequence_length=8,
        target_update_tau=0.005,
        td_errors_loss_fn=lambda a, b: 0.5 * tf.reduce_mean(tf.square(a - b)),
        gamma=0.99,
        model_batch_size=int(question["model_batch_size"]),
        train_step_counter=tf.Variable(0, dtype=tf.int64),
    )
    agent._actor_network.create_variables()
    for name, i in itertools.product(("critic", "target_critic"), (1, 2)):
        getattr(agent, f"_{name}_network{i}").create_variables()
    return agent


def slac_experience(question, k):
    """Their Trajectory of a batch. Their row holds the action that was taken after an image and
    what it brought; ours holds what led to the image."""
    from tf_agents.trajectories import time_step, trajectory

    kind = time_step.StepType
    first = question["is_first"][k]
    last = np.roll(first, -1, 1)
    last[:, -1] = False
    kinds = np.int32(np.select([first, last], [kind.FIRST, kind.LAST], kind.MID))
    state = np.zeros((*kinds.shape, 1), np.float64)
    rows = {n: np.roll(question[n][k], -1, 1) for n in ("action", "reward", "discount")}
    rows["observation"] = collections.OrderedDict(state=state, pixels=question["image"][k])
    rows |= {"step_type": kinds, "next_step_type": np.roll(kinds, -1, 1), "policy_info": ()}
    return tf.nest.map_structure(tf.constant, trajectory.Trajectory(**rows))


def slac_updates(folder, question):
    """Some updates and some steps of acting by their SlacAgent."""
    tf.keras.backend.set_floatx("float64")
    modules = slac_import(folder)
    note("compat.v1.losses.mean_squared_error, which casts to float32, by its formula")
    from tf_agents.policies import greedy_policy
    from tf_agents.trajectories import time_step

    tfd.MultivariateNormalDiag.sample = normal
    note("normal numbers by ours")
    adam = tf.compat.v1.train.AdamOptimizer
    rates = {"model": 1e-4, "actor": 3e-4, "critic": 3e-4, "alpha": 3e-4}  # their train_eval.py's
    optimizers = {name: adam(rate) for name, rate in rates.items()}
    answer = {f"optimizer/{name}": settings(value) for name, value in optimizers.items()}
    words = re.findall(
        r"num_eval_\w+ = \d+|eval_interval = \d+", slac_config(folder, question).read_text()
    )
    answer["evaluation"] = ", ".join(word.replace(" =", "") for word in words)
    agent = slac_agent(folder, modules, question, optimizers)
    model = agent._model_network
    updates, batch_size, T, _ = question["action"].shape
    inputs = str(question["actor_input"]), str(question["critic_input"])

    def without_queue(method):  # latents that are only shown are drawn without noise
        def wrapped(*x, **options):
            waiting, queues["normal"] = queues["normal"], [0.0] * 100
            result = method(*x, **options)
            queues["normal"] = waiting
            return result

        return wrapped

    def keeping(name, method):  # what their losses give
        def wrapped(*x, **options):
            result = method(*x, **options)
            metrics.update(result[1] if isinstance(result, tuple) else {name: result})
            return result

        return wrapped

    def queue_latents(noise):  # (B, T, Z)
        for t in range(T if len(noise) > 1 else T - 1):
            queues["normal"] += [noise[:, t, a:b] for a, b in question["noisy"]]

    metrics = {}
    model.sample_prior_or_posterior = without_queue(model.sample_prior_or_posterior)
    first = slac_experience(question, 0)
    images = tf.image.convert_image_dtype(first.observation["pixels"], tf.float64)
    rows = images, first.action, first.step_type, first.reward, first.discount
    without_queue(model.compute_loss)(*rows)  # makes the weights
    for name in ("critic_loss", "actor_loss", "alpha_loss"):
        setattr(agent, name, keeping(name, getattr(agent, name)))
    model.compute_loss = keeping("model_loss", model.compute_loss)
    layers = slac_layers(agent)
    answer |= initial(layers)
    give_weights(layers, question)
    for k in range(updates):
        for optimizer in optimizers.values():
            correct_bias_as_torch(optimizer, k, epsilon=1e-8)
        noise = question["noise"][k]
        if "latent" in inputs:
            queue_latents(noise)
        queues["normal"] += [question["next_noise"][k], *[question["actor_noise"][k]] * 2]
        if "latent" not in inputs:
            queue_latents(noise[: int(question["model_batch_size"])])
        agent._train(slac_experience(question, k))
        assert not queues["normal"], "noise is left"
        answer |= {f"{k}/metrics/{n}": v for n, v in metrics.items() if not v.shape.ndims}
        take_weights(layers, k, answer, optimizers.values())
        answer[f"{k}/weights/log_alpha"] = agent._log_alpha.numpy()
    policies = {"sample": agent.policy, "mean": greedy_policy.GreedyPolicy(agent.policy)}
    for mode, policy in policies.items():
        state = policy.get_initial_state(1)
        for k, image in enumerate(question["acting/image"]):
            if inputs[0] == "latent":
                queue_latents(question["acting/noise"][k][None])
            if mode == "sample":
                queues["normal"].append(question["acting/action_noise"][k][None])
            kind = time_step.StepType
            kind = np.int32([kind.FIRST if question["acting/is_first"][k] else kind.MID])
            zero = np.zeros((1, 1), np.float64)
            seen = collections.OrderedDict(state=zero, pixels=image[None])
            reward, discount = np.zeros(1, np.float32), np.ones(1, np.float32)
            step = time_step.TimeStep(kind, reward, discount, seen)
            output = policy._action(tf.nest.map_structure(tf.constant, step), state, None)
            state = output.state
            answer[f"acting/{mode}/{k}"] = output.action[0]
    return answer


def slac_data(folder, question):
    """What their replay buffer and their environment give."""
    modules = slac_import(folder)
    from tf_agents.environments import suite_dm_control, wrappers
    from tf_agents.replay_buffers import tf_uniform_replay_buffer
    from tf_agents.trajectories import time_step, trajectory

    kind = time_step.StepType
    spec = tf.TensorSpec((), tf.int32)
    parts = dict.fromkeys(("action", "observation", "reward", "discount"), spec)
    spec = trajectory.Trajectory(step_type=spec, next_step_type=spec, policy_info=(), **parts)
    buffer = tf_uniform_replay_buffer.TFUniformReplayBuffer(spec, batch_size=1, max_length=10_000)
    number = 0
    for length in question["rows"]:
        for i in range(length):
            now = kind.FIRST if i == 0 else kind.LAST if i == length - 1 else kind.MID
            row = dict.fromkeys(("action", "observation", "reward", "discount"), number)
            row |= {"step_type": int(now), "next_step_type": int(kind.MID), "policy_info": ()}
            row = trajectory.Trajectory(**row)
            buffer.add_batch(tf.nest.map_structure(lambda x: tf.constant([x], tf.int32), row))
            number += 1
    rows, _ = buffer.get_next(sample_batch_size=int(question["draws"]), num_steps=9)
    valid = ~rows.is_boundary().numpy()[:, -2]  # as their train_eval.py filters them
    starts = collections.Counter(rows.observation.numpy()[valid, 0].tolist())
    flat = wrappers.FlattenObservationsWrapper
    env = suite_dm_control.load(
        "cheetah", "run", task_kwargs={"random": int(question["seed"])}, env_wrappers=[flat]
    )
    show_what_is_rendered(env.physics)
    env = modules["dm_control_wrappers"].PixelObservationsDmControlWrapper(env)
    env = wrappers.ActionRepeat(env, 4)
    steps = [env.reset()] + [env.step(action) for action in question["actions"]]
    return {
        "starts": list(starts.items()),
        "images": [step.observation["pixels"] for step in steps],
        "rewards": [step.reward for step in steps],
    }


def main():
    folder, question, answer = map(Path, sys.argv[1:])
    name = "dreamer" if (folder / "dreamerv2/agent.py").exists() else "slac"
    with np.load(question) as file:
        question = dict(file)
    side = globals()[f"{name}_{question['about']}"]
    result = side(folder, question)
    np.savez(answer, **{name: np.asarray(value) for name, value in result.items()})


if __name__ == "__main__":
    main()
