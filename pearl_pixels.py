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
    x, a, z --> Q1, Q2       x, z -/-> V, actor       -/->: no gradient into z, nor into the CNN
    images --> CNN --> x     trained as --obs-mode says

    state     x is the true state, standardised
    cnn       x is a CNN's estimate of it, by regression
    cnn-rl    as cnn, and rl_weight times J(Q)'s gradient reaches the CNN
    cnn-test  x is the state in training, the CNN's estimate of it in tests
    critic    x is features that J(Q) trains
    ae        as critic, and a reconstruction trains them too

    python pearl_pixels.py --smoke                  # a visible result in minutes on a laptop
    python pearl_pixels.py --env-id cheetah-vel     # 20 target velocities to train on, 10 to test
    python pearl_pixels.py --evaluate RUN_DIR       # adapt to the test tasks, and film it

Shapes: T tasks, B transitions of each, N transitions of context of each, M = T B, K stacked images,
C H W image, S state, X what the agent sees of it (x), L task variable (z), A action.
Units: frame = step = one decision, as families set the control step; trajectory = so many
steps of one task, --trajectory-steps; visit = a task's trajectories in an iteration; update =
one gradient update on T tasks.
Tags in brackets, as [PEARL J(Q)], name the formula of a line, D1 a difference below; M&K is
Marshall & Khasar, SAC https://arxiv.org/abs/1812.05905, SAC+AE https://arxiv.org/abs/1910.01741.

Differences from the paper and the authors' code
D1  z is drawn once per update; theirs draws twice and uses the second. The same distribution.
D2  One backward pass through J(Q) and the KL, theirs two: the same gradient.
D3  No recurrent context encoder: in their code it is marked as not working.
D4  Evaluation has a seed and random numbers of its own, and reports every number of trajectories
    of context, z inferred anew after each. Theirs reports the last of three.
D5  dm_control's bodies are not Gym's: returns cannot be compared with the paper's.
D6  The designs from pixels were published as slides without code: what they leave open is ours.
D7  V and actor learn from the x of before the CNN's step; no gradient reaches it from the context.
D8  Hidden layers start as PyTorch's do, theirs as rlkit's, whose bound goes by the fan out.
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import os
import re
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

if sys.platform == "linux":
    if not os.environ.get("DISPLAY"):  # dm_control would choose GLFW, which needs a screen
        os.environ.setdefault("MUJOCO_GL", "egl")
    # glibc would map the memory of every large tensor anew; keeping it is up to 1.6 times as fast
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    # PyTorch for CUDA imports Triton with its first optimizer; after Mesa's LLVM that would crash
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")

# ---- Args --------------------------------------------------------------------------------------

HORIZON = {  # families of tasks, and the steps of their trajectories
    "cheetah-vel": 200, "cheetah-dir": 200, "walker-vel": 200, "cartpole-goal": 200,
    "reacher-goal": 100, "point-goal": 20, "pendulum-goal2": 25, "pendulum-goal": 25,
    "pendulum-gear": 200, "pendulum-gravity": 200, "pendulum-mass": 200,
}  # fmt: skip
ACTION_REPEAT = dict.fromkeys(HORIZON, 1)  # families set the length of a step
SMOKE = {
    "env_id": "pendulum-goal2", "obs_mode": "critic", "image_size": 32, "render": "fast",
    "total_frames": 44_200, "initial_steps": 100, "tasks_per_iteration": 2, "prior_steps": 50,
    "posterior_steps": 50, "extra_steps": 0, "updates_per_iteration": 50, "meta_batch": 4,
    "batch_size": 16, "context_size": 16, "latent_dim": 2, "hidden_dim": 128, "context_dim": 128,
    "filters": 16, "conv_strides": (2, 2, 1), "feature_dim": 32, "lr": 2e-3, "cnn_lr": 1e-3,
    "gamma": 0.9, "tau": 0.01, "kl_lambda": 0.005, "context_trajectories": 2,
    "eval_every_frames": 11_050, "eval_episodes": 20,
}  # fmt: skip


@dataclasses.dataclass
class Args:
    # every script
    env_id: str = "cheetah-vel"  # <domain>-<task> of the dm_control suite (here, a family of tasks)
    seed: int = 1  # of environment, networks and sampling; evaluation has its own
    total_frames: int = 520_000  # length of the run [frames]
    action_repeat: int = 1  # frames per step; 0: the published value for the task (1: see units)
    image_size: int = 64  # side of the square image [pixels]
    render: Literal["exact", "fast"] = "exact"  # fast: no shadows, coarse meshes; for smoke runs
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there, else mps, else cpu
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of matrix products and convs
    cuda_graph: bool = True  # on CUDA: launch an update, or an action, as one graph
    replay_capacity: int = 1_000_000  # rows, one per step and episode start; the run's if fewer
    batch_size: int = 64  # samples per update (transitions, of each task; code 256)
    eval_every_frames: int = 20_000  # distance between evaluations [frames]
    eval_episodes: int = 2  # episodes per evaluation (of each task, for each number of contexts)
    checkpoint_every_frames: int = 1000  # at the first episode end after so many [frames]
    runs_dir: str = "runs"  # where the run's folder is made
    resume: str = ""  # run folder to go on with; its arguments become the defaults
    evaluate: str = ""  # run folder or checkpoint to play and film, with its own arguments
    smoke: bool = False  # small images and networks that learn visibly in minutes on two CPU cores
    track: bool = False  # log to Weights & Biases too, if it is installed
    video: bool = True  # film the first episode of every evaluation
    # this algorithm
    obs_mode: Literal["state", "cnn-test", "cnn", "cnn-rl", "ae", "critic"] = "critic"  # what x is
    critic: Literal["v", "q"] = "v"  # V, temperature 1 (paper); or target Qs, learned temperature
    oracle: bool = False  # z is the task's parameter: nothing is inferred
    train_tasks: int = 20  # tasks to train on, where there are infinitely many (paper 100)
    test_tasks: int = 10  # tasks to test on, where there are infinitely many (paper 30)
    task_seed: int = 1337  # of the tasks' parameters, of which the first are to train on
    trajectory_steps: int = 0  # steps per trajectory (0: the family's)
    initial_steps: int = 1000  # per training task, by the untrained policy (code 2000)
    tasks_per_iteration: int = 5  # training tasks visited per iteration (code 5)
    prior_steps: int = 400  # of a visit, z from the prior, for Qs and context (code 400)
    posterior_steps: int = 0  # of a visit, z inferred but at first, for Qs and context (code 0)
    extra_steps: int = 600  # of a visit, z inferred but at first, for Qs alone (code 600)
    updates_per_iteration: int = 1000  # gradient updates per iteration (code 2000)
    meta_batch: int = 16  # tasks per update (code 16)
    context_size: int = 100  # transitions of context per task and update (code 100)
    context_trajectories: int = 4  # trajectories of context in an evaluation, at most
    latent_dim: int = 5  # size of z (code 5)
    next_obs_in_context: bool = False  # always, where the dynamics differ (pendulum-gear, ...)
    hidden_dim: int = 300  # width of the hidden layers (code 300)
    context_dim: int = 200  # width of the context encoder (code 200)
    gamma: float = 0.99  # discount per step (paper 0.99)
    lr: float = 3e-4  # Adam step of actor, critics and context encoder (code 3e-4)
    tau: float = 0.005  # part of the way that target V or Qs go at a time (code 0.005)
    kl_lambda: float = 0.1  # weight of the KL, which is a sum over tasks (code 0.1)
    reward_scale: float = 5.0  # of rewards in J(Q); the context has them as they are (code 5)
    frame_stack: int = 3  # images per observation
    filters: int = 32  # channels of every conv layer
    conv_strides: tuple[int, ...] = (2, 2, 2, 2)  # one 3x3 conv layer each
    feature_dim: int = 50  # size of what the encoder makes of an image
    cnn_lr: float = 3e-4  # Adam step of CNN and decoder
    cnn_pretrain_updates: int = 1000  # regressions of a cnn mode on the initial trajectories
    rl_weight: float = 0.1  # of J(Q)'s gradient in the CNN with --obs-mode cnn-rl
    encoder_tau: float = 0.05  # part of the way that the target encoder goes
    latent_weight: float = 1e-6  # of the penalty |z|^2 / 2 (of x, with --obs-mode ae)
    decoder_weight_decay: float = 1e-7  # L2 on the decoder, inside Adam


MAY_BE_ZERO = {"action_repeat", "cnn_pretrain_updates", "decoder_weight_decay", "extra_steps",
               "gamma", "kl_lambda", "latent_weight", "posterior_steps", "prior_steps",
               "rl_weight", "seed", "task_seed", "trajectory_steps"}  # fmt: skip
AT_MOST = {"conv_strides": 10, "encoder_tau": 1, "gamma": 1, "image_size": 4096,
           "seed": 2**31 - 1, "task_seed": 2**32 - 1, "tau": 1}  # fmt: skip
FREE_ON_RESUME = {"checkpoint_every_frames", "cuda_graph", "device", "eval_episodes",
                  "eval_every_frames", "precision", "replay_capacity", "resume", "runs_dir",
                  "smoke", "total_frames", "track", "video"}  # fmt: skip
DYNAMICS = {"pendulum-gear", "pendulum-gravity", "pendulum-mass"}  # families that differ in them


def refuse(name, why):
    """Bad usage: one line that names the flag (or variable) and the remedy; exit status 2."""
    flag = name if name.isupper() else "--" + name.replace("_", "-")
    print(f"error: {flag}: {' '.join(str(why).split())}", file=sys.stderr)
    sys.exit(2)


def make_args(values):
    """Args from JSON or a checkpoint, where tuples may have become lists."""
    return Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def parse_args():
    """Args from the command line, over the defaults of a smoke run or of the run to resume."""
    default = Args(**SMOKE) if "--smoke" in sys.argv else Args()
    args = tyro.cli(Args, default=default, description=__doc__.splitlines()[0])
    if args.resume:
        try:
            was = make_args(json.loads(Path(args.resume, "args.json").read_text()))
        except (OSError, ValueError, TypeError, AttributeError) as e:
            refuse("resume", f"{args.resume} is not a run folder of this script ({e})")
        args = tyro.cli(Args, default=was)
    check_args(args)
    return args


def check_args(args):
    """Refuses what cannot work, before PyTorch is imported or anything written."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                if not 0 < number < math.inf and not (number == 0 and name in MAY_BE_ZERO):
                    refuse(name, f"{number} is not a finite number above zero")
                if number > AT_MOST.get(name, math.inf):
                    refuse(name, f"{number} is above {AT_MOST[name]}")
    args.action_repeat = args.action_repeat or ACTION_REPEAT.get(args.env_id, 2)
    check_algorithm(args)
    if args.replay_capacity < 1000:
        refuse("replay_capacity", f"{args.replay_capacity} is below 1000, one long episode")
    if args.track and not importlib.util.find_spec("wandb"):
        refuse("track", "Weights & Biases is missing: pip install wandb")
    if args.evaluate and args.resume:
        refuse("evaluate", "cannot be combined with --resume; drop one of them")
    if args.evaluate and not Path(args.evaluate).exists():
        refuse("evaluate", f"there is no {args.evaluate}; give a run folder or a checkpoint")
    with require_renderer():
        from absl import logging

        logging.set_verbosity("error")  # MuJoCo warns of dm_control's own XML files
        import dm_control.suite
    check_run(args, dm_control.suite.ALL_TASKS)


def check_run(args, _):
    """Refuses an unknown family, and longer trajectories than it has."""
    if args.env_id not in HORIZON:
        near = difflib.get_close_matches(args.env_id, HORIZON, 3, 0.4) or HORIZON
        refuse("env_id", f"there is no family {args.env_id!r}, but {', '.join(near)}")
    most = HORIZON[args.env_id]
    args.trajectory_steps = args.trajectory_steps or most
    if args.trajectory_steps > most:
        refuse("trajectory_steps", f"{args.trajectory_steps} is above the family's {most}")
    args.next_obs_in_context |= args.env_id in DYNAMICS
    if args.oracle and args.env_id == "reacher-goal" and args.latent_dim < 2:
        refuse("latent_dim", "the family's parameter has 2 numbers")


@contextlib.contextmanager
def require_renderer():
    """Turns the many ways in which OpenGL can be missing into one line with the remedies."""
    try:
        yield
    except ModuleNotFoundError:  # dm_control is not installed
        raise
    except Exception as e:
        refuse("MUJOCO_GL", f"{os.environ.get('MUJOCO_GL')} cannot render ({e}). egl needs a GPU "
               "driver or apt-get install libegl1 libgl1-mesa-dri; osmesa needs "
               "apt-get install libosmesa6; glfw needs a screen")  # fmt: skip


@contextlib.contextmanager
def require_memory():
    """Turns what NumPy and PyTorch raise where memory is short into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:  # on a CPU, PyTorch has no class of its own for it
        why = (str(e) or "more than there is").splitlines()[0]
        if isinstance(e, MemoryError) or re.search("allocate|out of memory|Storage size", why):
            sys.exit(f"error: memory: {why}; smaller networks, batches or counts need less")
        raise


def conv_sizes(size, strides):
    """Side of the image and of every 3x3 conv layer's output [pixels]."""
    sizes = [size]
    for stride in strides:
        sizes.append((sizes[-1] - 3) // stride + 1)
    return sizes


def check_algorithm(args):
    """The part of check_args that is this script's own."""
    if args.action_repeat != 1:
        refuse("action_repeat", "families set the length of a step; leave it out")
    if not args.conv_strides:
        refuse("conv_strides", "there must be one conv layer at least")
    if min(conv_sizes(args.image_size, args.conv_strides)) < 1:
        least = functools.reduce(lambda n, stride: (n - 1) * stride + 3, args.conv_strides[::-1], 1)
        refuse("image_size", f"{args.image_size} is too small for these convs; from {least} on")
    if args.obs_mode == "state":
        args.frame_stack = 1  # of states
    if not args.prior_steps + args.posterior_steps:
        refuse("prior_steps", "there is no context without steps for it; use more than 0")


if __name__ == "__main__":  # up here, so that --help and a wrong flag need not wait for PyTorch
    ARGS = parse_args()

import imageio
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from dm_control import suite
from dm_control.mujoco.engine import Camera
from dm_control.rl import control
from dm_control.utils import rewards
from filelock import FileLock, Timeout  # comes with torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- task families -----------------------------------------------------------------------------


class MetaTask:
    """A task of the suite with a parameter theta that decides the reward or the dynamics. Nothing
    shows theta: targets are invisible, and what points at them is left out of observations."""

    def __init__(self, task, env_id):
        self.task, self.family = task, FAMILIES[env_id]
        self.theta = split(Args(env_id=env_id))[0][0]  # until collect() or evaluate() sets another

    def __getattr__(self, name):
        return getattr(self.task, name)  # everything else is the suite's

    def initialize_episode(self, physics):
        """The suite's start, then theta's changes to the model."""
        self.task.initialize_episode(physics)
        if "rootx" in physics.named.data.qpos.axes.row.names:
            physics.named.model.geom_pos[0, "x"] = 0.0  # the floor, or it ends two metres back
        self.family.apply(physics, self.theta)
        physics.forward()

    def before_step(self, action, physics):
        """Keeps action (A,) and joint positions for the reward."""
        self.action, self.qpos = np.array(action), physics.data.qpos.copy()
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

    base: str  # task of the suite that it is made of
    dt: float  # length of a step [s]
    thetas: object  # function of a RandomState that draws one; or a tuple of all there are
    reward: object  # function of MetaTask and physics
    apply: object = lambda physics, theta: None  # changes the model at an episode's start


def walker_reward(task, physics):
    """The suite's for walking, 0 to 1, at theta metres per second."""
    standing = rewards.tolerance(physics.torso_height(), (1.2, math.inf), margin=0.6)
    stand = (3 * standing + (1 + physics.torso_upright()) / 2) / 4
    return stand * (1 + 5 * max(0.0, 1 - abs(task.velocity(physics) - task.theta))) / 6


def cartpole_reward(task, physics):
    """0 to 1: the pole upright and the cart at theta; less the effort."""
    upright = (1 + physics.pole_angle_cosine().item()) / 2
    near = math.exp(-2 * abs(physics.named.data.qpos["slider"].item() - task.theta))
    return upright * near - task.effort()


def put_target(physics, theta):
    """At polar coordinates (radius, angle), invisible."""
    radius, angle = theta
    xy = radius * math.cos(angle), radius * math.sin(angle)
    physics.named.model.geom_pos["target", ["x", "y"]] = xy
    physics.named.model.geom_rgba["target", 3] = 0.0


def put_point_and_target(physics, theta):
    """The point at the origin, the target 0.2 m from it at angle theta."""
    physics.data.qpos[:] = 0.0
    put_target(physics, (0.2, theta))


def set_mass(physics, theta):
    """The pole weighs theta kg."""
    angle, physics.named.model.body_mass["pole"] = physics.data.qpos.copy(), theta
    mujoco.mj_setConst(physics.model.ptr, physics.data.ptr)
    physics.data.qpos[:] = angle  # which that had reset


def tame_pendulum(physics, theta):
    """A constant torque turns the pole to an angle and holds it, up to 1.2 rad from hanging; a
    target beyond that can only be approached."""
    physics.model.actuator_gear[0, 0], physics.model.dof_damping[0] = 4.5, 1.0


def angle_reward(task, physics):
    """-1 to 1: the cosine of the way to theta, counted from hanging [rad]."""
    return math.cos(physics.data.qpos[0] - math.pi - task.theta)


def suite_reward(task, physics):
    """The suite's: theta is in the dynamics."""
    return task.task.get_reward(physics)


FAMILIES = {
    "cheetah-vel": Family("cheetah-run", 0.05, lambda r: r.uniform(0, 3),
                          lambda t, p: -abs(t.velocity(p) - t.theta) - t.effort()),
    "cheetah-dir": Family("cheetah-run", 0.05, (-1.0, 1.0),
                          lambda t, p: t.theta * t.velocity(p) - t.effort()),
    "walker-vel": Family("walker-walk", 0.05, lambda r: r.uniform(0, 2), walker_reward),
    "cartpole-goal": Family("cartpole-balance", 0.02, lambda r: r.uniform(-1, 1),
                            cartpole_reward),
    "reacher-goal": Family("reacher-easy", 0.04,
                           lambda r: (r.uniform(0.05, 0.2), r.uniform(-math.pi, math.pi)),
                           lambda t, p: -p.finger_to_target_dist(), put_target),
    "point-goal": Family("point_mass-easy", 0.1, lambda r: r.uniform(-math.pi, math.pi),
                         lambda t, p: -p.mass_to_target_dist(), put_point_and_target),
    "pendulum-goal2": Family("pendulum-swingup", 0.04, (-math.pi / 2, math.pi / 2),
                             angle_reward, tame_pendulum),
    "pendulum-goal": Family("pendulum-swingup", 0.04, lambda r: r.uniform(-1.8, 1.8),
                            angle_reward, tame_pendulum),
    "pendulum-gear": Family("pendulum-swingup", 0.02, (-1.0, 1.0), suite_reward,
                            lambda p, theta: p.model.actuator_gear.__setitem__((0, 0), theta)),
    "pendulum-gravity": Family("pendulum-swingup", 0.02, lambda r: r.uniform(5, 15),
                               suite_reward,
                               lambda p, theta: p.model.opt.gravity.__setitem__(2, -theta)),
    "pendulum-mass": Family("pendulum-swingup", 0.02, lambda r: r.uniform(0.5, 2),
                            suite_reward, set_mass),
}


def split(args):
    """Parameters of the tasks to train on and of those to test on, whatever --seed is. Two-task
    families train and test on both."""
    family, random = FAMILIES[args.env_id], np.random.RandomState(args.task_seed)
    if isinstance(family.thetas, tuple):
        return list(family.thetas), list(family.thetas)
    thetas = [family.thetas(random) for _ in range(args.train_tasks + args.test_tasks)]
    return thetas[: args.train_tasks], thetas[args.train_tasks :]


# ---- PixelEnv (shared: the same text in every script) -------------------------------------------


class EnvSpec(NamedTuple):
    obs_shape: tuple  # (3, H, W) of an image or (S,) of a state vector
    obs_dtype: torch.dtype
    action_dim: int
    state_dim: int = 0  # of Step.state


class Step(NamedTuple):
    obs: np.ndarray  # what the agent sees: image uint8 (3, H, W), or the state
    state: np.ndarray  # the task's own observation, flattened, float32 (S,)
    action: np.ndarray  # what led here, float32 (A,); zeros where an episode starts
    reward: float  # summed over the action repeat
    discount: float  # 0 where the task ended for good; 1 everywhere else, at a time limit too
    first: bool  # an episode starts
    last: bool  # the episode is over


def load_task(env_id, random):
    """The dm_control environment of a family."""
    family = FAMILIES[env_id]
    env = suite.load(*family.base.split("-", 1), {"random": random})
    return control.Environment(env.physics, MetaTask(env.task, env_id), control_timestep=family.dt,
                               time_limit=(HORIZON[env_id] - 0.5) * family.dt)  # 0.5: rounding


class PixelEnv:
    """A dm_control suite task: action repeat, a camera, a random state that can be restored.

    render="exact" gives the pixels of physics.render; "fast" leaves out shadows, reflections and
    smooth edges, about 40 times as fast without a GPU. Actions are (A,) in [-1, 1].
    """

    def __init__(self, env_id, seed, action_repeat, image_size, render, pixels=True, video_size=0):
        self.random = np.random.RandomState(seed)
        self.env = load_task(env_id, self.random)
        self.action_repeat, self.image_size, self.pixels = action_repeat, image_size, pixels
        self.camera_id = 2 if env_id.startswith("quadruped") else 0
        self.cameras, self.flags = {}, {}
        action_spec = self.env.action_spec()
        bounds = action_spec.minimum, action_spec.maximum  # infinite ones (lqr) become -1, 1
        self.low, self.high = (np.where(np.abs(b) > 1e6, np.sign(b), b) for b in bounds)
        vis = self.env.physics.model.vis
        vis.global_.offwidth = vis.global_.offheight = max(image_size, video_size)
        if render == "fast":
            vis.quality.offsamples, vis.quality.numslices, vis.quality.numstacks = 0, 8, 6
            self.flags = {"shadow": False, "reflection": False}
        dtype = torch.uint8 if pixels else torch.float32
        first = self.reset()
        self.spec = EnvSpec(first.obs.shape, dtype, len(self.low), len(first.state))
        self.fps = max(1, round(1 / (self.env.control_timestep() * action_repeat)))  # of a video
        self.random.seed(seed)  # as if the reset above, for the shapes, had not been

    def reset(self):
        """First Step of a new episode."""
        self.start, self.actions = self.random.get_state(), []
        return self._see(self.env.reset(), 0.0)

    def step(self, action):
        """Next Step; the action is repeated until the episode ends at most."""
        assert not self.last, "the episode is over: reset() comes next"
        self.actions.append(action.tolist())
        control = self.low + (np.array(self.actions[-1]) + 1) / 2 * (self.high - self.low)
        reward = 0.0
        for _ in range(self.action_repeat):
            time_step = self.env.step(control)
            reward += time_step.reward
            if time_step.last():
                break
        return self._see(time_step, reward)

    def _see(self, time_step, reward):
        self.last = time_step.last()
        state = np.concatenate([np.ravel(v) for v in time_step.observation.values()])
        obs = state = state.astype(np.float32)  # obs: unless the agent sees pixels
        if self.pixels:
            obs = self.render(self.image_size).transpose(2, 0, 1).copy()
        action = np.float32(self.actions[-1] if self.actions else [0.0] * len(self.low))
        discount = 1.0 if time_step.discount is None else time_step.discount
        return Step(obs, state, action, float(reward), float(discount), not self.actions, self.last)

    def render(self, size):
        """Image (size, size, 3) uint8; copy it, the camera draws into the same array again."""
        if size not in self.cameras:
            self.cameras[size] = Camera(self.env.physics, size, size, self.camera_id)
        return self.cameras[size].render(render_flag_overrides=self.flags)

    def state_dict(self):
        """The random state at the episode's start and the actions since then."""
        name, keys, *rest = self.start
        return {"random": [name, keys.tolist(), *rest], "actions": list(self.actions)}

    def load_state_dict(self, state):
        """Plays the episode again up to where it was saved and returns that Step. Setting the
        simulator's state instead would not be exact: some of it cannot be read."""
        self.random.set_state(tuple(state["random"]))
        step = self.reset()
        for action in state["actions"]:
            step = self.step(np.float32(action))
        return step

    def close(self):
        """Frees the renderer (OSMesa complains at exit otherwise)."""
        self.env.physics.free()


# ---- ReplayBuffer (shared: the same text in every script) ---------------------------------------


def upload(values, device):
    """Array, number or tensor as a tensor on `device`. To CUDA from pinned memory, so that nothing
    waits for what the GPU still has to do."""
    tensor, cuda = torch.as_tensor(values), device.startswith("cuda")
    tensor = tensor.pin_memory() if cuda and tensor.is_cpu else tensor
    return tensor.to(device, non_blocking=cuda)


class ReplayBuffer:
    """Ring of rows on `device`. Every image is kept once, as uint8; stacks are made when sampled.

    Row t holds image t, the action that led to it (zeros at an episode's start), the reward and
    the discount on arriving. A transition is rows t and t + 1. Rows are counted from the run's
    start; row t lies in slot t % capacity. Nothing that is sampled reaches across episodes.
    """

    def __init__(self, capacity, spec, device):
        self.capacity, self.device = capacity, device
        self.row = self.saved = 0  # next row, next row to save
        self.columns = {
            "obs": torch.empty((capacity, *spec.obs_shape), dtype=spec.obs_dtype, device=device),
            "action": torch.empty((capacity, spec.action_dim), device=device),
            "reward": torch.empty((capacity, 1), device=device),
            "discount": torch.empty((capacity, 1), device=device),
        }
        self.start = np.zeros(capacity, np.int64)  # the row at which the row's episode starts

    @staticmethod
    def row_bytes(spec):
        """Memory of one row [bytes]."""
        obs = math.prod(spec.obs_shape) * spec.obs_dtype.itemsize
        return obs + 4 * spec.action_dim + 4 + 4 + 8  # reward, discount, start

    def add(self, step):
        """Appends a Step."""
        slot, before = self.row % self.capacity, (self.row - 1) % self.capacity
        self.start[slot] = self.row if step.first else self.start[before]
        for name, column in self.columns.items():
            column[slot] = upload(getattr(step, name), self.device)
        self.row += 1

    def draw(self, rng, count, oldest, length, together):
        """First rows (count,) of windows of `length` rows, none before `oldest`, whose last
        `together` rows are of one episode; uniform, with replacement. Raises if there are hardly
        any."""
        rows = np.empty(0, np.int64)
        for _ in range(1000):
            new = rng.integers(oldest, self.row - length + 1, count)
            starts = self.start[(new + length - 1) % self.capacity]  # of the last rows' episodes
            rows = np.append(rows, new[starts <= new + length - together])
            if len(rows) >= count:
                return rows[:count]
        raise ValueError(f"the replay buffer holds hardly any episode of {together} rows")

    def gather(self, column, rows):
        """Rows of a column, (*rows.shape, ...). On a CPU index_select is much faster than [ ]."""
        slots = upload(rows.ravel() % self.capacity, self.device)
        return self.columns[column].index_select(0, slots).unflatten(0, rows.shape)

    def transitions(self, rng, batch_size, stack):
        """Batch of obs, next_obs (B, stack * C, H, W), action (B, A), reward, discount (B, 1).

        Before an episode's first image, a stack repeats it.
        """
        oldest = self.row - self.capacity  # a stack must not reach before it
        oldest = oldest + stack - 1 if oldest > 0 else 0
        rows = self.draw(rng, batch_size, oldest, length=2, together=2)
        starts = self.start[rows % self.capacity]
        window = np.maximum(rows[:, None] + np.arange(1 - stack, 2), starts[:, None])
        obs = self.gather("obs", window)  # (B, stack + 1, C, H, W)
        batch = {key: self.gather(key, rows + 1) for key in ("action", "reward", "discount")}
        return {"obs": obs[:, :-1].flatten(1, 2), "next_obs": obs[:, 1:].flatten(1, 2), **batch}

    def sequences(self, rng, batch_size, length, together):
        """Batch of all columns (B, T, ...) and is_first (B, T): T rows of which at least the last
        `together` are of one episode; where is_first, one starts."""
        rows = self.draw(rng, batch_size, max(0, self.row - self.capacity), length, together)
        rows = rows[:, None] + np.arange(length)
        is_first = upload(self.start[rows % self.capacity] == rows, self.device)
        return {"is_first": is_first, **{key: self.gather(key, rows) for key in self.columns}}

    def save(self, folder):
        """Writes the rows since the last save, 1000 a file, each file named by its first row."""
        for first in range(self.saved, self.row, 1000):
            rows = np.arange(first, min(first + 1000, self.row))
            chunk = {key: self.gather(key, rows).cpu() for key in self.columns}
            chunk["start"] = torch.as_tensor(self.start[rows % self.capacity])
            write_file(chunk, folder / f"{first:010d}.pt")
        self.saved = self.row

    def load(self, folder, row):
        """Fills the buffer with the rows before `row` from the files that save() wrote."""
        while self.row < row:
            chunk = read_file(folder / f"{self.row:010d}.pt")
            rows = np.arange(self.row, self.row + len(chunk["start"]))[-self.capacity :]
            slots = torch.as_tensor(rows % self.capacity)
            for key, column in self.columns.items():
                column[slots.to(self.device)] = chunk[key][-len(rows) :].to(self.device)
            self.start[slots] = chunk["start"][-len(rows) :]
            self.row = self.saved = self.row + len(chunk["start"])


def free_memory(device):
    """Bytes free on `device`, within a container's limit; infinite where the system is silent."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]

    def read(path, word, default):
        try:
            return int(re.search(rf"{word}\W*(\d+)", Path(path).read_text())[1])
        except (OSError, TypeError):  # no such file; no number in it
            return default

    limit, group = read("/sys/fs/cgroup/memory.max", "", math.inf), "/sys/fs/cgroup/memory.stat"
    machine = 1024 * read("/proc/meminfo", "MemAvailable", math.inf)
    return min(machine, limit - read(group, "anon", 0))


# ---- TaskBuffer --------------------------------------------------------------------------------


class TaskBuffer(ReplayBuffer):
    """The replay buffer of all training tasks, with the state beside the image. For each task two
    lists of the rows at which its trajectories start: of all of them (rl), and of those that z may
    be inferred from (enc). They are the checkpoint's; all rows of a run are kept."""

    def __init__(self, capacity, spec, device, horizon):
        super().__init__(capacity, spec, device)
        self.columns["state"] = torch.empty((capacity, spec.state_dim), device=device)
        self.horizon = horizon

    def watch(self, thetas, rl, enc, latent_dim):
        """Takes the tasks' parameters and lists; the parameters also as a z (tasks, L)."""
        self.task_thetas, self.rl, self.enc = thetas, rl, enc
        self.thetas = torch.stack([as_z(theta, latent_dim) for theta in thetas])

    def pick(self, starts, rng, count):
        """Rows (count,) at which transitions of trajectories begin, with replacement. Trajectories
        have `horizon` steps, none fewer."""
        i = rng.integers(0, len(starts) * self.horizon, count)
        return np.array(starts)[i // self.horizon] + i % self.horizon

    def at(self, rows, stack):
        """The transitions that begin at rows (T, N), which are slots: {name: (T, N, ...)}."""
        window = np.maximum(rows[..., None] + np.arange(1 - stack, 2), self.start[rows][..., None])
        obs = self.gather("obs", window)  # (T, N, stack + 1, C, H, W)
        out = {key: self.gather(key, rows + 1) for key in ("action", "reward", "discount")}
        out |= {"state": self.gather("state", rows), "next_state": self.gather("state", rows + 1)}
        return out | {"obs": obs[:, :, :-1].flatten(2, 3), "next_obs": obs[:, :, 1:].flatten(2, 3)}


def as_z(theta, latent_dim):
    """A task's parameter in the first places of a z (L,), for --oracle."""
    values = torch.atleast_1d(torch.as_tensor(theta, dtype=torch.float32))
    return F.pad(values, (0, latent_dim - len(values)))


# ---- helpers -----------------------------------------------------------------------------------


class Linear32(nn.Linear):
    """A layer that stays out of bfloat16: values, logits and means need more digits."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def mlp(in_dim, hidden_dim, layers, out_dim, last=3e-3):
    """Hidden ReLU layers and a linear one, which starts near zero."""  # D8
    dims, net = [in_dim] + layers * [hidden_dim], []
    for i in range(layers):
        net += [nn.Linear(dims[i], dims[i + 1]), nn.ReLU()]
    net.append(Linear32(dims[-1], out_dim))
    for p in net[-1].parameters():
        nn.init.uniform_(p, -last, last)
    return nn.Sequential(*net)


def preprocess(obs):
    """uint8 images (B, C, H, W) to float in [0, 1], channels last; states pass unchanged."""
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


def minimize(loss, *optimizers):
    """One step of each optimizer on `loss`. Gradients go to the optimizers' own parameters and
    nowhere else, whatever the loss was computed with."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    with torch.autocast(loss.device.type, enabled=False):  # backward keeps forward's types
        loss.backward(inputs=parameters)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def soft_update(net, target, tau):
    """target <- tau net + (1 - tau) target."""
    for p, t in zip(net.parameters(), target.parameters(), strict=True):
        t.lerp_(p, tau)


# ---- networks ----------------------------------------------------------------------------------


class Encoder(nn.Sequential):
    """Stacked images (N, K * C, H, W) in [0, 1] -> x (N, X): an estimate of the standardised state,
    or (bounded) features of no given meaning."""

    def __init__(self, obs_shape, x_dim, bounded, args):
        sizes, layers, channels = conv_sizes(obs_shape[-1], args.conv_strides), [], obs_shape[0]
        for stride in args.conv_strides:
            layers += [nn.Conv2d(channels, args.filters, 3, stride), nn.ReLU()]
            channels = args.filters
        layers += [nn.Flatten(), Linear32(channels * sizes[-1] ** 2, x_dim)]
        super().__init__(*layers, *([nn.LayerNorm(x_dim), nn.Tanh()] if bounded else []))


class Decoder(nn.Sequential):
    """z (B, D) -> image stack (B, K * C, H, W), centred at 0: the encoder backwards."""

    def __init__(self, obs_shape, z_dim, args):
        sizes, n = conv_sizes(obs_shape[-1], args.conv_strides), args.filters
        layers = [nn.Linear(z_dim, n * sizes[-1] ** 2), nn.ReLU()]
        layers += [nn.Unflatten(1, (n, sizes[-1], sizes[-1]))]
        for i, stride in reversed(list(enumerate(args.conv_strides))):
            missing = sizes[i] - (sizes[i + 1] - 1) * stride - 3  # what the conv's stride cut off
            out = n if i else obs_shape[0]
            layers += [nn.ConvTranspose2d(n, out, 3, stride, output_padding=missing), nn.ReLU()]
        super().__init__(*layers[:-1])


# ---- Agent -------------------------------------------------------------------------------------


class Agent(nn.Module):
    """update, the algorithm, to be read first; a method per loss; act."""

    def __init__(self, args, spec):
        super().__init__()
        self.args, self.updates, self.action_dim = args, 0, spec.action_dim
        self.x_is_features = args.obs_mode in ("ae", "critic")  # x is features, not the state
        self.true_state = args.obs_mode == "cnn-test"  # in training; evaluate() chooses for itself
        A, L = spec.action_dim, args.latent_dim
        x_dim = args.feature_dim if self.x_is_features else spec.state_dim
        net = functools.partial(mlp, hidden_dim=args.hidden_dim, layers=3)
        self.actor = net(x_dim + L, out_dim=2 * A, last=1e-3)
        self.q1, self.q2 = (net(x_dim + A + L, out_dim=1) for _ in range(2))
        in_dim = (2 if args.next_obs_in_context else 1) * x_dim + A + 1
        self.context_encoder = mlp(in_dim, args.context_dim, 3, 2 * L)
        self.register_buffer("state_mean", torch.zeros(spec.state_dim))
        self.register_buffer("state_std", torch.ones(spec.state_dim))
        self.v = net(x_dim + L, out_dim=1) if args.critic == "v" else None
        if args.obs_mode != "state":
            images = (args.frame_stack * spec.obs_shape[0], *spec.obs_shape[1:])
            self.cnn = Encoder(images, x_dim, self.x_is_features, args)
        if args.obs_mode == "ae":
            self.decoder = Decoder(images, x_dim, args)
        self.to(args.device, memory_format=torch.channels_last)

        # Who trains what: each network has an optimizer, and a loss moves those that it is given to
        # minimize with, nothing else.
        self.optimizers = {}
        for name, module in self.named_children():
            lr = args.cnn_lr if name in ("cnn", "decoder") else args.lr
            decay = args.decoder_weight_decay if name == "decoder" else 0.0
            self.optimizers[name] = torch.optim.Adam(
                module.parameters(), lr, weight_decay=decay, fused=True)
        if self.v is None:
            self.log_alpha = nn.Parameter(torch.zeros((), device=args.device))
            self.optimizers["alpha"] = torch.optim.Adam([self.log_alpha], args.lr, fused=True)
        self.taus = dict.fromkeys(["q1", "q2"] if self.v is None else ["v"], args.tau)
        if self.x_is_features:
            self.taus["cnn"] = args.encoder_tau
        for name in self.taus:  # the networks that have a target
            target = copy.deepcopy(self.get_submodule(name)).requires_grad_(False)
            self.add_module(f"target_{name}", target)

    def prior(self, theta):
        """Mean and variance (1, L) of z before any context; with --oracle, all there is to know."""
        mu = as_z(theta, self.args.latent_dim).to(self.args.device)[None]
        return (mu, torch.zeros_like(mu)) if self.args.oracle else (0 * mu, torch.ones_like(mu))

    def standardise(self, state):
        """States (..., S) in units of the initial trajectories' spread."""
        return (state - self.state_mean) / self.state_std

    def see(self, obs, state, true_state, target=False):
        """x (M, X) of stacked images (M, K * C, H, W), or of states (M, S)."""
        if self.args.obs_mode == "state" or true_state:
            return self.standardise(state)
        return (self.target_cnn if target else self.cnn)(preprocess(obs))

    def infer(self, x, action, reward, next_x):
        """Mean and variance (T, L) of q(z | c), from context (T, N, X), (T, N, A), (T, N, 1)."""
        parts = [x, action, reward] + [next_x] * self.args.next_obs_in_context
        mu, var = self.context_encoder(torch.cat(parts, -1)).chunk(2, -1)
        return product_of_gaussians(mu, F.softplus(var))  # [PEARL product]

    def policy(self, x, z):
        """Mean and log standard deviation (M, A) before the tanh."""
        mean, log_std = self.actor(torch.cat([x, z], -1)).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    @torch.no_grad()  # acting learns nothing
    def act(self, step, carry, explore):
        """Action (A,) for a Step. The carry holds z (1, L), whether the true state is seen, and the
        stack of images; it comes back with x (1, X)."""
        obs = torch.as_tensor(step.obs, device=self.args.device)[None]
        state = torch.as_tensor(step.state, device=self.args.device)[None]
        if self.args.obs_mode != "state":
            old = carry.get("stack", torch.cat([obs] * self.args.frame_stack, 1))
            obs = torch.cat([old[:, obs.shape[1] :], obs], 1)  # (1, K * C, H, W)
        x = self.see(obs, state, carry["true_state"])
        mean, log_std = self.policy(x, carry["z"])
        action = tanh_gaussian(mean, log_std)[0] if explore else torch.tanh(mean)
        return action[0], {**carry, "stack": obs, "x": x}

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
            value = torch.min(self.target_q1(inputs), self.target_q2(inputs))
            value = value - self.log_alpha.exp() * log_prob
        return self.args.reward_scale * reward + self.args.gamma * discount * value

    def q_loss(self, x, action, z, target):
        """Squared TD error of both Qs; trains them, z, and perhaps x."""
        inputs = torch.cat([x, action, z], -1)
        q1, q2 = self.q1(inputs), self.q2(inputs)
        return F.mse_loss(q1, target) + F.mse_loss(q2, target)  # [PEARL J(Q)]

    def v_loss(self, x, z, q, log_prob):
        """Squared distance of V to the policy's value."""
        value = self.v(torch.cat([x, z], -1))
        return F.mse_loss(value, (q - log_prob).detach())  # [PEARL J(V)]

    def actor_loss(self, q, log_prob, mean, log_std):
        """SAC's, and a pull of mean and log std towards 0."""
        alpha = 1.0 if self.args.critic == "v" else self.log_alpha.exp().detach()
        pull = 1e-3 * mean.square().mean() + 1e-3 * log_std.square().mean()
        return (alpha * log_prob - q).mean() + pull  # [PEARL J(pi)]

    def alpha_loss(self, log_prob):
        """Moves the temperature until the entropy is -A."""
        error = (self.action_dim - log_prob).detach()
        return (self.log_alpha.exp() * error).mean()  # [SAC J(alpha)]

    def cnn_loss(self, x, state):
        """Squared error of the estimated state, in units of its variance."""
        return F.mse_loss(x, self.standardise(state))  # [M&K CNN]

    def reconstruction_loss(self, x, obs):
        """SAC+AE's: squared pixel error and a penalty that keeps x small."""
        target = (obs // 8 + torch.rand_like(obs, dtype=torch.float32)) / 32 - 0.5
        error = F.mse_loss(self.decoder(x), target)
        return error + self.args.latent_weight * 0.5 * x.square().sum(-1).mean()  # [SAC+AE J(RAE)]

    def posterior(self, context):
        """Mean and variance (T, L) of q(z | c), from context (T, N, ...) of the replay buffer."""
        if self.args.oracle:
            return context["theta"], torch.zeros_like(context["theta"])
        shape = context["action"].shape[:2]
        with torch.no_grad():  # the CNN learns from the transitions, not from the context
            xs = [self.see(context[key + "obs"].flatten(0, 1), context[key + "state"].flatten(0, 1),
                           self.true_state).unflatten(0, shape)
                  for key in ("", "next_")[: 1 + self.args.next_obs_in_context]]
        # xs[-1] counts only with --next-obs-in-context
        return self.infer(xs[0], context["action"], context["reward"], xs[-1])

    def sample(self, buffer, rng):
        """The batch that update() takes: transitions (T, B, ...), context (T, N, ...)."""
        args = self.args
        tasks = rng.integers(0, len(buffer.rl), args.meta_batch)  # [PEARL alg. 1:12]
        transitions = np.stack([buffer.pick(buffer.rl[i], rng, args.batch_size) for i in tasks])
        context = np.stack([buffer.pick(buffer.enc[i], rng, args.context_size) for i in tasks])
        context = buffer.at(context, args.frame_stack)
        context["theta"] = upload(buffer.thetas[tasks], args.device)
        transitions = buffer.at(transitions, args.frame_stack)
        return {"transitions": transitions, "context": context}  # [PEARL alg. 1:13]

    def update(self, batch):
        """One update from a batch of sample(); metrics as 0-d tensors."""
        args, optimizers, metrics = self.args, self.optimizers, {}
        mu, var = self.posterior(batch["context"])
        z = mu + var.sqrt() * torch.randn_like(mu)  # (T, L)  D1  [PEARL alg. 1:14]
        z = z.repeat_interleave(args.batch_size, 0)  # (M, L)
        obs, next_obs, state, next_state, action, reward, discount = (
            batch["transitions"][key].flatten(0, 1) for key in (
                "obs", "next_obs", "state", "next_state", "action", "reward", "discount"))
        x, movers = self.see(obs, state, self.true_state), ["q1", "q2"]
        with torch.no_grad():  # the target is a constant
            next_x = self.see(next_obs, next_state, self.true_state, target=self.x_is_features)
            target = self.target(reward, discount, next_x, z)
        extra, x_for_q, grads = 0.0, x, []
        if args.obs_mode.startswith("cnn"):
            estimate = self.cnn(preprocess(obs)) if self.true_state else x
            extra = metrics["loss/cnn"] = self.cnn_loss(estimate, state)
            weight = args.rl_weight if args.obs_mode == "cnn-rl" else 0.0
            x_for_q = x.detach() + weight * (x - x.detach())  # scales J(Q)'s gradient in the CNN
        if args.obs_mode == "cnn-rl":  # norms of the two gradients that meet in x
            x_for_q.register_hook(grads.append)  # one that held metrics would keep the graph alive
            metrics["stat/x_grad_cnn"] = 2 * (extra / x.numel()).sqrt()  # of a mean squared error
        if args.obs_mode == "ae":
            extra = metrics["loss/reconstruction"] = self.reconstruction_loss(x, obs)
            movers.append("decoder")
        metrics["loss/q"] = self.q_loss(x_for_q, action, z, target)  # [PEARL alg. 1:16]
        if not args.oracle:
            metrics["loss/kl"] = self.kl_loss(mu, var)  # [PEARL alg. 1:17]
            extra = extra + args.kl_lambda * metrics["loss/kl"]
            movers.append("context_encoder")
        if args.obs_mode != "state":
            movers.append("cnn")
        loss = metrics["loss/q"] + extra
        minimize(loss, *(optimizers[name] for name in movers))  # [PEARL alg. 1:19, 21]
        if grads:
            metrics["stat/x_grad_q"] = weight * grads[0].norm()
        x, z = x.detach(), z.detach()  # V and actor train neither the CNN nor the context encoder
        metrics |= self.update_policy(x, z)
        for name, tau in self.taus.items():
            soft_update(self.get_submodule(name), self.get_submodule(f"target_{name}"), tau)
        self.updates += 1
        metrics["stat/posterior_var"] = var.mean()
        return {name: value.detach() for name, value in metrics.items()}

    def update_policy(self, x, z):
        """The actor, and V or the temperature, from x (M, X), z (M, L)."""
        mean, log_std = self.policy(x, z)
        action, log_prob = tanh_gaussian(mean, log_std)
        inputs = torch.cat([x, action, z], -1)
        q = torch.min(self.q1(inputs), self.q2(inputs))
        losses = {"actor": self.actor_loss(q, log_prob, mean, log_std)}  # [PEARL alg. 1:15]
        if self.args.critic == "v":
            losses["v"] = self.v_loss(x, z, q, log_prob)
        else:
            losses["alpha"] = self.alpha_loss(log_prob)
        for name, loss in losses.items():  # independent of each other
            minimize(loss, self.optimizers[name])  # [PEARL alg. 1:20]
        metrics = {f"loss/{name}": loss for name, loss in losses.items()}
        return metrics | {"stat/entropy": -log_prob.mean()}

    def prepare(self, buffer):
        """After the initial trajectories: fixes the standardisation of states, if x is one."""
        if not self.x_is_features:
            state = buffer.columns["state"][: buffer.row]
            self.state_mean.copy_(state.mean(0))
            self.state_std.copy_(state.std(0).clamp(min=1e-3))

    def fit(self, buffer, rng):
        """One step of the CNN alone towards the states of the initial trajectories."""
        starts = [start for starts in buffer.rl for start in starts]
        rows = buffer.pick(starts, rng, self.args.meta_batch * self.args.batch_size)[None]
        batch = buffer.at(rows, self.args.frame_stack)
        x = self.cnn(preprocess(batch["obs"][0]))
        minimize(self.cnn_loss(x, batch["state"][0]), self.optimizers["cnn"])

    @torch.no_grad()  # for the eye
    def images(self, buffer, rng):
        """{name: uint8 (H, W, 3)}: with a decoder, eight images above their reconstructions."""
        if self.args.obs_mode != "ae":
            return {}
        obs = self.sample(buffer, rng)["transitions"]["obs"].flatten(0, 1)[:8]
        output = ((self.decoder(self.cnn(preprocess(obs))) + 0.5) * 255).clamp(0, 255).byte()
        grid = torch.cat([obs[:, -3:], output[:, -3:]], 2)  # (8, 3, 2 H, W)
        return {"reconstruction": grid.permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()}


# ---- evaluate ----------------------------------------------------------------------------------


def rng_state():
    """PyTorch's random state on the CPU and on the accelerator in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_rng_state(states):
    """Puts back what rng_state gave, as far as this machine has the same."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"].cpu())


def play_trajectory(agent, env, carry, explore, film=None):
    """One trajectory: its Steps and the x (1, X) of each. Appends images to `film`, if that is a
    list."""
    steps, xs = [env.reset()], []
    for _ in range(agent.args.trajectory_steps):
        if film is not None:
            film.append(env.render(256).copy())
        action, carry = agent.act(steps[-1], carry, explore)
        action = action.cpu()
        if not action.isfinite().all():
            check_finite({"the action": math.nan}, agent.updates)
        xs.append(carry["x"])
        steps.append(env.step(action))
    # of the last step too: it is the next x of the last transition
    return steps, [*xs, agent.act(steps[-1], carry, explore=False)[1]["x"]]


def evaluate(agent, env, thetas, true_state, film=None, interrupt=None):
    """Adapts to every task of `thetas`, eval_episodes times: trajectory k is played by the mean
    action with z from the k trajectories before. The paper's algorithm 2.

    Seeds the environment and PyTorch, and leaves PyTorch's random numbers as they were. Gives the
    returns (tasks, episodes, k + 1), the last posterior means (tasks, episodes, L), and with a CNN
    what the agent saw: x (n, S) and the true states (n, S). A signal ends it early.
    """
    args, before, seen = agent.args, rng_state(), []
    returns = np.zeros((len(thetas), args.eval_episodes, args.context_trajectories + 1))
    means = np.zeros((*returns.shape[:2], args.latent_dim))
    env.random.seed(args.seed + 2**31)
    torch.manual_seed(args.seed)
    for i, j, k in np.ndindex(returns.shape):  # k runs fastest  [PEARL alg. 2:2]
        if interrupt and interrupt.signal:
            break
        if k == 0:
            env.env.task.theta, context = thetas[i], []  # [PEARL alg. 2:1]
            mu, var = agent.prior(thetas[i])
        carry = {"z": mu + var.sqrt() * torch.randn_like(mu),  # [PEARL alg. 2:3]
                 "true_state": true_state}  # fmt: skip
        camera = film if i == j == 0 else None
        steps, xs = play_trajectory(agent, env, carry, False, camera)  # [PEARL alg. 2:4]
        returns[i, j, k] = sum(step.reward for step in steps)
        if args.obs_mode.startswith("cnn"):
            seen += [(x[0].cpu(), torch.as_tensor(s.state)) for x, s in zip(xs, steps, strict=True)]
        for x, next_x, step in zip(xs[:-1], xs[1:], steps[1:], strict=True):
            reward = torch.tensor([[step.reward]], device=args.device)
            action = torch.as_tensor(step.action, device=args.device)[None]
            context.append((x, action, reward, next_x))  # [PEARL alg. 2:5]
        if not args.oracle:
            with torch.no_grad():
                # from all transitions so far; updates infer from context_size of them
                mu, var = agent.infer(*(torch.stack(c, 1) for c in zip(*context, strict=True)))
        means[i, j] = mu[0].cpu()
    set_rng_state(before)  # D4
    return returns, means, [torch.stack(column) for column in zip(*seen, strict=True)]


def interval(values):
    """Mean over tasks and its 95 % bootstrap interval, of values (tasks, ...) -> (3, ...)."""
    rng, n = np.random.default_rng(0), len(values)
    means = values[rng.integers(0, n, (1000, n))].mean(1)
    return np.stack([values.mean(0), *np.percentile(means, [2.5, 97.5], 0)])


def score(returns):
    """The summary's numbers from returns (tasks, episodes, k + 1): return_by_context, each with its
    interval; eval_return, that after two trajectories; and gain, that less the one after none, with
    its standard error: over tasks, or over episodes where two tasks are all there are."""
    by_context = interval(returns.mean(1)).T.tolist()
    k = min(2, len(by_context) - 1)
    gains = returns[..., k] - returns[..., 0]
    gains = gains.mean(1) if len(gains) > 2 else gains.ravel()
    error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else math.inf
    return {"return_by_context": by_context, "eval_return": by_context[k][0],
            "gain": [gains.mean().item(), float(error)]}


def report(returns):
    """{name: number} of returns (tasks, episodes, k + 1), for metrics.csv."""
    gain, error = score(returns)["gain"]
    out = {f"eval/return_{i}": value for i, value in enumerate(returns.mean((0, 1)).tolist())}
    return out | {"eval/gain": gain, "eval/gain_error": error}


# ---- Logger and checkpoints (shared: the same text in every script) -----------------------------


@contextlib.contextmanager
def survive(what):
    """A full disk costs a warning, not the run (PyTorch raises RuntimeError there)."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        tqdm.write(f"warning: {what} not written: {e}", file=sys.stderr)


def write_video(path, images, fps):
    """MP4 if imageio-ffmpeg is installed, else GIF; gives the path with its suffix."""
    mp4 = importlib.util.find_spec("imageio_ffmpeg")
    rate = {"fps": fps} if mp4 else {"duration": 1000 / fps, "loop": 0}
    path = path.with_suffix(".mp4" if mp4 else ".gif")
    path.write_bytes(imageio.mimsave("<bytes>", images, format=path.suffix, **rate))
    return path


class Logger:
    """Progress bar, metrics.csv with a row per log point, TensorBoard, images and videos."""

    def __init__(self, args, run_dir, frames, rows):
        self.run_dir, self.columns = run_dir, []
        self.rows = rows  # the caller's list: what is appended here is in its checkpoints
        for name in ("images", "videos"):
            (run_dir / name).mkdir(exist_ok=True)
        if args.track:
            import wandb

            wandb.init(name=run_dir.name, config=vars(args), sync_tensorboard=True)
        self.writer = SummaryWriter(run_dir, purge_step=frames + 1)
        threading.excepthook = lambda end: tqdm.write(  # TensorBoard's writes to the disk
            f"warning: {end.thread.name} ended: {end.exc_value}", file=sys.stderr)
        self.bar = tqdm(total=args.total_frames, initial=frames, unit="frame", disable=None)

    def tensorboard(self, add):
        """Gives the writer to `add`: a new one after a failure, as its thread is dead then."""
        with survive("TensorBoard"):
            folder = self.run_dir.resolve(strict=True)  # it would make a deleted one anew
            writer, self.writer = self.writer or SummaryWriter(folder), None
            add(writer)
            self.writer = writer

    def log(self, row):
        """Appends {name: number} to metrics.csv and TensorBoard."""
        self.rows.append(row)
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        new, self.columns = columns != self.columns, []  # new: the whole file is written, as also
        with survive("metrics"):  # after a resume and after a write that failed
            with open(self.run_dir / "metrics.csv", "w" if new else "a", newline="") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerows(self.rows if new else [row])
            self.columns = columns
        self.tensorboard(lambda board: [
            board.add_scalar(name, row[name], row["frames"]) for name in row if "/" in name])
        shown = {k: f"{v:.0f}" for k, v in row.items() if k.endswith(("updates", "return"))}
        self.bar.set_postfix(shown)

    def show(self, frames, images, video, fps):
        """Writes {name: uint8 (H, W, 3)} as PNG and to TensorBoard, and the video; a (T, H, W, 3)
        among the images is one too."""
        videos = {"": video} | {f"_{k}": v for k, v in images.items() if v.ndim == 4}
        images = {k: v for k, v in images.items() if v.ndim == 3}
        self.tensorboard(lambda board: [
            board.add_image(k, v, frames, dataformats="HWC") for k, v in images.items()])
        with survive("images"):
            for name, image in images.items():
                path = self.run_dir / f"images/{frames:09d}_{name}.png"
                path.write_bytes(imageio.imwrite("<bytes>", image, format="png"))
            for name, film in videos.items():
                if len(film):
                    write_video(self.run_dir / f"videos/{frames:09d}{name}", film, fps)


def write_file(payload, path, previous=None):
    """Whole or not at all: temporary file, fsync, rename; what was there becomes `previous`."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_file(path, device="cpu"):
    """torch.load that checks every CRC and lets in tensors and plain types only."""
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise ValueError(f"{bad} is damaged")
    return torch.load(path, map_location=device, weights_only=True)


def check_finite(metrics, updates):
    """Ends a run whose losses are NaN or infinite, before such weights reach a checkpoint."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            sys.exit(f"error: {name} is {float(value)} after {updates} updates; it is not saved. "
                     "A new run with smaller learning rates may help")  # fmt: skip


@survive("checkpoint")
def save_checkpoint(run_dir, args, agent, buffer, env, rng, progress):
    """All that the rest of the run depends on; the checkpoint before stays as previous.pt."""
    total = sum(tensor.sum() for tensor in agent.state_dict().values())
    check_finite(progress["metrics"] | {"the sum of all weights": total}, agent.updates)
    (run_dir / "replay").mkdir(exist_ok=True)
    buffer.save(run_dir / "replay")
    payload = {
        "format": 1, "script": Path(__file__).stem, "args": dataclasses.asdict(args),
        "agent": agent.state_dict(), "updates": agent.updates, "row": buffer.row,
        "optimizers": {name: o.state_dict() for name, o in agent.optimizers.items()},
        "env": env.state_dict(), "numpy": rng.bit_generator.state, "torch": rng_state(),
        "version": str(torch.__version__), "progress": progress,
    }  # fmt: skip
    write_file(payload, run_dir / "checkpoint.pt", run_dir / "previous.pt")


def read_checkpoint(path, flag, device):
    """Payload of a checkpoint, or of the newest readable one of a run; refuses anything else."""
    path, problems = Path(path), []
    for file in [path / "checkpoint.pt", path / "previous.pt"] if path.is_dir() else [path]:
        try:
            payload = read_file(file, device)
            if (payload["format"], payload["script"]) != (1, Path(__file__).stem):
                raise ValueError(f"written by {payload['script']}, format {payload['format']}")
        except Exception as e:  # whatever a damaged, foreign or hostile file makes them raise
            why = "is missing" if isinstance(e, FileNotFoundError) else f"is unusable: {e}"
            problems.append(f"{file.name} {why}"[:200])
        else:
            if problems:
                print(f"warning: {problems[0]}; going on from {file.name}", file=sys.stderr)
            if problems and flag == "resume" and (path / "checkpoint.pt").exists():
                os.replace(path / "checkpoint.pt", path / "damaged.pt")  # never to be previous.pt
            return payload
    refuse(flag, f"no checkpoint of {Path(__file__).name} in {path} ({'; '.join(problems)})")


def load_checkpoint(payload, run_dir, agent, buffer, env, rng):
    """Puts everything back where it was; gives the progress and the environment's Step."""
    agent.load_state_dict(payload["agent"])
    agent.updates = payload["updates"]
    for name, optimizer in agent.optimizers.items():
        optimizer.load_state_dict(payload["optimizers"][name])
    try:
        buffer.load(run_dir / "replay", payload["row"])
    except Exception as e:
        refuse("resume", f"a file in {run_dir / 'replay'} is missing or damaged ({e})")
    rng.bit_generator.state = payload["numpy"]
    if payload["version"] != torch.__version__:
        print(f"warning: saved with PyTorch {payload['version']}; the numbers will differ")
    set_rng_state(payload["torch"])
    progress, step = payload["progress"], env.load_state_dict(payload["env"])
    payload.clear()  # gives back its memory
    return progress, step


# ---- CUDA graphs (shared; a reader can skip them) ------------------------------------------------


class CudaGraph:
    """Takes the place of an agent's method: records what that launches on the GPU, and from then on
    launches it all at once, on inputs at fixed places.

    There is a recording for each form of the inputs (nested tensors, arrays, numbers, None), each
    value of the bools among them, the options and cadence(). Whatever else the method reads or
    changes must lie on the GPU; only agent.updates may be counted besides.
    """

    def __init__(self, agent, name, cadence):
        self.agent, self.method, self.cadence = agent, getattr(agent, name), cadence
        self.calls, self.graphs, self.stream = {}, {}, torch.cuda.Stream()
        setattr(agent, name, self)

    def __call__(self, *inputs, **options):
        agent, now = self.agent, torch.cuda.current_stream()
        inputs = tree_map(lambda v: v if v is None or isinstance(v, bool) else
                          upload(v, agent.args.device), inputs)  # fmt: skip
        shapes = tree_map_only(torch.Tensor, lambda tensor: tensor.shape, inputs)
        key = str((shapes, options, self.cadence()))
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:  # the first calls choose algorithms and make Adam's moments
            self.stream.wait_stream(now)
            with torch.cuda.stream(self.stream):
                outputs = self.method(*inputs, **options)
            now.wait_stream(self.stream)
            return outputs
        if key not in self.graphs:
            groups = [g for o in agent.optimizers.values() for g in o.param_groups]
            places = tree_map_only(torch.Tensor, torch.clone, inputs)
            graph, before = torch.cuda.CUDAGraph(), agent.updates
            for group in groups:
                group["capturable"] = True
            with torch.cuda.graph(graph):  # launches nothing
                outputs = self.method(*places, **options)
            for group in groups:
                group["capturable"] = False
            self.graphs[key] = graph, places, outputs, agent.updates - before
            agent.updates = before
        graph, places, outputs, updates = self.graphs[key]
        for place, value in zip(tree_leaves(places), tree_leaves(inputs), strict=True):
            if isinstance(place, torch.Tensor):
                place.copy_(value)
        graph.replay()
        agent.updates += updates
        return tree_map_only(torch.Tensor, torch.clone, outputs)


# ---- train -------------------------------------------------------------------------------------


def autocast(args):
    """What updates run in: with --precision bf16, convs and matrix products in bfloat16. Without a
    cache of converted weights, as they change in the middle of an update."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, args.precision == "bf16",
                          cache_enabled=False)  # fmt: skip


def make_env(args, seed, pixels=True, video_size=0):
    """The family's environment; env.env.task.theta is the task."""
    return PixelEnv(args.env_id, seed, args.action_repeat, args.image_size, args.render,
                    pixels and args.obs_mode != "state", video_size)  # fmt: skip


def trajectories(args):
    """Numbers of trajectories: initial ones per task; and per visit of one, with z from the prior,
    from the posterior, and extra ones."""
    return [math.ceil(steps / args.trajectory_steps) for steps in (
        args.initial_steps, args.prior_steps, args.posterior_steps, args.extra_steps)]


def replay_rows(args):
    """Rows of the replay buffer: all of the run's, one per step and one per trajectory."""
    horizon, (initial, *visit) = args.trajectory_steps, trajectories(args)
    first, each = initial * len(split(args)[0]), args.tasks_per_iteration * sum(visit)
    if args.total_frames <= first * horizon:
        refuse("total_frames", f"there are {first * horizon} initial steps alone; raise it")
    rows = (horizon + 1) * (first + math.ceil((args.total_frames / horizon - first) / each) * each)
    if rows > args.replay_capacity:
        refuse("replay_capacity", f"all of a run's rows are kept; at least {rows}")
    return rows


class Interrupt:
    """Ctrl-C or SIGTERM sets `signal`; the loop stops with a checkpoint. A second one kills."""

    def __init__(self):
        self.signal = 0
        signal.signal(signal.SIGINT, self)
        signal.signal(signal.SIGTERM, self)

    def __call__(self, number, _):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("\nstopping with a checkpoint; once more to stop at once", file=sys.stderr)


def visits(args, rng, tasks):
    """The trajectories of an iteration in their order: [(task, whether a visit begins with it,
    whether z is inferred, whether it is for the context)]."""
    _, prior, posterior, extra = trajectories(args)
    kinds = [(False, True)] * prior  # [PEARL alg. 1:5]
    # the first of every kind has z from the prior, as in their code
    kinds += [(i > 0, True) for i in range(posterior)] + [(i > 0, False) for i in range(extra)]
    chosen = rng.integers(tasks, size=args.tasks_per_iteration).tolist()  # [PEARL alg. 1:3]
    return [(task, i == 0, *kind) for task in chosen for i, kind in enumerate(kinds)]


def collect(agent, env, buffer, job, rng):
    """Plays a trajectory of a training task, one of visits(), and gives its return."""
    (task, begins, inferred, for_context), args = job, agent.args
    if begins:
        buffer.enc[task].clear()  # [PEARL alg. 1:4]
    env.env.task.theta = buffer.task_thetas[task]
    mu, var = agent.prior(env.env.task.theta)
    if inferred and not args.oracle:
        rows = buffer.pick(buffer.enc[task], rng, args.context_size)[None]  # [PEARL alg. 1:8]
        with torch.no_grad():
            mu, var = agent.posterior(buffer.at(rows, args.frame_stack))
    z = mu + var.sqrt() * torch.randn_like(mu)  # [PEARL alg. 1:6]
    carry, row = {"z": z, "true_state": agent.true_state}, buffer.row
    steps, _ = play_trajectory(agent, env, carry, explore=True)
    for step in steps:
        buffer.add(step)  # [PEARL alg. 1:7]
    buffer.rl[task].append(row)
    if for_context:
        buffer.enc[task].append(row)
    return sum(step.reward for step in steps)


def train(args, run_dir, interrupt, payload=None):
    """The paper's algorithm 1, one trajectory or update at a time: what is left of an iteration is
    in `now`, so that a run may stop, and go on, between any two of them."""
    rng, (train_thetas, test_thetas) = np.random.default_rng(args.seed), split(args)
    torch.manual_seed(args.seed)
    env, eval_env = make_env(args, args.seed), make_env(args, 0, video_size=256 * args.video)
    agent, regresses = Agent(args, env.spec), args.obs_mode.startswith("cnn")
    rows = replay_rows(args)
    buffer = TaskBuffer(rows, env.spec, args.device, args.trajectory_steps)  # [PEARL alg. 1:1]
    if payload:
        now, _ = load_checkpoint(payload, run_dir, agent, buffer, env, rng)
    else:
        initial = [(task, False, False, True) for task in range(len(train_thetas))
                   for _ in range(trajectories(args)[0])]  # fmt: skip
        # frames at the last log (step) and checkpoint (saved); what is left of the iteration: jobs,
        # the trajectories of visits(), and numbers of fits and updates; the buffer's lists
        now = {"step": 0, "iteration": 0, "jobs": initial, "fits": 0, "updates": 0, "returns": [],
               "metrics": {}, "rows": [], "wall_s": 0.0, "saved": 0, "random_return": None,
               "eval_return": None, "score": {}, "rl": [[] for _ in train_thetas],
               "enc": [[] for _ in train_thetas]}  # fmt: skip
        env.reset()  # a checkpoint may come before the first trajectory
        print(f"{len(train_thetas)} tasks to train on, {len(test_thetas)} to test on"
              + ", the same ones" * (train_thetas == test_thetas), flush=True)  # fmt: skip
    buffer.watch(train_thetas, now["rl"], now["enc"], args.latent_dim)
    if args.cuda_graph and args.device.startswith("cuda"):
        CudaGraph(agent, "update", tuple)
        CudaGraph(agent, "act", tuple)
    frames = buffer.row - sum(map(len, now["rl"]))
    logger = Logger(args, run_dir, now["step"], now["rows"])
    logger.bar.update(frames - now["step"])
    clock = time.monotonic() - now["wall_s"]

    def save():
        now["wall_s"], now["saved"] = time.monotonic() - clock, frames
        save_checkpoint(run_dir, args, agent, buffer, env, rng, now)

    def finish():
        """Evaluates if it is time, logs the iteration; False if a signal came before."""
        check_finite(now["metrics"], agent.updates)
        row, every = {"train/return": float(np.mean(now["returns"]))}, args.eval_every_frames
        if frames // every > now["step"] // every or frames >= args.total_frames:
            film, test = [] if args.video else None, (agent, eval_env, test_thetas)
            by_context, means, seen = evaluate(*test, False, film, interrupt)
            shift = evaluate(*test, True, None, interrupt)[0] if regresses else None
            if interrupt.signal:
                return False
            now["score"] = score(by_context)
            row |= report(by_context)
            images = agent.images(buffer, np.random.default_rng(0))
            order = np.argsort([np.ravel(theta)[-1] for theta in test_thetas])  # reacher's: angle
            images["z"] = scatter(means[order])
            if regresses:  # the distribution shift, as numbers and as a picture
                row |= {k.replace("/", "/true_state_"): v for k, v in report(shift).items()}
                x, state = seen[0], agent.standardise(seen[1].to(args.device)).cpu()
                row["eval/cnn_error"] = F.mse_loss(x, state).item()
                images["estimates"] = scatter(torch.stack([state, x], -1).transpose(0, 1), 3, 1)
            tqdm.write(f"{frames:,} frames: return by trajectories of context "
                       + " ".join(f"{r:.1f}" for r in by_context.mean((0, 1))))
            logger.show(frames, images, film or [], env.fps)
        now["step"], now["wall_s"] = frames, time.monotonic() - clock
        metrics = {name: float(value) for name, value in now["metrics"].items()}
        counters = {"frames": frames, "updates": agent.updates}
        logger.log(counters | row | metrics | {"time/wall_s": now["wall_s"]})
        return True

    while now["step"] < args.total_frames and not interrupt.signal:  # [PEARL alg. 1:2]
        if now["fits"]:
            agent.fit(buffer, rng)
            now["fits"] -= 1
            if now["fits"] == 0:
                save()
        elif now["jobs"]:
            now["returns"].append(collect(agent, env, buffer, now["jobs"].pop(0), rng))
            frames += args.trajectory_steps
            logger.bar.update(args.trajectory_steps)
            if frames - now["saved"] >= args.checkpoint_every_frames:
                save()
        elif now["updates"]:  # [PEARL alg. 1:11]
            with autocast(args):
                now["metrics"] |= agent.update(agent.sample(buffer, rng))
            now["updates"] -= 1
        else:
            if now["iteration"] and not finish():
                break  # a signal came: the resumed run begins with this evaluation
            if now["iteration"] == 0:
                now["random_return"] = float(np.mean(now["returns"]))
                print(f"untrained policy: {now['random_return']:.1f} per trajectory", flush=True)
                agent.prepare(buffer)
                now["fits"] = args.cnn_pretrain_updates if regresses else 0
            now |= {"iteration": now["iteration"] + 1, "updates": args.updates_per_iteration,
                    "returns": [], "jobs": visits(args, rng, len(train_thetas))}  # fmt: skip
            save()
    save()
    logger.bar.close()
    logger.tensorboard(SummaryWriter.close)
    env.close()
    eval_env.close()
    return summary(args, now, agent.updates) | now["score"]


def scatter(points, limit=0, dot=5, size=200):
    """Picture (size, size, 3) of the first two numbers of points (groups, n, 1 or more), a square
    of `dot` pixels for each, the groups coloured from blue to red. With a limit both axes end at
    +-limit, and a line shows where the two are equal."""
    points, picture = np.asarray(points), np.full((size, size, 3), 255, np.uint8)
    xy = np.concatenate([points, np.zeros_like(points)], -1)[..., :2]
    low, high = (-limit, limit) if limit else (xy.min((0, 1)), xy.max((0, 1)))
    if limit:
        picture[np.arange(size)[::-1], np.arange(size)] = 200
    share = np.clip((xy - low) / np.maximum(high - low, 1e-6), 0, 1)
    for i, dots in enumerate(((size - dot) * share).astype(int)):
        red = 255 * i / max(1, len(points) - 1)
        for x, y in dots:
            picture[size - y - dot : size - y, x : x + dot] = red, 60, 255 - red
    return picture


# ---- main (shared: the same text in every script) -----------------------------------------------


def summary(args, now, updates):
    """The numbers of the last line that is printed."""
    return {"env_id": args.env_id, "script": Path(__file__).stem, "seed": args.seed,
            "device": args.device, "frames": now["step"] * args.action_repeat, "updates": updates,
            "wall_s": round(now["wall_s"], 1), "random_return": now["random_return"],
            "eval_return": now["eval_return"]}  # fmt: skip


def play(args):
    """--evaluate: adapts a checkpoint's agent to the test tasks and writes a video beside it."""
    payload, path = read_checkpoint(args.evaluate, "evaluate", args.device), Path(args.evaluate)
    chosen = {k: v for k, v in vars(args).items() if k in FREE_ON_RESUME}
    args = dataclasses.replace(make_args(payload["args"]), **chosen)
    env, film = make_env(args, 0, video_size=256), [] if args.video else None
    agent = Agent(args, env.spec)
    agent.load_state_dict(payload["agent"])
    returns, *_ = evaluate(agent, env, split(args)[1], False, film)
    env.close()
    for theta, row in zip(split(args)[1], returns.mean(1), strict=True):
        print(f"task {np.round(theta, 2)}: " + " ".join(f"{r:.1f}" for r in row))
    if film:
        folder = path if path.is_dir() else path.parent
        with survive("video"):
            print(f"video: {write_video(folder / 'evaluation', film, env.fps)}")
    now = payload["progress"]  # perhaps in the middle of an iteration
    now["step"] = payload["row"] - sum(map(len, now["rl"]))
    return summary(args, now, payload["updates"]) | score(returns)


def main(args):
    """Checks what takes PyTorch and the simulator to check, then trains or plays."""
    if args.device == "auto":
        mps = torch.backends.mps.is_available()
        args.device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as e:
        refuse("device", f"{args.device} cannot be used; try auto ({str(e).splitlines()[0]})")
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    tf32 = args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if args.evaluate:
        print("summary " + json.dumps(play(args) | {"run_dir": args.evaluate}))
        return
    with require_renderer():
        env = make_env(args, 0)
        env.close()
    rows, row_bytes = replay_rows(args), ReplayBuffer.row_bytes(env.spec)
    size, free = rows * row_bytes, free_memory(args.device)
    if size > free:
        refuse("replay_capacity", f"{rows} rows of {row_bytes} bytes are {size / 2**30:.1f} GiB, "
               f"{free / 2**30:.1f} are free; at most {int(0.9 * free / row_bytes)}")  # fmt: skip
    payload, run_dir = None, Path(args.resume)
    if not args.resume:
        stamp = time.strftime("%Y%m%d-%H%M%S-") + str(os.getpid())
        name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{stamp}"
        run_dir = Path(args.runs_dir, name)
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=1))
        except OSError as e:
            refuse("runs_dir", f"{run_dir} cannot be made ({e.strerror})")
    lock, probe = FileLock(run_dir / "lock"), run_dir / "probe"
    try:
        lock.acquire(timeout=0)  # until this process ends, in whatever way
        probe.write_bytes(bytes(2**20))
        probe.unlink()
    except (OSError, Timeout) as e:
        refuse("resume" if args.resume else "runs_dir", f"another process is at work in {run_dir}, "
               f"or it cannot be written to ({e})")  # fmt: skip
    if args.resume:
        payload = read_checkpoint(run_dir, "resume", args.device)
        for name, was in vars(make_args(payload["args"])).items():
            if name not in FREE_ON_RESUME and was != getattr(args, name):
                refuse(name, f"the run has {was}; for another value start a new run")
    print(f"{args.env_id}, seed {args.seed}, {args.device}, in {run_dir}\nreplay: {rows:,} rows of "
          f"{row_bytes:,} bytes, {size / 2**30:.2f} GiB of {free / 2**30:.1f} free", flush=True)
    interrupt = Interrupt()
    numbers = train(args, run_dir, interrupt, payload)
    if numbers["frames"] + args.action_repeat <= args.total_frames:  # a step was left
        print(f"stopped; to go on: python {Path(__file__).name} --resume {run_dir}")
        sys.exit(128 + interrupt.signal)
    print("summary " + json.dumps(numbers | {"run_dir": str(run_dir)}))


if __name__ == "__main__":
    with require_memory():
        main(ARGS)
