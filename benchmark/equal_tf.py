"""What equal.py does with the authors' TensorFlow code: dreamerv2.py beside danijar/dreamerv2, and
slac.py beside alexlee-gk/slac.

Their side is authors_tf.py. It runs in a process of its own with the Python that TF_PYTHON names,
.venv-tf/bin/python by default; requirements-tf.txt says how to make that environment. The two sides
exchange weights, batches, noise and results by files.

DreamerV2's code demands float32, in which rounding differs between the libraries; SLAC's is edited
to float64. A difference of a loss, a gradient's norm or an action is relative to its size; that of
"gradients", which are Adam's first moments, relative to the largest of their layer. LIMITS has what
rounding explains.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro

HERE = Path(__file__).resolve().parent
KINDS = "losses", "norms", "gradients", "weights", "actions", "data", "initial", "optimizers"
LIMITS = {  # of each kind; data is rewards, which tf-agents keeps in single precision, and the like
    "dreamerv2": dict(zip(KINDS, (2e-5, 5e-5, 2e-4, 2e-6, 2e-5, 1e-7, 0.15, 1e-9), strict=True)),
    "slac": dict(zip(KINDS, (1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1e-7, 0.15, 1e-9), strict=True)),
}
A = 6  # actions


def ask(folder, about, question):
    """Their answer {name: array} to a question {name: array} about "updates" or "data"."""
    python = Path(os.environ.get("TF_PYTHON", HERE.parent / ".venv-tf/bin/python"))
    if not python.exists():
        sys.exit(
            f"error: no {python}. Make that environment as benchmark/requirements-tf.txt says, or "
            "name the Python of another one in the variable TF_PYTHON"
        )
    with tempfile.TemporaryDirectory() as temporary:
        files = Path(temporary, "question.npz"), Path(temporary, "answer.npz")
        np.savez(files[0], about=about, **question)
        command = [python, HERE / "authors_tf.py", Path(folder).resolve(), *files]
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if process.returncode:
            sys.exit(f"{process.stderr}error: the authors' side failed")
        with np.load(files[1]) as answer:
            return dict(answer)


class Comparison:
    """Prints differences and keeps the largest of each kind."""

    def __init__(self):
        self.worst = {}

    def __call__(self, kind, name, ours, theirs, show=True):
        """Compares two arrays of one shape; relative to 1 or, if that is more, to their size."""
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        difference = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
        assert np.isfinite(difference), name
        self.worst[kind] = max(difference, self.worst.get(kind, 0.0))
        if show:
            means = f"{ours.mean():18.8f}{theirs.mean():18.8f}"
            print(f"    {name:28}{means}   difference {difference:.1e}")

    def show(self, kind, name):
        """Prints the largest difference of a kind so far."""
        print(f"    {name:28}{'':36}   difference {self.worst[kind]:.1e}, the largest so far")


def images(rng, *shape):
    """Coarse random images uint8 (*shape, 64, 64, 3)."""
    return rng.integers(0, 256, (*shape, 8, 8, 3), np.uint8).repeat(8, -3).repeat(8, -2)


def arrays(layers):
    """{name/part: array} of {name: our layer}, with the order of axes that Keras has."""
    out = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.LayerNorm):
            parts = {"gamma": layer.weight, "beta": layer.bias}
        elif isinstance(layer, nn.Linear):
            parts = {"kernel": layer.weight.T, "bias": layer.bias}
        else:
            parts = {"kernel": layer.weight.permute(2, 3, 1, 0), "bias": layer.bias}
        out |= {f"{name}/{part}": v.detach().numpy().copy() for part, v in parts.items()}
    return out


def compare_weights(agent, names, answer, update, compare):
    """Compares all weights and gradients after an update; names(agent) gives ours like theirs."""
    for name, value in names(agent).items():
        compare("weights", name, value, answer[f"{update}/weights/{name}"], show=False)
    weights = {p: p.data for p in agent.parameters()}
    for optimizer in agent.optimizers.values():
        for p, state in optimizer.state.items():
            p.data = state["exp_avg"]
    for name, value in names(agent).items():
        theirs = answer.get(f"{update}/gradients/{name}")
        if theirs is not None:
            size = np.abs(theirs).max() + 1e-12
            compare("gradients", name, value / size, theirs / size, show=False)
    for p, data in weights.items():
        p.data = data
    for kind in ("weights", "gradients"):
        compare.show(kind, kind)


def make_agent(script, args):
    """Our agent. Its targets have weights of their own, or nothing would show who reads them."""
    torch.manual_seed(0)
    agent = script.Agent(args, script.EnvSpec((3, 64, 64), A, 1))
    agent.target_critic.apply(script.weight_init)
    return agent


def compare_data(script, folder, repeat, length, tail, compare):
    """Which windows a batch may contain, and what the environments give, for equal actions."""
    rng = np.random.default_rng(0)
    question = {"rows": [60, 75, 130], "draws": 20_000, "seed": 1}
    question["actions"] = np.float32(rng.uniform(-1, 1, (20, A)))
    theirs = ask(folder, "data", question)
    args = script.Args(env_id="cheetah-run", action_repeat=repeat, device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        rows = sum(question["rows"])
        buffer = script.ReplayBuffer(directory, rows, args, script.EnvSpec((1,), A, 1))
        for count in question["rows"]:
            for i in range(count):
                ends = i == 0, i == count - 1
                buffer.add(script.Step(np.zeros(1), np.zeros(1), np.zeros(A), 0.0, 1.0, *ends, 1))
        starts = buffer.draw(rng, question["draws"], length, tail)
    number, count = theirs["starts"].T
    episode = np.digitize(number, np.cumsum(question["rows"]))
    shares = [count[episode == i].sum() / count.sum() for i in range(3)]
    print(f"data: {len(number)} windows of {length} rows, from three episodes of 60, 75, 130 rows")
    print(f"    shares of the episodes, theirs  {np.round(shares, 2)}")
    shares = np.bincount(np.digitize(starts, np.cumsum(question["rows"]))) / len(starts)
    print(f"    shares of the episodes, ours    {np.round(shares, 2)}")
    compare("data", "first rows of windows", np.unique(starts), np.sort(number))
    env = script.PixelEnv(args)
    physics = env.env.physics
    rewards, rendered = [], []
    for i in range(len(question["actions"]) + 1):
        step = env.step(question["actions"][i - 1]) if i else env.reset(question["seed"])
        assert (step.obs.transpose(1, 2, 0) == physics.render(64, 64, camera_id=0)).all()
        rewards += [step.reward] * (i > 0)
        rendered.append([64, 64, 0, *physics.data.qpos])
    compare("data", "images of 20 steps", rendered, theirs["images"])
    compare("data", "rewards of 20 steps", np.float32(rewards), np.float32(theirs["rewards"][1:]))


def initial(weights):
    """What authors_tf.initial() gives, of weights {name/part: array}: {name: three numbers}."""
    out = {}
    for name, kernel in weights.items():
        if name.endswith("/kernel"):
            bound = (6 / (np.prod(kernel.shape[:-2]) * sum(kernel.shape[-2:]))) ** 0.5
            bias = np.abs(weights[name.replace("kernel", "bias")]).max()
            spread = np.abs(kernel).max() / bound, 3**0.5 * kernel.std() / bound
            out[name.removesuffix("/kernel")] = *spread, bias
    return out


def compare_settings(ours, weights, clip, decays, answer, compare):
    """Compares initial distributions and optimizers, and prints the evaluation of both."""
    print("as initialised: largest weight and deviation, both over Glorot's; largest bias")
    for name, numbers in initial(weights).items():
        theirs = answer[f"initial/{name}"]
        shown = [f"{a:7.3f}{b:7.3f}" for a, b in zip(numbers, theirs, strict=True)]
        print(f"    {name:36}" + "   ".join(shown))
        compare("initial", name, numbers, theirs, show=False)
    print("optimizers: learning rate, betas, epsilon, clipping, decay of weights")
    for name, optimizer in ours.optimizers.items():
        group = optimizer.param_groups[0]
        given = [group["lr"], *group["betas"], group["eps"], clip, decays]
        theirs = answer[f"optimizer/{name}"]
        print(f"    {name:36}" + "  ".join(f"{b:.3g}" for b in theirs))
        compare("optimizers", name, np.float32(given), np.float32(theirs), show=False)
    args = ours.args
    print(f"evaluation, theirs: {answer['evaluation']}")
    print(f"evaluation, ours: {args.eval_episodes} every {args.eval_every_frames} frames")


# ---- DreamerV2 ---------------------------------------------------------------------------------
def dreamer_weights(agent):
    """All weights of ours under the names of theirs."""

    def net(name, module, words):
        found = [layer for layer in module.modules() if hasattr(layer, "weight")]
        return {f"{name}/{word}": layer for word, layer in zip(words, found, strict=True)}

    convs = [f"conv{i}" for i in range(4)]
    dense = [f"dense{i}" for i in range(4)]
    rssm = agent.rssm
    layers = {
        "rssm/img_in": rssm.gru_in,
        "rssm/gru": rssm.gru,
        "rssm/gru_norm": rssm.gru_norm,
        "rssm/img_out_0": rssm.prior_in,
        "rssm/img_dist_0": rssm.prior_out,
        "rssm/obs_out": rssm.post_in,
        "rssm/obs_dist": rssm.post_out,
        "decoder/convin": agent.decoder.fc,
        **net("encoder", agent.encoder, convs),
        **net("decoder", agent.decoder.net, convs),
    }
    heads = {"reward": agent.reward_head, "actor": agent.actor, "critic": agent.critic}
    heads["target"] = agent.target_critic
    if agent.discount_head is not None:
        heads["discount"] = agent.discount_head
    for name, head in heads.items():
        layers |= net(name, head, [*dense, "out/out"])
    out = arrays(layers)
    for part in ("kernel", "bias"):  # theirs has two layers for the actor's mean and deviation
        mean, deviation = np.split(out[f"actor/out/out/{part}"], 2, -1)
        out |= {f"actor/out/out/{part}": mean, f"actor/out/std/{part}": deviation}
    return out


def dreamer_question(args, updates=4, batch=4, length=10, acting=8):
    """Batches and noise; episodes start and end inside the sequences."""
    rng = np.random.default_rng(0)
    latent = args.categoricals, args.classes
    shape = updates, batch, length
    imagined = updates, args.horizon, batch * length

    def uniform(*shape):
        return np.float32(rng.uniform(1e-4, 1 - 1e-4, shape))

    is_first = rng.random(shape) < 0.15
    is_first[..., 0] = True
    return {
        "image": images(rng, *shape),
        "action": np.float32(rng.uniform(-1, 1, (*shape, A))),
        "reward": np.float32(rng.uniform(0, 2, shape)),
        "is_first": is_first,
        "is_terminal": rng.random(shape) < 0.2,
        "model_noise": uniform(*shape, *latent),
        "imagined_noise": uniform(*imagined, *latent),
        "uniform": uniform(*imagined, A),
        "acting/image": images(rng, acting),
        "acting/is_first": np.arange(acting) % 5 == 0,
        "acting/noise": uniform(acting, *latent),
        "acting/uniform": uniform(acting, A),
    }


def dreamer_case(script, folder, args, compare):
    """Updates and acting with one configuration."""
    print(f"discount head {args.discount_head}, free nats {args.free_nats}")
    question = dreamer_question(args)
    ours = make_agent(script, args)
    weights = {f"weights/{name}": value for name, value in dreamer_weights(ours).items()}
    heads = ["decoder", "reward"] + ["discount"] * args.discount_head
    config = {"pred_discount": args.discount_head, "kl.free": args.free_nats, "grad_heads": heads}
    answer = ask(folder, "updates", {**question, **weights, "config": json.dumps(config)})
    rand, rand_like, clip = torch.rand, torch.rand_like, nn.utils.clip_grad_norm_
    noise, norms, clips = [], [], set()
    torch.rand = torch.rand_like = lambda *_, **__: torch.as_tensor(noise.pop(0))

    def clip_and_note(parameters, limit):
        clips.add(limit)
        norms.append(clip(parameters, limit))

    nn.utils.clip_grad_norm_ = clip_and_note
    for k in range(len(question["action"])):
        names = "image", "action", "reward", "is_first", "is_terminal"
        image, action, reward, is_first, is_terminal = (
            torch.as_tensor(question[name][k]) for name in names
        )
        batch = {"obs": image.permute(0, 1, 4, 2, 3), "action": action, "is_first": is_first}
        batch["reward"] = reward[..., None]
        batch["discount"] = 1 - is_terminal[..., None].float()
        noise += [question[name][k] for name in ("model_noise", "imagined_noise", "uniform")]
        ours.updates = k
        metrics = ours.update(batch)
        assert not noise
        print(f"  update {k + 1}")
        for name in ("kl", "image", "reward", "discount", "actor", "critic"):
            if f"loss/{name}" in metrics:
                theirs = answer[f"{k}/metrics/{name}_loss"]
                compare("losses", f"loss/{name}", metrics[f"loss/{name}"], theirs)
        compare("losses", "KL", metrics["stat/kl"], answer[f"{k}/metrics/model_kl"])
        for name, norm in zip(("model", "actor", "critic"), norms, strict=True):
            theirs = answer[f"{k}/metrics/{name}_grad_norm"]
            compare("norms", f"norm of {name}'s gradient", norm, theirs)
        norms.clear()
        compare_weights(ours, dreamer_weights, answer, k, compare)
    nn.utils.clip_grad_norm_ = clip
    for mode in ("train", "eval"):
        for k, image in enumerate(question["acting/image"]):
            first = bool(question["acting/is_first"][k])
            if first:
                carry, action = None, torch.zeros(A)
            noise.append(question["acting/noise"][k][None, None])
            if mode == "train":
                noise.append(question["acting/uniform"][k][None])
            ends = first, False
            step = script.Step(image.transpose(2, 0, 1), None, action.numpy(), 0, 1, *ends, 1)
            action, carry = ours.act(step, carry, explore=mode == "train")
            compare("actions", f"action {k}", action, answer[f"acting/{mode}/{k}"], show=False)
    torch.rand, torch.rand_like = rand, rand_like
    compare.show("actions", "actions")
    if args.discount_head and args.free_nats:  # once
        start = {name.removeprefix("weights/"): value for name, value in weights.items()}
        compare_settings(ours, start, clips.pop(), args.weight_decay, answer, compare)


def dreamer(script, folder, compare):
    """All configurations of dreamerv2.py."""
    print("set equal: Adam's epsilon, which TensorFlow adds before the bias correction; the noise.")
    print("Left out: the metric stat/entropy, which is of all imagined steps here, of all but the")
    print("last two states there.")
    for head in (False, True):
        for free in (0.0, 1.0):  # the KL of these batches is about 0.2
            args = script.Args(discount_head=head, free_nats=free, device="cpu")
            dreamer_case(script, folder, args, compare)
    compare_data(script, folder, 2, 50, 50, compare)


# ---- SLAC --------------------------------------------------------------------------------------
SLAC = [  # (their configuration, their class, our flags)
    ("slac", "ModelDistributionNetwork", ""),
    ("slac", "ModelDistributionNetwork", "--actor-input latent"),
    ("slac", "ModelDistributionNetwork", "--critic-input history"),
    ("slac_ablation_reference", "SlacModelDistributionNetwork", ""),
    ("slac_ablation_partially_stochastic", "SlacModelDistributionNetwork", "--z2 deterministic"),
    ("slac_ablation_deterministic", "SlacModelDistributionNetwork",
     "--z1 deterministic --z2 deterministic"),
    ("slac_ablation_vae", "SlacModelDistributionNetwork", "--no-temporal"),
    ("slac_ablation_simple_filtering", "SimpleModelDistributionNetwork", "--z2 none"),
    ("slac_ablation_simple_vae", "SimpleModelDistributionNetwork", "--z2 none --no-temporal"),
]  # fmt: skip
MODEL_BATCH = 3  # of 6 sequences


def slac_weights(agent):
    """All weights of ours under the names of theirs. Kernels of convs are mirrored, as PyTorch and
    TensorFlow pad more on opposite sides; the images that theirs gets are mirrored, too."""
    model = agent.model
    first, following, prior = "latent1_first_posterior", "latent1_posterior", "latent1_prior"
    if not model.z_dims[1]:
        first, following, prior = "latent_first_posterior", "latent_posterior", "latent_prior"
    nets = {first: model.q_first.net, "reward_predictor": model.reward_head.net}
    if model.temporal:
        nets |= {following: model.q_next.net, prior: model.prior.net}
    if model.z_dims[1]:
        nets["latent2_first_prior"] = model.z2_first.net
        if model.temporal:
            nets["latent2_prior"] = model.z2_next.net
    words = "dense1", "dense2", "output_layer"
    layers = {f"{n}/{word}": net[2 * i] for n, net in nets.items() for i, word in enumerate(words)}
    kinds = nn.Conv2d, nn.ConvTranspose2d
    for name, net in {
        "compressor/conv": model.encoder,
        "decoder/conv_transpose": model.decoder,
    }.items():
        convs = [layer for layer in net if isinstance(layer, kinds)]
        layers |= {f"{name}{i + 1}": layer for i, layer in enumerate(convs)}
    heads = {"actor": agent.actor.trunk}
    for name, critic in {"critic": agent.critic, "target_critic": agent.target_critic}.items():
        heads |= {f"{name}1": critic.q1, f"{name}2": critic.q2}
    layers |= {f"{name}/{i}": net[2 * i] for name, net in heads.items() for i in range(3)}
    out = arrays(layers) | {"log_alpha": agent.log_alpha.detach().numpy().copy()}
    return {name: v[::-1, ::-1] if v.ndim == 4 else v for name, v in out.items()}


def slac_question(args, updates=3, batch=2 * MODEL_BATCH, acting=12):
    """Batches and noise; episodes start and end inside the sequences, but not where D11 counts."""
    rng = np.random.default_rng(0)
    shape = updates, batch, args.actions + 1
    z_dim = args.z1_dim + (0 if args.z2 == "none" else args.z2_dim)

    def normal(*shape):
        return np.float64(rng.standard_normal(shape))

    is_first = rng.random(shape) < (0.2 if args.z1 == "stochastic" else 0.0)
    is_first[..., -1] = False  # the last two rows are of one episode
    for t in range(1, shape[-1]):
        is_first[..., t] &= ~is_first[..., t - 1]  # no episode has a single row
    discount = np.float64(rng.random(shape) < 0.7)
    action = np.float64(rng.uniform(-1, 1, (*shape, A)))
    reward = np.float64(rng.uniform(0, 2, shape))
    action[is_first], reward[is_first], discount[is_first] = 0, 0, 1
    return {
        "image": images(rng, *shape),
        "action": action,
        "reward": reward,
        "discount": discount,
        "is_first": is_first,
        "noise": normal(*shape, z_dim),
        "next_noise": normal(updates, batch, A),
        "actor_noise": normal(updates, batch, A),
        "acting/image": images(rng, acting),
        "acting/is_first": np.arange(acting) % 10 == 0,
        "acting/noise": normal(acting, args.actions, z_dim),
        "acting/action_noise": normal(acting, A),
    }


class AtOnce:
    """Lets the steps of our optimizers wait until take(), as theirs do (D2)."""

    def __init__(self, script):
        self.gradients = []
        self.targets = []
        self.soft_update = script.soft_update
        script.minimize = self.minimize
        script.soft_update = lambda *inputs: self.targets.append(inputs)

    def minimize(self, loss, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        options = {"retain_graph": True, "allow_unused": True}
        gradients = torch.autograd.grad(loss, parameters, **options)
        self.gradients.append((optimizer, parameters, gradients))

    def take(self):
        for optimizer, parameters, gradients in self.gradients:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        for inputs in self.targets:
            self.soft_update(*inputs)
        self.gradients.clear()
        self.targets.clear()


def slac_case(script, folder, case, at_once, compare):
    """Updates and acting with one configuration."""
    config, network, flags = case
    print(f"{config}.gin, {flags or 'no flags'}")
    args = tyro.cli(script.Args, args=["--device", "cpu", *flags.split()])
    args.pretrain_updates = 0
    question = slac_question(args)
    ours = make_agent(script, args)
    single = np.float32  # in which TensorFlow keeps such numbers
    for module in ours.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = float(single(module.negative_slope))
    for optimizer in ours.optimizers.values():
        group = optimizer.param_groups[0]
        group |= {"lr": float(single(group["lr"])), "eps": float(single(group["eps"]))}
        group["betas"] = tuple(float(single(beta)) for beta in group["betas"])
    z1, z2 = ours.model.z_dims
    noisy = [(0, z1)] * (args.z1 == "stochastic") + [(z1, z1 + z2)] * (args.z2 == "stochastic")
    words = {"history": "sequence_action_feature", "latent": "latent"}
    told = {f"weights/{name}": value for name, value in slac_weights(ours).items()}
    told |= {name: question[name][..., ::-1, ::-1, :] for name in ("image", "acting/image")}
    told |= {"config": config, "network": network, "model_batch_size": MODEL_BATCH, "noisy": noisy}
    told |= {f"{k}_input": words[getattr(args, f"{k}_input")] for k in ("actor", "critic")}
    answer = ask(folder, "updates", {**question, **told})
    noise, randn_like = [], torch.randn_like
    ours.model.noise = lambda *_: torch.as_tensor(noise.pop(0)) * ours.model.noisy
    torch.randn_like = lambda _: torch.as_tensor(noise.pop(0))
    for k in range(len(question["action"])):
        names = "image", "action", "reward", "discount", "is_first"
        batch = {name: torch.as_tensor(question[name][k]) for name in names}
        batch["obs"] = batch.pop("image").permute(0, 1, 4, 2, 3)
        batch |= {name: batch[name][..., None] for name in ("reward", "discount")}
        noise.append(question["noise"][k][:MODEL_BATCH])
        if "latent" in (args.actor_input, args.critic_input):
            noise.append(question["noise"][k])
        noise += [question[f"{name}_noise"][k] for name in ("next", "actor")]
        for_model = {name: value[:MODEL_BATCH] for name, value in batch.items()}
        metrics = ours.update({"model": for_model, "sac": batch})
        at_once.take()
        assert not noise
        print(f"  update {k + 1}")
        theirs = {name: answer[f"{k}/metrics/{name}_loss"] for name in ("critic", "actor", "alpha")}
        theirs["kl"] = answer[f"{k}/metrics/kl_divergence"]
        if args.z1 == "deterministic":  # their log-density has a constant that a KL has not
            theirs["kl"] = theirs["kl"] - 0.5 * np.log(2 * np.pi) * z1 * args.actions
        theirs["image"] = -answer[f"{k}/metrics/log_likelihood"]
        theirs["reward"] = -answer[f"{k}/metrics/reward_log_likelihood"]
        for name, value in theirs.items():
            compare("losses", f"loss/{name}", metrics[f"loss/{name}"], value)
        compare_weights(ours, slac_weights, answer, k, compare)
    for mode in ("sample", "mean"):
        args.eval_policy = mode
        for k, image in enumerate(question["acting/image"]):
            first = bool(question["acting/is_first"][k])
            if first:
                carry, action = None, torch.zeros(A)
            if args.actor_input == "latent":
                noise.append(question["acting/noise"][k][None])
            if mode == "sample":
                noise.append(question["acting/action_noise"][k][None])
            ends = first, False
            step = script.Step(image.transpose(2, 0, 1), None, action.numpy(), 0, 1, *ends, 1)
            action, carry = ours.act(step, carry)
            compare("actions", f"action {k}", action, answer[f"acting/{mode}/{k}"], show=False)
            if mode == "mean":
                action = torch.zeros(A)  # their greedy policy forgets what it did (D12)
    torch.randn_like = randn_like
    compare.show("actions", "actions")
    if case == SLAC[0]:  # once
        start = slac_weights(make_agent(script, args))
        compare_settings(ours, start, 0, 0, answer, compare)


def slac(script, folder, compare):
    """All configurations of slac.py that theirs has, too."""
    print(
        "set equal: the noise; padding, by mirrored images and kernels (D5); all gradients before"
    )
    print("the first step, one batch for model, actor and critic, one sample for actor and")
    print("temperature (D2, D3); the targets' weights (D9); Adam's epsilon, which TensorFlow adds")
    print("before the bias correction (D10); no starts inside sequences where z1 is deterministic")
    print("(D11); with --eval-policy mean, no past actions (D12); the slope of leaky ReLUs and")
    print("Adam's settings, which TensorFlow rounds to single precision.")
    at_once = AtOnce(script)
    torch.set_default_dtype(torch.float64)
    script.preprocess, preprocess = lambda obs: obs.double() / 255, script.preprocess
    for case in SLAC:
        slac_case(script, folder, case, at_once, compare)
    torch.set_default_dtype(torch.float32)
    script.preprocess = preprocess
    compare_data(script, folder, 4, 9, 2, compare)


def main(script, folder):
    """Prints the comparison. Gives the exit status: 1 if a limit is passed."""
    compare = Comparison()
    side = slac if script.__name__ == "slac" else dreamer
    side(script, folder, compare)
    limits = LIMITS[script.__name__]
    for kind, worst in compare.worst.items():
        print(f"largest difference of {kind}: {worst:.1e} (limit {limits[kind]:.0e})")
    return int(any(worst > limits[kind] for kind, worst in compare.worst.items()))
