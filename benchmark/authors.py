"""The authors' agents, built from checkouts of their repositories, which are not part of this one:

github.com/denisyarats/pytorch_sac_ae    beside sac_ae.py
github.com/Otsuts/SAC-GAARA              beside sac_gaara.py; commit 4fe3771 is its release 1
github.com/MishaLaskin/curl              beside sac_gaara.py --reconstruction none ...
github.com/toshikwa/slac.pytorch         beside slac.py; not the authors'
github.com/jsikyoon/dreamer-torch        beside dreamerv2.py; not the authors'
github.com/katerakelly/oyster            beside pearl_pixels.py --obs-mode state

The authors' DreamerV2 and SLAC are TensorFlow code; equal_tf.py and authors_tf.py are about them.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

ACTION_DIM, BATCH, CAPACITY = 6, 128, 1000
PEERS = {  # file in the checkout: (our script, their class, side of the images in their replay)
    "sac_cae.py": ("sac_gaara", "SacCaeAgent", 100),
    "curl_sac.py": ("sac_gaara", "CurlSacAgent", 100),
    "sac_ae.py": ("sac_ae", "SacAeAgent", 84),
    "slac/algo.py": ("slac", "SlacAlgorithm", 64),
    "dreamer.py": ("dreamerv2", None, 64),
    "rlkit/torch/sac/sac.py": ("pearl_pixels", "PEARLSoftActorCritic", 0),
    "dreamerv2/agent.py": ("dreamerv2", None, 64),
    "slac/agents/slac/slac_agent.py": ("slac", None, 64),
}
TENSORFLOW = "dreamerv2/agent.py", "slac/agents/slac/slac_agent.py"  # authors_tf.py runs them
ARGUMENTS = {  # of their train.py
    "hidden_dim": 1024, "discount": 0.99, "init_temperature": 0.1, "alpha_lr": 1e-4,
    "alpha_beta": 0.5, "actor_lr": 1e-3, "actor_beta": 0.9, "actor_log_std_min": -10,
    "actor_log_std_max": 2, "actor_update_freq": 2, "critic_lr": 1e-3, "critic_beta": 0.9,
    "critic_tau": 0.01, "critic_target_update_freq": 2, "encoder_type": "pixel",
    "encoder_feature_dim": 50, "encoder_lr": 1e-3, "encoder_tau": 0.05, "num_layers": 4,
    "num_filters": 32,
}  # fmt: skip
DREAMER = {  # their configs.yaml, with the networks of dreamerv2's dmc_vision
    "dyn_cell": "gru_layer_norm", "dyn_hidden": 200, "dyn_deter": 200, "dyn_stoch": 32,
    "dyn_discrete": 32, "dyn_input_layers": 1, "dyn_output_layers": 1, "dyn_rec_depth": 1,
    "dyn_shared": False, "dyn_mean_act": "none", "dyn_std_act": "sigmoid2", "dyn_min_std": 0.1,
    "dyn_temp_post": True, "grad_heads": ["image", "reward"], "units": 400, "reward_layers": 4,
    "value_layers": 4, "actor_layers": 4, "act": torch.nn.ELU, "cnn_depth": 48,
    "encoder_kernels": [4, 4, 4, 4], "decoder_kernels": [5, 5, 6, 6], "decoder_thin": True,
    "value_head": "normal", "kl_scale": "1.0", "kl_balance": "0.8", "kl_free": "1.0",
    "kl_forward": False, "pred_discount": False, "discount_scale": 1.0, "reward_scale": 1.0,
    "weight_decay": 1e-6, "model_lr": 3e-4, "value_lr": 8e-5, "actor_lr": 8e-5, "opt_eps": 1e-5,
    "grad_clip": 100, "value_grad_clip": 100, "actor_grad_clip": 100, "slow_value_target": True,
    "slow_actor_target": True, "slow_target_update": 100, "slow_target_fraction": 1, "opt": "adam",
    "discount": 0.99, "discount_lambda": 0.95, "imag_horizon": 15, "imag_gradient": "dynamics",
    "imag_sample": True, "actor_dist": "trunc_normal", "actor_entropy": lambda: 1e-4,
    "actor_state_entropy": lambda: 0.0, "actor_init_std": 1.0, "actor_min_std": 0.1,
    "actor_temp": 0.1, "actor_outscale": 0.0, "value_decay": 0.0, "future_entropy": False,
    "precision": 32, "grayscale": False, "size": (64, 64), "clip_rewards": "identity",
    "num_actions": ACTION_DIM,
}  # fmt: skip
DECODER = {
    "decoder_type": "pixel",
    "decoder_lr": 1e-3,
    "decoder_update_freq": 1,
    "decoder_latent_lambda": 1e-6,
    "decoder_weight_lambda": 1e-7,
}


def which(folder):
    """File name of the agent in a checkout: a key of PEERS."""
    for name in PEERS:
        if (Path(folder) / name).exists():
            return name
    sys.exit(f"error: none of {', '.join(PEERS)} in {folder}")


class Wrapper:
    """gym.Wrapper."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)


def windows(images, shape):
    """skimage.util.shape.view_as_windows, for which numpy has a name too."""
    return np.lib.stride_tricks.sliding_window_view(images, shape)


def load(folder):
    """Their agent's module and their utils; what these import but do not need here is a stub."""
    name = which(folder)
    spaces = types.SimpleNamespace(Box=types.SimpleNamespace)
    sys.modules["gym"] = types.SimpleNamespace(Wrapper=Wrapper, spaces=spaces)
    shape = types.SimpleNamespace(view_as_windows=windows)
    for stub in ("skimage", "skimage.util", "skimage.util.shape"):
        sys.modules[stub] = shape
    for ours in ("sac_ae", "slac"):  # theirs have the same names
        sys.modules.pop(ours, None)
        sys.path = [entry for entry in sys.path if not Path(entry, f"{ours}.py").exists()]
    sys.path.insert(0, str(folder))
    if name == "slac/algo.py":
        return importlib.import_module("slac.algo"), importlib.import_module("slac.buffer")
    if name == "rlkit/torch/sac/sac.py":
        for stub in ("gtimer", "joblib", "dateutil", "dateutil.tz", "gym", "gym.spaces"):
            sys.modules[stub] = types.ModuleType(stub)
        sys.modules["gym.spaces"].__dict__.update(Box=None, Discrete=None, Tuple=None)
        return (
            importlib.import_module("rlkit.torch.sac.sac"),
            importlib.import_module("rlkit.torch.sac.policies"),
        )
    if name == "dreamer.py":
        for stub in ("PIL", "PIL.Image"):  # for pictures
            if not importlib.util.find_spec("PIL"):
                sys.modules[stub] = types.ModuleType(stub)
        return importlib.import_module("models"), importlib.import_module("tools")
    return importlib.import_module(Path(name).stem), importlib.import_module("utils")


def make_agent(module, folder, device, contrast_weight=1.0):
    """Their agent for (9, 84, 84) images and 6 actions; contrast_weight: GAARA's first lambda."""
    name, extra = which(folder), {}
    if name == "slac/algo.py":
        return module.SlacAlgorithm((3, 64, 64), (ACTION_DIM,), 4, torch.device(device), seed=0)
    if name == "dreamer.py":
        config = types.SimpleNamespace(**DREAMER, device=device)
        model = module.WorldModel(0, config).to(device)
        return model, module.ImagBehavior(config, model).to(device)
    if name != "curl_sac.py":
        extra |= DECODER
    if name == "sac_cae.py":
        extra |= {"comparison_lambda": contrast_weight, "curl_latent_dim": 128, "image_size": 84}
    kind = getattr(module, PEERS[name][1])
    return kind((9, 84, 84), (ACTION_DIM,), torch.device(device), **ARGUMENTS, **extra)


def make_buffer(utils, folder, device):
    """Their replay buffer, full of noise."""
    side, rng = PEERS[which(folder)][2], np.random.default_rng(0)
    shape = (9, side, side)
    buffer = utils.ReplayBuffer(shape, (ACTION_DIM,), CAPACITY, BATCH, device)
    for _ in range(CAPACITY):
        obs = rng.integers(0, 256, shape, dtype=np.uint8)
        buffer.add(obs, rng.uniform(-1, 1, ACTION_DIM), rng.random(), obs, False)
    return buffer


def dreamer_batch(seed):
    """Images uint8 (16, 50, 64, 64, 3), actions (16, 50, A), the first of each sequence zero, and
    rewards (16, 50), as their preprocess takes them."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (16, 50, 8, 8, 3), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    action = np.float32(rng.uniform(-1, 1, (16, 50, ACTION_DIM)))
    action[:, 0] = 0
    return {"image": images, "action": action, "reward": np.float32(rng.uniform(0, 2, (16, 50)))}


def make_pearl(module, policies, tasks, batch_size, size=300, context=200, latent=5, state=17):
    """Oyster's algorithm without its loop: networks, optimizers and what _take_step reads."""
    networks = importlib.import_module("rlkit.torch.networks")
    agents = importlib.import_module("rlkit.torch.sac.agent")
    mlp = {"hidden_sizes": [size] * 3}
    q1, q2 = (
        networks.FlattenMlp(input_size=state + ACTION_DIM + latent, output_size=1, **mlp)
        for _ in range(2)
    )
    v = networks.FlattenMlp(input_size=state + latent, output_size=1, **mlp)
    encoder = networks.MlpEncoder(
        hidden_sizes=[context] * 3, output_size=2 * latent, input_size=state + ACTION_DIM + 1
    )
    policy = policies.TanhGaussianPolicy(
        obs_dim=state + latent, latent_dim=latent, action_dim=ACTION_DIM, **mlp
    )
    agent = agents.PEARLAgent(
        latent,
        encoder,
        policy,
        recurrent=False,
        sparse_rewards=False,
        use_information_bottleneck=True,
        use_next_obs_in_context=False,
    )
    algorithm = module.PEARLSoftActorCritic.__new__(module.PEARLSoftActorCritic)
    mse = torch.nn.MSELoss()
    vars(algorithm).update(
        agent=agent,
        qf1=q1,
        qf2=q2,
        vf=v,
        target_vf=v.copy(),
        vf_criterion=mse,
        kl_lambda=0.1,
        use_information_bottleneck=True,
        reward_scale=5.0,
        discount=0.99,
        batch_size=batch_size,
        soft_target_tau=0.005,
        policy_mean_reg_weight=1e-3,
        policy_std_reg_weight=1e-3,
        policy_pre_activation_weight=0.0,
        eval_statistics={},
        tasks=range(tasks),
    )
    for name, net in {"policy": policy, "qf1": q1, "qf2": q2, "vf": v, "context": encoder}.items():
        setattr(algorithm, f"{name}_optimizer", torch.optim.Adam(net.parameters(), 3e-4))
    return algorithm


def pearl_batch(seed, tasks, batch_size, context_size, state=17):
    """(transitions, context), each [state, action, reward, next state, terminal] of (T, N, ...)."""
    g = torch.Generator().manual_seed(seed)
    return [
        [
            *(torch.randn(tasks, n, size, generator=g) for size in (state, ACTION_DIM, 1, state)),
            torch.zeros(tasks, n, 1),
        ]
        for n in (batch_size, context_size)
    ]


def fill_pearl(algorithm, tasks, steps=1000, state=17):
    """Gives oyster's algorithm its two replay buffers, with `steps` transitions of noise each."""
    buffers = importlib.import_module("rlkit.data_management.env_replay_buffer")
    simple, rng = buffers.SimpleReplayBuffer, np.random.default_rng(0)
    for name in ("replay_buffer", "enc_replay_buffer"):
        buffer = buffers.MultiTaskReplayBuffer.__new__(buffers.MultiTaskReplayBuffer)
        buffer.task_buffers = {i: simple(steps, state, ACTION_DIM) for i in range(tasks)}
        for one in buffer.task_buffers.values():
            for _ in range(steps):
                obs, next_obs, action = (rng.standard_normal(n) for n in (state, state, ACTION_DIM))
                one.add_sample(obs, action, rng.random(), False, next_obs, env_info={})
        setattr(algorithm, name, buffer)
    vars(algorithm).update(
        recurrent=False,
        sparse_rewards=False,
        use_next_obs_in_context=False,
        embedding_batch_size=100,
        embedding_mini_batch_size=100,
    )


def fill_slac(agent, buffers):
    """Fills slac.pytorch's replay buffer with noise, in episodes of 250 steps."""
    buffers.LazyFrames.__array__ = (  # NumPy 2 passes one argument more
        lambda self, dtype=None, copy=None: np.array(self._frames, dtype=dtype)
    )
    rng = np.random.default_rng(0)
    for t in range(CAPACITY):
        image = rng.integers(0, 256, (3, 64, 64), dtype=np.uint8)
        if t % 250 == 0:
            agent.buffer.reset_episode(image)
        action = rng.uniform(-1, 1, ACTION_DIM)
        agent.buffer.append(action, rng.random(), False, image, t % 250 == 249)


class Log:
    """Their logger's interface; keeps the last value of everything."""

    def __init__(self):
        self.last = {}

    def log(self, key, value, step):
        self.last[key] = value

    add_scalar = log

    def log_histogram(self, *_):
        pass

    log_param = log_image = log_histogram
