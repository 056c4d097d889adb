# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "torch>=2.10,<2.14", "numpy>=2,<2.6", "dm_control==1.0.50", "mujoco>=3.17,<4", "tyro>=1,<2",
#     "tensorboard>=2.20,<3", "imageio>=2.37,<3", "tqdm>=4.66,<5", "pytest>=8",
# ]
# ///
"""SLAC: stochastic latent actor-critic; SAC on the latent variables of a learned model.

Lee et al. 2020, Stochastic Latent Actor-Critic: Deep Reinforcement Learning with a Latent Variable
Model, https://arxiv.org/abs/1907.00953; the authors' code: https://github.com/alexlee-gk/slac

    image' --> encoder --> f' -+--> q(z1' | f', z2, a) --> z1' --> p(z2' | z1', z2, a) --> z2'
                               |    z1, z2 --> decoder, reward    J(M) trains this, p(z1' | z2, a)
                               +-x-> f of 8 images, 7 actions --> actor     J(pi) trains the actor
    z1, z2 of the last two images -x-> Q1, Q2     J(Q) trains Q1, Q2        x stops the gradient

    python slac.py --smoke                  # learns visibly in minutes without a GPU
    python slac.py --env-id cheetah-run     # the published hyperparameters
    python slac.py --evaluate RUN_DIR       # play a trained agent and film it

Shapes: B batch, T time (9 images; 8 in act()), N images, C H W image, F features, Z latent (z1 and
z2), S input of the actor or the critic, n images in a window (8), W windows in a sequence (T - n +
1), A action.
Units: a frame is one control step of the simulator; a step is one decision of the agent, held for
action_repeat frames; an update is one gradient update on one batch.
In a sequence, action[t] led to image t, and reward[t] came with it. The paper's a_t is action[t+1].
A tag such as [SLAC J(Q)] names the formula behind a line; D1 is the first difference below.

Differences from the paper and the authors' code
D1  The actor's loss is taken at the second-to-last image, as in the authors' code. The paper's
    equation 10 takes it at the last.
D2  The model, the critic and the actor step in turn, and the model has 32 sequences of its own.
    Theirs computes all gradients first, and the model learns from 32 of the 256 sequences.
D3  The temperature's loss uses the action that the actor's loss has sampled. Theirs samples again.
D4  Evaluation has its own environment, seed and random numbers. Quadruped, which is not among the
    paper's tasks, is seen by its camera 2; all other tasks are seen by camera 0.
D5  Convs pad evenly on both sides. TensorFlow's pad more at the end; the sizes are the same.
D6  The decoder's last layer has a leaky ReLU, as in the authors' code. The paper calls it linear.
D7  A run begins with 10,000 frames of random actions and 50,000 updates of the model alone, as in
    the paper's experiments. The public code has 10,000 steps and 100,000 updates.
D8  The actor is feed-forward, as in the authors' code. The paper's submission has a recurrent one.
D9  The target Qs start as copies. Theirs are never copied and start with weights of their own.
D10 Adam's epsilon, 1e-8, follows the bias correction. TensorFlow 1's, "epsilon hat", precedes it.
D11 With --z1 deterministic the KL is dropped also where an episode starts inside a sequence.
    Theirs drops it at the first row of a sequence only.
D12 With --eval-policy mean the actor sees the actions that it took. Theirs sees zeros instead of
    them, as their greedy policy does not store what it did.
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    with contextlib.suppress(AttributeError):  # have glibc keep freed memory: up to 1.6x as fast
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    with contextlib.suppress(ImportError):  # Triton crashes if it is imported after OpenGL
        importlib.import_module("triton")

import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from dm_control.rl import control
from filelock import FileLock, Timeout  # comes with torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ---- Args --------------------------------------------------------------------------------------
@dataclasses.dataclass
class Args:
    # run
    env_id: str = "cheetah-run"  # <domain>-<task> of the dm_control suite (or module:function)
    smoke: bool = False  # a small run that learns visibly in minutes on two CPU cores
    seed: int = 1  # random seed for the environment, the networks and the sampling
    total_frames: int = 1_000_000  # length of the run, in whole episodes [frames]
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto uses a GPU if there is one
    resume: str = ""  # continue the run in this folder, with its arguments as defaults
    evaluate: str = ""  # play the trained agent of the run in this folder, and film it
    video: bool = True  # film the first episode of every evaluation
    track: bool = False  # also log to Weights & Biases
    runs_dir: str = "runs"  # parent of the run's folder
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # bf16 on a CPU wants AVX512_BF16 or AMX
    cuda_graph: bool = True  # on CUDA, launch an update or an action as one graph
    compile: bool = True  # with CUDA graphs, fuse small kernels; the run starts a minute later
    threads: int = 0  # CPU threads (0: PyTorch's choice); 1 is best for runs side by side
    delete_replay: bool = False  # remove the replay buffer's files when the run has finished
    eval_every_frames: int = 10_000  # interval between evaluations [frames]
    eval_episodes: int = 10  # episodes per evaluation (paper 10)
    checkpoint_every_minutes: float = 5.0  # minimum time between two checkpoints [minutes]
    # data and updates
    action_repeat: int = 0  # frames per step (0: the published value for the task)
    obs = "pixels"  # not a flag: this script sees nothing else
    image_size: int = 64  # width and height of an image [pixels]
    render: Literal["exact", "fast"] = "exact"  # fast: no shadows, coarse meshes; for smoke runs
    replay_capacity: int = 100_000  # number of newest rows to sample from; one row per image
    replay_device: Literal["auto", "cpu"] = "auto"  # cpu: keep the rows out of GPU memory
    warmup_steps: int = 0  # random steps first; the last episode is completed (0: 10,000 frames)
    pretrain_updates: int = 50_000  # updates in one burst after the warm-up (model; paper 50,000)
    updates_per_step: float = 1.0  # updates per step after the burst (paper 1)
    model_batch_size: int = 32  # sequences per update of the model (paper 32)
    sac_batch_size: int = 256  # sequences per update of actor and critic (paper 256)
    actions: int = 8  # actions per sequence, which has one image more (paper 8)
    # networks
    channels: tuple[int, ...] = (32, 64, 128, 256)  # channels per conv layer (paper 32 64 128 256)
    feature_dim: int = 256  # size of an image's features (paper 256)
    z1_dim: int = 0  # size of z1 (0: the paper's 32, or 256 with --z2 none)
    z2_dim: int = 256  # size of z2 (paper 256)
    hidden_dim: int = 256  # width of the hidden layers (paper 256)
    # losses
    gamma: float = 0.99  # discount per step (paper 0.99)
    model_lr: float = 1e-4  # Adam's learning rate for the model (paper 1e-4)
    critic_lr: float = 3e-4  # Adam's learning rate for the critic (paper 3e-4)
    actor_lr: float = 3e-4  # Adam's learning rate for the actor (paper 3e-4)
    alpha_lr: float = 3e-4  # Adam's learning rate for log alpha (paper 3e-4)
    init_temperature: float = 1.0  # alpha at the start (paper 1)
    critic_tau: float = 0.005  # Polyak coefficient of the target Qs (paper 0.005)
    decoder_variance: float = 0.1  # variance of a decoded pixel (paper 0.1, or tuned per task)
    reward_std_floor: float = 1e-5  # least standard deviation of a reward (authors' code 1e-5)
    # variants
    z1: Literal["stochastic", "deterministic"] = "stochastic"  # the latent inferred from each image
    z2: Literal["stochastic", "deterministic", "recurrent", "none"] = "stochastic"  # latent memory
    temporal: bool = True  # each latent depends on the one before; if off, on its image alone
    actor_input: Literal["history", "latent"] = "history"  # history: features, actions; latent: z
    critic_input: Literal["history", "latent"] = "latent"  # history: features, actions; latent: z
    eval_policy: Literal["sample", "mean"] = "sample"  # actions in evaluations (paper sample)

    def __post_init__(self):
        self.action_repeat = self.action_repeat or ACTION_REPEAT.get(self.env_id, 2)
        self.warmup_steps = self.warmup_steps or math.ceil(10_000 / self.action_repeat)  # D7
        self.z1_dim = self.z1_dim or (256 if self.z2 == "none" else 32)


ACTION_REPEAT = {  # the paper's; 2 for any other task
    "ball_in_cup-catch": 4, "cartpole-swingup": 4, "cheetah-run": 4, "finger-spin": 1,
    "reacher-easy": 4, "walker-walk": 2,
}  # fmt: skip
SMOKE = {
    "env_id": "finger-spin", "action_repeat": 4, "total_frames": 24_000, "image_size": 32,
    "render": "fast", "warmup_steps": 1000, "pretrain_updates": 300, "model_batch_size": 16,
    "sac_batch_size": 32, "actions": 4, "channels": (16, 16, 32, 32), "feature_dim": 64,
    "z1_dim": 16, "z2_dim": 64, "hidden_dim": 128, "decoder_variance": 0.04,
    "reward_std_floor": 0.05, "model_lr": 1e-3, "critic_lr": 1e-3, "actor_lr": 1e-3,
    "alpha_lr": 1e-3, "init_temperature": 0.1, "gamma": 0.95, "critic_tau": 0.02,
    "eval_every_frames": 4000, "compile": False,
}  # fmt: skip
MAY_BE_ZERO = ["gamma", "pretrain_updates", "seed"]
AT_MOST_ONE = ["critic_tau", "gamma"]


def algorithm_checks(args):
    """Checks that only this script has: rows of (flag, whether it is wrong, what to do)."""
    warmup = 1000 * math.ceil(args.warmup_steps / math.ceil(1000 / args.action_repeat))  # frames
    unit = 2 ** len(args.channels)  # each conv halves the image
    fits = 2 <= args.actions < min(args.warmup_steps, 1000)  # 1000 is the least replay_capacity
    needs_past = args.z1 == "deterministic" or args.z2 == "recurrent"
    lacks_past = needs_past and not args.temporal
    return [
        ("total_frames", args.total_frames <= warmup, f"use more than the warm-up's {warmup}"),
        ("channels", not args.channels, "needs at least one number"),
        ("image_size", args.image_size % unit > 0, f"must be a multiple of {unit}, see --channels"),
        ("actions", not fits, "must be at least 2, and below 1000 and the --warmup-steps"),
        ("temporal", lacks_past, "a recurrent z2 and a deterministic z1 need it; use --temporal"),
    ]


# ---- networks ----------------------------------------------------------------------------------
def weight_init(module):
    """Xavier's uniform weights and zero biases; a GRU keeps PyTorch's."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Float32Linear(nn.Linear):
    """A linear layer in float32: bfloat16 has too few digits for values, logits and means."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def mlp(in_dim, hidden_dim, out_dim):
    """An MLP with two hidden ReLU layers."""
    first = [nn.Linear(in_dim, hidden_dim), nn.ReLU()]
    second = [nn.Linear(hidden_dim, hidden_dim), nn.ReLU()]
    return nn.Sequential(*first, *second, Float32Linear(hidden_dim, out_dim))


def preprocess(obs):
    """Scales uint8 images (B, C, H, W) to [0, 1], channels last; states pass unchanged."""
    if obs.dtype != torch.uint8:
        return obs
    return obs.to(torch.float32, memory_format=torch.channels_last) / 255


def tanh_gaussian(mu, log_std):
    """Sample a = tanh(mu + sigma eps) (B, A) and log pi(a) (B, 1); SAC, appendix C."""
    noise = torch.randn_like(mu)
    u = mu + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return torch.tanh(u), log_prob.sum(-1, keepdim=True)


def kl_divergence(q, p):
    """KL(q || p) of diagonal Gaussians, each (mean, std), summed over the last dimension."""
    ratio = (q[1] / p[1]).square()
    return 0.5 * (ratio + ((q[0] - p[0]) / p[1]).square() - 1 - ratio.log()).sum(-1)


class Encoder(nn.Sequential):
    """Images (N, C, H, W) in [0, 1] -> features f (N, F)."""

    def __init__(self, obs_shape, args):
        channels = [obs_shape[0], *args.channels]
        layers = []
        for i in range(len(args.channels)):
            sizes = (3, 2, 1) if i else (5, 2, 2)  # kernel, stride, padding: half the image  D5
            layers += [nn.Conv2d(channels[i], channels[i + 1], *sizes), nn.LeakyReLU(0.2)]
        side = obs_shape[-1] // 2 ** len(args.channels)  # what is left of the image
        last = nn.Conv2d(channels[-1], args.feature_dim, side)
        super().__init__(*layers, last, nn.LeakyReLU(0.2), nn.Flatten())


class Decoder(nn.Sequential):
    """Latent z (N, Z) -> means of the images (N, C, H, W): the encoder backwards."""

    def __init__(self, obs_shape, z_dim, args):
        side = obs_shape[-1] // 2 ** len(args.channels)
        channels = [obs_shape[0], *args.channels]
        layers = [nn.Unflatten(1, (z_dim, 1, 1)), nn.ConvTranspose2d(z_dim, channels[-1], side)]
        for i in reversed(range(len(args.channels))):
            sizes = (3, 2, 1, 1) if i else (5, 2, 2, 1)  # and output padding: twice the image
            layers += [nn.LeakyReLU(0.2), nn.ConvTranspose2d(channels[i + 1], channels[i], *sizes)]
        super().__init__(*layers, nn.LeakyReLU(0.2))  # D6


class Gaussian(nn.Module):
    """Concatenated inputs -> mean and std (..., D) of a diagonal Gaussian. Without `stochastic` it
    learns the mean alone; its std of 1 is for the KL, and LatentModel.noise() is zero for it."""

    def __init__(self, in_dim, out_dim, args, stochastic=True, floor=1e-5):
        super().__init__()
        self.stochastic = stochastic
        self.floor = floor
        n = args.hidden_dim
        first = [nn.Linear(in_dim, n), nn.LeakyReLU(0.2)]
        second = [nn.Linear(n, n), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*first, *second, Float32Linear(n, out_dim * (1 + stochastic)))

    def forward(self, *inputs):
        x = self.net(torch.cat(inputs, -1))
        if not self.stochastic:
            return x, torch.ones_like(x)
        mean, std = x.chunk(2, -1)
        return mean, F.softplus(std) + self.floor


class LatentModel(nn.Module):
    """Latents z (B, Z) of images and actions, z1 and z2 side by side, and what follows from them.

    z2 given z1 has the same network in the prior p and in the posterior q, so that only z1 has a
    KL. The context is all that p and q of the next z1 know of the past: z2 (without it, z1) and the
    action, or the recurrent state after both.
    """

    def __init__(self, obs_shape, action_dim, args):
        super().__init__()
        z1_dim = args.z1_dim
        z2_dim = 0 if args.z2 == "none" else args.z2_dim
        self.z_dims = z1_dim, z2_dim
        self.z_dim = z1_dim + z2_dim
        self.temporal = args.temporal
        noisy1 = args.z1 == "stochastic"
        noisy2 = args.z2 == "stochastic"
        noisy = torch.tensor([noisy1] * z1_dim + [noisy2] * z2_dim, dtype=torch.float32)
        self.register_buffer("noisy", noisy, persistent=False)  # (Z,)
        context_dim = z2_dim if args.z2 == "recurrent" else (z2_dim or z1_dim) + action_dim
        self.encoder = Encoder(obs_shape, args)
        self.decoder = Decoder(obs_shape, self.z_dim, args)
        reward_dim = 2 * self.z_dim + action_dim
        self.reward_head = Gaussian(reward_dim, 1, args, floor=args.reward_std_floor)
        self.q_first = Gaussian(args.feature_dim, z1_dim, args, noisy1)  # q(z1 | f)
        self.q_next = Gaussian(args.feature_dim + context_dim, z1_dim, args, noisy1)
        self.prior = Gaussian(context_dim, z1_dim, args, noisy1)  # p(z1' | z2, a)
        self.gru = nn.GRUCell(z1_dim + action_dim, z2_dim) if args.z2 == "recurrent" else None
        self.z2_first = self.z2_next = None
        if args.z2 in ("stochastic", "deterministic"):
            self.z2_first = Gaussian(z1_dim, z2_dim, args, noisy2)  # p(z2 | z1)
            self.z2_next = Gaussian(z1_dim + context_dim, z2_dim, args, noisy2)

    def encode(self, obs):
        """Features (B, T, F) of uint8 images (B, T, C, H, W)."""
        return self.encoder(preprocess(obs.flatten(0, 1))).unflatten(0, obs.shape[:2])

    def noise(self, *shape):
        """Normal noise (*shape, Z), zero where z is deterministic."""
        return torch.randn(*shape, self.z_dim, device=self.noisy.device) * self.noisy

    def context(self, z, action):
        """The context of the next latent, from z (B, Z) and the action in between (B, A)."""
        z1, z2 = z.split(self.z_dims, -1)
        if self.gru is not None:
            with torch.autocast(z.device.type, enabled=False):
                return self.gru(torch.cat([z1, action], -1), z2)
        return torch.cat([z1 if self.z2_next is None else z2, action], -1)

    def draw(self, z1, context, noise):
        """z (..., Z) from the mean and std of its z1; context is None where an episode starts."""
        noise1, noise2 = noise.split(self.z_dims, -1)
        mean, std = z1
        z1 = mean + std * noise1
        if self.gru is not None:
            z2 = torch.zeros_like(noise2) if context is None else context
            return torch.cat([z1, z2], -1)
        if self.z2_next is None:
            return z1
        mean, std = self.z2_first(z1) if context is None else self.z2_next(z1, context)
        return torch.cat([z1, mean + std * noise2], -1)

    def filter(self, features, action, is_first, noise):
        """Posterior along sequences of features (B, T, F), actions (B, T, A), is_first (B, T) and
        noise (B, T, Z): z (B, T, Z), q and p of z1, each (mean, std), and where no past is used."""
        times = torch.arange(is_first.shape[1], device=is_first.device)
        started = is_first | (times == 0)  # a sequence starts anew even in the middle of an episode
        q_first = self.q_first(features)  # (B, T, z1)
        p_first = torch.zeros_like(q_first[0]), torch.ones_like(q_first[1])  # N(0, I)
        z_first = self.draw(q_first, None, noise)  # (B, T, Z), as if an episode started everywhere
        if not self.temporal:
            return z_first, q_first, p_first, torch.ones_like(started)
        z = [z_first[:, 0]]
        contexts = []
        q_next = []
        for t in range(1, features.shape[1]):
            context = self.context(z[-1], action[:, t])
            q = self.q_next(features[:, t], context)  # q(z1' | f', z2, a)
            z_next = self.draw(q, context, noise[:, t])
            z.append(torch.where(started[:, t, None], z_first[:, t], z_next))
            contexts.append(context)
            q_next.append(q)
        q_next = [torch.stack(values, 1) for values in zip(*q_next, strict=True)]  # mean, std
        p_next = self.prior(torch.stack(contexts, 1))  # of all steps, given the z2 of the posterior

        def merge(first, following):  # (B, T, z1), (B, T - 1, z1) -> (B, T, z1)
            following = torch.cat([first[:, :1], following], 1)
            return torch.where(started[..., None], first, following)

        q = [merge(a, b) for a, b in zip(q_first, q_next, strict=True)]
        p = [merge(a, b) for a, b in zip(p_first, p_next, strict=True)]
        return torch.stack(z, 1), q, p, started

    def imagine(self, z, action, noise):
        """The prior's z (B, T, Z) after z (B, Z), along actions (B, T, A), with noise (B, T, Z)."""
        out = []
        for t in range(action.shape[1]):
            context = self.context(z, action[:, t]) if self.temporal else None
            z1 = self.prior(context) if self.temporal else (0.0, 1.0)
            z = self.draw(z1, context, noise[:, t])
            out.append(z)
        return torch.stack(out, 1)


class Actor(nn.Module):
    """Its input (B, S) -> mean and log standard deviation (B, A) before the tanh."""

    def __init__(self, in_dim, action_dim, args):
        super().__init__()
        self.trunk = mlp(in_dim, args.hidden_dim, 2 * action_dim)

    def forward(self, seen):
        mu, log_std = self.trunk(seen).chunk(2, -1)
        return mu, log_std.clamp(-20, 2)


class Critic(nn.Module):
    """Features (B, D), action (B, A) -> Q1, Q2 (B, 1)."""

    def __init__(self, z_dim, action_dim, args):
        super().__init__()
        self.q1 = mlp(z_dim + action_dim, args.hidden_dim, 1)
        self.q2 = mlp(z_dim + action_dim, args.hidden_dim, 1)

    def forward(self, z, action):
        z_action = torch.cat([z, action], -1)
        return self.q1(z_action), self.q2(z_action)


def minimize(loss, *optimizers):
    """One step of each optimizer on `loss`. Gradients go to the optimizers' own parameters and
    nowhere else, whatever the loss was computed with."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    with torch.autocast(loss.device.type, enabled=False):  # the types are those of the forward pass
        loss.backward(inputs=parameters)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def soft_update(net, target, tau):
    """target <- tau net + (1 - tau) target."""
    for p, t in zip(net.parameters(), target.parameters(), strict=True):
        t.lerp_(p, tau)


# ---- Agent -------------------------------------------------------------------------------------
def sequences(buffer, rng, batch_size, length, same_episode_tail):
    """Batch of obs, action, reward, discount (B, T, ...) and is_first (B, T), where an episode
    starts; at least the last `same_episode_tail` of the T rows are of one episode."""
    rows = buffer.draw(rng, batch_size, length, same_episode_tail)[:, None] + np.arange(length)
    batch = {name: buffer.gather(name, rows) for name in ("obs", "action", "reward", "discount")}
    return {"is_first": upload(buffer.files["start"][rows] == rows, buffer.device), **batch}


class Cadence(NamedTuple):
    """Which parts this update moves besides the model."""

    actor_and_critic: bool


class Agent(nn.Module):
    """SLAC. Read update() first: it is the algorithm; each loss is a method."""

    updates = 0  # number of updates so far; the training loop sets it
    # the methods that --compile turns into faster kernels
    compiled = ["model_losses", "features_for", "critic_loss", "actor_loss"]

    def __init__(self, args, spec):
        super().__init__()
        self.args = args
        self.spec = spec
        n = args.actions  # images in a window, which ends before the sequence's last action
        self.model = LatentModel(spec.obs_shape, spec.action_dim, args)
        history_dim = n * args.feature_dim + (n - 1) * spec.action_dim
        dims = {"history": history_dim, "latent": self.model.z_dim}
        self.actor = Actor(dims[args.actor_input], spec.action_dim, args)
        self.critic = Critic(dims[args.critic_input], spec.action_dim, args)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_temperature)))
        self.apply(weight_init).to(args.device, memory_format=torch.channels_last)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)  # D9

        # Who trains what: a loss moves the parameters of its own optimizer and nothing else.
        adam = functools.partial(torch.optim.Adam, fused=True)  # D10
        self.optimizers = {
            "model": adam(self.model.parameters(), args.model_lr),
            "critic": adam(self.critic.parameters(), args.critic_lr),
            "actor": adam(self.actor.parameters(), args.actor_lr),
            "alpha": adam([self.log_alpha], args.alpha_lr),
        }

    def histories(self, features, action, is_first):
        """(B, W, n * F + (n - 1) * A): the n features of each window and the actions between them.
        What lies before an episode's first image is that image again, without actions."""
        n = self.args.actions
        t = torch.arange(is_first.shape[1], device=is_first.device)
        start = (is_first * t).amax(1, keepdim=True)  # (B, 1); no window ends before, see sample()
        rows = torch.maximum(t, start)[..., None].expand(-1, -1, features.shape[-1])
        features = features.gather(1, rows)  # (B, T, F)
        action = action * (t > start)[..., None]
        windows = []
        for i in range(len(t) - n + 1):
            seen = features[:, i : i + n].flatten(1), action[:, i + 1 : i + n].flatten(1)
            windows.append(torch.cat(seen, -1))
        return torch.stack(windows, 1)

    def features_for(self, obs, action, is_first, kinds):
        """{kind: (B, W, S)}: what an actor or a critic of this kind sees of each window."""
        features = self.model.encode(obs)  # (B, T, F)
        seen = {}
        if "history" in kinds:
            seen["history"] = self.histories(features, action, is_first)
        if "latent" in kinds:
            noise = self.model.noise(*is_first.shape)
            z = self.model.filter(features, action, is_first, noise)[0]
            seen["latent"] = z[:, self.args.actions - 1 :]
        return seen

    def kl_loss(self, q, p, started):
        """KL(q || p) of z1, each (mean, std), summed over time. For deterministic z1 (std 1) it is
        half the squared distance of the means, without the starts, whose prior is not learned."""
        kl = kl_divergence(q, p)  # (B, T)
        if self.args.z1 == "deterministic":
            kl = kl * ~started  # D11
        return kl.sum(1).mean()  # [SLAC J(M): KL]

    def image_loss(self, z, images):
        """-log p(x | z), summed over time and pixels, of images (B * T, C, H, W) in [0, 1]."""
        variance = self.args.decoder_variance
        error = (images - self.model.decoder(z.flatten(0, 1))).square()
        constant = 0.5 * math.log(2 * math.pi * variance) * images[0].numel() * z.shape[1]
        return 0.5 / variance * error.sum() / len(z) + constant  # [SLAC J(M): x]

    def reward_loss(self, z, action, reward, is_first):
        """-log p(r | z, a, z'), summed over time; an episode's first image has no reward. Also
        gives the mean standard deviation, which may collapse where rewards are rare."""
        mean, std = self.model.reward_head(z[:, :-1], action[:, 1:], z[:, 1:])  # (B, T - 1, 1)
        error = (reward[:, 1:] - mean) / std
        nll = 0.5 * error.square() + std.log() + 0.5 * math.log(2 * math.pi)
        return (nll * ~is_first[:, 1:, None]).sum((1, 2)).mean(), std.mean()  # [SLAC J(M): r]

    def model_losses(self, obs, action, reward, discount, is_first):
        """{name: scalar} of a batch of sequences(); their sum is the model's loss. Also
        gives the mean standard deviation of the rewards."""
        images = preprocess(obs.flatten(0, 1))  # (B * T, C, H, W)
        features = self.model.encoder(images).unflatten(0, obs.shape[:2])  # (B, T, F)
        noise = self.model.noise(*is_first.shape)
        z, q, p, started = self.model.filter(features, action, is_first, noise)
        losses = {"loss/kl": self.kl_loss(q, p, started), "loss/image": self.image_loss(z, images)}
        losses["loss/reward"], reward_std = self.reward_loss(z, action, reward, is_first)
        return losses, reward_std

    def critic_loss(self, seen, action, reward, discount, next_seen, next_seen_by_actor):
        """Squared TD error of both Qs, from what the critic sees (B, S) at both ends of a
        transition; action (B, A), reward, discount (B, 1)."""
        with torch.no_grad():  # the target is a constant
            next_action, log_prob = tanh_gaussian(*self.actor(next_seen_by_actor))
            q = torch.min(*self.target_critic(next_seen, next_action))
            value = q - self.log_alpha.exp() * log_prob  # (B, 1)
            target = reward + self.args.gamma * discount * value
        q1, q2 = self.critic(seen, action)  # (B, 1)
        return 0.5 * (F.mse_loss(q1, target) + F.mse_loss(q2, target))  # [SLAC J(Q)]

    def actor_loss(self, seen_by_actor, seen):
        """The loss from what the actor and the critic see (B, S), and log pi (B, 1), which
        alpha_loss needs. Q is only read: minimize() moves the actor."""
        action, log_prob = tanh_gaussian(*self.actor(seen_by_actor))
        q = torch.min(*self.critic(seen, action))
        alpha = self.log_alpha.exp().detach()  # alpha has a loss of its own
        return (alpha * log_prob - q).mean(), log_prob  # [SLAC J(pi)]

    def alpha_loss(self, log_prob):
        """Moves the temperature until the entropy is -A; log_prob (B, 1)."""
        target_entropy = -self.spec.action_dim
        error = (-log_prob - target_entropy).detach()  # this loss moves alpha, not the actor
        return (self.log_alpha * error).mean()  # [SLAC J(alpha)]

    def cadence(self):
        """What this update moves. The first burst of updates moves the model alone (D7)."""
        return Cadence(actor_and_critic=self.updates >= self.args.pretrain_updates)

    def sample(self, buffer, rng):
        """The batch that update() takes: sequences for the model, and others for the actor and the
        critic, if these move. The last two rows of a sequence are of one episode."""
        args = self.args
        length = args.actions + 1
        draw = functools.partial(sequences, buffer, rng, length=length, same_episode_tail=2)
        batch = {"model": draw(batch_size=args.model_batch_size)}
        if self.cadence().actor_and_critic:
            batch["sac"] = draw(batch_size=args.sac_batch_size)
        return batch

    def update(self, batch):
        """One update from a batch of sample(); gives metrics as 0-d tensors.

        On CUDA the update is recorded once for each cadence and then replayed. The recording
        freezes every Python number. A number that changes from update to update must be a tensor
        of the batch, or a field of cadence() that takes few values.
        """
        args, optimizers = self.args, self.optimizers
        model_losses, reward_std = self.model_losses(**batch["model"])
        minimize(sum(model_losses.values()), optimizers["model"])  # D2
        metrics = model_losses | {"stat/reward_std": reward_std}

        if "sac" in batch:  # sample() adds it if cadence() says so
            sac = batch["sac"]
            kinds = {args.actor_input, args.critic_input}
            with torch.no_grad():  # neither the critic nor the actor trains the model
                seen = self.features_for(sac["obs"], sac["action"], sac["is_first"], kinds)
            # two windows: one ends at the second-to-last image, the other at the last
            for_actor, next_for_actor = seen[args.actor_input].unbind(1)  # (B, S)
            for_critic, next_for_critic = seen[args.critic_input].unbind(1)
            arrival = [sac[name][:, -1] for name in ("action", "reward", "discount")]  # (B, ...)
            critic_loss = self.critic_loss(for_critic, *arrival, next_for_critic, next_for_actor)
            minimize(critic_loss, optimizers["critic"])
            metrics["loss/critic"] = critic_loss
            actor_loss, log_prob = self.actor_loss(for_actor, for_critic)  # D1
            minimize(actor_loss, optimizers["actor"])
            alpha_loss = self.alpha_loss(log_prob)  # D3
            minimize(alpha_loss, optimizers["alpha"])
            metrics |= {"loss/actor": actor_loss, "loss/alpha": alpha_loss}
            metrics |= {"stat/entropy": -log_prob.mean(), "stat/alpha": self.log_alpha.exp()}
            soft_update(self.critic, self.target_critic, args.critic_tau)
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()  # acting needs no gradient
    def act(self, step, carry, explore=False):
        """Action (A,) for a Step, and the next carry: the last n rows; None at first."""
        device = self.args.device
        row = {
            "obs": torch.as_tensor(step.obs, device=device)[None, None],  # (1, 1, C, H, W)
            "action": torch.as_tensor(step.action, device=device)[None, None],
            "is_first": torch.full((1, 1), step.first, device=device),
        }
        if carry is None:  # before an episode's first image there is that image again
            carry = {name: torch.cat([value] * self.args.actions, 1) for name, value in row.items()}
        else:
            carry = {name: torch.cat([carry[name][:, 1:], row[name]], 1) for name in row}
        kind = self.args.actor_input
        seen = self.features_for(**carry, kinds={kind})[kind]  # (1, 1, S)
        mu, log_std = self.actor(seen[:, 0])
        sample = explore or self.args.eval_policy == "sample"
        action = tanh_gaussian(mu, log_std)[0] if sample else torch.tanh(mu)  # D12
        return action[0], carry

    @torch.no_grad()  # only to be looked at
    def images(self, buffer, rng):
        """{name: uint8 (H, W, 3)}: a sequence over time; below it, decoded, its posterior, the
        prior after the first image, and the prior after none, each given the actions."""
        model = self.model
        length = self.args.actions + 1
        batch = sequences(buffer, rng, 64, length, same_episode_tail=2)
        whole = batch["is_first"][:, 1:].sum(1).argmin()[None]  # of 64, the one with fewest starts
        obs, action, is_first = (batch[name][whole] for name in ("obs", "action", "is_first"))
        noise = model.noise(1, length)
        z = model.filter(model.encode(obs), action, is_first, noise)[0]  # (1, T, Z)
        unseen = model.draw((0.0, 1.0), None, model.noise(1))  # (1, Z), of p(z1) p(z2 | z1)
        rows = [z]
        for first in (z[:, 0], unseen):
            following = model.imagine(first, action[:, 1:], noise[:, 1:])
            rows.append(torch.cat([first[:, None], following], 1))
        decoded = model.decoder(torch.cat(rows).flatten(0, 1)).unflatten(0, (3, length))
        decoded = (decoded * 255).round().clamp(0, 255).to(torch.uint8)
        grid = torch.cat([obs, decoded])  # (4, T, C, H, W)
        return {"sequence": grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).cpu().numpy()}


# ---- environment (from here on, the scripts share almost all text) -------------------------------
class UsageError(ValueError):
    """Bad usage. The message names the flag, or the variable, and says what to do."""

    def __init__(self, name, remedy):
        super().__init__(f"{name if name.isupper() else '--' + name.replace('_', '-')}: {remedy}")


@contextlib.contextmanager
def refuse_on(errors, name, remedy):
    """Turns such errors into a one-line UsageError, which gives their reason in brackets."""
    try:
        yield
    except errors as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UsageError(name, f"{remedy} ({reason})") from e


def stream(seed, purpose, counter):
    """Gives a NumPy generator seeded with the arguments, and seeds PyTorch from it. No random state
    is ever saved: a resumed run draws the same numbers at the same counters."""
    rng = np.random.default_rng([seed, *purpose.encode(), counter])
    torch.manual_seed(int(rng.integers(2**63)))
    return rng


class EnvSpec(NamedTuple):
    obs_shape: tuple  # (3, H, W) of an image or (S,) of a state vector
    action_dim: int
    state_dim: int  # of Step.state


class Step(NamedTuple):
    obs: np.ndarray  # the agent's observation: an image uint8 (3, H, W) or the state
    state: np.ndarray  # the task's own observation, flattened, float32 (S,)
    action: np.ndarray  # the action that led here, float32 (A,); zeros at an episode's start
    reward: float  # summed over the frames of the step
    discount: float  # 0 where the task ended for good; 1 everywhere else, at a time limit too
    first: bool  # an episode starts
    last: bool  # the episode is over
    frames: int  # frames simulated: action_repeat, fewer at an episode's end, 0 at its start


def load_task(env_id, random):
    """Gives the dm_control environment of a task, or your own if env_id is module:function or
    file.py:function. The function is called with `random`, a np.random.RandomState to draw from."""
    if ":" in env_id:
        name, _, function = env_id.rpartition(":")
        is_file = name.endswith(".py")
        with refuse_on((ImportError, OSError), "env_id", f"{name} cannot be imported"):
            names = runpy.run_path(name) if is_file else vars(importlib.import_module(name))
        if function not in names:
            raise UsageError("env_id", f"{name} has no function {function}")
        env = names[function](random)
        if not hasattr(env, "physics"):
            raise UsageError("env_id", "the environment has no physics to render images from")
        bounds = [getattr(env.action_spec(), end, np.inf) for end in ("minimum", "maximum")]
        if not all(np.isfinite(bound).all() for bound in bounds):
            raise UsageError("env_id", "the environment's actions have no bounds")
        return env
    from dm_control import suite  # imported here, after check_args() has looked for OpenGL

    tasks = ["-".join(task) for task in suite.ALL_TASKS]
    if env_id not in tasks:
        near = difflib.get_close_matches(env_id, tasks, 3, 0.4) or tasks
        raise UsageError("env_id", f"the suite has no {env_id!r}; try {', '.join(near)}")
    limit = {"time_limit": 30.0} if env_id.startswith("lqr") else {}  # it has no time limit
    return suite.load(*env_id.split("-", 1), {"random": random, **limit})


class PixelEnv:
    """A task with action repeat and a camera; actions are (A,) in [-1, 1]. --render exact gives the
    pixels of physics.render; fast drops shadows and smooth edges, 40 times as fast on a CPU."""

    def __init__(self, args, pixels=True, largest_image=0):
        self.args = args
        self.pixels = pixels and args.obs != "state"
        self.largest_image = max(args.image_size, largest_image)
        self.random = np.random.RandomState(args.seed)  # reset() seeds it anew
        self.env = load_task(args.env_id, self.random)
        self.model = None
        bounds = self.env.action_spec()  # lqr's are infinite
        self.low = np.full(bounds.shape, np.where(bounds.minimum < -1e6, -1, bounds.minimum))
        self.high = np.full(bounds.shape, np.where(bounds.maximum > 1e6, 1, bounds.maximum))
        first = self.reset(0)
        self.spec = EnvSpec(first.obs.shape, len(self.low), len(first.state))
        self.fps = max(1, round(1 / (self.env.control_timestep() * args.action_repeat)))

    def reset(self, seed):
        """First Step of the episode that this seed starts."""
        self.random.seed(seed)
        time_step = self.env.reset()
        model = self.env.physics.model
        if model.ptr is not self.model:  # some build a new model for each episode
            self.model = model.ptr
            self.cameras = {}
            model.vis.global_.offwidth = model.vis.global_.offheight = self.largest_image
            if self.args.render == "fast":
                model.vis.quality.offsamples = 0
                model.vis.quality.numslices = 8
                model.vis.quality.numstacks = 6
        return self.observe(time_step, np.zeros(len(self.low)), 0.0, 0)

    def step(self, action):
        """Next Step. Holds the action (A,) for action_repeat frames, or until the episode ends."""
        control = self.low + (np.float64(action) + 1) / 2 * (self.high - self.low)
        time_steps = [self.env.step(control)]
        while len(time_steps) < self.args.action_repeat and not time_steps[-1].last():
            time_steps.append(self.env.step(control))
        reward = sum(time_step.reward for time_step in time_steps)
        return self.observe(time_steps[-1], action, reward, len(time_steps))

    def observe(self, time_step, action, reward, frames):
        """The Step of a dm_env.TimeStep."""
        if not time_step.observation:  # None, or {}
            raise UsageError("env_id", "the environment must observe something, also at its end")
        state = np.float32(np.concatenate([np.ravel(v) for v in time_step.observation.values()]))
        obs = self.render(self.args.image_size).transpose(2, 0, 1) if self.pixels else state
        discount = 1.0 if time_step.discount is None else float(time_step.discount)
        ends = time_step.first(), time_step.last()
        return Step(obs, state, np.float32(action), float(reward), discount, *ends, frames)

    def render(self, size):
        """Image (size, size, 3) uint8."""
        from dm_control.mujoco.engine import Camera

        if size not in self.cameras:  # making a camera takes longer than an image
            camera_id = min(0, self.env.physics.model.ncam - 1)  # without one: -1, the free camera
            if self.args.env_id.startswith("quadruped"):
                camera_id = 2
            self.cameras[size] = Camera(self.env.physics, size, size, camera_id)
        fast = {"shadow": False, "reflection": False} if self.args.render == "fast" else {}
        return self.cameras[size].render(render_flag_overrides=fast).copy()  # its array is reused


# ---- replay buffer -----------------------------------------------------------------------------
def upload(values, device):
    """Puts an array, number or tensor on `device`; on CUDA without waiting for the GPU."""
    tensor = torch.as_tensor(values)
    pinned = tensor.is_cpu and device.startswith("cuda")
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)


class ReplayBuffer:
    """Rows in memory-mapped files. Rows that a checkpoint counts are never overwritten, so that a
    run can go on after its process died. A GPU holds a copy of all rows, or of each batch only.

    Row t holds image t, the action that led to it (zeros at an episode's start), and the reward and
    the discount that came with it. A transition is rows t and t + 1 of one episode. Samples reach
    `capacity` rows back. Agent.sample() makes stacks of images and sequences from rows."""

    def __init__(self, folder, rows, args, spec, row=0):
        self.folder = Path(folder)
        self.capacity = args.replay_capacity
        self.device = args.device  # of samples
        self.rows_device = args.device if args.replay_device == "auto" else "cpu"
        self.row = row
        pixel = np.uint8 if len(spec.obs_shape) == 3 else np.float32
        floats = {"action": spec.action_dim, "reward": 1, "discount": 1, "state": spec.state_dim}
        self.types = {name: np.dtype((np.float32, (size,))) for name, size in floats.items()}
        self.types["obs"] = np.dtype((pixel, spec.obs_shape))
        self.types["start"] = np.dtype(np.int64)  # the row at which the row's episode starts
        self.grow(rows)

    def grow(self, rows):
        """Reserves room for `rows` rows, so that a disk that is too small is noticed at once."""
        self.rows = rows
        self.folder.mkdir(exist_ok=True)
        self.files = {}
        for name, dtype in self.types.items():
            path = self.folder / name
            path.touch()
            if path.stat().st_size < self.row * dtype.itemsize:
                raise UsageError("resume", f"{path} is missing or cut short; copy the run again")
            with open(path, "r+b") as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, rows * dtype.itemsize)
            self.files[name] = np.memmap(path, dtype, "r+", shape=(rows,))
        self.columns = {k: torch.from_numpy(v).to(self.rows_device) for k, v in self.files.items()}

    def add(self, step):
        """Appends a Step."""
        if self.row == self.rows:  # short episodes need more rows than planned
            self.grow(self.rows + self.rows // 4 + 1)
        values = step._asdict()
        values["start"] = self.row if step.first else self.files["start"][self.row - 1]
        for name, file in self.files.items():
            file[self.row] = values[name]
            if self.rows_device != "cpu":
                self.columns[name][self.row] = upload(file[self.row], self.rows_device)
        self.row += 1

    def draw(self, rng, count, length, same_episode_tail):
        """First rows (count,) of windows of `length` rows, uniform, with replacement. The last
        `same_episode_tail` rows of a window are of one episode. UsageError if there are hardly
        any."""
        oldest = max(0, self.row - self.capacity)
        rows = np.empty(0, np.int64)
        for _ in range(1000 if self.row - oldest >= length else 0):
            new = rng.integers(oldest, self.row - length + 1, count)
            last = new + length - 1
            whole = self.files["start"][last] <= last - same_episode_tail + 1  # one episode
            rows = np.append(rows, new[whole])
            if len(rows) >= count:
                return rows[:count]
        raise UsageError("env_id", f"hardly any episode has {same_episode_tail} rows for a sample")

    def gather(self, name, rows):
        """Rows of a column, (*rows.shape, ...). On a CPU index_select is much faster than [ ]."""
        indices = upload(rows.ravel(), self.rows_device)
        values = self.columns[name].index_select(0, indices).unflatten(0, rows.shape)
        return upload(values, self.device)


# ---- evaluation --------------------------------------------------------------------------------
VIDEO_SIZE = 256  # width and height of a film [pixels]


def evaluate(act, env, episodes, stop, film=False):
    """Plays episodes, the same ones each time, with act(step, carry) -> action, carry. Gives their
    returns (episodes,) and the images of the first, if it is filmed. A signal cuts it short.  D4"""
    returns = []
    images = []
    number = 0
    while len(returns) < episodes and not stop.signal:
        images = images if returns else []
        rng = stream(env.args.seed, "evaluate", number)
        number += 1
        carry = None
        total = 0.0
        try:
            step = env.reset(rng.integers(2**32))
            while not step.last:
                if film and not returns:
                    images.append(env.render(VIDEO_SIZE))
                action, carry = act(step, carry)
                step = env.step(action.cpu().numpy())
                total += step.reward
            returns.append(total)
        except control.PhysicsError as e:
            tqdm.write(f"warning: an episode of the evaluation is discarded: {e}")
            if number == 10 * episodes:
                raise FloatingPointError("nearly every episode of an evaluation diverges") from e
    return np.array(returns), images


# ---- logs and checkpoints ----------------------------------------------------------------------
def finite(metrics, updates):
    """Converts metrics to floats. If one is NaN or infinite the run ends, before it is saved."""
    metrics = {name: float(value) for name, value in metrics.items()}
    for name, value in metrics.items():
        if not math.isfinite(value):
            text = f"{name} is {value} after {updates} updates; progress since the last checkpoint"
            raise FloatingPointError(f"{text} is lost. Smaller learning rates may help")
    return metrics


class Logger:
    """Progress bar, metrics.csv with a row per log point, TensorBoard, images and films."""

    def __init__(self, args, run_dir, progress, total_updates):
        self.run_dir = run_dir
        self.progress = progress
        self.start = time.monotonic() - progress.wall_s
        self.last_return = math.nan
        for name in ("images", "videos"):
            (run_dir / name).mkdir(exist_ok=True)
        if args.track:
            wandb = {"id": run_dir.name, "dir": run_dir, "resume": "allow", "config": vars(args)}
            importlib.import_module("wandb").init(**wandb, sync_tensorboard=True)
        self.writer = SummaryWriter(run_dir, purge_step=progress.frames + 1)
        self.writer.add_text("arguments", json.dumps(vars(args), indent=4))
        # The bar counts updates, the slow part. Without a terminal it prints a line per minute.
        lines = {} if sys.stderr.isatty() else {"mininterval": 60}
        form = "{percentage:3.0f}%|{bar:20}| {desc} [{elapsed}<{remaining}]" + "\n" * len(lines)
        counts = {"initial": progress.updates, "total": total_updates, "miniters": 0}
        self.bar = tqdm(**counts, **lines, bar_format=form)

    def tick(self):
        """Brings the clock and the progress bar up to date."""
        progress = self.progress
        progress.wall_s = time.monotonic() - self.start
        speed = progress.frames / progress.wall_s
        text = f"{progress.frames:,} frames, {progress.updates:,} updates, {speed:.0f} frames/s"
        self.bar.set_description_str(f"{text}, return {self.last_return:.1f}", refresh=False)
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.bar.update(progress.updates - self.bar.n)

    def log(self, row):
        """Adds a row: {name: number}, the counters, and the last value of each metric."""
        self.tick()
        progress = self.progress
        progress.metrics = finite(progress.metrics, progress.updates)
        counters = {"frames": progress.frames, "steps": progress.step, "updates": progress.updates}
        row = counters | row | progress.metrics | {"time/wall_s": progress.wall_s}
        progress.rows.append(row)
        self.last_return = row.get("train/return", self.last_return)
        columns = dict.fromkeys(name for row in progress.rows for name in row)
        with open(self.run_dir / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(progress.rows)
        for name, value in row.items():
            if "/" in name:
                self.writer.add_scalar(name, value, progress.frames)

    def show(self, images, video, fps):
        """Writes {name: uint8 (H, W, 3)} as PNG and to TensorBoard, and a film (T, H, W, 3)."""
        frames = self.progress.frames
        for name, image in images.items():
            self.writer.add_image(name, image, frames, dataformats="HWC")
            imageio.imwrite(self.run_dir / f"images/{frames:09d}_{name}.png", image)
        if len(video):
            path = self.run_dir / f"videos/{frames:09d}.gif"
            imageio.mimsave(path, video, duration=1000 / fps, loop=0)


def save_checkpoint(run_dir, args, agent, buffer, progress):
    """Writes checkpoint.pt, whole or not at all."""
    weights = sum(tensor.sum() for tensor in agent.state_dict().values())
    progress.row = buffer.row
    progress.metrics = finite(progress.metrics, progress.updates)
    finite({"the sum of all weights": weights}, progress.updates)
    for file in buffer.files.values():
        file.flush()  # the rows must survive a crash of the machine
    payload = {"args": vars(args), "spec": tuple(agent.spec), "progress": vars(progress)}
    payload["agent"] = agent.state_dict()
    payload["optimizers"] = {name: o.state_dict() for name, o in agent.optimizers.items()}
    torch.save(payload, data := io.BytesIO())  # into memory first: PyTorch hides disk-full errors
    with open(run_dir / "checkpoint.part", "wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(run_dir / "checkpoint.part", run_dir / "checkpoint.pt")


def read_checkpoint(path, flag):
    """Args and payload of a checkpoint or of a run's folder. Code in the file never runs."""
    path = Path(path).expanduser()
    path = path / "checkpoint.pt" if path.is_dir() else path
    with refuse_on(Exception, flag, f"{path} is not a checkpoint of this script"):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # checks every CRC
                raise ValueError(f"{damaged} is damaged")
        payload = torch.load(path, map_location="cpu", weights_only=True)
        payload["run_dir"] = path.parent
        return Args(**payload["args"] | {"resume": "", "evaluate": ""}), payload


def restore_agent(args, payload):
    """The Agent of a checkpoint, with its optimizers."""
    agent = Agent(args, EnvSpec(*payload["spec"]))
    with refuse_on(RuntimeError, "resume" if args.resume else "evaluate", "another script's"):
        agent.load_state_dict(payload["agent"])
    for name, optimizer in agent.optimizers.items():
        optimizer.load_state_dict(payload["optimizers"][name])
    return agent


def load_agent(path, device="cpu"):
    """The trained agent of a run's folder, for code of your own. After env = PixelEnv(agent.args)
    and step = env.reset(seed=0), agent.act(step, carry=None, explore=False) gives action, carry."""
    args, payload = read_checkpoint(path, "evaluate")
    return restore_agent(dataclasses.replace(args, device=device), payload)


# ---- CUDA graphs (a reader can skip them) --------------------------------------------------------
def compile_parts(agent):
    """Compiles what Agent.compiled names, so that one kernel takes the place of many small ones."""
    compilers = [shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")]
    if not (importlib.util.find_spec("triton") and any(compilers)):
        text = "warning: --compile has no effect; it needs Triton and a C compiler (gcc or clang)"
        print(text, file=sys.stderr)
        return
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
    for name in agent.compiled:
        owner, _, method = name.rpartition(".")
        module = agent.get_submodule(owner)
        setattr(module, method, torch.compile(getattr(module, method), dynamic=False))


def record(agent, name, cadence=tuple):
    """Wraps a method of the agent in CUDA graphs. Each combination of input shapes, bools, Nones,
    options and cadence() has its own graph. The method runs normally in the first three calls, is
    recorded in the fourth, and is only replayed from then on. The inputs are copied to places that
    never move in memory. Whatever else the method reads or changes must lie on the GPU."""
    method = getattr(agent, name)
    device = agent.args.device
    side_stream = torch.cuda.Stream()
    places = {}
    calls = {}
    graphs = {}

    def launch(*inputs, **options):
        fixed = (bool, type(None))
        inputs = tree_map(lambda x: x if isinstance(x, fixed) else upload(x, device), inputs)
        shapes = tree_map_only(torch.Tensor, lambda tensor: tensor.shape, inputs)
        key = str((shapes, options, cadence()))
        if key not in places:
            contiguous = functools.partial(torch.clone, memory_format=torch.contiguous_format)
            places[key] = tree_map_only(torch.Tensor, contiguous, inputs)
            calls[key] = 0
        calls[key] += 1
        for place, new in zip(tree_leaves(places[key]), tree_leaves(inputs), strict=True):
            if isinstance(place, torch.Tensor):
                place.copy_(new)
        if calls[key] <= 3:  # here cuDNN chooses algorithms, and Adam creates its moments
            now = torch.cuda.current_stream()
            side_stream.wait_stream(now)
            with torch.cuda.stream(side_stream):
                outputs = method(*places[key], **options)
            now.wait_stream(side_stream)
        else:
            if key not in graphs:
                graphs[key] = capture(*places[key], **options)
            graph, outputs = graphs[key]
            graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, outputs)

    def capture(*inputs, **options):
        groups = [g for o in agent.optimizers.values() for g in o.param_groups]
        graph = torch.cuda.CUDAGraph()
        for group in groups:
            group["capturable"] = True
        # nothing may be compiled during a recording; what is not compiled yet runs as it is
        with torch.compiler.set_stance("eager_on_recompile"), torch.cuda.graph(graph):
            outputs = method(*inputs, **options)  # only recorded, not run
        for group in groups:
            group["capturable"] = False
        return graph, outputs

    launch.graphs = graphs
    setattr(agent, name, launch)


# ---- training loop -----------------------------------------------------------------------------
def autocast(args):
    """The context that updates run in: with --precision bf16, convs and matrix products use
    bfloat16. Converted weights are not cached, as weights change in the middle of an update."""
    on = args.precision == "bf16"
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, on, cache_enabled=False)


def updates_due(args, step):
    """Number of updates due before this step. The first burst waits for its episode's end."""
    since = step - args.warmup_steps
    return args.pretrain_updates + int(args.updates_per_step * since) if since >= 0 else 0


def to_host(tensor):
    """Starts to copy a tensor to the CPU. Gives a function that waits for that copy, but not for
    work that the GPU was given later, and returns the array."""
    if not tensor.is_cuda:
        return tensor.cpu().numpy
    copy_on_host = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait():
        copied.synchronize()
        return copy_on_host.numpy()

    return wait


class Stop:
    """Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 sets `signal`; the run then saves a checkpoint and stops
    as soon as it can. A second signal ends the process at once."""

    signal = 0

    def __enter__(self):
        self.handlers = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows lacks two of them
            if number and signal.getsignal(number) != signal.SIG_IGN:  # SIGHUP under nohup
                with contextlib.suppress(ValueError):  # a thread cannot catch signals
                    self.handlers[number] = signal.signal(number, self)
        return self

    def __call__(self, number, _):
        self.signal = number
        for other in self.handlers:
            signal.signal(other, signal.SIG_DFL)
        with contextlib.suppress(OSError, RuntimeError):  # the terminal may be gone or busy
            print("\nwill save and stop soon; repeat to stop at once", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def train(args, run_dir, stop, payload=None):
    """Plays whole episodes and makes the updates that are due at each step; it knows nothing of
    the algorithm. Evaluations and checkpoints come between episodes. Gives the progress."""
    env = PixelEnv(args)
    eval_env = PixelEnv(args, largest_image=VIDEO_SIZE * args.video)
    total_steps = math.ceil(args.total_frames / args.action_repeat)
    every = args.eval_every_frames
    if payload:
        agent = restore_agent(args, payload)
        progress = SimpleNamespace(**payload["progress"])
    else:
        stream(args.seed, "weights", 0)
        agent = Agent(args, env.spec)
        zeros = ["step", "frames", "episode", "updates", "evaluated", "row"]
        progress = SimpleNamespace(**dict.fromkeys(zeros, 0), wall_s=0.0, saved_wall_s=0.0)
        vars(progress).update(random_return=None, eval_return=None, metrics={}, rows=[])
    # also for the starts of episodes and for the last episode
    rows = max(total_steps + args.total_frames // 1000 + 1000, progress.row + 1)
    with refuse_on(OSError, "runs_dir", f"no room for {rows:,} rows of the replay buffer"):
        buffer = ReplayBuffer(run_dir / "replay", rows, args, env.spec, progress.row)
    if args.cuda_graph and args.device.startswith("cuda"):
        if args.compile:
            compile_parts(agent)
        record(agent, "update", agent.cadence)
        record(agent, "act")
    logger = Logger(args, run_dir, progress, updates_due(args, total_steps))

    def random_policy(step, carry):
        return 2 * torch.rand(env.spec.action_dim) - 1, None

    def update():
        agent.updates = progress.updates
        rng = stream(args.seed, "update", progress.updates)
        with autocast(args):
            progress.metrics |= agent.update(agent.sample(buffer, rng))
        progress.updates += 1

    def save(minutes=0.0):
        if progress.wall_s - progress.saved_wall_s >= 60 * minutes:
            progress.saved_wall_s = progress.wall_s
            save_checkpoint(run_dir, args, agent, buffer, progress)

    while not stop.signal:  # each turn makes one evaluation, one update or one episode
        finished = progress.frames >= args.total_frames
        missed = progress.frames // every > progress.evaluated // every
        if progress.random_return is None:
            returns, _ = evaluate(random_policy, PixelEnv(args, pixels=False), 10, stop)
            if stop.signal:
                break
            progress.random_return = returns.mean().item()
            tqdm.write(f"random policy: {progress.random_return:.1f} over 10 episodes")
            save()
        elif progress.updates < updates_due(args, progress.step):  # a burst
            update()
            logger.tick()
            if progress.updates % 1000 == 0:
                logger.log({})
            save(args.checkpoint_every_minutes)
        elif missed or (finished and progress.evaluated < progress.frames):
            returns, video = evaluate(agent.act, eval_env, args.eval_episodes, stop, args.video)
            if stop.signal:
                break  # the resumed run repeats the evaluation
            progress.evaluated = progress.frames
            mean = returns.mean().item()
            std = returns.std().item()
            progress.eval_return = mean
            tqdm.write(f"{progress.frames:,} frames: evaluation {mean:.1f} +- {std:.1f}")
            logger.log({"eval/return": mean, "eval/return_std": std})
            rng = stream(args.seed, "images", progress.frames)
            logger.show(agent.images(buffer, rng), video, env.fps)
        elif finished:
            break
        else:
            warm = progress.step >= args.warmup_steps
            act = functools.partial(agent.act, explore=True) if warm else random_policy
            first_row = buffer.row
            episode_return = 0.0
            rng = stream(args.seed, "episode", progress.episode)
            try:
                step = env.reset(rng.integers(2**32))
                carry = None
                buffer.add(step)
                while not step.last:
                    stream(args.seed, "act", progress.step)
                    action, carry = act(step, carry)
                    wait_for_action = to_host(action)
                    # any further backlog of updates waits until the episode is over
                    for _ in range(math.ceil(args.updates_per_step)):
                        if warm and progress.updates < updates_due(args, progress.step):
                            update()
                    action = wait_for_action()  # a GPU is still making the updates
                    finite({"the action": action.sum()}, progress.updates)
                    step = env.step(action)
                    progress.step += 1
                    progress.frames += step.frames
                    buffer.add(step)
                    episode_return += step.reward
                    logger.tick()
                logger.log({"train/return": episode_return})
            except control.PhysicsError as e:
                tqdm.write(f"warning: episode {progress.episode} is discarded: {e}")
                progress.frames += args.action_repeat  # even a run that only fails must end
                buffer.row = first_row
            progress.episode += 1
            save(args.checkpoint_every_minutes)
    save()
    with contextlib.suppress(OSError):
        logger.bar.close()
    logger.writer.close()
    return progress


# ---- main --------------------------------------------------------------------------------------
MAY_CHANGE = {  # flags that may be given with --resume or --evaluate
    "resume": {"resume", "total_frames", "device", "video", "track", "precision", "cuda_graph",
               "compile", "replay_device", "delete_replay", "eval_every_frames", "eval_episodes",
               "checkpoint_every_minutes"},
    "evaluate": {"evaluate", "seed", "eval_episodes", "device", "video", "track", "runs_dir"},
}  # fmt: skip
MAY_CHANGE["resume"].add("eval_policy")
MAY_CHANGE["evaluate"].add("eval_policy")
SUMMARY = ["frames", "updates", "wall_s", "random_return", "eval_return"]


def check_args(args):
    """Refuses what cannot work, before anything is written, and settles device and threads."""
    args.threads = args.threads or torch.get_num_threads()
    for name, value in vars(args).items():
        for number in value if isinstance(value, tuple) else [value]:
            if type(number) in (int, float):
                zero = number == 0 and name in MAY_BE_ZERO
                limit = " and at most 1" * (name in AT_MOST_ONE)
                if not (0 < number < math.inf or zero) or (limit and number > 1):
                    raise UsageError(name, f"{number} is not a finite number above zero{limit}")
    no_wandb = not args.evaluate and not importlib.util.find_spec("wandb")
    rows = [  # flag, whether it is wrong, what to do
        *algorithm_checks(args),
        ("evaluate", args.evaluate and args.resume, "excludes --resume; drop one of them"),
        ("replay_capacity", args.replay_capacity < 1000, "use at least 1000 (one long episode)"),
        ("track", args.track and no_wandb, "needs `pip install wandb`"),
    ]
    for flag, wrong, remedy in rows:
        if wrong:
            raise UsageError(flag, remedy)
    if args.video or args.obs != "state":
        used = {name: os.environ[name] for name in os.environ if name.startswith("MUJOCO_")}
        text = f"cannot render with {used}. Try MUJOCO_GL=egl, which needs a GPU driver or libegl1 "
        text += "and libgl1-mesa-dri, or MUJOCO_GL=osmesa, which needs libosmesa6"
        with refuse_on(Exception, "MUJOCO_GL", text):  # OpenGL can be missing in many ways
            from dm_control import _render

            _render.Renderer(max(args.image_size, VIDEO_SIZE), VIDEO_SIZE).free()
    if args.device == "auto":
        args.device = str(torch.accelerator.current_accelerator() or "cpu")
    text = f"{args.device} cannot be used; try cpu, cuda, cuda:1, mps or auto"
    with refuse_on((RuntimeError, AssertionError), "device", text):
        torch.zeros(1, device=args.device).item()
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    cpu = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "bf16"
    if args.device == "cpu" and args.precision == "bf16" and "bf16" not in cpu:
        print("warning: this CPU is slow with --precision bf16; leave it out", file=sys.stderr)
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.7 * os.cpu_count()
    if busy and args.threads > 1:
        print("note: the machine is busy; --threads 1 may be much faster", file=sys.stderr)
    torch.set_num_threads(args.threads)
    tf32 = args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def in_groups(help_text):
    """The text of --help with a title above each group of flags: the comments in Args."""
    for title, name in re.findall(r"    # (.+)\n    (\w+):", inspect.getsource(Args)):
        flag = rf"(?m)^(?=\W+--{name.replace('_', '-')}[ ,])"
        help_text = re.sub(flag, f"\n {title}\n", help_text, count=1)
    return help_text


def parse_args(words):
    """Args from the command line, and the payload of the checkpoint that they name, or None."""
    for i, word in enumerate(words):
        if re.fullmatch(r"[\d.]+e\d+", word) and float(word).is_integer():
            words[i] = str(int(float(word)))  # 1e6 is a whole number, too
    about = (__doc__ or "").partition("\n")[0]  # python -OO has no docstrings
    size = "{env_id} for {total_frames:,} frames, at {image_size}x{image_size} pixels"
    about += "\n\nWith --smoke: " + size.format(**SMOKE)
    parse = functools.partial(tyro.cli, Args, args=words, description=about)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as help_text:
            args = parse(default=Args(**SMOKE) if "--smoke" in words else None)
    except SystemExit:
        print(in_groups(help_text.getvalue()), end="")
        raise
    payload = None
    if path := args.resume or args.evaluate:
        flag = "resume" if args.resume else "evaluate"
        was, payload = read_checkpoint(path, flag)
        args = parse(default=was)
        for name, value in vars(was).items():
            if name not in MAY_CHANGE[flag] and value != getattr(args, name):
                raise UsageError(name, f"--{flag} cannot change it; the run has {value}")
    check_args(args)
    return args, payload


def make_run_dir(args, payload):
    """Gives the run's folder, and its lock, which is released once nothing refers to it. A new
    folder gets the arguments and a copy of this script, which can play the run later on."""
    if payload:
        run_dir = payload["run_dir"]
        if not (run_dir / "replay").exists():
            raise UsageError("resume", "the run's replay buffer was deleted; start a new run")
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{stamp}"
        name = re.sub(r"[^\w.-]+", "-", name)  # yours may hold colons or slashes
        run_dir = Path(args.runs_dir).expanduser() / name
        with refuse_on(OSError, "runs_dir", f"{run_dir} cannot be made"):
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps(vars(args), indent=1))
            shutil.copy(__file__, run_dir)
    lock = FileLock(run_dir / "lock")
    try:
        with refuse_on(Timeout, "resume", f"another process is at work in {run_dir}"):
            lock.acquire(timeout=0)
    except (OSError, NotImplementedError) as e:
        print(f"warning: {run_dir} cannot be locked ({e}); let only one process use it")
    return run_dir, lock


def play(args, payload):
    """--evaluate: plays a trained agent and films its first episode. Gives the run's progress."""
    folder = payload["run_dir"]
    if args.runs_dir != payload["args"]["runs_dir"]:
        folder = Path(args.runs_dir).expanduser()  # where the film goes
        folder.mkdir(parents=True, exist_ok=True)
    env = PixelEnv(args, largest_image=VIDEO_SIZE * args.video)
    act = restore_agent(args, payload).act
    returns, video = evaluate(act, env, args.eval_episodes, Stop(), args.video)
    print("returns: " + " ".join(f"{r:.1f}" for r in returns))
    if args.video:
        imageio.mimsave(folder / "evaluation.gif", video, duration=1000 / env.fps, loop=0)
        print(f"video: {folder / 'evaluation.gif'}")
    return SimpleNamespace(**payload["progress"] | {"eval_return": returns.mean().item()})


def main(words=None):
    """The command line; gives the exit status: 1 failed, 2 bad usage, 128 + n after signal n."""
    run_dir = None
    command = ""
    try:
        args, payload = parse_args(sys.argv[1:] if words is None else list(words))
        if args.evaluate:
            run_dir = payload["run_dir"]
            progress = play(args, payload)
        else:
            run_dir, lock = make_run_dir(args, payload)
            command = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
            print(f"{args.env_id}, seed {args.seed}, {args.device}, in {run_dir}", flush=True)
            with Stop() as stop:
                progress = train(args, run_dir, stop, payload)
            if stop.signal and progress.evaluated < args.total_frames:
                print(f"stopped; to resume: {command}")
                return 128 + stop.signal
        about = {"env_id": args.env_id, "script": Path(__file__).stem, "seed": args.seed}
        about |= {"device": args.device, "run_dir": str(run_dir)}
        numbers = json.dumps(about | {name: getattr(progress, name) for name in SUMMARY})
        if not args.evaluate:
            (run_dir / "summary.json").write_text(numbers)
            if args.delete_replay:
                shutil.rmtree(run_dir / "replay")
        print(f"summary {numbers}")
        return 0
    except UsageError as e:
        if run_dir and not payload and not (run_dir / "checkpoint.pt").exists():
            shutil.rmtree(run_dir, ignore_errors=True)  # a run that could not begin leaves nothing
        print(f"error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        text = str(e)
    except OSError as e:
        text = f"{e}{command and '; to resume: '}{command}"
    except (MemoryError, RuntimeError) as e:  # on a CPU, PyTorch raises the latter
        text = f"memory: {str(e) or 'too little'}; use smaller networks, batches or a shorter run"
        if not isinstance(e, MemoryError) and not re.search("allocate|out of memory", str(e)):
            raise
    print("error: " + text.replace("\n", " "), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
