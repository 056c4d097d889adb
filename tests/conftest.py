"""The harness of all tests: tiny runs of the scripts, and tiny agents with a buffer of noise.

python -m pytest              minutes: what a user or a later author would break
python -m pytest -m deep      more of it: every configuration, faults, statistics
python -m pytest -m slow      trains
"""

import contextlib
import csv
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sac_ae", "sac_gaara", "slac", "dreamerv2", "pearl_pixels"]
SUITE = SCRIPTS[:4]  # play one task; PEARL has a loop of its own
LOOPS = ["sac_ae", "pearl_pixels"]  # four scripts share one training loop
SCRATCH = tempfile.TemporaryDirectory()  # goes when pytest ends
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only wait
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # as the scripts do
with contextlib.suppress(ImportError):  # and that before OpenGL, as they do
    importlib.import_module("triton")

# Four episodes of 50 steps, about 150 updates of a tiny network: a whole run in a few seconds.
EVERY = (
    "--env-id cartpole-balance --action-repeat 20 --total-frames 4000 --render fast "
    "--warmup-steps 60 --pretrain-updates 10 --eval-every-frames 2000 --eval-episodes 1 "
    "--device cpu --no-video "
)
SMALL = "--image-size 24 --batch-size 4 --filters 4 --conv-strides 2 2 --hidden-dim 16 "
TINY = {
    "sac_ae": EVERY + SMALL,
    "sac_gaara": EVERY + SMALL + "--crop-size 20",
    "slac": EVERY + "--image-size 16 --model-batch-size 2 --sac-batch-size 4 --channels 4 8 "
    "--actions 3 --feature-dim 8 --z1-dim 4 --z2-dim 8 --hidden-dim 16",
    "dreamerv2": EVERY + "--image-size 13 --decoder-kernels 5 5 --updates-per-step 1 "
    "--batch-size 2 --sequence-length 6 --depth 4 --categoricals 3 --classes 4 --deter-dim 8 "
    "--hidden-dim 8 --head-dim 8 --head-layers 2 --horizon 3 --free-nats 0",
    # Two tasks, three iterations of four trajectories and six updates.
    "pearl_pixels": "--env-id pendulum-goal2 --render fast --total-frames 350 --image-size 24 "
    "--trajectory-steps 25 --initial-steps 25 --tasks-per-iteration 2 --prior-steps 25 "
    "--extra-steps 25 --updates-per-iteration 6 --meta-batch 2 --batch-size 4 --context-size 8 "
    "--filters 4 --conv-strides 2 2 --hidden-dim 16 --context-dim 16 --feature-dim 8 "
    "--latent-dim 2 --context-trajectories 2 --eval-every-frames 200 --eval-episodes 1 "
    "--device cpu --no-video",
}
TRAINS = {  # what moves when one step is taken on a loss; SAC+GAARA's other losses are SAC+AE's
    "sac_ae": {"critic": {"encoder.convs", "encoder.head", "critic"},
               "actor": {"actor.head", "actor.trunk"}, "alpha": {"log_alpha"},
               "reconstruction": {"encoder.convs", "encoder.head", "decoder"}},
    "sac_gaara": {"contrastive": {"encoder.convs", "encoder.head", "similarity"}},
    "slac": {"KL + image + reward": {"model"}, "critic": {"critic"}, "actor": {"actor"},
             "alpha": {"log_alpha"}},
    "dreamerv2": {"KL + image + reward": {"encoder", "rssm", "decoder", "reward_head"},
                  "actor": {"actor"}, "critic": {"critic"}},
    "pearl_pixels": {"Q": {"q1", "q2", "context_encoder"}, "KL": {"context_encoder"}, "V": {"v"},
                     "actor": {"actor"}},
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--script", help="tests this script alone, such as sac_mine.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "deep: more than a later author needs; run with -m deep")
    config.addinivalue_line("markers", "slow: trains for minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    """Without -m the deep and the slow tests are left out."""
    if not config.option.markexpr:
        kept = [item for item in items if not {"deep", "slow"} & set(item.keywords)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def command(name, flags):
    return [sys.executable, str(ROOT / f"{name}.py"), *str(flags).split()]


def run(name, flags, **kwargs):
    """Runs a script to its end: the finished process, with its output as text."""
    kwargs = {"capture_output": True, "text": True, "timeout": 900, **kwargs}
    return subprocess.run(command(name, flags), **kwargs)


def summary(process):
    """The numbers of a run's last line."""
    assert process.returncode == 0, process.stdout + process.stderr
    word, numbers = process.stdout.splitlines()[-1].split(" ", 1)
    assert word == "summary"
    return json.loads(numbers)


def run_here(name, flags, status=0):
    """Runs a script in this process, which is quicker: the numbers of its last line, or None."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert importlib.import_module(name).main(str(flags).split()) == status, out.getvalue()
    _, found, numbers = out.getvalue().rpartition("summary ")
    return json.loads(numbers) if found else None


def metrics(run_dir):
    """Rows of metrics.csv without the times."""
    with open(Path(run_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]


def tiny_args(module, flags="", name=None, **changes):
    """The tiny run's Args, with more flags or with changed values."""
    import tyro

    words = f"{TINY[name or module.__name__]} {flags}".split()
    args = tyro.cli(module.Args, args=words)
    for key, value in changes.items():
        setattr(args, key, value)
    return args


def noise_step(module, spec, rng, first):
    """A Step of random numbers."""
    state = np.float32(rng.standard_normal(spec.state_dim))
    obs = rng.integers(0, 256, spec.obs_shape, dtype=np.uint8)
    if len(spec.obs_shape) == 1:
        obs = state
    action = np.float32((not first) * rng.uniform(-1, 1, spec.action_dim))
    discount = float(first or rng.random() < 0.9)
    return module.Step(obs, state, action, rng.random(), discount, first, False, 2)


def tiny_agent(name, flags="", device="cpu", like=None):
    """Module, agent, replay buffer of 160 rows of noise, and random numbers for batches. `like` is
    the script whose flags a renamed copy has."""
    import torch

    module = importlib.import_module(name)
    args = tiny_args(module, f"--device {device} {flags}", like or name)
    for flag, wrong, remedy in module.algorithm_checks(args):
        assert not wrong, (flag, remedy)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = (3, args.image_size, args.image_size)
    spec = module.EnvSpec((4,) if args.obs == "state" else image, 2, 4)
    agent = module.Agent(args, spec)
    folder = tempfile.mkdtemp(dir=SCRATCH.name)
    if hasattr(module, "TaskBuffer"):
        buffer, length = pearl_buffer(module, folder, args, spec)
    else:
        buffer, length = module.ReplayBuffer(folder, 200, args, spec), 40
    for t in range(160):
        buffer.add(noise_step(module, spec, rng, t % length == 0))
    return module, agent, buffer, rng


def pearl_buffer(module, folder, args, spec):
    """PEARL's buffer for two tasks, one of two trajectories, and the rows of a trajectory."""
    length = args.trajectory_steps + 1
    buffer = module.TaskBuffer(folder, 200, args, spec)
    buffer.rl = buffer.enc = [[0, 2 * length], [length]]
    return buffer, length
