"""The harness: finds the scripts that exist, imports them, runs them as a user would."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [name for name in ("sac_ae", "sac_gaara", "slac", "dreamerv2", "pearl_pixels")
           if (ROOT / f"{name}.py").exists()]
SUITE = [name for name in SCRIPTS if name != "pearl_pixels"]  # run one task; PEARL has its own loop
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only wait
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # as the scripts do, before a test imports dm_control
with contextlib.suppress(ImportError):  # and that before OpenGL, as they do
    importlib.import_module("triton")

# Four episodes of 50 steps, about 150 updates of a tiny network: a whole run in a few seconds.
EVERY = ("--env-id cartpole-balance --action-repeat 20 --total-frames 4000 --render fast "
         "--warmup-steps 60 --pretrain-updates 10 --eval-every-frames 2000 --eval-episodes 1 "
         "--checkpoint-every-frames 1000 --device cpu --no-video ")
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
    "--checkpoint-every-frames 100 --device cpu --no-video",
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
REPRESENTATIVES = ("sac_ae",)  # holds all text that scripts share


def pytest_addoption(parser):
    parser.addoption("--every-script", action="store_true",
                     help="repeat the tests of shared text for every script")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    config.addinivalue_line("markers", "shared: tests text that test_shared.py keeps the same in "
                            "every script, so one script is enough; see --every-script")


def pytest_collection_modifyitems(config, items):
    """Leaves out the slow tests unless -m asks for them, and what tests the same text again."""
    def again(item):
        params = getattr(item, "callspec", None) and item.callspec.params or {}
        names = {params.get(key) for key in ("script", "name", "whole", "module")} & set(SCRIPTS)
        return "shared" in item.keywords and names and not names & set(REPRESENTATIVES)

    if not config.option.every_script:
        config.hook.pytest_deselected(items=[item for item in items if again(item)])
        items[:] = [item for item in items if not again(item)]
    if not config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(params=SUITE)
def script(request):
    """The module of every script in turn, but for PEARL, whose tests are its own."""
    return importlib.import_module(request.param)


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


def sac_steps(script, agent, batch):
    """SAC's part of an update of SAC+AE and SAC+GAARA in the published order, no pass shared."""
    opt, columns = agent.optimizers, (batch["action"], batch["reward"], batch["discount"])
    obs, next_obs = script.preprocess(batch["obs"]), script.preprocess(batch["next_obs"])
    script.minimize(agent.critic_loss(obs, *columns, next_obs), opt["critic"])
    loss, log_prob = agent.actor_loss(agent.encoder.convs(obs).detach())
    script.minimize(loss, opt["actor"])
    script.minimize(agent.alpha_loss(log_prob), opt["alpha"])
    script.soft_update(agent.critic, agent.target_critic, 0.01)
    script.soft_update(agent.encoder, agent.target_encoder, 0.05)
    return obs


def tiny_args(module, **changes):
    """The tiny run's Args, with changes."""
    import tyro

    args = tyro.cli(module.Args, args=TINY[module.__name__].split())
    for key, value in changes.items():
        setattr(args, key, value)
    return args
