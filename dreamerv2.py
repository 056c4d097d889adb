# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "torch>=2.10,<2.14", "numpy>=2,<2.6", "dm_control==1.0.50", "mujoco>=3.17,<4", "tyro>=1,<2",
#     "tensorboard>=2.20,<3", "imageio>=2.37,<3", "tqdm>=4.66,<5", "pytest>=8",
# ]
# ///
"""DreamerV2 for continuous control: actor and critic learn in the imagination of a learned model.

Hafner et al. 2021, Mastering Atari with Discrete World Models, https://arxiv.org/abs/2010.02193;
the authors' code: https://github.com/danijar/dreamerv2, here its dmc_vision configuration.
The switches for data efficiency are those of Bednarz's study, whose finished form is
https://github.com/vitreusx/msc-thesis, or of work that it cites. Their losses follow CURL (InfoNCE,
https://arxiv.org/abs/2004.04136), SPR (https://arxiv.org/abs/2007.05929) and masked world models
(MWM, https://arxiv.org/abs/2206.14244). Bednarz alg. 1 is that of the study's first draft.

    images --> encoder --> e' --+--> q(z' | h', e') --> z'   J(M): image, reward, KL(q || p)
                                |                            trains encoder, RSSM, decoder, reward
    z, h, a --> GRU --> h' -----+--> p(z' | h')
    z, h --> decoder, reward
    z, h -x-> actor --> a --> h' --> z' ~ p --x-> actor ...  15 steps, imagined from every z, h
        J(pi) trains the actor, through the model; J(v) trains the critic; x stops the gradient

    python dreamerv2.py --smoke                  # learns visibly in minutes without a GPU
    python dreamerv2.py --env-id walker-walk     # the published hyperparameters
    python dreamerv2.py --evaluate RUN_DIR       # play a trained agent and film it

Shapes: B batch, T time, N a batch of images or of states, C H W image (H also: imagined steps),
E embedding of an image, S categoricals of K classes (z: Z = S K numbers, one-hot), D recurrent
state h, F = Z + D features, A action.
Units: a frame is one control step of the simulator; a step is one decision of the agent, held for
action_repeat frames; an update is one gradient update on one batch. Row t of a sequence holds the
action that led to its image and the reward that came with it.
A tag such as [DreamerV2 KL] names the formula behind a line; D1 is the first difference below.

Differences from the paper and the authors' code
D1  The paper covers Atari and a humanoid. This script follows the authors' public configuration for
    the suite: smaller networks, gradients through the dynamics alone, 16 sequences of 50 steps.
    Their repository does not say whether it gave the curves that they published for the suite.
D2  Sequences also come from the running episode, and all possible starts are equally likely.
    Theirs draws a finished episode first.
D3  Actions come from the truncated normal's inverse CDF, with its argument clamped to 1e-6 and
    1 - 1e-6, where float32 is finite. Theirs come from TensorFlow's sampler. The gradient is the
    one that TensorFlow registers for its sampler. It takes the bounds as constants:
    d action / d loc = 1, d action / d std = (action - loc) / std. With the exact gradient,
    d action / d loc would be 0.25 on average at the initial deviation of 1.1, and the actor's
    gradient would be four times smaller at the start and nearly the same later.
D4  Evaluation has its own seed and random numbers, and ten episodes. Theirs plays one episode.
D5  By default everything is float32. Theirs is float16 in parts. Adam's epsilon is PyTorch's, added
    after the bias correction. One layer gives the actor's mean and deviation, so Glorot's bound is
    lower.
D6  The target critic starts as a copy of the critic. Theirs starts with weights of its own.
D7  The switches for data efficiency follow nobody's code exactly. InfoNCE and SPR compare 128
    numbers per image, with a target encoder like CURL's; InfoNCE's negatives are the batch without
    neighbouring images; the model's optimizer minimizes all auxiliary losses. A reset may come in
    mid-episode; then the agent's state starts anew, whichever weights were reset.
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
    total_frames: int = 2_000_000  # length of the run, in whole episodes [frames]
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
    eval_every_frames: int = 20_000  # interval between evaluations [frames]
    eval_episodes: int = 10  # episodes per evaluation (code 1)
    checkpoint_every_minutes: float = 5.0  # minimum time between two checkpoints [minutes]
    # data and updates
    action_repeat: int = 2  # frames per step (code 2 on every task)
    obs = "pixels"  # not a flag: this script sees nothing else
    image_size: int = 64  # width and height of an image [pixels]
    render: Literal["exact", "fast"] = "exact"  # fast: no shadows, coarse meshes; for smoke runs
    replay_capacity: int = 2_000_000  # number of newest rows to sample from; one row per image
    replay_device: Literal["auto", "cpu"] = "auto"  # cpu: keep the rows out of GPU memory
    warmup_steps: int = 1000  # random steps first; the last episode is completed (code 1000)
    pretrain_updates: int = 100  # updates in one burst after the warm-up (code 100)
    updates_per_step: float = 0.2  # updates per step after the burst (code 0.2)
    batch_size: int = 16  # samples per batch (sequences; code 16, paper 50)
    sequence_length: int = 50  # steps per sequence (code 50)
    horizon: int = 15  # imagined steps (paper 15)
    target_every_updates: int = 100  # update the target networks at every Nth update (code 100)
    # networks
    depth: int = 48  # channels of the first conv layer; every next one has twice as many (code 48)
    decoder_kernels: tuple[int, ...] = (5, 5, 6, 6)  # kernel sizes; the encoder has as many convs
    categoricals: int = 32  # categorical variables that z consists of (paper 32)
    classes: int = 32  # classes of each categorical (paper 32)
    deter_dim: int = 200  # size of h (code 200)
    hidden_dim: int = 200  # width of the hidden layers (of the RSSM; code 200)
    head_dim: int = 400  # width of the actor, the critic and all heads (paper 400)
    head_layers: int = 4  # hidden layers of the actor, the critic and all heads (paper 4)
    # losses
    gamma: float = 0.99  # discount per step (code 0.99)
    model_lr: float = 3e-4  # Adam's learning rate for the model (code 3e-4)
    actor_lr: float = 8e-5  # Adam's learning rate for the actor (code 8e-5)
    critic_lr: float = 8e-5  # Adam's learning rate for the critic (code 8e-5)
    return_lambda: float = 0.95  # lambda of the lambda returns (paper 0.95)
    kl_scale: float = 1.0  # weight of the KL (paper 1)
    kl_balance: float = 0.8  # share of the KL that trains the prior (paper 0.8)
    free_nats: float = 1.0  # mean KL below which the KL has no gradient (code 1)
    entropy_weight: float = 1e-4  # weight of the actor's entropy in J(pi) (paper 1e-4)
    weight_decay: float = 1e-6  # share that each weight loses per update (paper 1e-6)
    discount_head: bool = False  # learn when an episode ends for good, as in few tasks (lqr)
    # variants for data efficiency, all off
    model_every_updates: int = 1  # update the model at every Nth update
    behavior_every_updates: int = 1  # update actor and critic at every Nth update
    reset: Literal["none", "transition", "actor-critic", "all"] = "none"  # weights that are reset
    reset_every_updates: int = 25_000  # updates between resets, not counting catch-up updates
    reset_alpha: float = 0.8  # how far a reset goes: 0 keeps the weights, 1 makes them fresh
    catch_up_updates: int = 1000  # extra updates after each reset
    shift: int = 0  # largest random shift of the images that the model sees [pixels]
    encoder_tau: float = 0.05  # Polyak coefficient of the target encoder (CURL 0.05)
    infonce_weight: float = 0.0  # weight of InfoNCE between encoder and target encoder
    spr_weight: float = 0.0  # weight of predicting the target encoder's next five outputs (SPR)
    mask_ratio: float = 0.0  # share of feature map cells hidden in a second reconstruction; 0: none


SMOKE = {
    "env_id": "cheetah-run", "action_repeat": 4, "total_frames": 30_000, "image_size": 32,
    "render": "fast", "updates_per_step": 0.5, "batch_size": 12, "sequence_length": 12,
    "decoder_kernels": (5, 6, 6), "depth": 8, "categoricals": 8, "classes": 8, "deter_dim": 64,
    "hidden_dim": 64, "head_dim": 64, "head_layers": 2, "horizon": 8, "gamma": 0.98,
    "entropy_weight": 3e-3, "model_lr": 1e-3, "actor_lr": 3e-4, "critic_lr": 4e-4,
    "eval_every_frames": 5000, "compile": False,
}  # fmt: skip
MAY_BE_ZERO = ["catch_up_updates", "entropy_weight", "free_nats", "gamma", "infonce_weight"]
MAY_BE_ZERO += ["kl_balance", "kl_scale", "mask_ratio", "pretrain_updates", "return_lambda", "seed"]
MAY_BE_ZERO += ["shift", "spr_weight", "weight_decay"]
AT_MOST_ONE = ["encoder_tau", "gamma", "kl_balance", "mask_ratio", "reset_alpha", "return_lambda"]


def algorithm_checks(args):
    """Checks that only this script has: rows of (flag, whether it is wrong, what to do)."""
    encoded, decoded = image_sides(args)
    kernels = len(args.decoder_kernels)
    warmup = 1000 * math.ceil(args.warmup_steps / math.ceil(1000 / args.action_repeat))  # frames
    capacity = max(1000, args.replay_capacity)  # less is refused later
    most = min(500 // args.action_repeat, capacity // 4)  # half an episode; a quarter of the buffer
    length_is_wrong = not 2 <= args.sequence_length <= most
    five_ahead = args.spr_weight > 0 and args.sequence_length < 6
    idle = min(args.model_every_updates, args.behavior_every_updates) > 1  # at some updates
    return [
        ("total_frames", args.total_frames <= warmup, f"use more than the warm-up's {warmup}"),
        ("decoder_kernels", kernels < 2, "use two conv layers at least"),
        ("image_size", decoded != args.image_size, f"use {decoded}, for these --decoder-kernels"),
        ("decoder_kernels", encoded < 1, "use larger kernels, for larger images"),
        ("sequence_length", length_is_wrong, f"must be between 2 and {most}"),
        ("horizon", args.horizon < 2, "must be 2 at least"),
        ("spr_weight", five_ahead, "looks five steps ahead; use --sequence-length 6 at least"),
        ("model_every_updates", idle, "this or --behavior-every-updates must be 1"),
    ]


# ---- networks ----------------------------------------------------------------------------------
def image_sides(args):
    """Sides of the encoder's last feature map and of the decoder's output [pixels]."""
    encoded = args.image_size
    decoded = 1
    for kernel in args.decoder_kernels:
        encoded = (encoded - 4) // 2 + 1
        decoded = 2 * (decoded - 1) + kernel
    return encoded, decoded


def weight_init(module):
    """Glorot's uniform weights and zero biases, as Keras has; LayerNorm is here for resets."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()


class Float32Linear(nn.Linear):
    """A linear layer in float32: bfloat16 has too few digits for values, logits and means."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def mlp(in_dim, hidden_dim, layers, out_dim):
    """Hidden ELU layers and a linear one."""
    net = [nn.Linear(in_dim, hidden_dim), nn.ELU()]
    for _ in range(layers - 1):
        net += [nn.Linear(hidden_dim, hidden_dim), nn.ELU()]
    return nn.Sequential(*net, Float32Linear(hidden_dim, out_dim))


def preprocess(obs):
    """Scales uint8 images (B, C, H, W) to [0, 1], channels last; states pass unchanged."""
    if obs.dtype != torch.uint8:
        return obs
    return obs.to(torch.float32, memory_format=torch.channels_last) / 255


def random_shift(obs, pixels):
    """Moves images (B, T, C, H, W) by up to `pixels` each way, all images of a sequence alike. The
    border is repeated."""
    if not pixels:
        return obs
    place = torch.arange(obs.shape[-1], device=obs.device)
    offset = torch.randint(-pixels, pixels + 1, (2, len(obs), 1), device=obs.device)
    rows, columns = (place + offset).clamp(0, len(place) - 1)  # (B, H), (B, W)
    obs = obs.gather(3, rows[:, None, None, :, None].expand_as(obs))
    return obs.gather(4, columns[:, None, None, None].expand_as(obs))


def one_hot_sample(logits, uniform):
    """One class of each categorical (..., S, K) as a one-hot z (..., S * K), from uniform noise of
    the logits' shape: argmax p / Exp(1) is a sample, as in the Gumbel-max trick."""
    probs = torch.softmax(logits, -1)
    index = (probs.detach() / -torch.log(uniform)).argmax(-1, keepdim=True)  # without a gradient
    hard = torch.zeros_like(logits).scatter_(-1, index, 1.0)
    # straight-through: the value is one-hot, the gradient is that of the probabilities
    return (hard + (probs - probs.detach())).flatten(-2)


def categorical_kl(q, p):
    """KL(q || p) of S categoricals with logits (..., S, K), summed over them."""
    log_q = torch.log_softmax(q, -1)
    log_p = torch.log_softmax(p, -1)
    return (log_q.exp() * (log_q - log_p)).sum((-1, -2))


def truncated_normal(loc, std, uniform):
    """Action from N(loc, std) cut off at -1 and 1, by the inverse CDF of uniform noise, and the
    entropy of each of its dimensions; all (..., A)."""
    low = (-1 - loc) / std
    high = (1 - loc) / std
    cdf_low = torch.special.ndtr(low)
    mass = torch.special.ndtr(high) - cdf_low
    p = (cdf_low + uniform * mass).clamp(1e-6, 1 - 1e-6)
    # detached: the gradient of the action ignores that the bounds shift, as the authors' does; D3
    x = loc + std * math.sqrt(2) * torch.erfinv(2 * p - 1).detach()
    action = x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()  # clipped, with the gradient of x
    density = [torch.exp(-0.5 * v.square()) / math.sqrt(2 * math.pi) for v in (low, high)]
    entropy = 0.5 * math.log(2 * math.pi * math.e) + torch.log(std * mass)
    return action, entropy + (low * density[0] - high * density[1]) / (2 * mass)


def lambda_returns(reward, value, discount, lambda_):
    """Returns R_0 to R_{H-1} (H, N): R_i = r_i + d_i ((1 - lambda) v_{i+1} + lambda R_{i+1}) and
    R_H = v_H. Reward and discount (H, N) are at states 0 to H - 1, value (H, N) at 1 to H."""
    returns = [value[-1]]
    for r, v, d in zip(reward.flip(0), value.flip(0), discount.flip(0), strict=True):
        returns.append(r + d * ((1 - lambda_) * v + lambda_ * returns[-1]))
    return torch.stack(returns[:0:-1])


class Permute(nn.Module):
    """Reorders the dimensions. Between convs and linear layers the channels come last, as they do
    in memory, so that nothing is copied."""

    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


class Encoder(nn.Module):
    """Images (N, C, H, W) in [-0.5, 0.5] -> feature maps of the second layer, embeddings (N, E)."""

    def __init__(self, obs_shape, args):
        super().__init__()
        layers = []
        channels = obs_shape[0]
        for i in range(len(args.decoder_kernels)):
            layers += [nn.Conv2d(channels, args.depth * 2**i, 4, 2), nn.ELU()]
            channels = args.depth * 2**i
        self.net = nn.Sequential(*layers, Permute(0, 2, 3, 1), nn.Flatten())
        self.dim = channels * image_sides(args)[0] ** 2

    def forward(self, images):
        maps = self.net[:4](images)  # two convs with their ELUs; masked_loss goes on from here
        return maps, self.net[4:](maps)


class Decoder(nn.Module):
    """Features (N, F) -> means of the images (N, C, H, W) in [-0.5, 0.5]."""

    def __init__(self, obs_shape, in_dim, args):
        super().__init__()
        n = len(args.decoder_kernels)
        # if there are four layers, 32 times the depth comes first, and then 4, 2, 1 times
        channels = [args.depth * 2**i for i in (n + 1, *range(n - 2, -1, -1))] + [obs_shape[0]]
        layers = []
        for i, kernel in enumerate(args.decoder_kernels):
            layers += [nn.ConvTranspose2d(channels[i], channels[i + 1], kernel, 2), nn.ELU()]
        self.fc = nn.Linear(in_dim, channels[0])
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, features):
        first = self.net[0]  # its input is one pixel: as a matrix product it is five times as fast
        weight = first.weight.permute(0, 2, 3, 1)  # (C', k, k, C), a view: channels are last
        x = self.fc(features) @ weight.flatten(1)  # (N, k * k * C)
        x = x.unflatten(1, weight.shape[1:]) + first.bias
        return self.net[1:](x.permute(0, 3, 1, 2))


class RSSM(nn.Module):
    """Recurrent state-space model: h' = GRU(h, z, a), prior p(z | h), posterior q(z | h, e)."""

    def __init__(self, e_dim, action_dim, args):
        super().__init__()
        self.shape = (args.categoricals, args.classes)
        self.z_dim = args.categoricals * args.classes
        self.h_dim = args.deter_dim
        n = args.hidden_dim
        self.gru_in = nn.Linear(self.z_dim + action_dim, n)
        self.gru = nn.Linear(n + self.h_dim, 3 * self.h_dim)
        self.gru_norm = nn.LayerNorm(3 * self.h_dim, eps=1e-3)
        self.prior_in = nn.Linear(self.h_dim, n)
        self.prior_out = Float32Linear(n, self.z_dim)
        self.post_in = nn.Linear(self.h_dim + e_dim, n)
        self.post_out = Float32Linear(n, self.z_dim)

    def noise(self, *shape):
        """Uniform noise (*shape, S, K), from which z is drawn."""
        return torch.rand(*shape, *self.shape, device=self.gru.weight.device)

    def cell(self, x, h):
        """The GRU: h' (..., D) from h and the ELU of x. One LayerNorm covers all gates; the
        reset gate multiplies the tanh's whole argument. PyTorch's GRUCell has no norm, and its
        reset gate multiplies only what comes from h."""
        gates = self.gru_norm(self.gru(torch.cat([F.elu(x), h], -1)))
        reset, candidate, update = gates.chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h

    def prior(self, h):
        """Logits (..., S, K) of p(z | h)."""
        return self.prior_out(F.elu(self.prior_in(h))).unflatten(-1, self.shape)

    def imagine_step(self, z, h, action, noise):
        """Next state z' (..., Z), h' (..., D) after an action (..., A), without an image."""
        h = self.cell(self.gru_in(torch.cat([z, action], -1)), h)
        return one_hot_sample(self.prior(h), noise), h

    def observe_step(self, z, h, x, y, noise):
        """Next state z' (B, Z), h' (B, D) and the posterior's logits (B, S, K); x is
        the action's share of gru_in's output, and y the embedding's share of post_in's."""
        w_z = self.gru_in.weight[:, : self.z_dim]
        w_h = self.post_in.weight[:, : self.h_dim]
        h = self.cell(F.linear(z, w_z) + x, h)
        post = self.post_out(F.elu(F.linear(h, w_h) + y)).unflatten(-1, self.shape)
        return one_hot_sample(post, noise), h, post

    def observe(self, e, action, is_first, noise, z=None, h=None):
        """From embeddings e (B, T, E), the actions before them (B, T, A), is_first (B, T), noise
        (B, T, S, K) and the state z, h before: z (B, T, Z), h (B, T, D), and the logits of
        posterior and prior (B, T, S, K). Where is_first, the state before and the action are 0."""
        keep = 1.0 - is_first[..., None].float()
        # the parts of gru_in and post_in that read a and e, for all times at once; z and h follow
        x = F.linear(action * keep, self.gru_in.weight[:, self.z_dim :], self.gru_in.bias)
        y = F.linear(e, self.post_in.weight[:, self.h_dim :], self.post_in.bias)
        z = e.new_zeros(len(e), self.z_dim) if z is None else z
        h = e.new_zeros(len(e), self.h_dim) if h is None else h
        states = []
        for t in range(e.shape[1]):
            state = z * keep[:, t], h * keep[:, t]
            z, h, post = self.observe_step(*state, x[:, t], y[:, t], noise[:, t])
            states.append((z, h, post))
        z, h, post = (torch.stack(values, 1) for values in zip(*states, strict=True))
        return z, h, post, self.prior(h)


class Actor(nn.Module):
    """Features (..., F) -> mean and standard deviation (..., A) of a normal before truncation."""

    def __init__(self, in_dim, action_dim, args):
        super().__init__()
        self.trunk = mlp(in_dim, args.head_dim, args.head_layers, 2 * action_dim)

    def forward(self, features):
        mean, std = self.trunk(features).chunk(2, -1)
        return torch.tanh(mean), 2 * torch.sigmoid(std / 2) + 0.1  # 0.1 to 2.1, initially about 1.1


def minimize(loss, optimizer):
    """One step of the optimizer on `loss`. Gradients go to the optimizer's own parameters and
    nowhere else, whatever the loss was computed with. They are clipped to a norm of 100."""
    optimizer.zero_grad()
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    with torch.autocast(loss.device.type, enabled=False):  # the types are those of the forward pass
        loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, 100.0)
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
    """What an update does."""

    reset: bool  # it begins with a reset
    model: bool
    behavior: bool  # it moves actor and critic
    target: bool


class Agent(nn.Module):
    """DreamerV2. Read update() first: it is the algorithm; each loss is a method."""

    updates = 0  # number of updates so far; the training loop sets it
    # the methods that --compile turns into faster kernels
    compiled = ["rssm.observe_step", "imagine_step", "model_loss"]

    def __init__(self, args, spec):
        super().__init__()
        self.args = args
        self.spec = spec
        head = functools.partial(mlp, hidden_dim=args.head_dim, layers=args.head_layers)
        self.encoder = Encoder(spec.obs_shape, args)
        e_dim = self.encoder.dim
        self.rssm = RSSM(e_dim, spec.action_dim, args)
        f_dim = self.rssm.z_dim + self.rssm.h_dim
        self.decoder = Decoder(spec.obs_shape, f_dim, args)
        self.reward_head = head(f_dim, out_dim=1)
        self.discount_head = head(f_dim, out_dim=1) if args.discount_head else None
        self.masked_decoder = Decoder(spec.obs_shape, e_dim, args) if args.mask_ratio else None
        self.masked_reward_head = head(e_dim, out_dim=1) if args.mask_ratio else None
        self.similarity = Float32Linear(128, 128) if args.infonce_weight else None
        self.predictor = head(f_dim, out_dim=e_dim) if args.spr_weight else None
        compares = args.infonce_weight or args.spr_weight
        self.projection = Float32Linear(e_dim, 128) if compares else None
        self.world = [name for name, _ in self.named_children()]  # what J(M) trains
        self.actor = Actor(f_dim, spec.action_dim, args)
        self.critic = head(f_dim, out_dim=1)
        self.register_buffer("reset_count", torch.zeros(1, 1, dtype=torch.int64))  # for act()
        self.apply(weight_init).to(args.device, memory_format=torch.channels_last)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)  # D6
        if self.projection is not None:
            self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.target_projection = copy.deepcopy(self.projection).requires_grad_(False)

        def adam(names, lr):  # D5
            parameters = [p for name in names for p in self.get_submodule(name).parameters()]
            decay = args.weight_decay / lr  # AdamW multiplies it by lr, theirs does not
            return torch.optim.AdamW(parameters, lr, eps=1e-5, weight_decay=decay, fused=True)

        # Who trains what: each loss has its own optimizer and moves that optimizer's parameters and
        # nothing else, although J(pi) goes through the model and the target critic.
        self.optimizers = {
            "model": adam(self.world, args.model_lr),
            "actor": adam(["actor"], args.actor_lr),
            "critic": adam(["critic"], args.critic_lr),
        }

    def encode(self, obs, encoder):
        """Of uint8 images (B, T, C, H, W): the images in [-0.5, 0.5] (B * T, C, H, W), their
        feature maps (B * T, ...), and their embeddings (B, T, E)."""
        images = preprocess(obs.flatten(0, 1)) - 0.5
        maps, e = encoder(images)
        return images, maps, e.unflatten(0, obs.shape[:2])

    def image_loss(self, means, images):
        """-log N(image | mean, 1), summed over the pixels; both (N, C, H, W)."""
        error = (means - images).square().sum() / len(images)
        return 0.5 * error + 0.5 * math.log(2 * math.pi) * images[0].numel()  # [DreamerV2 image]

    def reward_loss(self, mean, reward):
        """-log N(reward | mean, 1); both (..., 1)."""
        return 0.5 * F.mse_loss(mean, reward) + 0.5 * math.log(2 * math.pi)  # [DreamerV2 reward]

    def discount_loss(self, logit, discount):
        """Cross entropy with gamma * discount as the probability; both (B, T, 1)."""
        target = self.args.gamma * discount
        return F.binary_cross_entropy_with_logits(logit, target)  # [DreamerV2 discount]

    def kl_loss(self, post, prior):
        """KL of posterior to prior from logits (B, T, S, K). The share kl_balance trains the prior,
        the rest trains the posterior. Below free_nats its mean trains nothing. Also gives the
        plain KL."""
        to_prior = categorical_kl(post.detach(), prior).mean()  # trains the prior alone
        to_post = categorical_kl(post, prior.detach()).mean()  # trains the posterior alone
        free = self.args.free_nats
        balance = self.args.kl_balance
        kl = balance * to_prior.clamp(min=free) + (1 - balance) * to_post.clamp(min=free)
        return kl, to_post  # [DreamerV2 KL]

    def contrastive_loss(self, e, keys):
        """InfoNCE: the embedding e (B, T, E) of an image must find the key of the same image under
        a random shift, among the keys (B, T, 128) of the batch except those close by in its
        sequence. An image that two sequences hold counts as a negative of itself, as in CURL."""
        query = self.similarity(self.projection(e)).flatten(0, 1)  # (N, 128)
        index = torch.arange(len(query), device=e.device)
        sequence = index // e.shape[1]
        apart = (index[:, None] - index).abs()
        near = (sequence[:, None] == sequence) & (apart > 0) & (apart <= 3)  # they look the same
        with torch.autocast(e.device.type, enabled=False):  # as in Float32Linear
            logits = (query @ keys.flatten(0, 1).T).masked_fill(near, -math.inf)  # (N, N)
        return F.cross_entropy(logits, index)  # [CURL InfoNCE]

    def spr_loss(self, z, h, action, keys):
        """From every state z (B, T, Z), h (B, T, D) the model goes five steps ahead by the real
        actions (B, T, A) and predicts the keys (B, T, 128) of the images there: 2 - 2 cosine."""
        loss = 0.0
        for k in range(1, 6):
            z, h = z[:, :-1], h[:, :-1]  # the last state has no image so far ahead
            noise = self.rssm.noise(*z.shape[:2])
            z, h = self.rssm.imagine_step(z, h, action[:, k:], noise)
            predicted = self.projection(self.predictor(torch.cat([z, h], -1)))
            loss = loss + 2 - 2 * F.cosine_similarity(predicted, keys[:, k:], -1).mean()
        return loss / 5  # [SPR loss]

    def masked_loss(self, maps, images, reward):
        """Reconstruction of whole images (N, C, H, W) and of the reward (N, 1) from an embedding
        for which cells of the feature maps (N, c, h, w) were hidden."""
        hidden = torch.rand_like(maps[:, :1]) < self.args.mask_ratio
        e = self.encoder.net[4:](maps.masked_fill(hidden, 0.0))
        image_loss = self.image_loss(self.masked_decoder(e), images)
        return image_loss + self.reward_loss(self.masked_reward_head(e), reward)  # [MWM light]

    def model_loss(self, batch, images, maps, e, z, h, post, prior):
        """J(M) of a batch, its images and what the model makes of them; and metrics."""
        features = torch.cat([z, h], -1)  # (B, T, F)
        losses = {}
        losses["loss/kl"], kl = self.kl_loss(post, prior)
        losses["loss/image"] = self.image_loss(self.decoder(features.flatten(0, 1)), images)
        losses["loss/reward"] = self.reward_loss(self.reward_head(features), batch["reward"])
        if self.discount_head is not None:
            logit = self.discount_head(features)
            losses["loss/discount"] = self.discount_loss(logit, batch["discount"])
        if self.projection is not None:
            with torch.no_grad():  # the target follows the encoder by a moving average
                moved = random_shift(batch["obs"], 4)  # as in SPR and DrQ
                keys = self.target_projection(self.encode(moved, self.target_encoder)[2])
        if self.similarity is not None:
            losses["loss/contrastive"] = self.contrastive_loss(e, keys)
        if self.predictor is not None:
            losses["loss/spr"] = self.spr_loss(z, h, batch["action"], keys)
        if self.masked_decoder is not None:
            losses["loss/masked"] = self.masked_loss(maps, images, batch["reward"].flatten(0, 1))
        weights = {
            "loss/kl": self.args.kl_scale,
            "loss/contrastive": self.args.infonce_weight,
            "loss/spr": self.args.spr_weight,
        }
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items())
        return loss, {**losses, "stat/kl": kl}

    def imagine_step(self, features, z, h, uniform, noise):
        """The actor's next step in the model: z (N, Z), h (N, D), and the actor's entropy (N,)."""
        # no gradient through what the actor sees, only through what its actions bring about
        loc, std = self.actor(features.detach())
        action, entropy = truncated_normal(loc, std, uniform)
        z, h = self.rssm.imagine_step(z, h, action, noise)
        return z, h, entropy.sum(-1)

    def imagine(self, z, h):
        """The actor acts in the model, from states z (N, Z), h (N, D) on. Gives the features
        (H + 1, N, F), and the actor's entropies (H, N) at all but the last. Actions carry
        gradients."""
        features = [torch.cat([z, h], -1)]
        entropies = []
        noise = self.rssm.noise(self.args.horizon, len(z))
        uniform = torch.rand(*noise.shape[:2], self.spec.action_dim, device=z.device)
        for t in range(self.args.horizon):
            z, h, entropy = self.imagine_step(features[-1], z, h, uniform[t], noise[t])
            features.append(torch.cat([z, h], -1))  # (N, F)
            entropies.append(entropy)
        return torch.stack(features), torch.stack(entropies)

    def discounts(self, features, first_discount):
        """Discounts of imagined states (H + 1, N), and weights, the product of the discounts before
        each state. Without the discount head all discounts are gamma. With it, the first is gamma
        times the replay buffer's (N,), and the others are the head's output, with gamma in it."""
        discount = features.new_full(features.shape[:2], self.args.gamma)
        if self.discount_head is not None:
            predicted = torch.sigmoid(self.discount_head(features[1:])).squeeze(-1)
            discount = torch.cat([self.args.gamma * first_discount[None], predicted])
        weights = torch.cat([torch.ones_like(discount[:1]), discount[:-1]]).cumprod(0)
        return discount, weights.detach()  # or the actor could gain by making losses weigh less

    def returns(self, features, discount):
        """Lambda returns (H, N) of imagined features (H + 1, N, F) with discounts (H + 1, N). State
        i comes with reward i, so a state's value includes its own reward."""
        reward = self.reward_head(features[:-1]).squeeze(-1)
        value = self.target_critic(features[1:]).squeeze(-1)
        return lambda_returns(reward, value, discount[:-1], self.args.return_lambda)

    def actor_loss(self, returns, entropies, weights):
        """Minus the returns after the actions and their entropies, both (H, N), averaged with
        weights (H + 1, N). The gradient flows through the model's steps."""
        # Action i leads to state i + 1, and return i + 1 is the first that it changes. The last
        # action counts only through the value of the last state, and its entropy does not count.
        objective = returns[1:] + self.args.entropy_weight * entropies[:-1]
        return -(weights[:-2] * objective).mean()  # [DreamerV2 actor]

    def critic_loss(self, features, returns, weights):
        """-log N(return | critic, 1) at imagined features (H + 1, N, F) except the last."""
        value = self.critic(features[:-1]).squeeze(-1)
        nll = 0.5 * (value - returns).square() + 0.5 * math.log(2 * math.pi)
        return (weights[:-1] * nll).mean()  # [DreamerV2 critic]

    def resets_due(self, updates):
        """Number of resets so far, with one that comes at this update. Before reset k there are
        k * reset_every_updates ordinary updates and the catch-up updates of all earlier resets."""
        extra = self.args.catch_up_updates
        period = self.args.reset_every_updates + extra
        return 0 if self.args.reset == "none" else max(0, updates + extra) // period

    @torch.no_grad()  # weights are set, not learned
    def reset_weights(self):
        """Moves weights towards fresh ones by the share reset_alpha, sets their moments and counter
        in Adam to 0, and copies the weights to their targets."""
        transition = ("gru_in", "gru", "gru_norm", "prior_in", "prior_out")
        names = {
            "transition": [f"rssm.{name}" for name in transition],
            "actor-critic": ["actor", "critic"],
            "all": [*self.world, "actor", "critic"],
        }
        for name in names[self.args.reset]:
            module = self.get_submodule(name)
            fresh = copy.deepcopy(module).apply(weight_init)
            soft_update(fresh, module, self.args.reset_alpha)
            for optimizer in self.optimizers.values():
                for p in module.parameters():
                    for value in optimizer.state.get(p, {}).values():
                        value.zero_()
            if f"target_{name}" in self._modules:
                soft_update(module, self.get_submodule(f"target_{name}"), 1.0)
        self.reset_count += 1

    def cadence(self):
        """What this update does. By default target_critic is copied after updates 1, 101, ..."""
        args = self.args
        n = self.updates
        return Cadence(
            reset=self.resets_due(n) > self.resets_due(n - 1),
            model=n % args.model_every_updates == 0,
            behavior=n % args.behavior_every_updates == 0,
            target=n % (args.behavior_every_updates * args.target_every_updates) == 0,
        )

    def sample(self, buffer, rng):
        """The sequences that update() takes. The model starts anew at the first row of each."""
        args = self.args
        length = args.sequence_length
        batch = sequences(buffer, rng, args.batch_size, length, length)  # D2  [Bednarz alg. 1:3]
        batch["is_first"][:, 0] = True  # the state before it is unknown: zeros, without its action
        return batch

    def update_model(self, batch, due):
        """One step of the model, if it is due. Gives the states z (B, T, Z), h (B, T, D) as the
        model saw them before that step, and metrics."""
        with torch.set_grad_enabled(due):  # without a step there is nothing to learn
            obs = random_shift(batch["obs"], self.args.shift)
            images, maps, e = self.encode(obs, self.encoder)
            noise = self.rssm.noise(*e.shape[:2])
            z, h, *logits = self.rssm.observe(e, batch["action"], batch["is_first"], noise)
        if not due:
            return z, h, {}
        loss, metrics = self.model_loss(batch, images, maps, e, z, h, *logits)
        minimize(loss, self.optimizers["model"])
        if self.projection is not None:
            soft_update(self.encoder, self.target_encoder, self.args.encoder_tau)
            soft_update(self.projection, self.target_projection, self.args.encoder_tau)
        return z, h, metrics

    def update_behavior(self, z, h, first_discount, target_due):
        """One step of actor and critic from states z (N, Z), h (N, D) and their discounts (N,)."""
        features, entropies = self.imagine(z, h)  # (H + 1, N, F), (H, N)  [Bednarz alg. 1:5]
        discount, weights = self.discounts(features, first_discount)  # [Bednarz alg. 1:6]
        returns = self.returns(features, discount)  # (H, N)
        actor_loss = self.actor_loss(returns, entropies, weights)
        # detached: this loss moves the critic, and neither the actor nor the model
        critic_loss = self.critic_loss(features.detach(), returns.detach(), weights)
        minimize(actor_loss, self.optimizers["actor"])
        minimize(critic_loss, self.optimizers["critic"])
        if target_due:
            soft_update(self.critic, self.target_critic, 1.0)
        metrics = {"loss/actor": actor_loss, "loss/critic": critic_loss}
        metrics |= {"stat/entropy": entropies.mean(), "stat/imagined_return": returns.mean()}
        return metrics

    def update(self, batch):
        """One update from a batch of sample(); gives metrics as 0-d tensors.

        On CUDA the update is recorded once for each cadence and then replayed. The recording
        freezes every Python number. A number that changes from update to update must be a tensor
        of the batch, or a field of cadence() that takes few values.
        """
        due = self.cadence()
        if due.reset:
            self.reset_weights()
        z, h, metrics = self.update_model(batch, due.model)  # [Bednarz alg. 1:4]
        if due.behavior:
            # imagination starts from every state; detached: the model has a loss of its own
            z, h = z.detach().flatten(0, 1), h.detach().flatten(0, 1)  # (N, Z), (N, D)
            discount = batch["discount"].flatten()
            metrics |= self.update_behavior(z, h, discount, due.target)  # [Bednarz alg. 1:7]
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()  # acting needs no gradient
    def act(self, step, carry, explore=False):
        """Action (A,) for a Step, and the next carry, the state; it is None before an episode's
        first step."""
        obs = torch.as_tensor(step.obs, device=self.args.device)[None, None]
        action = torch.as_tensor(step.action, device=self.args.device)[None, None]
        carry = carry or {"z": None, "h": None, "reset_count": self.reset_count - 1}
        # (1, 1): an episode starts; or weights were reset, and the state says nothing any more; D7
        is_first = carry["reset_count"] != self.reset_count
        *_, e = self.encode(obs, self.encoder)
        noise = self.rssm.noise(1, 1)
        z, h, *_ = self.rssm.observe(e, action, is_first, noise, carry["z"], carry["h"])
        loc, std = self.actor(torch.cat([z, h], -1)[0])
        action = truncated_normal(loc, std, torch.rand_like(loc))[0] if explore else loc
        return action[0], {"z": z[0], "h": h[0], "reset_count": self.reset_count.clone()}

    @torch.no_grad()  # only to be looked at
    def images(self, buffer, rng):
        """{name: uint8 (H, W, 3)}: a sequence of T images; below it the model, which sees the first
        five and imagines the others from the actions alone; below that the model's error, which is
        grey where there is none."""
        length = min(self.args.sequence_length, 20)
        batch = sequences(buffer, rng, 1, length, length)
        obs, action = batch["obs"], batch["action"]
        noise = self.rssm.noise(1, length)
        is_first = torch.arange(length, device=obs.device)[None] == 0
        *_, e = self.encode(obs, self.encoder)
        seen = (x[:, :5] for x in (e, action, is_first, noise))
        z, h, *_ = self.rssm.observe(*seen)
        features = [torch.cat([z, h], -1)]
        z, h = z[:, -1], h[:, -1]
        for t in range(5, length):
            z, h = self.rssm.imagine_step(z, h, action[:, t], noise[:, t])
            features.append(torch.cat([z, h], -1)[:, None])
        truth = obs[0] / 255  # (T, C, H, W)
        model = self.decoder(torch.cat(features, 1)[0]) + 0.5
        rows = torch.stack([truth, model, (model - truth + 1) / 2])  # (3, T, C, H, W)
        rows = (rows * 255).round().clamp(0, 255).to(torch.uint8)
        strip = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (3 * H, T * W, C)
        return {"open_loop": strip.cpu().numpy()}


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
    """Number of updates that are due when this step is taken, with the catch-up updates that
    follow each reset.

    The loop makes at most ceil(updates_per_step) updates at a step, and the other catch-up updates
    after the episode. That is all right because resets go by the number of the update (see
    resets_due) and not by the step.
    """
    since = step - args.warmup_steps
    due = args.pretrain_updates + int(args.updates_per_step * since) if since >= 0 else 0
    resets = due // args.reset_every_updates if args.reset != "none" else 0
    return due + args.catch_up_updates * resets


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
