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
The switches for data efficiency follow Bednarz's study (https://github.com/vitreusx/msc-thesis),
InfoNCE CURL (https://arxiv.org/abs/2004.04136), the rest SPR (https://arxiv.org/abs/2007.05929)
and masked world models (MWM, https://arxiv.org/abs/2206.14244).

    images --> encoder --> e' --+--> q(z' | h', e') --> z'   J(M): image, reward, KL(q || p)
                                |                            trains encoder, RSSM, decoder, reward
    z, h, a --> GRU --> h' -----+--> p(z' | h')
    z, h --> decoder, reward
    z, h -x-> actor --> a --> h' --> z' ~ p --x-> actor ...  15 steps, imagined from every z, h
        J(pi) trains the actor, through the model; J(v) trains the critic; x: no gradient

    python dreamerv2.py --smoke                  # a visible result in minutes on a laptop
    python dreamerv2.py --env-id walker-walk     # the published hyperparameters
    python dreamerv2.py --evaluate RUN_DIR       # play a trained agent and film it

Shapes: B batch, T time, N a batch of images or of states, C H W image (H also: imagined steps),
E embedding of an image, S categoricals of K classes (z: Z = S K numbers, one-hot), D recurrent
state h, F = Z + D, A action.
Units: frame = one control step of the task; step = one decision, held for action_repeat frames;
update = one gradient update on one batch. Row t of a sequence holds the action that led to it and
the reward that came with it.
Tags in brackets, as [DreamerV2 KL], name the formula of a line, D1 a difference below.

Differences from the paper and the authors' code
D1  The paper has Atari and a humanoid; here the authors' public configuration for the suite is
    followed: smaller networks, dynamics backpropagation alone, 16 sequences of 50. Whether it made
    their published curves of the suite, their repository does not say.
D2  Sequences come from the running episode too, and every possible start is as likely as every
    other. Theirs draws an ended episode first.
D3  Actions come from the truncated normal's inverse CDF, of numbers within [1e-6, 1 - 1e-6], as
    float32 would reach infinity; theirs from a sampler with a gradient written by hand.
D4  Evaluation has a seed and random numbers of its own, and ten episodes; theirs plays one.
D5  All is float32, theirs float16 in parts. Adam's epsilon is PyTorch's, added after bias
    correction. The actor's mean and deviation are one layer, for which Glorot's bound is lower.
D6  The target critic starts as a copy of the critic, theirs with weights of its own.
D7  The switches for data efficiency follow nobody's code exactly: InfoNCE and SPR compare 128
    numbers per image, with a target encoder as CURL's; InfoNCE's negatives are the batch without
    the frames near by; all auxiliary losses have the model's optimizer. A reset comes in
    mid-episode, and the agent's state starts anew, whichever weights it is of.
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

ACTION_REPEAT = {}  # the authors': 2 for every task
SMOKE = {
    "env_id": "cheetah-run", "action_repeat": 4, "total_frames": 40_000, "image_size": 32,
    "render": "fast", "updates_per_step": 0.5, "batch_size": 12, "sequence_length": 12,
    "decoder_kernels": (5, 6, 6), "depth": 8, "categoricals": 8, "classes": 8, "deter_dim": 64,
    "hidden_dim": 64, "head_dim": 64, "head_layers": 2, "horizon": 8, "gamma": 0.98,
    "entropy_weight": 3e-3, "model_lr": 1e-3, "actor_lr": 3e-4, "critic_lr": 4e-4,
    "eval_every_frames": 10_000, "checkpoint_every_frames": 10_000,
}  # fmt: skip


@dataclasses.dataclass
class Args:
    # every script
    env_id: str = "cheetah-run"  # <domain>-<task> of the dm_control suite
    seed: int = 1  # of environment, networks and sampling; evaluation has its own
    total_frames: int = 2_000_000  # length of the run [frames]
    action_repeat: int = 0  # frames per step; 0: the published value for the task
    image_size: int = 64  # side of the square image [pixels]
    render: Literal["exact", "fast"] = "exact"  # fast: no shadows, coarse meshes; for smoke runs
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there, else mps, else cpu
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of matrix products and convs
    cuda_graph: bool = True  # on CUDA: launch an update, or an action, as one graph
    replay_capacity: int = 2_000_000  # rows, one per step and episode start; the run's if fewer
    warmup_steps: int = 1000  # uniformly random steps before the first update (code 1000)
    pretrain_updates: int = 100  # updates at the end of the warm-up (code 100)
    updates_per_step: float = 0.2  # updates per step from then on (code 0.2)
    batch_size: int = 16  # samples per update (sequences; code 16, paper 50)
    eval_every_frames: int = 20_000  # distance between evaluations [frames]
    eval_episodes: int = 10  # episodes per evaluation (code 1)
    checkpoint_every_frames: int = 100_000  # at the first episode end after so many [frames]
    runs_dir: str = "runs"  # where the run's folder is made
    resume: str = ""  # run folder to go on with; its arguments become the defaults
    evaluate: str = ""  # run folder or checkpoint to play and film, with its own arguments
    smoke: bool = False  # small images and networks that learn visibly in minutes on two CPU cores
    track: bool = False  # log to Weights & Biases too, if it is installed
    video: bool = True  # film the first episode of every evaluation
    # this algorithm
    sequence_length: int = 50  # steps per sequence (code 50)
    depth: int = 48  # channels of the first conv layer; each next has twice as many (code 48)
    decoder_kernels: tuple[int, ...] = (5, 5, 6, 6)  # stride 2; the encoder has as many (code)
    categoricals: int = 32  # how many z is made of (paper 32)
    classes: int = 32  # of each categorical (paper 32)
    deter_dim: int = 200  # size of h (code 200)
    hidden_dim: int = 200  # width of the hidden layers (code 200: of the RSSM)
    head_dim: int = 400  # width of actor, critic and all heads (paper 400)
    head_layers: int = 4  # hidden layers of actor, critic and all heads (paper 4)
    horizon: int = 15  # imagined steps (paper 15)
    gamma: float = 0.99  # discount per step (code 0.99)
    return_lambda: float = 0.95  # of the lambda returns (paper 0.95)
    kl_scale: float = 1.0  # weight of the KL (paper 1)
    kl_balance: float = 0.8  # share of the KL that trains the prior (paper 0.8)
    free_nats: float = 1.0  # mean KL below which it has no gradient (code 1)
    entropy_weight: float = 1e-4  # of the actor's entropy in J(pi) (paper 1e-4)
    discount_head: bool = False  # learn when an episode ends for good; few tasks here do (lqr)
    model_lr: float = 3e-4  # Adam step on J(M) (code 3e-4)
    actor_lr: float = 8e-5  # Adam step on J(pi) (code 8e-5)
    critic_lr: float = 8e-5  # Adam step of the critic (code 8e-5)
    weight_decay: float = 1e-6  # share that weights lose per update, at any step (paper 1e-6)
    target_every_updates: int = 100  # target networks move at every Nth update (the critic's)
    # data efficiency, all off
    model_every_updates: int = 1  # the model moves at every Nth update
    behavior_every_updates: int = 1  # actor and critic move at every Nth update
    reset: Literal["none", "transition", "actor-critic", "all"] = "none"  # weights made fresh
    reset_every_updates: int = 25_000  # distance between resets, without the catch-up updates
    reset_alpha: float = 0.8  # part of the way to fresh weights that a reset goes
    catch_up_updates: int = 1000  # extra updates after each reset
    shift: int = 0  # augmentation: largest random shift of what the model sees [pixels]
    encoder_tau: float = 0.05  # part of the way that the target encoder goes (CURL 0.05)
    infonce_weight: float = 0.0  # of InfoNCE between encoder and target encoder
    spr_weight: float = 0.0  # of predicting the target encoder's next five outputs (SPR)
    mask_ratio: float = 0.0  # of feature map cells hidden in a second reconstruction; 0: none


MAY_BE_ZERO = {"action_repeat", "catch_up_updates", "infonce_weight", "entropy_weight",
               "free_nats", "gamma", "kl_balance", "kl_scale", "mask_ratio", "pretrain_updates",
               "return_lambda", "seed", "shift", "spr_weight", "weight_decay"}  # fmt: skip
AT_MOST = {"encoder_tau": 1, "gamma": 1, "head_layers": 100, "image_size": 4096, "kl_balance": 1,
           "mask_ratio": 1, "reset_alpha": 1, "return_lambda": 1, "seed": 2**31 - 1}  # fmt: skip
FREE_ON_RESUME = {"checkpoint_every_frames", "cuda_graph", "device", "eval_episodes",
                  "eval_every_frames", "precision", "resume", "runs_dir", "smoke", "total_frames",
                  "track", "video"}  # fmt: skip


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
    decoded, encoded, kernels = 1, args.image_size, args.decoder_kernels
    for kernel in kernels:
        decoded, encoded = 2 * (decoded - 1) + kernel, (encoded - 4) // 2 + 1
    if len(kernels) < 2:
        refuse("decoder_kernels", "there must be two conv layers at least")
    if decoded != args.image_size:
        refuse("image_size", f"{args.image_size} is not where the --decoder-kernels "
               f"{' '.join(map(str, kernels))} end; use {decoded}")  # fmt: skip
    if encoded < 1:
        refuse("decoder_kernels", f"{len(kernels)} convs need a larger image than {decoded}; use "
               "larger kernels or fewer")  # fmt: skip
    capacity = max(1000, args.replay_capacity)  # less is refused elsewhere
    most = min(500 // args.action_repeat, args.warmup_steps // 2, capacity // 4)
    if not 2 <= args.sequence_length <= most:
        refuse("sequence_length", f"{args.sequence_length} is not between 2 and {most}: half an "
               "episode or the --warmup-steps, a quarter of the --replay-capacity")  # fmt: skip
    if args.horizon < 2:
        refuse("horizon", "one imagined step has no return to learn from; at least 2")
    if args.spr_weight and args.sequence_length < 6:
        refuse("spr_weight", "looks five steps ahead; --sequence-length 6 at least")
    if min(args.model_every_updates, args.behavior_every_updates) > 1:
        refuse("model_every_updates", "this or --behavior-every-updates must be 1, or some updates "
               "would move nothing")  # fmt: skip


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
    """Glorot's uniform weights, zero biases, as Keras has by default; LayerNorm for resets."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()


class Linear32(nn.Linear):
    """A layer that stays out of bfloat16: values, logits and means need more digits."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def mlp(in_dim, hidden_dim, layers, out_dim):
    """Hidden ELU layers and a linear one."""
    net = [nn.Linear(in_dim, hidden_dim), nn.ELU()]
    for _ in range(layers - 1):
        net += [nn.Linear(hidden_dim, hidden_dim), nn.ELU()]
    return nn.Sequential(*net, Linear32(hidden_dim, out_dim))


def preprocess(obs):
    """uint8 images (B, C, H, W) to float in [0, 1], channels last; states pass unchanged."""
    if obs.dtype != torch.uint8:
        return obs
    return obs.to(torch.float32, memory_format=torch.channels_last) / 255


def random_shift(obs, pixels):
    """Images (B, T, C, H, W) moved by up to so many pixels each way, a sequence as a whole; the
    border is repeated."""
    if not pixels:
        return obs
    place = torch.arange(obs.shape[-1], device=obs.device)
    offset = torch.randint(-pixels, pixels + 1, (2, len(obs), 1), device=obs.device)
    rows, columns = (place + offset).clamp(0, len(place) - 1)  # (B, H), (B, W)
    obs = obs.gather(3, rows[:, None, None, :, None].expand_as(obs))
    return obs.gather(4, columns[:, None, None, None].expand_as(obs))


def one_hot_sample(logits, uniform):
    """One class of each categorical (..., S, K) as a one-hot z (..., S * K), straight-through: it
    has the gradient of the probabilities. From uniform noise of that shape: argmax p / Exp(1) is a
    sample, as Gumbel-max."""
    probs = torch.softmax(logits, -1)
    index = (probs.detach() / -torch.log(uniform)).argmax(-1, keepdim=True)
    hard = torch.zeros_like(logits).scatter_(-1, index, 1.0)
    return (hard + (probs - probs.detach())).flatten(-2)


def categorical_kl(q, p):
    """KL(q || p) of S categoricals with logits (..., S, K), summed over them."""
    q, p = torch.log_softmax(q, -1), torch.log_softmax(p, -1)
    return (q.exp() * (q - p)).sum((-1, -2))


def truncated_normal(loc, std, uniform):
    """Action from N(loc, std) cut off at -1 and 1, by the inverse CDF of uniform noise, and the
    entropy of each of its dimensions; all (..., A)."""
    low, high = (-1 - loc) / std, (1 - loc) / std
    cdf_low, cdf_high = torch.special.ndtr(low), torch.special.ndtr(high)
    mass = cdf_high - cdf_low
    p = (cdf_low + uniform * mass).clamp(1e-6, 1 - 1e-6)  # D3: 1 would be infinitely far out
    x = loc + std * math.sqrt(2) * torch.erfinv(2 * p - 1)
    action = x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()  # clipped, with the gradient of x
    density = [torch.exp(-0.5 * v.square()) / math.sqrt(2 * math.pi) for v in (low, high)]
    entropy = 0.5 * math.log(2 * math.pi * math.e) + torch.log(std * mass)
    return action, entropy + (low * density[0] - high * density[1]) / (2 * mass)


def lambda_returns(reward, value, discount, lambda_):
    """R_i = r_i + d_i ((1 - lambda) v_{i+1} + lambda R_{i+1}) and R_H = v_H, of reward and discount
    at states 0 to H - 1 (H, N) and value at states 1 to H (H, N): the first H of them (H, N)."""
    returns = [value[-1]]
    for r, v, d in zip(reward.flip(0), value.flip(0), discount.flip(0), strict=True):
        returns.append(r + d * ((1 - lambda_) * v + lambda_ * returns[-1]))
    return torch.stack(returns[:0:-1])


def minimize(loss, optimizer):
    """One step of the optimizer on `loss`. The gradient goes to its own parameters and nowhere
    else, whatever the loss was computed with, and is clipped to a norm of 100."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    with torch.autocast(loss.device.type, enabled=False):  # backward keeps forward's types
        loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, 100.0)
    optimizer.step()


@torch.no_grad()
def soft_update(net, target, tau):
    """target <- tau net + (1 - tau) target."""
    for p, t in zip(net.parameters(), target.parameters(), strict=True):
        t.lerp_(p, tau)


# ---- networks ----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Images (N, C, H, W) in [-0.5, 0.5] -> the second layer's feature maps, embeddings (N, E)."""

    def __init__(self, obs_shape, args):
        super().__init__()
        channels, side, layers = obs_shape[0], obs_shape[-1], []
        for i in range(len(args.decoder_kernels)):
            after, side = args.depth * 2**i, (side - 4) // 2 + 1
            layers += [nn.Conv2d(channels, after, 4, 2), nn.ELU()]
            channels = after
        self.net, self.dim = nn.Sequential(*layers, nn.Flatten()), channels * side**2

    def forward(self, images):
        maps = self.net[:4](images)  # two convs with their ELUs; masked_loss goes on from here
        return maps, self.net[4:](maps)


class Decoder(nn.Module):
    """(N, F) -> means of the images (N, C, H, W) in [-0.5, 0.5]."""

    def __init__(self, obs_shape, in_dim, args):
        super().__init__()
        n, layers = len(args.decoder_kernels), []
        # first 32 times the depth if there are four layers, then 4, 2, 1 times
        channels = [args.depth * 2**i for i in (n + 1, *range(n - 2, -1, -1))] + [obs_shape[0]]
        for i, kernel in enumerate(args.decoder_kernels):
            layers += [nn.ConvTranspose2d(channels[i], channels[i + 1], kernel, 2), nn.ELU()]
        self.fc, self.net = nn.Linear(in_dim, channels[0]), nn.Sequential(*layers[:-1])

    def forward(self, features):
        first = self.net[0]  # its input is one pixel: as a matrix product five times as fast
        x = self.fc(features) @ first.weight.flatten(1)  # (N, C * k * k)
        x = x.unflatten(1, first.weight.shape[1:]) + first.bias[:, None, None]
        return self.net[1:](x)


class RSSM(nn.Module):
    """Recurrent state-space model: h' = GRU(h, z, a), prior p(z | h), posterior q(z | h, e)."""

    def __init__(self, e_dim, action_dim, args):
        super().__init__()
        self.shape, self.h_dim = (args.categoricals, args.classes), args.deter_dim
        self.z_dim, n = args.categoricals * args.classes, args.hidden_dim
        self.gru_in = nn.Linear(self.z_dim + action_dim, n)
        self.gru = nn.Linear(n + self.h_dim, 3 * self.h_dim)
        self.gru_norm = nn.LayerNorm(3 * self.h_dim, eps=1e-3)
        self.prior_in, self.prior_out = nn.Linear(self.h_dim, n), Linear32(n, self.z_dim)
        self.post_in, self.post_out = nn.Linear(self.h_dim + e_dim, n), Linear32(n, self.z_dim)

    def noise(self, *shape):
        """Uniform noise (*shape, S, K), of which a z is drawn."""
        return torch.rand(*shape, *self.shape, device=self.gru.weight.device)

    def cell(self, x, h):
        """The GRU: h' (..., D) from an input before its ELU. One LayerNorm over all gates, and the
        reset gate times the tanh's whole argument: torch's GRUCell has no norm, and resets the part
        of h alone."""
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

    def observe(self, e, action, is_first, noise, z=None, h=None):
        """Filters embeddings e (B, T, E), the actions before (B, T, A) and is_first (B, T) with
        noise (B, T, S, K), from state z, h on: z (B, T, Z), h (B, T, D) and the logits of
        posterior and prior (B, T, S, K). Where is_first, the state before and its action are 0."""
        keep = 1.0 - is_first[..., None].float()
        # of gru_in and post_in, the parts that read a and e, for all times at once; z and h follow
        w_z, w_a = self.gru_in.weight.split([self.z_dim, action.shape[-1]], 1)
        w_h, w_e = self.post_in.weight.split([self.h_dim, e.shape[-1]], 1)
        x = F.linear(action * keep, w_a, self.gru_in.bias)
        y = F.linear(e, w_e, self.post_in.bias)
        z = e.new_zeros(len(e), self.z_dim) if z is None else z
        h = e.new_zeros(len(e), self.h_dim) if h is None else h
        states = []
        for t in range(e.shape[1]):
            z, h = z * keep[:, t], h * keep[:, t]
            h = self.cell(F.linear(z, w_z) + x[:, t], h)
            post = self.post_out(F.elu(F.linear(h, w_h) + y[:, t])).unflatten(-1, self.shape)
            z = one_hot_sample(post, noise[:, t])
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
        return torch.tanh(mean), 2 * torch.sigmoid(std / 2) + 0.1  # 0.1 to 2.1, first about 1.1


# ---- Agent -------------------------------------------------------------------------------------


class Agent(nn.Module):
    """update, the algorithm, to be read first; a method per loss; act."""

    def __init__(self, args, spec):
        super().__init__()
        self.args, self.updates, self.action_dim = args, 0, spec.action_dim
        head = functools.partial(mlp, hidden_dim=args.head_dim, layers=args.head_layers)
        self.encoder = Encoder(spec.obs_shape, args)
        e_dim = self.encoder.dim
        self.rssm = RSSM(e_dim, spec.action_dim, args)
        f_dim = self.rssm.z_dim + args.deter_dim
        self.decoder = Decoder(spec.obs_shape, f_dim, args)
        self.reward_head = head(f_dim, out_dim=1)
        contrast, spr, mask = args.infonce_weight, args.spr_weight, args.mask_ratio
        self.discount_head = head(f_dim, out_dim=1) if args.discount_head else None
        self.masked_decoder = Decoder(spec.obs_shape, e_dim, args) if mask else None
        self.masked_reward_head = head(e_dim, out_dim=1) if mask else None
        self.similarity = Linear32(128, 128) if contrast else None
        self.predictor = head(f_dim, out_dim=e_dim) if spr else None
        self.projection = Linear32(e_dim, 128) if contrast or spr else None
        self.world = [name for name, _ in self.named_children()]  # what J(M) trains
        self.actor = Actor(f_dim, spec.action_dim, args)
        self.critic = head(f_dim, out_dim=1)
        self.register_buffer("reset_count", torch.zeros(1, 1, dtype=torch.int64))  # for act()
        self.apply(weight_init).to(args.device, memory_format=torch.channels_last)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)  # D6
        if self.projection is not None:
            self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.target_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.loss_weights = {"loss/kl": args.kl_scale, "loss/contrastive": contrast,
                             "loss/spr": spr}  # fmt: skip

        def adam(names, lr):  # D5
            parameters = [p for name in names for p in self.get_submodule(name).parameters()]
            decay = args.weight_decay / lr  # AdamW multiplies it by lr, theirs does not
            return torch.optim.AdamW(parameters, lr, eps=1e-5, weight_decay=decay, fused=True)

        # Who trains what: a loss moves the parameters of its own optimizer, nothing else (see
        # minimize), though J(pi) is computed through the model, the reward and the target critic.
        self.optimizers = {"model": adam(self.world, args.model_lr),
                           "actor": adam(["actor"], args.actor_lr),
                           "critic": adam(["critic"], args.critic_lr)}  # fmt: skip

    @torch.no_grad()  # acting learns nothing
    def act(self, step, carry, explore):
        """Action (A,) for a Step, and the state to carry on; None: an episode starts."""
        obs = torch.as_tensor(step.obs, device=self.args.device)[None, None]
        action = torch.as_tensor(step.action, device=self.args.device)[None, None]
        carry = carry or {"z": None, "h": None, "reset_count": self.reset_count - 1}
        # (1, 1): an episode starts, or a reset came, after which the state says nothing; D7
        is_first = carry["reset_count"] != self.reset_count
        *_, e = self.encode(obs, self.encoder)
        noise = self.rssm.noise(1, 1)
        z, h, *_ = self.rssm.observe(e, action, is_first, noise, carry["z"], carry["h"])
        loc, std = self.actor(torch.cat([z, h], -1)[0])
        action = truncated_normal(loc, std, torch.rand_like(loc))[0] if explore else loc
        return action[0], {"z": z[0], "h": h[0], "reset_count": self.reset_count.clone()}

    def encode(self, obs, encoder):
        """Of uint8 images (B, T, C, H, W): in [-0.5, 0.5] (B * T, C, H, W), their feature maps
        (B * T, ...), and embeddings (B, T, E)."""
        images = preprocess(obs.flatten(0, 1)) - 0.5
        maps, e = encoder(images)
        return images, maps, e.unflatten(0, obs.shape[:2])

    def image_loss(self, means, images):
        """-log N(image | mean, 1), summed over its pixels; both (N, C, H, W)."""
        error = (means - images).square().sum() / len(images)
        return 0.5 * error + 0.5 * math.log(2 * math.pi) * images[0].numel()  # [DreamerV2 image]

    def reward_loss(self, mean, reward):
        """-log N(reward | mean, 1); both (B, T, 1)."""
        return 0.5 * F.mse_loss(mean, reward) + 0.5 * math.log(2 * math.pi)  # [DreamerV2 reward]

    def discount_loss(self, logit, discount):
        """Cross entropy with gamma * discount as the probability; both (B, T, 1)."""
        target = self.args.gamma * discount
        return F.binary_cross_entropy_with_logits(logit, target)  # [DreamerV2 discount]

    def kl_loss(self, post, prior):
        """KL of posterior to prior from logits (B, T, S, K); kl_balance of it trains the prior, the
        rest the posterior. Below free_nats on average it is constant. Also gives the plain KL."""
        to_prior = categorical_kl(post.detach(), prior).mean()  # no gradient to q's logits
        to_post = categorical_kl(post, prior.detach()).mean()  # none to p's
        free, balance = self.args.free_nats, self.args.kl_balance
        kl = balance * to_prior.clamp(min=free) + (1 - balance) * to_post.clamp(min=free)
        return kl, to_post  # [DreamerV2 KL]

    def contrastive_loss(self, e, keys):
        """InfoNCE: the embedding of an image e (B, T, E) must find the key of the same image under
        random shift, among the keys of the batch (B, T, 128) but for those close by in its
        sequence. An image that two sequences hold counts as a negative of itself, as in CURL."""
        query = self.similarity(self.projection(e)).flatten(0, 1)
        n, T = len(query), e.shape[1]
        index = torch.arange(n, device=e.device)
        sequence, apart = index // T, (index[:, None] - index).abs()
        near = (sequence[:, None] == sequence) & (apart > 0) & (apart <= 3)  # look the same
        with torch.autocast(e.device.type, enabled=False):  # as Linear32
            logits = (query @ keys.flatten(0, 1).T).masked_fill(near, -math.inf)
        return F.cross_entropy(logits, index)  # [CURL InfoNCE]

    def spr_loss(self, z, h, action, keys):
        """From every state of z (B, T, Z), h (B, T, D) the model goes five steps ahead by the real
        actions (B, T, A) and predicts the keys (B, T, 128) of the images there: 2 - 2 cosine."""
        loss = 0.0
        for k in range(1, 6):
            z, h = z[:, :-1], h[:, :-1]  # the last has no image so far ahead
            noise = self.rssm.noise(*z.shape[:2])
            z, h = self.rssm.imagine_step(z, h, action[:, k:], noise)
            predicted = self.projection(self.predictor(torch.cat([z, h], -1)))
            loss = loss + 2 - 2 * F.cosine_similarity(predicted, keys[:, k:], -1).mean()
        return loss / 5  # [SPR loss]

    def masked_loss(self, maps, images, reward):
        """Reconstruction of whole images (N, C, H, W), and the reward (N, 1), from an embedding for
        which cells of the feature maps (N, c, h, w) were hidden."""
        hidden = torch.rand_like(maps[:, :1]) < self.args.mask_ratio
        e = self.encoder.net[4:](maps.masked_fill(hidden, 0.0))
        return (self.image_loss(self.masked_decoder(e), images)
                + self.reward_loss(self.masked_reward_head(e), reward))  # [MWM light]

    def model_losses(self, batch, images, maps, e, z, h, post, prior):
        """{name: scalar} of a batch, its images and what the model makes of them. J(M) is the
        weighted sum of those that are called loss/..."""
        features, losses = torch.cat([z, h], -1), {}  # (B, T, F)
        losses["loss/kl"], losses["stat/kl"] = self.kl_loss(post, prior)
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
        return losses

    def imagine(self, z, h):
        """The actor in the model from states z (N, Z), h (N, D) on: features (H + 1, N, F), and the
        entropies (H, N) of the actor at all but the last. Actions carry gradients."""
        features, entropies = [torch.cat([z, h], -1)], []
        noise = self.rssm.noise(self.args.horizon, len(z))
        uniform = torch.rand(*noise.shape[:2], self.action_dim, device=z.device)
        for t in range(self.args.horizon):
            # no gradient through what the actor sees, only through what its actions bring about
            loc, std = self.actor(features[-1].detach())
            action, entropy = truncated_normal(loc, std, uniform[t])
            z, h = self.rssm.imagine_step(z, h, action, noise[t])
            features.append(torch.cat([z, h], -1))
            entropies.append(entropy.sum(-1))
        return torch.stack(features), torch.stack(entropies)

    def discounts(self, features, first_discount):
        """Discounts of imagined states (H + 1, N): gamma. Or with the head: gamma times those of
        the replay buffer (N,), and then what the head says, which includes gamma. And weights: the
        product of the discounts before each state."""
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
        """Minus the return after each action and its entropy, both (H, N), weighted (H + 1, N); the
        gradient flows through the model's steps."""
        # Action i leads to state i + 1, and return i + 1 is the first that it changes. The last
        # action counts through the value of the last state alone, its entropy not.
        objective = returns[1:] + self.args.entropy_weight * entropies[:-1]
        return -(weights[:-2] * objective).mean()  # [DreamerV2 actor]

    def critic_loss(self, features, returns, weights):
        """-log N(return | critic, 1) at imagined features (H + 1, N, F), the last left out."""
        value = self.critic(features[:-1].detach()).squeeze(-1)  # the model is not the critic's
        nll = 0.5 * (value - returns.detach()).square() + 0.5 * math.log(2 * math.pi)
        return (weights[:-1] * nll).mean()  # [DreamerV2 critic]

    def resets_due(self, updates):
        """How many resets come up to this update, its own included: the k-th is catch_up_updates
        before update k * (every + catch_up_updates), and updates_due lets those follow at once."""
        every, extra = self.args.reset_every_updates, self.args.catch_up_updates
        return 0 if self.args.reset == "none" else max(0, updates + extra) // (every + extra)

    @torch.no_grad()
    def reset(self):
        """Moves weights reset_alpha of the way to fresh ones, clears the state of their Adam (its
        counter too), and copies them to their targets."""
        names = {"transition": ["rssm.gru_in", "rssm.gru", "rssm.gru_norm", "rssm.prior_in",
                                "rssm.prior_out"], "actor-critic": ["actor", "critic"],
                 "all": [*self.world, "actor", "critic"]}[self.args.reset]  # fmt: skip
        for name in names:
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
        """Whether this update begins with a reset, and moves the model, the policy, the target."""
        args, n = self.args, self.updates
        model, behavior = n % args.model_every_updates == 0, n % args.behavior_every_updates == 0
        target = n % (args.behavior_every_updates * args.target_every_updates) == 0
        return self.resets_due(n) > self.resets_due(n - 1), model, behavior, target

    def sample(self, buffer, rng):
        """The sequences that update() takes; the model starts anew at the first row of each."""
        size, length = self.args.batch_size, self.args.sequence_length
        batch = buffer.sequences(rng, size, length, length)  # D2  [Bednarz alg. 1:3]
        batch["is_first"][:, 0] = True  # the state before is not known: zeros, without its action
        return batch

    def update_model(self, batch, due):
        """One step of the model, if it is due; then states z (B, T, Z), h (B, T, D) as the model
        before that step saw them, and metrics."""
        args = self.args
        with torch.set_grad_enabled(due):
            images, maps, e = self.encode(random_shift(batch["obs"], args.shift), self.encoder)
            noise = self.rssm.noise(*e.shape[:2])
            states = self.rssm.observe(e, batch["action"], batch["is_first"], noise)
        if not due:
            return *states[:2], {}
        metrics = self.model_losses(batch, images, maps, e, *states)
        loss = sum(self.loss_weights.get(name, 1.0) * value
                   for name, value in metrics.items() if name.startswith("loss/"))  # fmt: skip
        minimize(loss, self.optimizers["model"])
        if self.projection is not None:
            soft_update(self.encoder, self.target_encoder, args.encoder_tau)
            soft_update(self.projection, self.target_projection, args.encoder_tau)
        return *states[:2], metrics

    def update_behavior(self, z, h, first_discount, target_due):
        """One step of actor and critic from states z (N, Z), h (N, D) and their discounts (N,)."""
        features, entropies = self.imagine(z, h)  # [Bednarz alg. 1:5]
        discount, weights = self.discounts(features, first_discount)  # [Bednarz alg. 1:6]
        returns = self.returns(features, discount)
        actor_loss = self.actor_loss(returns, entropies, weights)
        critic_loss = self.critic_loss(features, returns, weights)
        minimize(actor_loss, self.optimizers["actor"])
        minimize(critic_loss, self.optimizers["critic"])
        if target_due:
            soft_update(self.critic, self.target_critic, 1.0)
        return {"loss/actor": actor_loss, "loss/critic": critic_loss,
                "stat/entropy": entropies.mean(), "stat/imagined_return": returns.mean()}

    def update(self, batch):
        """One update from a batch of sample(); metrics as 0-d tensors."""
        reset_due, model_due, behavior_due, target_due = self.cadence()
        if reset_due:
            self.reset()
        z, h, metrics = self.update_model(batch, model_due)  # [Bednarz alg. 1:4]
        if behavior_due:
            start = [x.detach().flatten(0, 1) for x in (z, h)]  # the model has losses of its own
            discount = batch["discount"].flatten()
            metrics |= self.update_behavior(*start, discount, target_due)  # [Bednarz alg. 1:7]
        self.updates += 1
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()  # for the eye
    def images(self, buffer, rng):
        """A sequence of T images; the model, which sees the first five and imagines the others from
        the actions alone; its error, grey where there is none. {"open_loop": the three one below
        the other, uint8 (3 H, T W, 3), "film": side by side, enlarged, (T, 4 H, 12 W, 3)}."""
        length = min(self.args.sequence_length, 20)
        if buffer.row < length:
            return {}
        batch = buffer.sequences(rng, 1, length, length)
        obs, action, noise = batch["obs"], batch["action"], self.rssm.noise(1, length)
        is_first = torch.arange(length, device=obs.device)[None] == 0
        *_, e = self.encode(obs, self.encoder)
        z, h, *_ = self.rssm.observe(*(x[:, :5] for x in (e, action, is_first, noise)))
        features, z, h = [torch.cat([z, h], -1)], z[:, -1], h[:, -1]
        for t in range(5, length):
            z, h = self.rssm.imagine_step(z, h, action[:, t], noise[:, t])
            features.append(torch.cat([z, h], -1)[:, None])
        truth, model = obs[0] / 255, self.decoder(torch.cat(features, 1)[0]) + 0.5
        rows = torch.stack([truth, model, (model - truth + 1) / 2])  # (3, T, C, H, W)
        rows = (rows * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        film = F.interpolate(rows.permute(1, 2, 3, 0, 4).flatten(3), scale_factor=4)
        return {"open_loop": rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy(),
                "film": film.permute(0, 2, 3, 1).numpy()}


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
    """Updates that belong before this step is taken: the cadence, without memory."""
    since = step - args.warmup_steps
    due = args.pretrain_updates + int(args.updates_per_step * since) if since >= 0 else 0
    resets = due // args.reset_every_updates if args.reset != "none" else 0
    return due + args.catch_up_updates * resets


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
