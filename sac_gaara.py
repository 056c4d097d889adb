# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "torch>=2.10,<2.14", "numpy>=2,<2.6", "dm_control==1.0.50", "mujoco>=3.17,<4", "tyro>=1,<2",
#     "tensorboard>=2.20,<3", "imageio>=2.37,<3", "tqdm>=4.66,<5", "pytest>=8",
# ]
# ///
"""SAC+GAARA: SAC+AE plus an annealed contrastive loss between a centre and a random crop.

Chen & Gong 2022, SAC+GAARA: Generate Augmented And Reconstructable latent states with Ae, report
and code: https://github.com/Otsuts/SAC-GAARA; it builds on CURL (Laskin et al. 2020,
https://arxiv.org/abs/2004.04136) and on SAC+AE:

Yarats et al. 2019, Improving Sample Efficiency in Model-Free Reinforcement Learning from Images,
https://arxiv.org/abs/1910.01741; the authors' code: https://github.com/denisyarats/pytorch_sac_ae

                            +---> head --> z --+--> Q1, Q2      J(Q) trains convs, head, Q1, Q2
    obs --> convs --> h ----+                  +--> decoder     J(RAE) trains convs, head, decoder
                            +-x-> actor's own head --> MLP      J(pi) trains it, through Q(z, a)
                                                                x: no gradient
    obs = centre crop ------> z = z_a -------------+
                                                   +--> z_a W z_p   InfoNCE trains convs, head, W
    random crop --> target encoder -x-> z_p -------+                with a weight that is annealed

    python sac_gaara.py --smoke                  # a visible result in minutes on a laptop
    python sac_gaara.py --env-id cheetah-run     # the published hyperparameters
    python sac_gaara.py --evaluate RUN_DIR       # play a trained agent and film it

Shapes: B batch, T time, K stacked images, C H W image, S state, F features, D latent, A action.
Units: frame = one control step of the task; step = one decision, held for action_repeat frames;
update = one gradient update on one batch.
Tags in brackets, as [GAARA (6)], name the formula of a line, D1 a difference below.

Differences from the paper and the authors' code
(D1 to D6 from SAC+AE's, the others from the report of SAC+GAARA and its code)
D1  The actor's optimizer does not hold the convs that it shares with the critic. Theirs does, but
    their gradient in it is always zero: the same parameters come out. (--actor-trains-encoder: it
    does.)
D2  Actor and decoder read one pass of the convs over obs. Nothing that it depends on changes
    between the two, but with --actor-trains-encoder: the same losses come out.
D3  Bootstrapping follows dm_control's discount, which is 1 at a time limit. Theirs keeps a done
    flag and clears it there: the same targets wherever episodes only end by time.
D4  Evaluation has an environment, a seed and random numbers of its own; theirs uses the training's.
D5  --freeze-encoder: the actor trains its own head on the frozen convs. In the first version of
    the authors' code that head stayed as initialised.
D6  log alpha is float32, theirs float64.
D7  Random crops of 84 in 100 start at 0 to 16; GAARA's and CURL's code leaves out 16.
D8  The contrastive weight is a function of the update counter, not a running difference. As
    published it has no effect: the loss has an Adam of its own, which divides any factor out. It
    has one with --anneal lr, and with --contrast-step joint at weights near 1e-3, where the two
    gradients in the encoder are of one size.
D9  The report's (2) and (9) lack the minus of a cross entropy, algorithm 1 encodes the positives
    online, and section 4.2 swaps query and key. Here as in (6) and in the code: anchor W target.
D10 CURL's code takes two steps of two Adams on one contrastive gradient; here it is one.
D11 The contrastive step of its own is taken at every update; theirs waits for the decoder's, which
    is as often by default.
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
    "ball_in_cup-catch": 4, "cartpole-swingup": 8, "cheetah-run": 4, "finger-spin": 2,
    "reacher-easy": 4, "walker-walk": 2,
}  # fmt: skip
SMOKE = {
    "env_id": "finger-spin", "action_repeat": 4, "total_frames": 64_000, "image_size": 48,
    "render": "fast", "warmup_steps": 2000, "pretrain_updates": 500, "updates_per_step": 0.5,
    "batch_size": 32, "filters": 16, "conv_strides": (2, 2, 1), "hidden_dim": 256, "gamma": 0.95,
    "critic_tau": 0.02, "alpha_lr": 1e-3, "actor_every_updates": 1, "target_every_updates": 1,
    "eval_every_frames": 16_000, "checkpoint_every_frames": 16_000, "crop_size": 40,
}  # fmt: skip


@dataclasses.dataclass
class Args:
    # every script
    env_id: str = "cheetah-run"  # <domain>-<task> of the dm_control suite
    seed: int = 1  # of environment, networks and sampling; evaluation has its own
    total_frames: int = 1_000_000  # length of the run [frames]
    action_repeat: int = 0  # frames per step; 0: the published value for the task
    image_size: int = 100  # side of the square image [pixels]
    render: Literal["exact", "fast"] = "exact"  # fast: no shadows, coarse meshes; for smoke runs
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there, else mps, else cpu
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of matrix products and convs
    cuda_graph: bool = True  # on CUDA: launch an update, or an action, as one graph
    replay_capacity: int = 700_000  # rows, one per step and episode start; the run's if fewer
    warmup_steps: int = 1000  # uniformly random steps before the first update (paper 1000)
    pretrain_updates: int = 1000  # updates at the end of the warm-up (authors' code 1000)
    updates_per_step: float = 1.0  # updates per step from then on (paper 1)
    batch_size: int = 128  # samples per update (transitions; paper 128)
    eval_every_frames: int = 20_000  # distance between evaluations [frames]
    eval_episodes: int = 10  # episodes per evaluation (paper 10)
    checkpoint_every_frames: int = 100_000  # at the first episode end after so many [frames]
    runs_dir: str = "runs"  # where the run's folder is made
    resume: str = ""  # run folder to go on with; its arguments become the defaults
    evaluate: str = ""  # run folder or checkpoint to play and film, with its own arguments
    smoke: bool = False  # small images and networks that learn visibly in minutes on two CPU cores
    track: bool = False  # log to Weights & Biases too, if it is installed
    video: bool = True  # film the first episode of every evaluation
    # this algorithm
    obs: Literal["pixels", "state"] = "pixels"  # state: SAC from the simulator's state vector
    reconstruction: Literal["ae", "vae", "none"] = "ae"  # vae: beta-VAE; none: no decoder
    decoder_every_updates: int = 1  # reconstruct only at every Nth update
    freeze_encoder: bool = False  # no gradient of J(Q) reaches the encoder
    actor_trains_encoder: bool = False  # J(pi) moves the convs too, through pi and Q (unstable)
    frame_stack: int = 3  # images per observation (paper 3)
    filters: int = 32  # channels of every conv layer (paper 32)
    conv_strides: tuple[int, ...] = (2, 1, 1, 1)  # one 3x3 conv layer each (paper 2 1 1 1)
    latent_dim: int = 50  # size of z (paper 50)
    hidden_dim: int = 1024  # width of the hidden layers (paper 1024)
    gamma: float = 0.99  # discount per step (paper 0.99)
    critic_lr: float = 1e-3  # Adam step of the critic (paper 1e-3)
    actor_lr: float = 1e-3  # Adam step on J(pi) (paper 1e-3)
    alpha_lr: float = 1e-4  # Adam step of log alpha (paper 1e-4)
    encoder_lr: float = 1e-3  # Adam step of the encoder on auxiliary losses (paper 1e-3)
    decoder_lr: float = 1e-3  # Adam step of the decoder (paper 1e-3)
    alpha_beta1: float = 0.5  # Adam's beta1 of log alpha (paper 0.5)
    init_temperature: float = 0.1  # first alpha (paper 0.1)
    actor_every_updates: int = 2  # actor and alpha move at every Nth update (paper 2)
    target_every_updates: int = 2  # target networks move at every Nth update (paper 2)
    critic_tau: float = 0.01  # part of the way that the target Qs go at a time (paper 0.01)
    encoder_tau: float = 0.05  # part of the way that the target encoder goes (paper 0.05)
    latent_weight: float = 1e-6  # of the penalty |z|^2 / 2 (paper 1e-6)
    decoder_weight_decay: float = 1e-7  # L2 on the decoder, inside Adam (paper 1e-7)
    kl_weight: float = 3.15e-5  # vae: beta / 31752, half the pixels that the error is a mean of
    crop_size: int = 84  # side of what the networks see of the image [pixels] (paper 84)
    obs_crop: Literal["centre", "random"] = "centre"  # of obs (the anchor) and next_obs in training
    contrast: Literal["infonce", "discriminator", "none"] = "infonce"  # discriminator: of decodings
    contrast_step: Literal["separate", "joint"] = "separate"  # joint: added to J(RAE), one step
    positive_encoder: Literal["target", "online"] = "target"  # what encodes the other crop
    train_similarity: bool = True  # InfoNCE moves its matrix W; the first release of the code: no
    latent_tanh: bool = True  # z is squashed into (-1, 1); CURL: no
    contrast_weight: float = 1.0  # of the contrastive loss, or its rate, at first (paper 1)
    contrast_floor: float = 0.5  # what the weight falls to; one that began below stays (paper 0.5)
    contrast_decay: float = 1e-6  # what the weight loses per update (paper 1e-6)
    anneal: Literal["loss", "lr"] = "loss"  # what the weight scales; paper: the loss, see D8


MAY_BE_ZERO = {"action_repeat", "alpha_beta1", "contrast_decay", "contrast_floor",
               "decoder_weight_decay", "gamma", "kl_weight", "latent_weight", "pretrain_updates",
               "seed"}  # fmt: skip
AT_MOST = {"conv_strides": 10, "critic_tau": 1, "encoder_tau": 1, "gamma": 1, "image_size": 4096,
           "seed": 2**31 - 1}  # fmt: skip
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


def conv_sizes(size, strides):
    """Side of the image and of every 3x3 conv layer's output [pixels]."""
    sizes = [size]
    for stride in strides:
        sizes.append((sizes[-1] - 3) // stride + 1)
    return sizes


def check_algorithm(args):
    """The part of check_args that is this script's own."""
    modules = {args.reconstruction, args.contrast}
    if args.obs == "state" and (modules, args.frame_stack) != ({"none"}, 1):
        refuse("obs", "a state is no image; add --reconstruction none --contrast none "
               "--frame-stack 1")  # fmt: skip
    if args.contrast == "discriminator" and args.reconstruction == "none":
        refuse("contrast", "discriminator is the decoder; drop --reconstruction none")
    if args.contrast_step == "joint" and ("none" in modules or args.contrast != "infonce"):
        refuse("contrast_step", "joint is the sum of a reconstruction loss and InfoNCE; add both")
    if args.contrast_step == "joint" and args.anneal == "lr":
        refuse("anneal", "a joint step has no learning rate of its own; use loss")
    if args.alpha_beta1 >= 1:
        refuse("alpha_beta1", f"{args.alpha_beta1} is not below 1")
    if not args.conv_strides:
        refuse("conv_strides", "there must be one conv layer at least")
    if args.freeze_encoder and args.actor_trains_encoder:
        refuse("freeze_encoder", "contradicts --actor-trains-encoder; drop one of them")
    if min(conv_sizes(args.crop_size, args.conv_strides)) < 1:
        least = functools.reduce(lambda n, stride: (n - 1) * stride + 3, args.conv_strides[::-1], 1)
        refuse("crop_size", f"{args.crop_size} is too small for these convs; from {least} on")
    if args.crop_size > args.image_size:
        refuse("image_size", f"{args.image_size} is below the --crop-size {args.crop_size}")


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
    """Orthogonal linear layers; delta-orthogonal convs (https://arxiv.org/abs/1806.05393): zero but
    for the centre tap, so that a signal crosses the layers with its norm."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        centre = module.weight.data[:, :, module.kernel_size[0] // 2, module.kernel_size[1] // 2]
        nn.init.orthogonal_(centre, math.sqrt(2))


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


def crop(images, size, rng=None):
    """Windows (B, C, size, size) of images (B, C, H, W): the middle or, with a rng, one that is
    drawn for each sample and is the same in all its channels. States pass unchanged."""
    if images.ndim < 4:
        return images
    room = images.shape[-1] - size
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # [:, :, top, left], without a copy
    if rng is None:
        return windows[:, :, room // 2, room // 2]
    top, left = upload(rng.integers(0, room + 1, (2, len(images))), str(images.device))  # D7
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def bounded_log_std(x):
    """Squashes a network's output into [-10, 2]."""
    return -10 + 6 * (torch.tanh(x) + 1)


def tanh_gaussian(mu, log_std):
    """Sample a = tanh(mu + sigma eps) (B, A) and log pi(a) (B, 1); SAC, appendix C."""
    noise = torch.randn_like(mu)
    action = torch.tanh(mu + log_std.exp() * noise)
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - torch.log(F.relu(1 - action.square()) + 1e-6)  # the tanh's Jacobian
    return action, log_prob.sum(-1, keepdim=True)


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


class Head(nn.Module):
    """h (B, F) -> z (B, D): linear, LayerNorm, tanh; a beta-VAE's adds noise of learned size, also
    when it acts, whatever `explore` is."""

    def __init__(self, h_dim, z_dim, stochastic):
        super().__init__()
        self.fc, self.norm, self.squash = Linear32(h_dim, z_dim), nn.LayerNorm(z_dim), nn.Tanh()
        self.log_std = Linear32(h_dim, z_dim) if stochastic else None

    def gaussian(self, h):
        """Mean and log standard deviation (B, D) of q(z|o); None: deterministic."""
        mu = self.squash(self.norm(self.fc(h)))
        return mu, None if self.log_std is None else bounded_log_std(self.log_std(h))

    def forward(self, h):
        mu, log_std = self.gaussian(h)
        return mu if log_std is None else mu + log_std.exp() * torch.randn_like(mu)

    def kl(self, h):
        """KL(q(z|o) || N(0, I)), summed over z, mean over the batch; 0 if deterministic."""
        mu, log_std = self.gaussian(h)
        if log_std is None:
            return torch.zeros((), device=h.device)
        return 0.5 * (mu.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(-1).mean()


class Encoder(nn.Module):
    """obs (B, K * C, H, W) in [0, 1] -> convs -> h (B, F) -> head -> z (B, D).

    Actor and critic share the convs; each has a head of its own.
    """

    def __init__(self, obs_shape, args, stochastic):
        super().__init__()
        if len(obs_shape) == 1:  # --obs state: nothing to encode
            self.convs, self.head, self.z_dim = nn.Identity(), nn.Identity(), obs_shape[0]
            return
        sizes, layers, channels = conv_sizes(obs_shape[-1], args.conv_strides), [], obs_shape[0]
        for stride in args.conv_strides:
            layers += [nn.Conv2d(channels, args.filters, 3, stride), nn.ReLU()]
            channels = args.filters
        self.convs, self.z_dim = nn.Sequential(*layers, nn.Flatten()), args.latent_dim
        self.head = Head(channels * sizes[-1] ** 2, self.z_dim, stochastic)
        if not args.latent_tanh:
            self.head.squash = nn.Identity()  # as CURL

    def forward(self, obs):
        return self.head(self.convs(obs))


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


class Actor(nn.Module):
    """h (B, F) -> own head -> mean and log standard deviation (B, A) before the tanh."""

    def __init__(self, encoder, action_dim, args):
        super().__init__()
        self.head = copy.deepcopy(encoder.head)  # the same layers; weight_init draws other weights
        self.trunk = mlp(encoder.z_dim, args.hidden_dim, 2 * action_dim)

    def forward(self, h):
        mu, log_std = self.trunk(self.head(h)).chunk(2, -1)
        return mu, bounded_log_std(log_std)


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
        sides = [args.crop_size] * len(spec.obs_shape[1:])  # a state has none
        obs_shape = (args.frame_stack * spec.obs_shape[0], *sides)
        autoencoder = args.reconstruction  # ae, vae or none
        self.encoder = Encoder(obs_shape, args, stochastic=autoencoder == "vae")
        self.actor = Actor(self.encoder, spec.action_dim, args)
        self.critic = Critic(self.encoder.z_dim, spec.action_dim, args)
        has_decoder, z_dim = autoencoder != "none", self.encoder.z_dim
        self.decoder = Decoder(obs_shape, z_dim, args) if has_decoder else None
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_temperature)))  # D6
        self.apply(weight_init).to(args.device, memory_format=torch.channels_last)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        infonce, D = args.contrast == "infonce", args.latent_dim
        self.similarity = nn.Parameter(torch.rand(D, D, device=args.device)) if infonce else None

        # Who trains what: a loss moves the parameters of its own optimizers, nothing else (see
        # minimize). Each loss that trains the encoder has Adam moments of its own, as published.
        adam = functools.partial(torch.optim.Adam, fused=True)
        encoder, convs = [*self.encoder.parameters()], [*self.encoder.convs.parameters()]
        seen_by_critic = [] if args.freeze_encoder else encoder  # D5
        W = [self.similarity] if infonce and args.train_similarity else []
        joint = args.contrast_step == "joint"
        self.moved_by_actor = convs if args.actor_trains_encoder else []  # D1
        self.optimizers = {
            "critic": adam([*seen_by_critic, *self.critic.parameters()], args.critic_lr),
            "actor": adam([*self.actor.parameters(), *self.moved_by_actor], args.actor_lr),
            "alpha": adam([self.log_alpha], args.alpha_lr, (args.alpha_beta1, 0.999)),
        }
        if self.decoder is not None:
            decay = args.decoder_weight_decay  # coupled: Adam sees it in the gradient
            self.optimizers["encoder"] = adam(encoder + W if joint else encoder, args.encoder_lr)
            self.optimizers["decoder"] = adam(
                self.decoder.parameters(), args.decoder_lr, weight_decay=decay)
        if args.contrast != "none" and not joint:
            self.optimizers["contrastive"] = adam(encoder + W, args.encoder_lr)

    @torch.no_grad()  # acting learns nothing
    def act(self, step, carry, explore):
        """Action (A,) for a Step, and the next carry: the stack so far, None at a start."""
        obs = torch.as_tensor(step.obs, device=self.args.device)[None]
        old = [obs] * (self.args.frame_stack - 1) if carry is None else [carry[:, obs.shape[1] :]]
        stack = torch.cat([*old, obs], 1)  # (1, K * C, H, W)
        mu, log_std = self.actor(self.encoder.convs(preprocess(crop(stack, self.args.crop_size))))
        action = tanh_gaussian(mu, log_std)[0] if explore else torch.tanh(mu)
        return action[0], stack

    def critic_loss(self, obs, action, reward, discount, next_obs):
        """Squared TD error of both Qs; obs in [0, 1], action (B, A), reward, discount (B, 1)."""
        with torch.no_grad():  # the target is a constant
            next_action, log_prob = tanh_gaussian(*self.actor(self.encoder.convs(next_obs)))
            q = torch.min(*self.target_critic(self.target_encoder(next_obs), next_action))
            value = q - self.log_alpha.exp() * log_prob  # (B, 1)  [SAC+AE V]
            target = reward + self.args.gamma * discount * value  # D3
        q1, q2 = self.critic(self.encoder(obs), action)  # (B, 1)
        return F.mse_loss(q1, target) + F.mse_loss(q2, target)  # [SAC+AE J(Q)]

    def actor_loss(self, h):
        """From conv features (B, F). Also gives log pi (B, 1), which alpha_loss needs. Q and its
        head are only read: the step on this loss moves the actor alone."""
        action, log_prob = tanh_gaussian(*self.actor(h))
        q = torch.min(*self.critic(self.encoder.head(h), action))
        alpha = self.log_alpha.exp().detach()  # has a loss of its own
        return (alpha * log_prob - q).mean(), log_prob  # [SAC+AE J(pi)]

    def alpha_loss(self, log_prob):
        """Moves the temperature until the entropy is -A; log_prob (B, 1)."""
        target_entropy = -self.action_dim
        error = (-log_prob - target_entropy).detach()  # moves alpha, not the actor
        return (self.log_alpha.exp() * error).mean()  # [SAC+AE J(alpha)]

    def image_target(self, images):
        """uint8 (B, K * C, H, W) to 32 grey levels plus noise of one level, in [-0.5, 0.5)."""
        return (images // 8 + torch.rand_like(images, dtype=torch.float32)) / 32 - 0.5

    def reconstruction_loss(self, h, images):
        """Mean squared pixel error, a penalty that keeps z small, and the KL of a beta-VAE; from
        conv features (B, F) and the uint8 images (B, K * C, H, W) that they were made of."""
        z = self.encoder.head(h)
        error = F.mse_loss(self.decoder(z), self.image_target(images))
        penalty = 0.5 * z.square().sum(-1).mean()
        kl = self.args.kl_weight * self.encoder.head.kl(h)
        return error + self.args.latent_weight * penalty + kl  # [SAC+AE J(RAE)]

    def contrastive_loss(self, h, positive):
        """InfoNCE: cross entropy of finding each anchor's positive in the batch. Or squared error
        between the two decoded. From the anchors' conv features (B, F), the positives' images."""
        online = self.args.positive_encoder == "online"
        encoder = self.encoder if online else self.target_encoder  # D9; the target has no gradient
        z_a, z_p = self.encoder.head(h), encoder(preprocess(positive))  # (B, D)
        if self.args.contrast == "discriminator":
            return F.mse_loss(self.decoder(z_a), self.decoder(z_p))  # [GAARA (11)]
        with torch.autocast(h.device.type, enabled=False):  # as Linear32
            logits = z_a @ self.similarity @ z_p.T  # (B, B)  [GAARA (6)]
        return F.cross_entropy(logits, torch.arange(len(h), device=h.device))  # D9  [GAARA (2)]

    def annealed_weight(self):
        """Of the contrastive loss at this update."""
        args = self.args
        floor = min(args.contrast_floor, args.contrast_weight)
        return max(floor, args.contrast_weight - args.contrast_decay * self.updates)  # D8

    def cadence(self):
        """Whether this update moves the actor, the autoencoder, and the targets: what happens at
        every Nth update. In the first burst all of it does, as in the authors' code, whose counter
        is the environment's and stands at 1000 there."""
        args, since = self.args, self.updates - self.args.pretrain_updates + 1
        every = args.actor_every_updates, args.decoder_every_updates, args.target_every_updates
        return tuple(since <= 0 or since % n == 0 for n in every)

    def sample(self, buffer, rng):
        """The batch that update() takes: transitions with obs and next_obs cropped; for contrast,
        another crop of obs and the weight."""
        batch = buffer.transitions(rng, self.args.batch_size, self.args.frame_stack)
        size, obs_rng = self.args.crop_size, rng if self.args.obs_crop == "random" else None
        if self.args.contrast != "none":
            batch["positive"] = crop(batch["obs"], size, rng)
            # as a tensor: a CUDA graph would freeze a Python number
            batch["weight"] = upload(self.annealed_weight(), self.args.device)
        return batch | {key: crop(batch[key], size, obs_rng) for key in ("obs", "next_obs")}

    def update(self, batch):
        """One update from a batch of sample(); metrics as 0-d tensors."""
        optimizers, args = self.optimizers, self.args
        obs, next_obs = preprocess(batch["obs"]), preprocess(batch["next_obs"])
        columns = batch["action"], batch["reward"], batch["discount"]
        metrics = {"loss/critic": self.critic_loss(obs, *columns, next_obs)}
        minimize(metrics["loss/critic"], optimizers["critic"])
        actor_due, decoder_due, target_due = self.cadence()
        decoder_due &= self.decoder is not None
        # D2: actor and decoder share h. No detach: minimize() ends the actor's backward pass at the
        # actor's own parameters, so that the graph of h is still whole for the decoder.
        h = self.encoder.convs(obs) if actor_due or decoder_due else None  # (B, F)
        if actor_due:
            metrics["loss/actor"], log_prob = self.actor_loss(h)
            minimize(metrics["loss/actor"], optimizers["actor"])
            metrics["loss/alpha"] = self.alpha_loss(log_prob)
            minimize(metrics["loss/alpha"], optimizers["alpha"])
            metrics |= {"stat/entropy": -log_prob.mean(), "stat/alpha": self.log_alpha.exp()}
            if self.moved_by_actor:
                h = self.encoder.convs(obs)  # other features from now on
        if target_due:
            soft_update(self.critic, self.target_critic, args.critic_tau)
            soft_update(self.encoder, self.target_encoder, args.encoder_tau)
        if args.contrast != "none":
            weight = metrics["stat/contrast_weight"] = batch["weight"]
        if decoder_due:
            loss = metrics["loss/reconstruction"] = self.reconstruction_loss(h, batch["obs"])
            if args.contrast_step == "joint":
                metrics["loss/contrastive"] = self.contrastive_loss(h, batch["positive"])
                loss = loss + weight * metrics["loss/contrastive"]  # [GAARA (10)]
            minimize(loss, optimizers["encoder"], optimizers["decoder"])
        if "contrastive" in optimizers:  # D11
            if decoder_due or h is None:  # the convs have moved; or none yet
                h = self.encoder.convs(obs)
            loss = metrics["loss/contrastive"] = self.contrastive_loss(h, batch["positive"])
            if args.anneal == "loss":
                loss = weight * loss  # [GAARA (9)]
            else:
                optimizers["contrastive"].param_groups[0]["lr"] = weight * args.encoder_lr
            minimize(loss, optimizers["contrastive"])
        self.updates += 1
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()  # for the eye
    def images(self, buffer, rng):
        """{name: uint8 (H, W, 3)}: newest images of eight stacks: obs, positive, reconstruction."""
        if self.decoder is None:
            return {}
        batch = self.sample(buffer, rng)
        output = self.decoder(self.encoder(preprocess(batch["obs"][:8])))
        rows = [batch["obs"], ((output + 0.5) * 255).clamp(0, 255).to(torch.uint8)]
        if "positive" in batch:
            rows.insert(1, batch["positive"])
        grid = torch.cat([row[:8, -3:] for row in rows], 2)  # (8, 3, rows * H, W)
        return {"reconstruction": grid.permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()}


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
                    pixels and args.obs == "pixels", video_size)  # fmt: skip


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
