# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "torch>=2.10,<2.14", "numpy>=2,<2.6", "dm_control==1.0.50", "mujoco>=3.17,<4", "tyro>=1,<2",
#     "tensorboard>=2.20,<3", "imageio>=2.37,<3", "tqdm>=4.66,<5", "pytest>=8",
# ]
# ///
"""SLAC: stochastic latent actor-critic, soft actor-critic on the latent of a learned model.

Lee et al. 2020, Stochastic Latent Actor-Critic: Deep Reinforcement Learning with a Latent Variable
Model, https://arxiv.org/abs/1907.00953; the authors' code: https://github.com/alexlee-gk/slac

    images --> encoder --> f' -+--> q(z1' | f', z2, a) --> z1' --> p(z2' | z1', z2, a) --> z2'
                               |    z = z1, z2 --> decoder, reward            J(M) trains all that
                               x
                               +--> f of 8 frames, 7 actions --> actor        J(pi) trains actor
                z of the last two frames --x--> Q1, Q2        J(Q) trains Q1, Q2; x: no gradient

    python slac.py --smoke                  # a visible result in minutes on a laptop
    python slac.py --env-id cheetah-run     # the published hyperparameters
    python slac.py --evaluate RUN_DIR       # play a trained agent and film it

Shapes: B batch, T time (9 images), N images, C H W image, F features, Z latent (z1 and z2), S what
actor or critic sees, W windows of 8 images in a sequence (T - 8 + 1), A action.
Units: frame = one control step of the task; step = one decision, held for action_repeat frames;
update = one gradient update on one batch. Of sequences, which have an image per step, a frame is
an image; action[t] led to frame t and reward[t] came with it: the paper's a_t is action[t + 1].
Tags in brackets, as [SLAC J(Q)], name the formula of a line, D1 a difference below.

Differences from the paper and the authors' code
D1  The actor's loss is taken at the last frame but one, as in the authors' code; the paper's
    equation 10 has the last.
D2  The model steps first, on 32 sequences of its own, then the critic, then the actor. In the
    authors' code all gradients are those at the old parameters, and the model learns from 32 of the
    256 sequences of actor and critic.
D3  The temperature's loss uses the actor's sample of the action; theirs draws another.
D4  Evaluation has an environment, a seed and random numbers of its own.
D5  Convs pad evenly on both sides, TensorFlow's at the end: the same sizes.
D6  The decoder's last layer is leaky too, as in the authors' code; the paper calls it linear.
D7  A run begins with 10,000 frames of random actions and 50,000 updates of the model, as in the
    paper's experiments; the public code has 10,000 steps and 100,000 updates.
D8  The actor is feed-forward, as in the authors' code; the paper's submission describes a recurrent
    one for dm_control.
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

ACTION_REPEAT = {  # the paper's; 2 for any other task
    "ball_in_cup-catch": 4, "cartpole-swingup": 4, "cheetah-run": 4, "finger-spin": 1,
    "reacher-easy": 4, "walker-walk": 2,
}  # fmt: skip
SMOKE = {
    "env_id": "finger-spin", "action_repeat": 4, "total_frames": 36_000, "image_size": 32,
    "render": "fast", "warmup_steps": 1000, "pretrain_updates": 300, "model_batch_size": 16,
    "sac_batch_size": 32, "actions": 4, "channels": (16, 16, 32, 32), "feature_dim": 64,
    "z1_dim": 16, "z2_dim": 64, "hidden_dim": 128, "decoder_variance": 0.04,
    "reward_std_floor": 0.05, "model_lr": 1e-3, "critic_lr": 1e-3, "actor_lr": 1e-3,
    "alpha_lr": 1e-3, "init_temperature": 0.1, "gamma": 0.95, "critic_tau": 0.02,
    "eval_every_frames": 12_000, "checkpoint_every_frames": 12_000,
}  # fmt: skip


@dataclasses.dataclass
class Args:
    # every script
    env_id: str = "cheetah-run"  # <domain>-<task> of the dm_control suite
    seed: int = 1  # of environment, networks and sampling; evaluation has its own
    total_frames: int = 1_000_000  # length of the run [frames]
    action_repeat: int = 0  # frames per step; 0: the published value for the task
    image_size: int = 64  # side of the square image [pixels]
    render: Literal["exact", "fast"] = "exact"  # fast: no shadows, coarse meshes; for smoke runs
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there, else mps, else cpu
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of matrix products and convs
    cuda_graph: bool = True  # on CUDA: launch an update, or an action, as one graph
    replay_capacity: int = 100_000  # rows, one per step and episode start; the run's if fewer
    warmup_steps: int = 0  # uniformly random steps before the first update (0: 10,000 frames)
    pretrain_updates: int = 50_000  # updates at the end of the warm-up (paper 50,000: model only)
    updates_per_step: float = 1.0  # updates per step from then on (paper 1)
    eval_every_frames: int = 10_000  # distance between evaluations [frames]
    eval_episodes: int = 10  # episodes per evaluation (paper 10)
    checkpoint_every_frames: int = 100_000  # at the first episode end after so many [frames]
    runs_dir: str = "runs"  # where the run's folder is made
    resume: str = ""  # run folder to go on with; its arguments become the defaults
    evaluate: str = ""  # run folder or checkpoint to play and film, with its own arguments
    smoke: bool = False  # small images and networks that learn visibly in minutes on two CPU cores
    track: bool = False  # log to Weights & Biases too, if it is installed
    video: bool = True  # film the first episode of every evaluation
    # this algorithm
    z1: Literal["stochastic", "deterministic"] = "stochastic"  # inferred from the image, z2, action
    z2: Literal["stochastic", "deterministic", "recurrent", "none"] = "stochastic"  # the memory
    temporal: bool = True  # latents depend on the latent and action before; no: each frame alone
    actor_input: Literal["history", "latent"] = "history"  # features and actions, or z
    critic_input: Literal["history", "latent"] = "latent"  # features and actions, or z
    model_batch_size: int = 32  # sequences per update of the model (paper 32)
    sac_batch_size: int = 256  # sequences per update of actor and critic (paper 256)
    actions: int = 8  # per sequence, of one image more; the actor sees as many images (paper 8)
    channels: tuple[int, ...] = (32, 64, 128, 256)  # one conv layer of stride 2 each (paper)
    feature_dim: int = 256  # size of what the encoder makes of an image (paper 256)
    z1_dim: int = 0  # size of z1 (0: the paper's 32, or 256 with --z2 none)
    z2_dim: int = 256  # size of z2 (paper 256)
    hidden_dim: int = 256  # width of the hidden layers (paper 256)
    decoder_variance: float = 0.1  # of a pixel in [0, 1] (paper 0.1, or tuned per task)
    reward_std_floor: float = 1e-5  # least standard deviation of a predicted reward (code 1e-5)
    gamma: float = 0.99  # discount per step (paper 0.99)
    model_lr: float = 1e-4  # Adam step on J(M) (paper 1e-4)
    critic_lr: float = 3e-4  # Adam step of the critic (paper 3e-4)
    actor_lr: float = 3e-4  # Adam step on J(pi) (paper 3e-4)
    alpha_lr: float = 3e-4  # Adam step of log alpha (paper 3e-4)
    init_temperature: float = 1.0  # first alpha (paper 1)
    critic_tau: float = 0.005  # part of the way that the target Qs go at a time (paper 0.005)
    eval_policy: Literal["sample", "mean"] = "sample"  # actions of evaluations (paper: samples)


MAY_BE_ZERO = {"action_repeat", "gamma", "pretrain_updates", "seed", "warmup_steps", "z1_dim"}
AT_MOST = {"critic_tau": 1, "gamma": 1, "image_size": 4096, "seed": 2**31 - 1}
FREE_ON_RESUME = {"checkpoint_every_frames", "cuda_graph", "device", "eval_episodes",
                  "eval_every_frames", "eval_policy", "precision", "resume", "runs_dir", "smoke",
                  "total_frames", "track", "video"}  # fmt: skip


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


def check_run(args, suite_tasks):
    """Refuses a run that ends before it learns, and an unknown task."""
    steps = args.total_frames // args.action_repeat
    if steps <= args.warmup_steps:
        refuse("total_frames", f"{steps} steps are no more than the --warmup-steps; raise it")
    tasks = sorted("-".join(task) for task in suite_tasks)
    if args.env_id not in tasks:
        near = difflib.get_close_matches(args.env_id, tasks, 3, 0.4) or tasks
        refuse("env_id", f"the suite has no task {args.env_id!r}, but {', '.join(near)}")


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


def check_algorithm(args):
    """The part of check_args that is this script's own."""
    args.warmup_steps = args.warmup_steps or math.ceil(10_000 / args.action_repeat)  # D7
    if not args.channels:
        refuse("channels", "there must be one conv layer at least")
    unit = 2 ** len(args.channels)
    if args.image_size % unit:
        below = args.image_size // unit * unit
        refuse("image_size", f"{args.image_size} cannot be halved {len(args.channels)} times, once "
               f"for each of the --channels; use {f'{below} or ' * (below > 0)}{below + unit}")
    if not 2 <= args.actions < min(args.warmup_steps, 1000):  # the replay buffer's least size
        refuse("actions", f"{args.actions} is not at least 2 and below 1000 and the --warmup-steps")
    if not args.temporal and (args.z1 == "deterministic" or args.z2 == "recurrent"):
        refuse("temporal", "a recurrent z2 or a deterministic z1 needs it; drop --no-temporal")


if __name__ == "__main__":  # up here, so that --help and a wrong flag need not wait for PyTorch
    ARGS = parse_args()

import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from dm_control import suite
from dm_control.mujoco.engine import Camera
from filelock import FileLock, Timeout  # comes with torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

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
    """The dm_control environment of a task of the suite."""
    limit = {"time_limit": 30.0} if env_id.startswith("lqr") else {}  # the only one without an end
    return suite.load(*env_id.split("-", 1), {"random": random, **limit})


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


# ---- helpers -----------------------------------------------------------------------------------


def weight_init(module):
    """Xavier's uniform weights, zero biases (a GRU keeps PyTorch's)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Linear32(nn.Linear):
    """A layer that stays out of bfloat16: values, logits and means need more digits."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def mlp(in_dim, hidden_dim, out_dim):
    """Two hidden ReLU layers."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(),
                         nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
                         Linear32(hidden_dim, out_dim))  # fmt: skip


def preprocess(obs):
    """uint8 images (B, C, H, W) to float in [0, 1], channels last; states pass unchanged."""
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
    """Images (N, C, H, W) in [0, 1] -> features f (N, F)."""

    def __init__(self, obs_shape, args):
        layers, before = [], obs_shape[0]
        for i, after in enumerate(args.channels):
            kernel = 3 if i else 5
            layers += [nn.Conv2d(before, after, kernel, 2, kernel // 2), nn.LeakyReLU(0.2)]  # D5
            before = after
        side = obs_shape[-1] // 2 ** len(args.channels)  # what is left of the image
        layers += [nn.Conv2d(before, args.feature_dim, side), nn.LeakyReLU(0.2), nn.Flatten()]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """Latent z (N, Z) -> means of the images (N, C, H, W): the encoder backwards."""

    def __init__(self, obs_shape, z_dim, args):
        side, channels = obs_shape[-1] // 2 ** len(args.channels), [obs_shape[0], *args.channels]
        layers = [nn.Unflatten(1, (z_dim, 1, 1)), nn.ConvTranspose2d(z_dim, channels[-1], side)]
        for i in range(len(args.channels), 0, -1):
            kernel = 3 if i > 1 else 5
            layers += [nn.LeakyReLU(0.2), nn.ConvTranspose2d(
                channels[i], channels[i - 1], kernel, 2, kernel // 2, output_padding=1)]
        super().__init__(*layers, nn.LeakyReLU(0.2))  # D6


class Gaussian(nn.Module):
    """Inputs side by side -> mean and standard deviation (..., D) of a diagonal Gaussian. One that
    is not stochastic has only a mean; its 1 is for the KL, and noise() has no noise for it."""

    def __init__(self, in_dim, out_dim, args, stochastic=True, floor=1e-5):
        super().__init__()
        self.stochastic, self.floor, n = stochastic, floor, args.hidden_dim
        self.net = nn.Sequential(nn.Linear(in_dim, n), nn.LeakyReLU(0.2),
                                 nn.Linear(n, n), nn.LeakyReLU(0.2),
                                 Linear32(n, out_dim * (1 + stochastic)))  # fmt: skip

    def forward(self, *inputs):
        x = self.net(torch.cat(inputs, -1))
        if not self.stochastic:
            return x, torch.ones_like(x)
        mean, std = x.chunk(2, -1)
        return mean, F.softplus(std) + self.floor


class LatentModel(nn.Module):
    """Latents z (B, Z), z1 and z2 side by side, of images and actions, and what follows from them.

    z2 given z1 is the same for prior and posterior, so that only z1 has a KL. What p and q of the
    next z1 know of the past is the context: z2 (without it, z1) and the action, or the recurrent
    state after both.
    """

    def __init__(self, obs_shape, action_dim, args):
        super().__init__()
        alone = args.z2 == "none"
        z1, z2 = args.z1_dim or (256 if alone else 32), 0 if alone else args.z2_dim
        self.z_dims, self.z_dim, self.temporal = (z1, z2), z1 + z2, args.temporal
        self.encoder = Encoder(obs_shape, args)
        self.decoder = Decoder(obs_shape, self.z_dim, args)
        self.reward_head = Gaussian(
            2 * self.z_dim + action_dim, 1, args, floor=args.reward_std_floor)
        context = z2 if args.z2 == "recurrent" else (z2 or z1) + action_dim
        noisy1, noisy2 = args.z1 == "stochastic", args.z2 == "stochastic"
        self.q_first = Gaussian(args.feature_dim, z1, args, noisy1)  # q(z1 | f)
        self.q_next = Gaussian(args.feature_dim + context, z1, args, noisy1)  # q(z1' | f', z2, a)
        self.prior = Gaussian(context, z1, args, noisy1)  # p(z1' | z2, a)
        self.gru = nn.GRUCell(z1 + action_dim, z2) if args.z2 == "recurrent" else None
        self.z2_first = self.z2_next = None
        if args.z2 in ("stochastic", "deterministic"):
            self.z2_first = Gaussian(z1, z2, args, noisy2)  # p(z2 | z1)
            self.z2_next = Gaussian(z1 + context, z2, args, noisy2)  # p(z2' | z1', z2, a)
        noisy = torch.tensor([noisy1] * z1 + [noisy2] * z2, dtype=torch.float32)
        self.register_buffer("noisy", noisy, persistent=False)

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
        """z (..., Z) from the mean and std of its z1; without a context, an episode starts."""
        noise1, noise2 = noise.split(self.z_dims, -1)
        z1 = z1[0] + z1[1] * noise1
        if self.gru is not None:
            return torch.cat([z1, torch.zeros_like(noise2) if context is None else context], -1)
        if self.z2_next is None:
            return z1
        mean, std = self.z2_first(z1) if context is None else self.z2_next(z1, context)
        return torch.cat([z1, mean + std * noise2], -1)

    def filter(self, features, action, is_first, noise):
        """Posterior along sequences of features (B, T, F), actions (B, T, A), is_first (B, T) and
        noise (B, T, Z): z (B, T, Z), q and p of z1, each (mean, std), and where both started."""
        # the first frame of a sequence counts as a start, also in mid-episode
        started = is_first | (torch.arange(is_first.shape[1], device=is_first.device) == 0)
        q = self.q_first(features)  # (B, T, z1)
        start = self.draw(q, None, noise)  # (B, T, Z), as if an episode started at every frame
        p = torch.zeros_like(q[0]), torch.ones_like(q[1])
        if not self.temporal:
            return start, q, p, torch.ones_like(started)  # every frame is a start
        z, contexts, q_next = [start[:, 0]], [], []
        for t in range(1, features.shape[1]):
            contexts.append(self.context(z[-1], action[:, t]))
            q_next.append(self.q_next(features[:, t], contexts[-1]))
            new = self.draw(q_next[-1], contexts[-1], noise[:, t])
            z.append(torch.where(started[:, t, None], start[:, t], new))
        p_next = self.prior(torch.stack(contexts, 1))  # all at once, from the posterior's z2

        def merge(first, following):
            following = torch.cat([first[:, :1], following], 1)
            return torch.where(started[..., None], first, following)

        q_next = [torch.stack(values, 1) for values in zip(*q_next, strict=True)]  # mean, std
        q = [merge(a, b) for a, b in zip(q, q_next, strict=True)]
        p = [merge(a, b) for a, b in zip(p, p_next, strict=True)]
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
    """What it sees (B, S) -> mean and log standard deviation (B, A) before the tanh."""

    def __init__(self, in_dim, action_dim, args):
        super().__init__()
        self.trunk = mlp(in_dim, args.hidden_dim, 2 * action_dim)

    def forward(self, seen):
        mu, log_std = self.trunk(seen).chunk(2, -1)
        return mu, log_std.clamp(-20, 2)


class Critic(nn.Module):
    """z (B, D), action (B, A) -> Q1, Q2 (B, 1)."""

    def __init__(self, z_dim, action_dim, args):
        super().__init__()
        self.q1 = mlp(z_dim + action_dim, args.hidden_dim, 1)
        self.q2 = mlp(z_dim + action_dim, args.hidden_dim, 1)

    def forward(self, z, action):
        z_action = torch.cat([z, action], -1)
        return self.q1(z_action), self.q2(z_action)


# ---- Agent -------------------------------------------------------------------------------------


class Agent(nn.Module):
    """update, the algorithm, to be read first; a method per loss; act."""

    def __init__(self, args, spec):
        super().__init__()
        self.args, self.updates, self.action_dim = args, 0, spec.action_dim
        self.model = LatentModel(spec.obs_shape, spec.action_dim, args)
        n = args.actions  # images in a window: those before the sequence's last action
        dims = {"history": n * args.feature_dim + (n - 1) * self.action_dim,
                "latent": self.model.z_dim}
        self.actor = Actor(dims[args.actor_input], spec.action_dim, args)
        self.critic = Critic(dims[args.critic_input], spec.action_dim, args)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_temperature)))
        self.apply(weight_init).to(args.device, memory_format=torch.channels_last)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        adam = functools.partial(torch.optim.Adam, fused=True)  # stepped by minimize()
        self.optimizers = {
            "model": adam(self.model.parameters(), args.model_lr),
            "critic": adam(self.critic.parameters(), args.critic_lr),
            "actor": adam(self.actor.parameters(), args.actor_lr),
            "alpha": adam([self.log_alpha], args.alpha_lr),
        }

    def histories(self, features, action, is_first):
        """(B, W, n * F + (n - 1) * A): of each window n features and the actions between them. What
        lies before an episode's first frame is that frame again, without actions."""
        t, n = torch.arange(is_first.shape[1], device=is_first.device), self.args.actions
        start = (is_first * t).amax(1, keepdim=True)  # (B, 1); no window ends before, see sample()
        rows = torch.maximum(t, start)[..., None].expand(-1, -1, features.shape[-1])
        features, action = features.gather(1, rows), action * (t > start)[..., None]
        windows = [torch.cat([features[:, i : i + n].flatten(1),
                              action[:, i + 1 : i + n].flatten(1)], -1)
                   for i in range(len(t) - n + 1)]  # fmt: skip
        return torch.stack(windows, 1)

    def see(self, obs, action, is_first, kinds):
        """{kind: (B, W, S)} of what actor and critic see at the end of every window."""
        features, n, seen = self.model.encode(obs), self.args.actions, {}
        if "history" in kinds:
            seen["history"] = self.histories(features, action, is_first)
        if "latent" in kinds:
            noise = self.model.noise(*is_first.shape)
            seen["latent"] = self.model.filter(features, action, is_first, noise)[0][:, n - 1 :]
        return seen

    @torch.no_grad()  # acting learns nothing
    def act(self, step, carry, explore):
        """Action (A,) for a Step, and the next carry: the last n rows. None: an episode starts."""
        obs, action = (torch.as_tensor(x, device=self.args.device)[None, None]
                       for x in (step.obs, step.action))  # fmt: skip
        is_first = torch.full((1, 1), step.first, device=obs.device)
        row = {"obs": obs, "action": action, "is_first": is_first}
        old = carry or {k: v.repeat_interleave(self.args.actions, 1) for k, v in row.items()}
        carry = {k: torch.cat([old[k][:, 1:], v], 1) for k, v in row.items()}  # (1, n, ...)
        kind = self.args.actor_input
        mu, log_std = self.actor(self.see(**carry, kinds={kind})[kind][:, 0])
        sample = explore or self.args.eval_policy == "sample"
        action = tanh_gaussian(mu, log_std)[0] if sample else torch.tanh(mu)
        return action[0], carry

    def kl_loss(self, q, p, started):
        """KL(q || p) of z1 (B, T, z1), summed over time. Of deterministic ones (std 1) it is half
        the squared distance of the means, without the starts, whose prior N(0, I) is not learned.
        """
        kl = kl_divergence(q, p)  # (B, T)
        if self.args.z1 == "deterministic":
            kl = kl * ~started
        return kl.sum(1).mean()  # [SLAC J(M): KL]

    def image_loss(self, z, images):
        """- log p(x | z), summed over time and pixels, of images (B * T, C, H, W) in [0, 1]."""
        variance = self.args.decoder_variance
        error = (images - self.model.decoder(z.flatten(0, 1))).square()
        constant = 0.5 * math.log(2 * math.pi * variance) * images[0].numel() * z.shape[1]
        return 0.5 / variance * error.sum() / len(z) + constant  # [SLAC J(M): x]

    def reward_loss(self, z, action, reward, is_first):
        """- log p(r | z, a, z'), summed over time; a first frame has no reward. Also
        gives the mean standard deviation, which may collapse where rewards are rare."""
        mean, std = self.model.reward_head(z[:, :-1], action[:, 1:], z[:, 1:])  # (B, T - 1, 1)
        nll = 0.5 * ((reward[:, 1:] - mean) / std).square() + std.log()
        nll = nll + 0.5 * math.log(2 * math.pi)
        return (nll * ~is_first[:, 1:, None]).sum((1, 2)).mean(), std.mean()  # [SLAC J(M): r]

    def model_losses(self, obs, action, reward, discount, is_first):
        """{name: scalar} of a batch of ReplayBuffer.sequences: the sum of them is the model's loss.
        Also gives reward_loss's standard deviation."""
        images = preprocess(obs.flatten(0, 1))  # (B * T, C, H, W)
        features = self.model.encoder(images).unflatten(0, obs.shape[:2])
        noise = self.model.noise(*is_first.shape)
        z, q, p, started = self.model.filter(features, action, is_first, noise)
        losses = {"loss/kl": self.kl_loss(q, p, started), "loss/image": self.image_loss(z, images)}
        losses["loss/reward"], reward_std = self.reward_loss(z, action, reward, is_first)
        return losses, reward_std

    def critic_loss(self, seen, action, reward, discount, next_seen, next_seen_by_actor):
        """Squared TD error of both Qs, from what the critic sees at both ends of a transition."""
        with torch.no_grad():  # the target is a constant
            next_action, log_prob = tanh_gaussian(*self.actor(next_seen_by_actor))
            q = torch.min(*self.target_critic(next_seen, next_action))
            value = q - self.log_alpha.exp() * log_prob  # (B, 1)
            target = reward + self.args.gamma * discount * value
        q1, q2 = self.critic(seen, action)  # (B, 1)
        return 0.5 * (F.mse_loss(q1, target) + F.mse_loss(q2, target))  # [SLAC J(Q)]

    def actor_loss(self, seen_by_actor, seen):
        """From what actor and critic see. Also gives log pi (B, 1), which alpha_loss needs."""
        action, log_prob = tanh_gaussian(*self.actor(seen_by_actor))
        q = torch.min(*self.critic(seen, action))
        alpha = self.log_alpha.exp().detach()  # has a loss of its own
        return (alpha * log_prob - q).mean(), log_prob  # [SLAC J(pi)]

    def alpha_loss(self, log_prob):
        """Moves the temperature until the entropy is -A; log_prob (B, 1)."""
        target_entropy = -self.action_dim
        error = (-log_prob - target_entropy).detach()  # moves alpha, not the actor
        return (self.log_alpha * error).mean()  # [SLAC J(alpha)]

    def cadence(self):
        """Whether this update moves actor and critic, which wait for the first burst to end."""
        return self.updates >= self.args.pretrain_updates

    def sample(self, buffer, rng):
        """The sequences that update() takes; actor and critic have some of their own."""
        args, length = self.args, self.args.actions + 1  # the last 2 rows are of one episode
        batch = {"model": buffer.sequences(rng, args.model_batch_size, length, 2)}
        if self.cadence():
            batch["sac"] = buffer.sequences(rng, args.sac_batch_size, length, 2)
        return batch

    def update(self, batch):
        """One update from a batch of sample(); metrics as 0-d tensors."""
        optimizers, args = self.optimizers, self.args
        losses, reward_std = self.model_losses(**batch["model"])
        minimize(sum(losses.values()), optimizers["model"])  # D2
        metrics = losses | {"stat/reward_std": reward_std}
        if "sac" in batch:
            obs, action, reward, discount, is_first = (
                batch["sac"][k] for k in ("obs", "action", "reward", "discount", "is_first"))
            with torch.no_grad():  # neither the critic nor the actor trains the model
                seen = self.see(obs, action, is_first, {args.actor_input, args.critic_input})
            # two windows: up to the last frame but one, and up to the last
            (by_actor, next_by_actor), (by_critic, next_by_critic) = (
                seen[kind].unbind(1) for kind in (args.actor_input, args.critic_input))
            metrics["loss/critic"] = self.critic_loss(
                by_critic, action[:, -1], reward[:, -1], discount[:, -1], next_by_critic,
                next_by_actor)
            minimize(metrics["loss/critic"], optimizers["critic"])
            metrics["loss/actor"], log_prob = self.actor_loss(by_actor, by_critic)  # D1
            minimize(metrics["loss/actor"], optimizers["actor"])
            metrics["loss/alpha"] = self.alpha_loss(log_prob)  # D3
            minimize(metrics["loss/alpha"], optimizers["alpha"])
            metrics |= {"stat/entropy": -log_prob.mean(), "stat/alpha": self.log_alpha.exp()}
            soft_update(self.critic, self.target_critic, args.critic_tau)
        self.updates += 1
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()  # for the eye
    def images(self, buffer, rng):
        """{name: uint8 (H, W, 3)}: a sequence over time; below it what the decoder makes of the
        posterior, of the prior after the first frame, and of the prior after none, both given the
        actions."""
        length = self.args.actions + 1
        if buffer.row < length:
            return {}
        batch = buffer.sequences(rng, 64, length, 2)
        whole = batch["is_first"][:, 1:].sum(1).argmin()[None]  # of 64, one without a start inside
        obs, action, is_first = (batch[k][whole] for k in ("obs", "action", "is_first"))
        noise = self.model.noise(1, length)
        z = self.model.filter(self.model.encode(obs), action, is_first, noise)[0]
        nothing = self.model.draw((0.0, 1.0), None, self.model.noise(1))  # z ~ p(z1) p(z2 | z1)
        rows = [z, *(torch.cat([first[:, None], self.model.imagine(first, action[:, 1:],
                                                                   noise[:, 1:])], 1)
                     for first in (z[:, 0], nothing))]  # fmt: skip
        decoded = self.model.decoder(torch.cat(rows).flatten(0, 1)).unflatten(0, (3, length))
        decoded = (decoded * 255).round().clamp(0, 255).to(torch.uint8)
        strip = torch.cat([obs, decoded])  # (4, T, C, H, W)
        return {"sequence": strip.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).cpu().numpy()}


# ---- evaluate (shared: the same text in every script) -------------------------------------------


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


def evaluate(act, env, seed, episodes, video_size=0):
    """Plays `episodes` episodes of `env` with act(step, carry) -> action, carry.

    Seeds the environment and PyTorch, and leaves PyTorch's random numbers as they were. Gives the
    returns (episodes,) and the first episode's images (video_size, video_size, 3) if asked for.
    """
    returns, video, before = np.zeros(episodes), [], rng_state()
    env.random.seed(seed)
    torch.manual_seed(seed)
    for i in range(episodes):
        step, carry = env.reset(), None
        while not step.last:
            if video_size and i == 0:
                video.append(env.render(video_size).copy())
            action, carry = act(step, carry)
            step = env.step(action)
            returns[i] += step.reward
    set_rng_state(before)  # D4
    return returns, video


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


# ---- train (shared: the same text in every script) ----------------------------------------------


def autocast(args):
    """What updates run in: with --precision bf16, convs and matrix products in bfloat16. Without a
    cache of converted weights, as they change in the middle of an update."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, args.precision == "bf16",
                          cache_enabled=False)  # fmt: skip


def make_env(args, seed, pixels=True, video_size=0):
    """The run's task; pixels=False does without images."""
    return PixelEnv(args.env_id, seed, args.action_repeat, args.image_size, args.render,
                    pixels, video_size)  # fmt: skip


def replay_rows(args):
    """Rows of the replay buffer: one per step and one per episode start, of 1000 frames each."""
    rows = args.total_frames // args.action_repeat + args.total_frames // 1000 + 2
    return min(args.replay_capacity, rows)


def updates_due(args, step):
    """How many updates there should have been when this step is taken."""
    since = step - args.warmup_steps
    return args.pretrain_updates + int(args.updates_per_step * since) if since >= 0 else 0


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


def train(args, run_dir, interrupt, payload=None):
    """The loop, which knows nothing of the algorithm; `now` is its own part of a checkpoint."""
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    env, video_size = make_env(args, args.seed), 256 if args.video else 0
    eval_env, eval_seed = make_env(args, 0, video_size=video_size), args.seed + 2**31
    agent = Agent(args, env.spec)
    buffer = ReplayBuffer(replay_rows(args), env.spec, args.device)
    if args.cuda_graph and args.device.startswith("cuda"):
        CudaGraph(agent, "update", agent.cadence)
        CudaGraph(agent, "act", cadence=tuple)  # none: tuple() is ()
    total_steps = args.total_frames // args.action_repeat
    eval_steps = max(1, args.eval_every_frames // args.action_repeat)

    def random_action():
        return torch.as_tensor(rng.uniform(-1, 1, env.spec.action_dim), dtype=torch.float32)

    def log(row):
        check_finite(now["metrics"], agent.updates)
        now["wall_s"], frames = time.monotonic() - clock, now["step"] * args.action_repeat
        counters = {"frames": frames, "steps": now["step"], "updates": agent.updates}
        metrics = {k: float(v) for k, v in now["metrics"].items()}  # of the last update with them
        logger.log(counters | row | metrics | {"time/wall_s": now["wall_s"]})

    if payload:
        now, step = load_checkpoint(payload, run_dir, agent, buffer, env, rng)
    else:
        blind = make_env(args, 0, pixels=False)
        returns, _ = evaluate(lambda *_: (random_action(), None), blind, eval_seed, 10)
        print(f"random policy: {returns.mean():.1f} +- {returns.std():.1f} over 10 episodes")
        now = {"step": 0, "action": None, "carry": None, "return": 0.0, "metrics": {}, "rows": [],
               "random_return": returns.mean().item(), "eval_return": None, "wall_s": 0.0,
               "saved": 0}  # fmt: skip
        step = env.reset()
        buffer.add(step)
    logger = Logger(args, run_dir, now["step"] * args.action_repeat, now["rows"])
    clock, began = time.monotonic() - now["wall_s"], None
    while now["step"] < total_steps:
        if now["action"] is None:  # chosen before the updates; a run may be stopped among these
            action, now["carry"] = agent.act(step, now["carry"], explore=True)
            warm = now["step"] >= args.warmup_steps  # before, only the carry counts
            now["action"] = action.cpu() if warm else random_action()
        wanted = updates_due(args, now["step"])
        while agent.updates < wanted and not interrupt.signal:
            with autocast(args):
                now["metrics"] |= agent.update(agent.sample(buffer, rng))
            if agent.updates == 10:
                began = time.monotonic()
            elif agent.updates == 30 and began and args.device == "cpu":
                left = updates_due(args, total_steps) * (time.monotonic() - began) / 20
                left = tqdm.format_interval(left)
                tqdm.write(f"on this CPU the updates alone take at least {left}; see --smoke")
            if agent.updates % 1000 == 0 and agent.updates < wanted:  # a long burst
                log({})
                save_checkpoint(run_dir, args, agent, buffer, env, rng, now)
        if interrupt.signal:
            break

        if not now["action"].isfinite().all():
            check_finite(now["metrics"] | {"the action": math.nan}, agent.updates)
        step = env.step(now["action"])
        buffer.add(step)
        now |= {"step": now["step"] + 1, "action": None, "return": now["return"] + step.reward}
        frames, row = now["step"] * args.action_repeat, {}
        logger.bar.update(args.action_repeat)
        if step.last:
            row["train/return"] = now["return"]
        if now["step"] % eval_steps == 0 or now["step"] == total_steps:
            policy = functools.partial(agent.act, explore=False)
            returns, video = evaluate(policy, eval_env, eval_seed, args.eval_episodes, video_size)
            now["eval_return"] = row["eval/return"] = returns.mean().item()
            row["eval/return_std"] = returns.std().item()
            tqdm.write(f"{frames:,} frames: evaluation {returns.mean():.1f} +- {returns.std():.1f}")
            state = rng_state()  # some images take random numbers
            logger.show(frames, agent.images(buffer, np.random.default_rng(0)), video, env.fps)
            set_rng_state(state)
        if row:
            log(row)
        if step.last:
            step = env.reset()
            buffer.add(step)
            now |= {"carry": None, "return": 0.0}
            unsaved = frames - now["saved"]
            if unsaved >= args.checkpoint_every_frames and now["step"] < total_steps:
                now["saved"] = frames
                save_checkpoint(run_dir, args, agent, buffer, env, rng, now)
    now["wall_s"] = time.monotonic() - clock
    save_checkpoint(run_dir, args, agent, buffer, env, rng, now)
    logger.bar.close()
    logger.tensorboard(SummaryWriter.close)
    env.close()
    eval_env.close()
    return summary(args, now, agent.updates)


# ---- main (shared: the same text in every script) -----------------------------------------------


def summary(args, now, updates):
    """The numbers of the last line that is printed."""
    return {"env_id": args.env_id, "script": Path(__file__).stem, "seed": args.seed,
            "device": args.device, "frames": now["step"] * args.action_repeat, "updates": updates,
            "wall_s": round(now["wall_s"], 1), "random_return": now["random_return"],
            "eval_return": now["eval_return"]}  # fmt: skip


def play(args):
    """--evaluate: plays a checkpoint's agent and writes a video beside it."""
    payload, path = read_checkpoint(args.evaluate, "evaluate", args.device), Path(args.evaluate)
    chosen = {k: v for k, v in vars(args).items() if k in FREE_ON_RESUME}
    args = dataclasses.replace(make_args(payload["args"]), **chosen)
    with require_renderer():
        env = make_env(args, 0, video_size=256)
    agent = Agent(args, env.spec)
    agent.load_state_dict(payload["agent"])
    policy = functools.partial(agent.act, explore=False)
    returns, video = evaluate(policy, env, args.seed + 2**31, args.eval_episodes, 256 * args.video)
    env.close()
    print("returns: " + " ".join(f"{r:.1f}" for r in returns))
    if video:
        folder = path if path.is_dir() else path.parent
        with survive("video"):
            print(f"video: {write_video(folder / 'evaluation', video, env.fps)}")
    now = payload["progress"] | {"eval_return": returns.mean().item()}
    return summary(args, now, payload["updates"])


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
