# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "torch>=2.10,<2.14", "numpy>=2,<2.6", "dm_control==1.0.50", "mujoco>=3.17,<4", "tyro>=1,<2",
#     "tensorboard>=2.20,<3", "imageio>=2.37,<3", "tqdm>=4.66,<5", "pytest>=8",
# ]
# ///
"""PEARL from pixels: an agent that infers from a few trajectories which task it has been given.

Rakelly et al. 2019, Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context
Variables, https://arxiv.org/abs/1903.08254; their code: https://github.com/katerakelly/oyster
From pixels: designs 1 to 3 of Marshall & Khasar (cnn-test, cnn, cnn-rl), and two without states.

    context {(x, a, r[, next x])} --> MLP --> a Gaussian each --> their product q(z | c) --> z
                            J(Q) and the KL to N(0, I) train it
    x, a, z --> Q1, Q2       x, z -x-> V, actor       -x->: no gradient into z, nor into the CNN
    images --> CNN --> x     trained as --obs-mode says

    state     x is the true state, standardised
    cnn       x is a CNN's estimate of it, by regression
    cnn-rl    as cnn; J(Q) trains the CNN, too, with rl_weight times its gradient
    cnn-test  x is the true state in training and the CNN's estimate of it in tests
    critic    x is features that J(Q) trains
    ae        as critic; a reconstruction trains them, too

    python pearl_pixels.py --smoke                  # learns visibly in minutes without a GPU
    python pearl_pixels.py --env-id cheetah-vel     # 20 target velocities to train on, 10 to test
    python pearl_pixels.py --evaluate RUN_DIR       # adapt to the test tasks, and film it

Shapes: T tasks, B transitions and N context transitions of each, M = T B, K stacked images,
C H W image, S state, X what the agent sees of it (x), L task variable (z), A action.
Units: a frame is one control step of the simulator and one decision of the agent; a trajectory is
trajectory_steps frames of one task; a visit is a task's trajectories in an iteration; an update is
one gradient update on T tasks. A run ends with a whole iteration.
Tags in brackets, such as [PEARL J(Q)], name the formula behind a line; D1 is the first difference
below. M&K: Marshall & Khasar; SAC: arxiv.org/abs/1812.05905; SAC+AE: arxiv.org/abs/1910.01741.

Differences from the paper and the authors' code
D1  An update draws z once. Theirs draws twice and uses the second z, equal in distribution.
D2  J(Q) and the KL have one backward pass. Theirs makes two, with an equal gradient.
D3  There is no recurrent context encoder. In their code it is marked as not working.
D4  Evaluation has random numbers of its own and infers z anew after each trajectory. In theirs the
    second trajectory has z from the prior, too, and the third one counts.
D5  The bodies are dm_control's, not Gym's. Returns cannot be compared with the paper's.
D6  The designs from pixels were published as slides without code. What they leave open is ours.
D7  V and actor learn from x as it was before the CNN's step. The context does not train the CNN.
D8  Hidden weights start as PyTorch's do. Theirs start as rlkit's, whose bound uses the fan-out.
D9  States are standardised by the initial trajectories' mean and deviation. Theirs are not.
D10 The default run is smaller. Theirs has 100 training and 30 test tasks, 2000 initial steps, 2000
    updates per iteration, each with 256 transitions of each task, and 500 iterations.
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
    env_id: str = "cheetah-vel"  # <domain>-<task> of the dm_control suite (here a family of tasks)
    smoke: bool = False  # a small run that learns visibly in minutes on two CPU cores
    seed: int = 1  # random seed for the environment, the networks and the sampling
    total_frames: int = 520_000  # length of the run, in whole episodes [frames] (here iterations)
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto uses a GPU if there is one
    resume: str = ""  # continue the run in this folder, with its arguments as defaults
    evaluate: str = ""  # play the trained agent of the run in this folder, and film it
    video: bool = True  # film the first episode of every evaluation (here the first task's)
    track: bool = False  # also log to Weights & Biases
    runs_dir: str = "runs"  # parent of the run's folder
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # bf16 on a CPU wants AVX512_BF16 or AMX
    cuda_graph: bool = True  # on CUDA, launch an update or an action as one graph
    compile: bool = True  # with CUDA graphs, fuse small kernels; the run starts a minute later
    threads: int = 0  # CPU threads (0: PyTorch's choice); 1 is best for runs side by side
    delete_replay: bool = False  # remove the replay buffer's files when the run has finished
    eval_every_frames: int = 20_000  # interval between evaluations [frames]
    eval_episodes: int = 2  # episodes per evaluation (adaptations to each task)
    checkpoint_every_minutes: float = 5.0  # minimum time between two checkpoints [minutes]
    # data and updates
    action_repeat: int = 1  # frames per step (always 1)
    image_size: int = 64  # width and height of an image [pixels]
    render: Literal["exact", "fast"] = "exact"  # fast: no shadows, coarse meshes; for smoke runs
    frame_stack: int = 3  # images per observation
    replay_capacity = math.inf  # not a flag: samples reach back to the run's first trajectory
    replay_device: Literal["auto", "cpu"] = "auto"  # cpu: keep the rows out of GPU memory
    batch_size: int = 64  # samples per batch (transitions of each task; code 256)
    train_tasks: int = 20  # tasks to train on, if the family is infinite (code 100)
    test_tasks: int = 10  # tasks to test on, if the family is infinite (code 30)
    task_seed: int = 1337  # random seed of the tasks' parameters
    trajectory_steps: int = 0  # steps per trajectory; 0: the family's
    initial_steps: int = 1000  # steps per training task by the untrained policy (code 2000)
    tasks_per_iteration: int = 5  # training tasks that an iteration visits (code 5)
    prior_steps: int | None = None  # steps per visit by the prior (None: 400; cheetah-dir 1000)
    posterior_steps: int = 0  # steps per visit with an inferred z (code 0)
    extra_steps: int | None = None  # steps kept out of the context (None: 600; cheetah-dir 1000)
    context_size: int | None = None  # transitions to infer z from (None: 100; cheetah-dir 256)
    context_trajectories: int = 4  # maximum of trajectories to infer z from in an evaluation
    meta_batch: int | None = None  # tasks per update (None: 16; cheetah-dir 4)
    updates_per_iteration: int = 1000  # updates per iteration, after its visits (code 2000)
    cnn_pretrain_updates: int = 1000  # updates of the CNN on the initial trajectories (cnn modes)
    # networks
    filters: int = 32  # channels of every conv layer
    conv_strides: tuple[int, ...] = (2, 2, 2, 2)  # one 3x3 conv layer each
    feature_dim: int = 50  # size of an image's features (x with --obs-mode critic or ae)
    latent_dim: int = 5  # size of z (code 5)
    hidden_dim: int = 300  # width of the hidden layers (code 300)
    context_dim: int = 200  # width of the context encoder's hidden layers (code 200)
    # losses
    gamma: float = 0.99  # discount per step (code 0.99)
    lr: float = 3e-4  # Adam's learning rate for actor, critics and context encoder (code 3e-4)
    cnn_lr: float = 3e-4  # Adam's learning rate for CNN and decoder
    tau: float = 0.005  # Polyak coefficient of the target V or Qs (code 0.005)
    encoder_tau: float = 0.05  # Polyak coefficient of the target encoder
    kl_lambda: float = 0.1  # weight of the KL, which is a sum over tasks (code 0.1)
    reward_scale: float = 5.0  # factor of the rewards in J(Q), not in the context (code 5)
    rl_weight: float = 0.1  # weight of J(Q)'s gradient in the CNN with --obs-mode cnn-rl
    latent_weight: float = 1e-6  # weight of the penalty |z|^2 / 2 (of x, with --obs-mode ae)
    decoder_weight_decay: float = 1e-7  # L2 on the decoder, inside Adam
    # variants
    obs_mode: Literal["state", "cnn-test", "cnn", "cnn-rl", "ae", "critic"] = "critic"  # what x is
    critic: Literal["v", "q"] = "v"  # v: V, fixed alpha (paper); q: target Qs, learned alpha
    oracle: bool = False  # z is the task's parameter, and nothing is inferred
    next_obs_in_context: bool = False  # add the next x to the context; always on if dynamics differ

    def __post_init__(self):
        family = FAMILIES.get(self.env_id, FAMILIES["cheetah-vel"])  # others are refused later
        self.action_repeat = self.action_repeat or 1
        self.trajectory_steps = self.trajectory_steps or family.steps
        self.frame_stack = 1 if self.obs == "state" else self.frame_stack
        self.next_obs_in_context |= family.reward is suite_reward  # the next x shows the dynamics
        for name, value in PUBLISHED.get(self.env_id, PUBLISHED["cheetah-vel"]).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def obs(self):
        """What PixelEnv shows, pixels or state."""
        return "state" if self.obs_mode == "state" else "pixels"


PUBLISHED = {  # the code's values for None; other families use those of cheetah-vel
    "cheetah-vel": {"prior_steps": 400, "extra_steps": 600, "meta_batch": 16, "context_size": 100},
    "cheetah-dir": {"prior_steps": 1000, "extra_steps": 1000, "meta_batch": 4, "context_size": 256},
}
SMOKE = {
    "env_id": "pendulum-goal2", "obs_mode": "critic", "image_size": 32, "render": "fast",
    "total_frames": 33_000, "initial_steps": 100, "tasks_per_iteration": 2, "prior_steps": 50,
    "posterior_steps": 50, "extra_steps": 0, "updates_per_iteration": 50, "meta_batch": 4,
    "batch_size": 16, "context_size": 16, "latent_dim": 2, "hidden_dim": 128, "context_dim": 128,
    "filters": 16, "conv_strides": (2, 2, 1), "feature_dim": 32, "lr": 1e-3, "cnn_lr": 1e-3,
    "gamma": 0.9, "tau": 0.01, "kl_lambda": 0.005, "context_trajectories": 2,
    "eval_every_frames": 5500, "compile": False, "eval_episodes": 40,
}  # fmt: skip
MAY_BE_ZERO = ["cnn_pretrain_updates", "decoder_weight_decay", "extra_steps", "gamma", "kl_lambda"]
MAY_BE_ZERO += ["latent_weight", "posterior_steps", "prior_steps", "rl_weight", "seed", "task_seed"]
AT_MOST_ONE = ["encoder_tau", "gamma", "tau"]


def algorithm_checks(args):
    """Checks that only this script has: rows of (flag, whether it is wrong, what to do)."""
    most = find_family(args.env_id).steps
    convs_fit = args.conv_strides and min(conv_sizes(args.image_size, args.conv_strides)) >= 1
    initial = len(plan(args, 0)) * args.trajectory_steps
    return [
        ("action_repeat", args.action_repeat != 1, "families set the step's length; leave it out"),
        ("trajectory_steps", args.trajectory_steps > most, f"the family has {most}; lower it"),
        ("prior_steps", not args.prior_steps + args.posterior_steps, "z needs context; raise it"),
        ("total_frames", args.total_frames <= initial, f"use more than the initial {initial}"),
        ("task_seed", args.task_seed >= 2**32, "must be below 2^32"),
        ("latent_dim", args.oracle and args.latent_dim < 2, "theta can be 2 numbers; raise it"),
        ("image_size", not convs_fit, "too small for the --conv-strides; raise it"),
    ]


# ---- task families -----------------------------------------------------------------------------
class MetaTask:
    """A task of the suite with a parameter theta that decides the reward or the dynamics. Nothing
    shows theta: targets are invisible, and observations leave out what points at them."""

    def __init__(self, task, family):
        self.task = task
        self.family = family
        self.theta = family.thetas[0]  # collect() and evaluate() set others

    def __getattr__(self, name):
        return getattr(self.task, name)  # everything else is the suite's

    def initialize_episode(self, physics):
        """The suite's start, then theta's changes to model or state."""
        self.task.initialize_episode(physics)
        if "rootx" in physics.named.data.qpos.axes.row.names:
            physics.named.model.geom_pos[0, "x"] = 0.0  # else the floor would end 2 m behind
        self.family.change(physics, self.theta)
        physics.forward()

    def before_step(self, action, physics):
        """Keeps the action (A,) and the joints' positions for the reward."""
        self.action = np.array(action)
        self.qpos = physics.data.qpos.copy()
        self.task.before_step(action, physics)

    def get_observation(self, physics):
        """The suite's, without the way to a target."""
        observation = self.task.get_observation(physics)
        observation.pop("to_target", None)
        return observation

    def get_reward(self, physics):
        """The family's."""
        return float(self.family.reward(self, physics))

    def velocity(self, physics):
        """Of the body along x, over the whole step [m/s]."""
        i = physics.model.jnt_qposadr[physics.model.name2id("rootx", "joint")]
        return (physics.data.qpos[i] - self.qpos[i]) / self.family.dt

    def effort(self):
        """What the action costs."""
        return 0.05 * np.square(self.action).sum()


class Family(NamedTuple):
    """Tasks that differ in theta."""

    base: str  # the suite's task that they are made of
    dt: float  # length of a step [s]
    steps: int  # of a whole trajectory
    thetas: object  # a list of all values, or a tuple of two bounds to draw between
    reward: object  # function of MetaTask and physics
    change: object = lambda physics, theta: None  # changes model or state at a trajectory's start


def walker_reward(task, physics):
    """0 to 1: the suite's standing reward; five sixths of it need the speed theta [m/s]."""
    near = max(0.0, 1 - abs(task.velocity(physics) - task.theta))
    return task.task.get_reward(physics) * (1 + 5 * near) / 6


def cartpole_reward(task, physics):
    """0 to 1, with the pole upright and the cart at theta; less the effort."""
    upright = (1 + physics.pole_angle_cosine().item()) / 2
    near = math.exp(-2 * abs(physics.named.data.qpos["slider"].item() - task.theta))
    return upright * near - task.effort()


def angle_reward(task, physics):
    """-1 to 1: the cosine of the angle between pole and theta, which counts from hanging [rad]."""
    return math.cos(physics.data.qpos[0] - math.pi - task.theta)


def suite_reward(task, physics):
    """The suite's. Theta is in the dynamics."""
    return task.task.get_reward(physics)


def put_target(physics, theta):
    """Puts the target at polar coordinates (radius, angle) and makes it invisible."""
    radius, angle = theta
    xy = radius * math.cos(angle), radius * math.sin(angle)
    physics.named.model.geom_pos["target", ["x", "y"]] = xy
    physics.named.model.geom_rgba["target", 3] = 0.0


def put_point_and_target(physics, theta):
    """Puts the point at the origin and the target 0.2 m from it at angle theta."""
    physics.data.qpos[:] = 0.0
    put_target(physics, (0.2, theta))


def tame_pendulum(physics, theta):
    """Lets a constant torque turn the pole to an angle and hold it, up to 1.2 rad from hanging. A
    target beyond that can be passed but not held."""
    physics.model.actuator_gear[0, 0] = 4.5
    physics.model.dof_damping[0] = 1.0


FAMILIES = {  # base, dt, steps, thetas, reward, change
    "cheetah-vel": Family("cheetah-run", 0.05, 200, (0, 3),
                          lambda t, p: -abs(t.velocity(p) - t.theta) - t.effort()),
    "cheetah-dir": Family("cheetah-run", 0.05, 200, [-1.0, 1.0],
                          lambda t, p: t.theta * t.velocity(p) - t.effort()),
    "walker-vel": Family("walker-stand", 0.05, 200, (0, 2), walker_reward),
    "cartpole-goal": Family("cartpole-balance", 0.02, 200, (-1, 1), cartpole_reward),
    "reacher-goal": Family("reacher-easy", 0.04, 100, ((0.05, -math.pi), (0.2, math.pi)),
                           lambda t, p: -p.finger_to_target_dist(), put_target),
    "point-goal": Family("point_mass-easy", 0.1, 20, (-math.pi, math.pi),
                         lambda t, p: -p.mass_to_target_dist(), put_point_and_target),
    "pendulum-goal2": Family("pendulum-swingup", 0.04, 25, [-math.pi / 2, math.pi / 2],
                             angle_reward, tame_pendulum),
    "pendulum-goal": Family("pendulum-swingup", 0.04, 25, (-1.8, 1.8),
                            angle_reward, tame_pendulum),
    "pendulum-gear": Family("pendulum-swingup", 0.02, 200, [-1.0, 1.0], suite_reward,
                            lambda p, theta: p.model.actuator_gear[:, 0].fill(theta)),
    "pendulum-gravity": Family("pendulum-swingup", 0.02, 200, (5, 15), suite_reward,
                               lambda p, theta: p.model.opt.gravity[2:].fill(-theta)),
    "pendulum-mass": Family("pendulum-swingup", 0.02, 200, (0.5, 2), suite_reward,
                            lambda p, theta: p.model.body_mass[1:].fill(theta)),
}  # fmt: skip


def find_family(env_id):
    """The Family of this name."""
    if env_id not in FAMILIES:
        near = difflib.get_close_matches(env_id, FAMILIES, 3, 0.4) or FAMILIES
        raise UsageError("env_id", f"there is no family {env_id!r}; try {', '.join(near)}")
    return FAMILIES[env_id]


def split(args):
    """Parameters of the tasks to train on and of those to test on, whatever --seed is. A family of
    two tasks trains and tests on both."""
    thetas = find_family(args.env_id).thetas
    if isinstance(thetas, list):
        return thetas, thetas
    random = np.random.RandomState(args.task_seed)
    drawn = [random.uniform(*thetas) for _ in range(args.train_tasks + args.test_tasks)]
    return drawn[: args.train_tasks], drawn[args.train_tasks :]


# ---- networks ----------------------------------------------------------------------------------
def conv_sizes(size, strides):
    """Side of the image and of every 3x3 conv layer's output [pixels]."""
    sizes = [size]
    for stride in strides:
        sizes.append((sizes[-1] - 3) // stride + 1)
    return sizes


class Float32Linear(nn.Linear):
    """A linear layer in float32: bfloat16 has too few digits for values, logits and means."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def mlp(in_dim, hidden_dim, out_dim, last=3e-3):
    """Three hidden ReLU layers and a linear one, whose numbers start within `last` of zero."""
    layers = []
    for size in (in_dim, hidden_dim, hidden_dim):
        layers += [nn.Linear(size, hidden_dim), nn.ReLU()]  # D8
        nn.init.constant_(layers[-2].bias, 0.1)
    layers.append(Float32Linear(hidden_dim, out_dim))
    for parameter in layers[-1].parameters():
        nn.init.uniform_(parameter, -last, last)
    return nn.Sequential(*layers)


def preprocess(obs):
    """Scales uint8 images (B, C, H, W) to [0, 1], channels last; states pass unchanged."""
    if obs.dtype != torch.uint8:
        return obs
    return obs.to(torch.float32, memory_format=torch.channels_last) / 255


def tanh_gaussian(mu, log_std):
    """Sample a = tanh(mu + sigma eps) (B, A) and log pi(a) (B, 1); SAC, appendix C."""
    noise = torch.randn_like(mu)
    action = torch.tanh(mu + log_std.exp() * noise)
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - torch.log(F.relu(1 - action.square()) + 1e-6)  # the tanh's Jacobian
    return action, log_prob.sum(-1, keepdim=True)


def product_of_gaussians(mu, var):
    """Mean and variance (T, L) of the product of Gaussians (T, N, L) over N: a posterior that does
    not depend on their order. The prior is not a factor."""
    precision = 1 / var.clamp(min=1e-7)
    var = 1 / precision.sum(1)
    return var * (mu * precision).sum(1), var


def sample_z(mu, var):
    """A sample (T, L) of the Gaussians with this mean and variance (T, L)."""
    return mu + var.sqrt() * torch.randn_like(mu)


def as_z(theta, latent_dim):
    """A task's parameter in the first places of a z (L,), for --oracle."""
    values = torch.atleast_1d(torch.as_tensor(theta, dtype=torch.float32))
    return F.pad(values, (0, latent_dim - len(values)))


class Permute(nn.Module):
    """Reorders the dimensions. Between convs and linear layers the channels come last, as they do
    in memory, so that nothing is copied."""

    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


class Encoder(nn.Sequential):
    """Stacked images (M, K * C, H, W) in [0, 1] -> x (M, X): an estimate of the standardised state,
    or (bounded) features without a given meaning."""

    def __init__(self, obs_shape, x_dim, bounded, args):
        layers = []
        channels = obs_shape[0]
        for stride in args.conv_strides:
            layers += [nn.Conv2d(channels, args.filters, 3, stride), nn.ReLU()]
            channels = args.filters
        side = conv_sizes(obs_shape[-1], args.conv_strides)[-1]
        linear = nn.Linear if bounded else Float32Linear  # an estimate needs float32
        layers += [Permute(0, 2, 3, 1), nn.Flatten(), linear(channels * side**2, x_dim)]
        if bounded:
            layers += [nn.LayerNorm(x_dim), nn.Tanh()]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """Features (B, D) -> image stack (B, K * C, H, W), centred at 0: the encoder backwards."""

    def __init__(self, obs_shape, z_dim, args):
        sizes = conv_sizes(obs_shape[-1], args.conv_strides)
        n = args.filters
        layers = [nn.Linear(z_dim, n * sizes[-1] ** 2), nn.ReLU()]
        layers += [nn.Unflatten(1, (sizes[-1], sizes[-1], n)), Permute(0, 3, 1, 2)]
        for i, stride in reversed(list(enumerate(args.conv_strides))):
            missing = sizes[i] - (sizes[i + 1] - 1) * stride - 3  # what the conv never reached
            out = n if i else obs_shape[0]
            layers += [nn.ConvTranspose2d(n, out, 3, stride, output_padding=missing), nn.ReLU()]
        super().__init__(*layers[:-1])


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
class Agent(nn.Module):
    """Read update() first: it is the algorithm. Each loss is a method."""

    updates = 0  # made so far; the training loop counts them
    # the methods that --compile turns into faster kernels
    compiled = ["posterior", "features_for", "policy", "target"]
    compiled += ["q_loss", "v_loss", "actor_loss", "reconstruction_loss"]

    def __init__(self, args, spec):
        super().__init__()
        self.args = args
        self.spec = spec
        self.x_is_features = args.obs_mode in ("ae", "critic")  # and not a state
        self.regresses = args.obs_mode in ("cnn", "cnn-rl", "cnn-test")
        self.true_state = args.obs_mode == "cnn-test"  # in training; evaluate() chooses for itself
        A, L = spec.action_dim, args.latent_dim
        x_dim = args.feature_dim if self.x_is_features else spec.state_dim
        self.actor = mlp(x_dim + L, args.hidden_dim, 2 * A, last=1e-3)
        self.q1 = mlp(x_dim + A + L, args.hidden_dim, 1)
        self.q2 = mlp(x_dim + A + L, args.hidden_dim, 1)
        self.v = mlp(x_dim + L, args.hidden_dim, 1) if args.critic == "v" else None
        seen = x_dim * (1 + args.next_obs_in_context) + A + 1  # of a transition
        self.context_encoder = mlp(seen, args.context_dim, 2 * L)
        self.register_buffer("state_mean", torch.zeros(spec.state_dim))
        self.register_buffer("state_std", torch.ones(spec.state_dim))
        if args.obs_mode != "state":
            images = (args.frame_stack * spec.obs_shape[0], *spec.obs_shape[1:])
            self.cnn = Encoder(images, x_dim, self.x_is_features, args)
        if args.obs_mode == "ae":
            self.decoder = Decoder(images, x_dim, args)
        self.to(args.device, memory_format=torch.channels_last)

        # Who trains what: each network has an optimizer, and a loss moves the networks whose
        # optimizers are given to minimize() with it, and nothing else.
        adam = functools.partial(torch.optim.Adam, fused=True)
        self.optimizers = {}
        for name, network in self.named_children():
            lr = args.cnn_lr if name in ("cnn", "decoder") else args.lr
            decay = args.decoder_weight_decay if name == "decoder" else 0.0
            self.optimizers[name] = adam(network.parameters(), lr, weight_decay=decay)
        if args.critic == "q":
            self.log_alpha = nn.Parameter(torch.zeros((), device=args.device))
            self.optimizers["alpha"] = adam([self.log_alpha], args.lr)
        self.taus = dict.fromkeys(["v"] if args.critic == "v" else ["q1", "q2"], args.tau)
        if self.x_is_features:
            self.taus["cnn"] = args.encoder_tau
        for name in self.taus:  # the networks that have a target
            target = copy.deepcopy(self.get_submodule(name)).requires_grad_(False)
            self.add_module(f"target_{name}", target)

    def standardise(self, state):
        """States (..., S) in units of the initial trajectories' spread."""
        return (state - self.state_mean) / self.state_std  # D9

    def features_for(self, obs, state, true_state, target=False):
        """x (..., X) of stacked images (..., K * C, H, W), or of states (..., S)."""
        if true_state or self.args.obs_mode == "state":
            return self.standardise(state)
        cnn = self.target_cnn if target else self.cnn
        return cnn(preprocess(obs.flatten(0, -4))).unflatten(0, obs.shape[:-3])

    def prior(self, theta):
        """Mean and variance (1, L) of z before any context; with --oracle it is theta."""
        mu = as_z(theta, self.args.latent_dim).to(self.args.device)[None]
        return (mu, torch.zeros_like(mu)) if self.args.oracle else (0 * mu, torch.ones_like(mu))

    def infer(self, x, action, reward, next_x):
        """Mean and variance (T, L) of q(z | c), from context (T, N, X), (T, N, A), (T, N, 1)."""
        parts = [x, action, reward] + [next_x] * self.args.next_obs_in_context
        mu, var = self.context_encoder(torch.cat(parts, -1)).chunk(2, -1)
        return product_of_gaussians(mu, F.softplus(var))  # [PEARL product]

    def posterior(self, context):
        """Mean and variance (T, L) of q(z | c), from context (T, N, ...) of the replay buffer."""
        if self.args.oracle:
            return context["theta"], torch.zeros_like(context["theta"])
        next_x = None
        with torch.no_grad():  # the CNN learns from the transitions, not from the context  D7
            x = self.features_for(context["obs"], context["state"], self.true_state)  # (T, N, X)
            if self.args.next_obs_in_context:
                after = context["next_obs"], context["next_state"]
                next_x = self.features_for(*after, self.true_state)
        return self.infer(x, context["action"], context["reward"], next_x)

    def policy(self, x, z):
        """Mean and log standard deviation (M, A) before the tanh."""
        mean, log_std = self.actor(torch.cat([x, z], -1)).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def kl_loss(self, mu, var):
        """KL(q(z | c) || N(0, I)) of (T, L), summed over both."""
        return 0.5 * (var + mu.square() - 1 - var.log()).sum()  # [PEARL KL]

    def target(self, reward, discount, next_x, z):
        """What the Qs are to be (M, 1)."""
        if self.args.critic == "v":
            value = self.target_v(torch.cat([next_x, z], -1))
        else:
            action, log_prob = tanh_gaussian(*self.policy(next_x, z))
            inputs = torch.cat([next_x, action, z], -1)
            q = torch.min(self.target_q1(inputs), self.target_q2(inputs))
            value = q - self.log_alpha.exp() * log_prob
        return self.args.reward_scale * reward + self.args.gamma * discount * value

    def q_loss(self, x, action, z, target):
        """Squared TD error of both Qs. It trains them, context encoder and, by --obs-mode, CNN."""
        inputs = torch.cat([x, action, z], -1)
        q1, q2 = self.q1(inputs), self.q2(inputs)
        return F.mse_loss(q1, target) + F.mse_loss(q2, target)  # [PEARL J(Q)]

    def v_loss(self, x, z, q, log_prob):
        """Squared distance of V to the policy's value."""
        value = self.v(torch.cat([x, z], -1))
        return F.mse_loss(value, q - log_prob)  # [PEARL J(V)]

    def actor_loss(self, q, log_prob, mean, log_std):
        """SAC's, and a pull of mean and log standard deviation towards 0."""
        alpha = 1.0
        if self.args.critic == "q":
            alpha = self.log_alpha.exp().detach()  # alpha has a loss of its own
        pull = 1e-3 * mean.square().mean() + 1e-3 * log_std.square().mean()
        return (alpha * log_prob - q).mean() + pull  # [PEARL J(pi)]

    def alpha_loss(self, log_prob):
        """Moves the temperature until the entropy is -A; log_prob (M, 1)."""
        target_entropy = -self.spec.action_dim
        error = (-log_prob - target_entropy).detach()  # this loss moves alpha, not the actor
        return (self.log_alpha.exp() * error).mean()  # [SAC J(alpha)]

    def cnn_loss(self, x, state):
        """Squared error of the estimated state, in units of its variance."""
        return F.mse_loss(x, self.standardise(state))  # [M&K CNN]

    def reconstruction_loss(self, x, images):
        """SAC+AE's: the squared pixel error, and a penalty that keeps x small; from the uint8
        images (M, K * C, H, W) that x was made of."""
        target = (images // 8 + torch.rand_like(images, dtype=torch.float32)) / 32 - 0.5
        error = F.mse_loss(self.decoder(x), target)
        penalty = 0.5 * x.square().sum(-1).mean()
        return error + self.args.latent_weight * penalty  # [SAC+AE J(RAE)]

    def sample(self, buffer, rng):
        """The batch that update() takes: transitions (T, B, ...), context (T, N, ...)."""
        args = self.args
        tasks = rng.integers(0, len(buffer.rl), args.meta_batch)  # [PEARL alg. 1:12]
        transitions = np.stack([buffer.pick(buffer.rl[i], rng, args.batch_size) for i in tasks])
        context = np.stack([buffer.pick(buffer.enc[i], rng, args.context_size) for i in tasks])
        context = buffer.gather_transitions(context, args.frame_stack)  # [PEARL alg. 1:13]
        context["theta"] = upload(buffer.thetas[tasks], args.device)  # (T, L)
        transitions = buffer.gather_transitions(transitions, args.frame_stack)
        return {"transitions": transitions, "context": context}

    def update(self, batch):
        """One update from a batch of sample(); metrics as 0-d tensors.

        On CUDA the update is recorded once and then replayed, so that a Python number in it keeps
        the value that it had then. A number that changes from update to update must be a
        tensor of the batch.
        """
        args, optimizers = self.args, self.optimizers
        mu, var = self.posterior(batch["context"])
        z = sample_z(mu, var)  # (T, L)  D1  [PEARL alg. 1:14]
        z = z.repeat_interleave(args.batch_size, 0)  # (M, L)
        batch = {name: column.flatten(0, 1) for name, column in batch["transitions"].items()}
        obs, state, action = batch["obs"], batch["state"], batch["action"]
        x = self.features_for(obs, state, self.true_state)  # (M, X)
        with torch.no_grad():  # the target is a constant
            next_obs, next_state = batch["next_obs"], batch["next_state"]
            next_x = self.features_for(next_obs, next_state, self.true_state, self.x_is_features)
            target = self.target(batch["reward"], batch["discount"], next_x, z)  # (M, 1)

        x_for_q = x
        x_gradients = []
        if args.obs_mode == "cnn":
            x_for_q = x.detach()  # only the regression trains the CNN
        if args.obs_mode == "cnn-rl":  # the same x, but J(Q)'s gradient in the CNN has a weight
            x_for_q = x.detach() + args.rl_weight * (x - x.detach())
            x_for_q.register_hook(x_gradients.append)
        q_loss = self.q_loss(x_for_q, action, z, target)  # [PEARL alg. 1:16]
        metrics = {"loss/q": q_loss, "stat/posterior_var": var.mean()}
        loss = q_loss
        if not args.oracle:
            metrics["loss/kl"] = self.kl_loss(mu, var)  # [PEARL alg. 1:17]
            loss = loss + args.kl_lambda * metrics["loss/kl"]
        if self.regresses:
            estimate = self.cnn(preprocess(obs)) if self.true_state else x
            metrics["loss/cnn"] = self.cnn_loss(estimate, state)
            loss = loss + metrics["loss/cnn"]
        if args.obs_mode == "ae":
            metrics["loss/reconstruction"] = self.reconstruction_loss(x, obs)
            loss = loss + metrics["loss/reconstruction"]
        trained = {"q1", "q2", "context_encoder", "cnn", "decoder"} & optimizers.keys()
        minimize(loss, *(optimizers[name] for name in sorted(trained)))  # D2  [PEARL alg. 1:19, 21]
        if args.obs_mode == "cnn-rl":  # norms of the two gradients that meet in x
            metrics["stat/x_grad_q"] = args.rl_weight * x_gradients[0].norm()
            metrics["stat/x_grad_cnn"] = 2 * (metrics["loss/cnn"] / x.numel()).sqrt()

        x, z = x.detach(), z.detach()  # V and actor train neither the CNN nor the context encoder
        mean, log_std = self.policy(x, z)
        new_action, log_prob = tanh_gaussian(mean, log_std)
        inputs = torch.cat([x, new_action, z], -1)
        q = torch.min(self.q1(inputs), self.q2(inputs))  # (M, 1)
        actor_loss = self.actor_loss(q, log_prob, mean, log_std)  # [PEARL alg. 1:15]
        minimize(actor_loss, optimizers["actor"])  # [PEARL alg. 1:20]
        metrics |= {"loss/actor": actor_loss, "stat/entropy": -log_prob.mean()}
        if args.critic == "v":
            # detached, as the target of V is a constant
            metrics["loss/v"] = self.v_loss(x, z, q.detach(), log_prob.detach())
            minimize(metrics["loss/v"], optimizers["v"])
        else:
            metrics["loss/alpha"] = self.alpha_loss(log_prob)
            minimize(metrics["loss/alpha"], optimizers["alpha"])
        for name, tau in self.taus.items():
            soft_update(self.get_submodule(name), self.get_submodule(f"target_{name}"), tau)
        return {name: value.detach() for name, value in metrics.items()}

    def prepare(self, buffer):
        """Fixes the standardisation of states after the initial trajectories, if x is a state."""
        if not self.x_is_features:
            state = buffer.columns["state"][: buffer.row]
            self.state_mean.copy_(state.mean(0))
            self.state_std.copy_(state.std(0).clamp(min=1e-3))

    def fit(self, buffer, rng):
        """One step of the CNN alone towards the states of the initial trajectories."""
        starts = [start for starts in buffer.rl for start in starts]
        rows = buffer.pick(starts, rng, self.args.meta_batch * self.args.batch_size)[None]
        batch = buffer.gather_transitions(rows, self.args.frame_stack)
        x = self.cnn(preprocess(batch["obs"][0]))
        minimize(self.cnn_loss(x, batch["state"][0]), self.optimizers["cnn"])

    @torch.no_grad()  # acting learns nothing
    def act(self, step, carry, explore):
        """Action (A,) for a Step, and the next carry: z (1, L), whether the true state is seen, the
        images of the stack, and the x (1, X) that was seen. An episode starts with the first two,
        or with None, which draws z from N(0, I)."""
        device = self.args.device
        carry = carry or {"z": torch.randn(1, self.args.latent_dim, device=device)}
        true_state = carry.get("true_state", False)
        obs = torch.as_tensor(step.obs, device=device)[None]
        state = torch.as_tensor(step.state, device=device)[None]
        if self.args.obs_mode != "state":
            old = carry.get("stack", torch.cat([obs] * self.args.frame_stack, 1))
            obs = torch.cat([old[:, obs.shape[1] :], obs], 1)  # (1, K * C, H, W), the newest last
        x = self.features_for(obs, state, true_state)
        mean, log_std = self.policy(x, carry["z"])
        action = tanh_gaussian(mean, log_std)[0] if explore else torch.tanh(mean)
        return action[0], {**carry, "stack": obs, "x": x}

    @torch.no_grad()  # for the eye
    def images(self, buffer, rng):
        """{name: uint8 (H, W, 3)}: newest images of eight stacks above their reconstructions."""
        if self.args.obs_mode != "ae":
            return {}
        obs = self.sample(buffer, rng)["transitions"]["obs"].flatten(0, 1)[:8]
        output = self.decoder(self.cnn(preprocess(obs)))
        rows = [obs, ((output + 0.5) * 255).clamp(0, 255).to(torch.uint8)]
        grid = torch.cat([row[:, -3:] for row in rows], 2)  # (8, 3, rows * H, W)
        return {"reconstruction": grid.permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()}


# ---- environment (from here on, all scripts share most of their text) ----------------------------
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
    """The dm_control environment of a family; `random` is its np.random.RandomState."""
    from dm_control import suite  # not at the top: check_args() says first if OpenGL is missing

    family = find_family(env_id)
    env = suite.load(*family.base.split("-", 1), {"random": random})
    limit = (family.steps - 0.5) * family.dt  # 0.5: rounding
    task = MetaTask(env.task, family)
    return control.Environment(env.physics, task, limit, control_timestep=family.dt)


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


class TaskBuffer(ReplayBuffer):
    """The trajectories of all training tasks. Each task has two lists of the rows at which they
    start: rl has all of them, and enc has those that z may be inferred from."""

    def __init__(self, folder, rows, args, spec, row=0):
        super().__init__(folder, rows, args, spec, row)
        self.horizon = args.trajectory_steps
        thetas = [as_z(theta, args.latent_dim) for theta in split(args)[0]]
        self.thetas = torch.stack(thetas)  # (tasks, L)
        self.rl = [[] for _ in thetas]
        self.enc = [[] for _ in thetas]

    def pick(self, starts, rng, count):
        """Rows (count,) at which transitions begin, of the trajectories that start at `starts`;
        uniform, with replacement. All trajectories have `horizon` steps."""
        i = rng.integers(0, len(starts) * self.horizon, count)
        return np.array(starts)[i // self.horizon] + i % self.horizon

    def gather_transitions(self, rows, stack):
        """The transitions that begin at rows (T, N): {name: (T, N, ...)}."""
        window = rows[..., None] + np.arange(1 - stack, 2)
        window = np.maximum(window, self.files["start"][rows][..., None])
        obs = self.gather("obs", window)  # (T, N, stack + 1, C, H, W)
        batch = {name: self.gather(name, rows + 1) for name in ("action", "reward", "discount")}
        batch |= {"obs": obs[:, :, :-1].flatten(2, 3), "next_obs": obs[:, :, 1:].flatten(2, 3)}
        states = {"state": self.gather("state", rows), "next_state": self.gather("state", rows + 1)}
        return batch | states


# ---- evaluation --------------------------------------------------------------------------------
VIDEO_SIZE = 256  # width and height of a film [pixels]


def play_trajectory(agent, env, rng, z, true_state, explore, film=False):
    """Plays one trajectory with z (1, L). Gives its Steps, their x (steps + 1, X), and images if it
    is filmed. If the simulator diverges, another one is played in its place."""
    while True:
        carry = {"z": z, "true_state": true_state}
        xs, images = [], []
        try:
            steps = [env.reset(rng.integers(2**32))]
            for _ in range(agent.args.trajectory_steps):
                if film:
                    images.append(env.render(VIDEO_SIZE))
                action, carry = agent.act(steps[-1], carry, explore=explore)
                action = action.cpu().numpy()
                finite({"the action": action.sum()}, agent.updates)
                xs.append(carry["x"])
                steps.append(env.step(action))
            _, carry = agent.act(steps[-1], carry, explore=False)  # for the last next x
            return steps, torch.cat([*xs, carry["x"]]), images
        except control.PhysicsError as e:
            tqdm.write(f"warning: a trajectory is discarded: {e}")


def evaluate(agent, env, thetas, stop, film=False, true_state=False):
    """Adapts to every task eval_episodes times: trajectory k has the mean action, and z from the
    k trajectories before. Every evaluation has the same starts. The paper's algorithm 2.  D4

    Gives the returns (tasks, episodes, k + 1), the last posterior means (tasks, episodes, L), the
    CNN's squared errors and the images of the first adaptation, or None if a signal came."""
    args = agent.args
    returns = np.zeros((len(thetas), args.eval_episodes, args.context_trajectories + 1))
    means = np.zeros((*returns.shape[:2], args.latent_dim))
    errors, film_images = [], []
    for number, (i, j, k) in enumerate(np.ndindex(returns.shape)):  # [PEARL alg. 2:2]
        if stop.signal:
            return None
        rng = stream(args.seed, "evaluate", number)
        if k == 0:
            env.env.task.theta = thetas[i]  # [PEARL alg. 2:1]
            mu, var = agent.prior(thetas[i])
            context = []
        z = sample_z(mu, var)  # [PEARL alg. 2:3]
        filmed = film and i == j == 0
        steps, x, images = play_trajectory(agent, env, rng, z, true_state, False, filmed)
        returns[i, j, k] = sum(step.reward for step in steps)  # [PEARL alg. 2:4]
        film_images += images
        if agent.regresses:
            state = np.stack([step.state for step in steps])
            errors.append(agent.cnn_loss(x, torch.as_tensor(state, device=args.device)).item())
        action = torch.as_tensor(np.stack([step.action for step in steps[1:]]), device=args.device)
        reward = torch.tensor([[step.reward] for step in steps[1:]], device=args.device)
        context.append((x[:-1], action, reward, x[1:]))  # [PEARL alg. 2:5]
        if not args.oracle:
            with torch.no_grad():  # from all transitions so far; updates use context_size of them
                mu, var = agent.infer(*(torch.cat(c)[None] for c in zip(*context, strict=True)))
        means[i, j] = mu[0].cpu()
    return returns, means, errors, film_images


def score(returns):
    """The summary's numbers from returns (tasks, episodes, k + 1): return_by_context, each with the
    95 % bootstrap interval over tasks; eval_return, the one after two trajectories; and gain, how
    much that is above the one after none, with its standard error over tasks, or over episodes if
    there are no more than two tasks."""
    n = len(returns)
    by_task = returns.mean(1)  # (tasks, k + 1)
    resampled = by_task[np.random.default_rng(0).integers(0, n, (1000, n))].mean(1)
    by_context = [by_task.mean(0), *np.percentile(resampled, [2.5, 97.5], 0)]
    k = min(2, returns.shape[-1] - 1)
    gains = returns[..., k] - returns[..., 0]
    gains = gains.mean(1) if n > 2 else gains.ravel()
    error = gains.std(ddof=1).item() / len(gains) ** 0.5 if len(gains) > 1 else math.inf
    return {
        "return_by_context": np.transpose(by_context).tolist(),
        "eval_return": by_context[0][k].item(),
        "gain": [gains.mean().item(), error],
    }


def report(returns, prefix):
    """{name: number} of returns (tasks, episodes, k + 1), for metrics.csv."""
    gain, error = score(returns)["gain"]
    row = {f"{prefix}return_{k}": value for k, value in enumerate(returns.mean((0, 1)).tolist())}
    return row | {f"{prefix}gain": gain, f"{prefix}gain_error": error}


def scatter(means, dot=5, size=200):
    """Picture (size, size, 3) of the first two numbers of the means (tasks, episodes, L) of z, the
    tasks coloured from blue to red."""
    picture = np.full((size, size, 3), 255, np.uint8)
    xy = np.pad(means, ((0, 0), (0, 0), (0, 1)))[..., :2]  # L may be 1
    low, high = xy.min((0, 1)), xy.max((0, 1))
    corners = (size - dot) * (xy - low) / np.maximum(high - low, 1e-6)
    for dots, red in zip(corners.astype(int), np.linspace(0, 255, len(xy)), strict=True):
        for x, y in dots:
            picture[size - y - dot : size - y, x : x + dot] = red, 60, 255 - red
    return picture


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


def plan(args, iteration):
    """The trajectories of an iteration in their order: [(task, whether a visit begins with it,
    whether z is inferred, whether z may be inferred from it)]. Iteration 0 has the initial ones."""
    steps = (args.initial_steps, args.prior_steps, args.posterior_steps, args.extra_steps)
    initial, prior, posterior, extra = (math.ceil(n / args.trajectory_steps) for n in steps)
    tasks = len(split(args)[0])
    if iteration == 0:
        return [(task, False, False, True) for task in range(tasks) for _ in range(initial)]
    rng = stream(args.seed, "tasks", iteration)
    kinds = [(False, True)] * prior  # [PEARL alg. 1:5]
    # the first of every kind has z from the prior, as in the authors' code
    kinds += [(i > 0, True) for i in range(posterior)] + [(i > 0, False) for i in range(extra)]
    chosen = rng.integers(tasks, size=args.tasks_per_iteration).tolist()  # [PEARL alg. 1:3]
    return [(task, i == 0, *kind) for task in chosen for i, kind in enumerate(kinds)]


def collect(agent, env, buffer, job, rng):
    """Plays a trajectory that plan() has listed, and gives its return."""
    args = agent.args
    task, begins, inferred, for_context = job
    theta = split(args)[0][task]
    env.env.task.theta = theta
    if begins:
        buffer.enc[task].clear()  # [PEARL alg. 1:4]
    mu, var = agent.prior(theta)
    if inferred and not args.oracle:
        rows = buffer.pick(buffer.enc[task], rng, args.context_size)[None]  # [PEARL alg. 1:8]
        with torch.no_grad():  # collecting learns nothing
            mu, var = agent.posterior(buffer.gather_transitions(rows, args.frame_stack))
    z = sample_z(mu, var)  # [PEARL alg. 1:6]
    row = buffer.row
    steps, *_ = play_trajectory(agent, env, rng, z, agent.true_state, explore=True)
    for step in steps:
        buffer.add(step)  # [PEARL alg. 1:7]
    buffer.rl[task].append(row)
    if for_context:
        buffer.enc[task].append(row)
    return sum(step.reward for step in steps)


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
    """The paper's algorithm 1. A run can be saved and stopped between any two trajectories, fits of
    the CNN and updates. Gives the progress."""
    env = PixelEnv(args)
    eval_env = PixelEnv(args, largest_image=VIDEO_SIZE * args.video)
    train_thetas, test_thetas = split(args)
    if payload:
        agent = restore_agent(args, payload)
        progress = SimpleNamespace(**payload["progress"])
    else:
        stream(args.seed, "weights", 0)
        agent = Agent(args, env.spec)
        counters = ["step", "frames", "iteration", "fits", "updates", "evaluated", "row"]
        results = ["random_return", "eval_return", "return_by_context", "gain"]
        progress = SimpleNamespace(**dict.fromkeys(counters, 0), **dict.fromkeys(results))
        vars(progress).update(wall_s=0.0, saved_wall_s=0.0, returns=[], metrics={}, rows=[])
        print(f"{len(train_thetas)} tasks to train on, {len(test_thetas)} to test on")
    initial, each = len(plan(args, 0)), len(plan(args, 1))  # trajectories
    wanted = math.ceil(args.total_frames / args.trajectory_steps)
    iterations = max(progress.iteration, math.ceil((wanted - initial) / each))
    rows = (initial + iterations * each) * (args.trajectory_steps + 1)
    with refuse_on(OSError, "runs_dir", f"no room for {rows:,} rows of the replay buffer"):
        folder = run_dir / "replay"
        buffer = TaskBuffer(folder, rows, args, env.spec, progress.row)  # [PEARL alg. 1:1]
    if payload:
        buffer.rl = progress.rl
        buffer.enc = progress.enc
    progress.rl = buffer.rl  # for the checkpoints
    progress.enc = buffer.enc
    if args.cuda_graph and args.device.startswith("cuda"):
        if args.compile:
            compile_parts(agent)
        record(agent, "update")
        record(agent, "act")
    logger = Logger(args, run_dir, progress, iterations * args.updates_per_iteration)

    def save(minutes=0.0):
        if progress.wall_s - progress.saved_wall_s >= 60 * minutes:
            progress.saved_wall_s = progress.wall_s
            save_checkpoint(run_dir, args, agent, buffer, progress)

    if not payload:
        save()
    while progress.evaluated < args.total_frames and not stop.signal:  # [PEARL alg. 1:2]
        agent.updates = progress.updates
        jobs = plan(args, progress.iteration)
        while len(progress.returns) < len(jobs) and not stop.signal:
            job = jobs[len(progress.returns)]
            rng = stream(args.seed, "trajectory", progress.frames)
            progress.returns.append(collect(agent, env, buffer, job, rng))
            progress.frames += args.trajectory_steps
            progress.step = progress.frames
            logger.tick()
            save(args.checkpoint_every_minutes)
        if stop.signal:
            break
        if progress.iteration == 0:
            agent.prepare(buffer)
        while agent.regresses and progress.fits < args.cnn_pretrain_updates and not stop.signal:
            agent.fit(buffer, stream(args.seed, "fit", progress.fits))
            progress.fits += 1
            logger.tick()
            save(args.checkpoint_every_minutes)
        due = progress.iteration * args.updates_per_iteration
        while progress.updates < due and not stop.signal:  # [PEARL alg. 1:11]
            rng = stream(args.seed, "update", progress.updates)
            with autocast(args):
                progress.metrics |= agent.update(agent.sample(buffer, rng))
            progress.updates += 1
            logger.tick()
            save(args.checkpoint_every_minutes)
        if stop.signal:
            break

        row = {"train/return": float(np.mean(progress.returns))}
        if progress.iteration == 0:
            progress.random_return = row["train/return"]
            print(f"untrained policy: {progress.random_return:.1f} per trajectory")
        every = args.eval_every_frames
        missed = progress.frames // every > progress.evaluated // every
        if missed or progress.frames >= args.total_frames:
            result = evaluate(agent, eval_env, test_thetas, stop, args.video)
            if agent.regresses:  # again with the true state: what do the CNN's errors cost?
                by_state = evaluate(agent, eval_env, test_thetas, stop, true_state=True)
            if stop.signal:
                break  # the resumed run repeats the evaluation
            returns, means, errors, video = result
            row |= report(returns, "eval/")
            if agent.regresses:
                row |= {"eval/cnn_error": np.mean(errors).item()}
                row |= report(by_state[0], "eval/true_state_")
            progress.evaluated = progress.frames
            vars(progress).update(score(returns))
            text = " ".join(f"{r:.1f}" for r in returns.mean((0, 1)))
            tqdm.write(f"{progress.frames:,} frames: return by trajectories of context {text}")
            images = agent.images(buffer, stream(args.seed, "images", progress.frames))
            order = np.argsort([np.ravel(theta)[-1] for theta in test_thetas])  # angles, if two
            logger.show({"z": scatter(means[order]), **images}, video, eval_env.fps)
        logger.log(row)
        progress.iteration += 1
        progress.returns = []
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
SUMMARY += ["return_by_context", "gain"]


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
    """--evaluate: adapts a trained agent to the test tasks and films the first adaptation. Gives
    the run's progress."""
    folder = payload["run_dir"]
    if args.runs_dir != payload["args"]["runs_dir"]:
        folder = Path(args.runs_dir).expanduser()  # where the film goes
        folder.mkdir(parents=True, exist_ok=True)
    env = PixelEnv(args, largest_image=VIDEO_SIZE * args.video)
    agent = restore_agent(args, payload)
    thetas = split(args)[1]
    returns, *_, video = evaluate(agent, env, thetas, Stop(), args.video)
    for theta, row in zip(thetas, returns.mean(1), strict=True):
        print(f"task {np.round(theta, 2)}: " + " ".join(f"{r:.1f}" for r in row))
    if args.video:
        imageio.mimsave(folder / "evaluation.gif", video, duration=1000 / env.fps, loop=0)
        print(f"video: {folder / 'evaluation.gif'}")
    return SimpleNamespace(**payload["progress"] | score(returns))


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
