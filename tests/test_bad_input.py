"""Bad usage ends with status 2, what fails later with 1; one line names the flag or the remedy."""

import importlib
import io
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import LOOPS, ROOT, SCRIPTS, run, run_here, summary
from filelock import FileLock
from test_run import OFTEN, RUNS, assert_goes_on_exactly, undisturbed


def assert_refused(name, flags, flag, remedy, capsys):
    capsys.readouterr()  # forgets what was printed before
    run_here(name, flags, status=2)
    line = capsys.readouterr().err
    assert line.startswith(f"error: {flag}: ") and remedy in line and line.count("\n") == 1, line


@pytest.mark.parametrize(
    "names, flags, flag, remedy",
    [
        ("all", "--env-id cheeta-run", "--env-id", "cheetah-"),  # unknown: the nearest are named
        ("all", "--total-frames 0", "--total-frames", "above zero"),
        ("all", "--gamma 1.5", "--gamma", "at most 1"),
        ("all", "--device gpu", "--device", "cuda:1"),
        ("all", "--resume /nowhere", "--resume", "/nowhere is not a checkpoint"),
        ("all", "--track", "--track", "pip install wandb"),
        ("all", "--runs-dir /dev/null/runs", "--runs-dir", "cannot be made"),
        ("all", "--total-frames 1e12", "--runs-dir", "no room"),  # the disk is too small
        ("sac_ae", "--env-id nowhere.py:task", "--env-id", "cannot be imported"),
        ("sac_ae", f"--env-id {ROOT}/tests/own_tasks.py:without_physics", "--env-id", "no physics"),
        ("sac_ae", f"--env-id {ROOT}/tests/own_tasks.py:without_bounds", "--env-id", "no bounds"),
        ("sac_ae", "--obs state", "--obs", "--reconstruction none --frame-stack 1"),
        ("sac_gaara", "--crop-size 101", "--image-size", "--crop-size"),
        ("slac", "--image-size 40", "--image-size", "multiple of 16"),
        ("dreamerv2", "--sequence-length 251", "--sequence-length", "between 2 and 250"),
        ("pearl_pixels", "--trajectory-steps 201", "--trajectory-steps", "200"),
    ],
)
def test_bad_usage_is_refused_in_one_line(names, flags, flag, remedy, tmp_path, capsys):
    for name in SCRIPTS if names == "all" else [names]:
        assert_refused(name, f"--runs-dir {tmp_path} {flags}", flag, remedy, capsys)
        assert not list(tmp_path.iterdir())


@pytest.mark.deep
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_titles_and_names_the_smoke_run(name, capsys):
    """Each title stands above its first flag; ten flags for beginners come first."""
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--smoke", "--help"])
    text = capsys.readouterr().out
    smoke = importlib.import_module(name).SMOKE
    assert "With --smoke: {env_id} for {total_frames:,} frames".format(**smoke) in text
    above = dict(re.findall(r"\n\n (.+)\n  --([\w-]+)", text))
    assert above["run"] == "env-id" and above["data and updates"] == "action-repeat"
    assert len(above) == 5 and text.index("--runs-dir") < text.index("--precision")


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, capsys):
    """Code in it never runs."""

    class Evil:
        def __reduce__(self):
            return sys.exit, ("the code ran",)

    run_dir = shutil.copytree(undisturbed("sac_ae"), tmp_path / "run")
    path = run_dir / "checkpoint.pt"
    whole = path.read_bytes()
    weight = torch.load(path, weights_only=True)["agent"]["critic.q1.0.weight"].numpy().tobytes()
    one_bit = whole.replace(weight, bytes([weight[0] ^ 1]) + weight[1:])
    torch.save({"args": Evil()}, evil := io.BytesIO())
    torch.save({"args": {"other": 1}}, foreign := io.BytesIO())
    for damaged in (whole[:-1000], one_bit, evil.getvalue(), foreign.getvalue()):
        path.write_bytes(damaged)
        for flag in ("--resume", "--evaluate"):
            assert_refused("sac_ae", f"{flag} {run_dir}", flag, "not a checkpoint", capsys)


def test_a_checkpoint_that_cannot_play_is_left_alone(tmp_path, capsys):
    """It lies in a folder of the user's. Its task is gone, or it is another script's."""
    payload = torch.load(undisturbed("sac_ae") / "checkpoint.pt", weights_only=True)
    path = tmp_path / "best.pt"
    torch.save(payload | {"args": payload["args"] | {"env_id": "gone.py:task"}}, path)
    assert_refused("sac_ae", f"--evaluate {path}", "--env-id", "gone", capsys)
    torch.save(payload | {"agent": {"other": torch.zeros(1)}}, path)
    assert_refused("sac_ae", f"--evaluate {path}", "--evaluate", "another script's", capsys)
    assert path.exists()


def test_a_resumed_run_refuses_other_arguments_by_name(capsys):
    for flag in ("--gamma", "--seed"):
        flags = f"--resume {undisturbed('sac_ae')} {flag} 0"
        assert_refused("sac_ae", flags, flag, "the run has", capsys)


@pytest.mark.deep
def test_two_processes_cannot_run_in_one_folder(capsys):
    run_dir = undisturbed("sac_ae")
    with FileLock(run_dir / "lock"):
        assert_refused("sac_ae", f"--resume {run_dir}", "--resume", "another process", capsys)


@pytest.mark.deep
def test_no_opengl_is_one_line_with_the_remedy(tmp_path):
    """Also where states are seen, and only films need it. A forwarded display does no harm."""
    states = f"--obs state --reconstruction none --frame-stack 1 --runs-dir {tmp_path}"
    process = run("sac_ae", states, env={**os.environ, "MUJOCO_GL": "disable"})
    line = process.stderr
    assert process.returncode == 2 and line.count("\n") == 1 and not list(tmp_path.iterdir())
    assert line.startswith("error: MUJOCO_GL: ") and "egl" in line
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    env["DISPLAY"] = "localhost:10.0"  # as ssh -X sets it
    summary(run("sac_ae", f"{RUNS['sac_ae']} --runs-dir {tmp_path}", env=env))


@pytest.mark.deep
@pytest.mark.parametrize("name", LOOPS)
def test_a_disk_that_fills_later_ends_the_run_in_one_line(name, tmp_path, capsys, monkeypatch):
    """The old checkpoint stays whole. The line has the command that resumes the run."""
    replace = os.replace
    saves = []

    def full(*paths):
        saves.append(paths)
        if len(saves) == 3:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    run_here(name, f"{RUNS[name]} {OFTEN} --runs-dir {tmp_path}", status=1)
    line = capsys.readouterr().err.splitlines()[-1]
    run_dir = next(tmp_path.iterdir())
    assert line.startswith("error: ") and "No space left" in line
    assert line.endswith(f" --resume {run_dir}") and (run_dir / "checkpoint.part").exists()
    assert_goes_on_exactly(name, run_dir, undisturbed(name))


@pytest.mark.deep
@pytest.mark.parametrize("name", LOOPS)
def test_nan_ends_the_run_by_name_and_nothing_is_saved(name, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(name)
    update = module.Agent.update
    made = []

    def diverges(self, batch):
        made.append(batch)
        number = torch.tensor(float("nan" if len(made) > 8 else 0))
        return update(self, batch) | {"loss/critic": number}

    monkeypatch.setattr(module.Agent, "update", diverges)
    run_here(name, f"{RUNS[name]} {OFTEN} --runs-dir {tmp_path}", status=1)
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: loss/critic is nan after")
    payload = torch.load(next(tmp_path.glob("*/checkpoint.pt")), weights_only=True)
    assert payload["progress"]["updates"] == 8
    assert all(value.isfinite().all() for value in payload["agent"].values())


@pytest.mark.deep
@pytest.mark.parametrize("name", LOOPS)
def test_an_episode_that_diverges_is_discarded(name, tmp_path, capsys, monkeypatch):
    """dm_control raises PhysicsError: here once in training and once in a filmed evaluation."""
    module = importlib.import_module(name)
    step = module.PixelEnv.step
    steps = []

    def diverges(self, action):
        steps.append((self.pixels, self.largest_image))
        if self.pixels and steps.count(steps[-1]) == 15:
            raise module.control.PhysicsError("mjWARN_BADQACC")
        return step(self, action)

    monkeypatch.setattr(module.PixelEnv, "step", diverges)
    assert module.main(f"{RUNS[name]} --video --runs-dir {tmp_path}".split()) == 0
    assert "".join(capsys.readouterr()).count("is discarded: mjWARN_BADQACC") == 2


@pytest.mark.deep
def test_memory_that_is_short_is_one_line(tmp_path, capsys):
    run_here("sac_ae", f"{RUNS['sac_ae']} --runs-dir {tmp_path} --hidden-dim 2000000", status=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: memory: ") and "smaller networks" in line
