"""Whole tiny runs: what they leave, and that a run which was killed or stopped goes on exactly."""

import functools
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from conftest import LOOPS, ROOT, SCRATCH, SCRIPTS, SUITE, TINY, command, metrics, run_here

# Three episodes of 34 steps, the last of which has 10 frames in place of 30. The first is warm-up.
SHORT = "--env-id lqr-lqr_2_1 --action-repeat 30 --total-frames 3000 --warmup-steps 34"
RUNS = {**TINY, **{name: f"{TINY[name]} {SHORT}" for name in SUITE}}
OFTEN = "--checkpoint-every-minutes 1e-9"  # a checkpoint wherever one may be made


@functools.cache
def undisturbed(name, flags=""):
    """The folder of a run that nobody disturbed."""
    runs = tempfile.mkdtemp(dir=SCRATCH.name)
    return Path(run_here(name, f"{RUNS[name]} --video {flags} --runs-dir {runs}")["run_dir"])


def signalled(name, flags, runs, rows, number):
    """A new run gets a signal once metrics.csv has so many rows. Its folder, status and output."""
    words = command(name, f"{RUNS[name]} {flags} --runs-dir {runs}")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not [path for path in runs.glob("*/metrics.csv") if len(metrics(path.parent)) >= rows]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate()
    return next(runs.iterdir()), process.returncode, out


def assert_goes_on_exactly(name, run_dir, reference):
    """Rows, weights, optimizers and counters become those of the undisturbed run, bit for bit."""
    run_here(name, f"--resume {run_dir}")
    assert metrics(run_dir) == metrics(reference)
    payloads = [torch.load(d / "checkpoint.pt", weights_only=True) for d in (run_dir, reference)]
    for payload in payloads:
        progress = payload["progress"]
        del payload["args"], progress["rows"], progress["wall_s"], progress["saved_wall_s"]
    torch.testing.assert_close(*payloads, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_and_what_it_leaves(name):
    """What the README lists. The trained agent plays the last evaluation's episode again."""
    run_dir = undisturbed(name)
    played = run_here(name, f"--evaluate {run_dir}")["eval_return"]
    assert f'"eval_return": {played}' in (run_dir / "summary.json").read_text()
    assert (run_dir / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text()
    assert list(run_dir.glob("events.*")) and (run_dir / "replay" / "obs").stat().st_size > 0
    assert min(imageio.imread(path).std() for path in run_dir.glob("images/*")) > 5
    for path in [*run_dir.glob("videos/*"), run_dir / "evaluation.gif"]:
        film = imageio.imread(path)
        assert film.shape[1:] == (256, 256, 3) and len(film) >= 10 and film.std() > 10
    rows = metrics(run_dir)
    losses = [column for column in rows[1] if column.startswith("loss/")]
    assert losses and all(rows[1][loss] != rows[-1][loss] for loss in losses)


@pytest.mark.parametrize("name", SUITE)
def test_episodes_updates_and_evaluations_come_when_they_are_due(name):
    """10 updates in a burst after the warm-up, then one per step. Frames count as simulated."""
    rows = metrics(undisturbed(name))
    assert [row["frames"] for row in rows] == ["1000", "2000", "2000", "3000", "3000"]
    assert [row["updates"] for row in rows] == ["0", "43", "44", "77", "78"]
    assert [bool(row["eval/return"]) for row in rows] == [False, False, True, False, True]


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_is_the_undisturbed_run(name, tmp_path):
    run_dir, *_ = signalled(name, OFTEN, tmp_path, 2, signal.SIGKILL)
    assert_goes_on_exactly(name, run_dir, undisturbed(name))


@pytest.mark.parametrize("name", ["sac_ae", pytest.param("pearl_pixels", marks=pytest.mark.deep)])
def test_a_signal_stops_with_a_checkpoint(name, tmp_path):
    """And with the command that resumes the run."""
    run_dir, status, out = signalled(name, "", tmp_path, 1, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and "Traceback" not in out
    assert f"--resume {run_dir}" in out.splitlines()[-1]
    assert_goes_on_exactly(name, run_dir, undisturbed(name))


@pytest.mark.deep
@pytest.mark.parametrize("name", LOOPS)
def test_killed_at_ten_random_moments(name, tmp_path):
    """The start of PyTorch, a long burst of updates and saves included."""
    import random

    moments = random.Random(name)
    burst = "--pretrain-updates 300" * (name in SUITE)
    run_dir, *_ = signalled(name, f"{OFTEN} {burst}", tmp_path, 1, signal.SIGKILL)
    for _ in range(10):
        process = subprocess.Popen(command(name, f"--resume {run_dir}"))
        time.sleep(moments.uniform(0, 12))
        process.kill()
        process.wait()
    assert_goes_on_exactly(name, run_dir, undisturbed(name, burst))


@pytest.mark.deep
@pytest.mark.parametrize(
    "flags, rows, number",
    [("--pretrain-updates 400", 1, signal.SIGUSR1), ("--eval-episodes 20", 2, signal.SIGTERM)],
)
def test_a_signal_stops_a_burst_and_an_evaluation(flags, rows, number, tmp_path):
    """A burst at the next update, and an evaluation at the end of its episode."""
    run_dir, status, _ = signalled("sac_ae", flags, tmp_path, rows, number)
    assert status == 128 + number
    progress = torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]
    assert progress["frames"] == 1000 * rows
    assert progress["updates"] < 400 and progress["evaluated"] == 0
    assert_goes_on_exactly("sac_ae", run_dir, undisturbed("sac_ae", flags))


@pytest.mark.deep
def test_a_second_signal_ends_at_once():
    """After the first one, signals have their default effect, which ends the process."""
    import sac_ae

    before = signal.getsignal(signal.SIGTERM)
    with sac_ae.Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert len(sac_ae.evaluate(None, None, 10, stop)[0]) == 0  # it does not even begin
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.deep
@pytest.mark.parametrize("name", SCRIPTS)
def test_checkpoints_and_evaluations_change_no_number(name, tmp_path):
    """The seed does."""
    flags = f"{RUNS[name]} --eval-every-frames 100000 --runs-dir {tmp_path}"
    often = run_here(name, f"{flags} {OFTEN}")
    other = run_here(name, f"{flags} --seed 2")
    assert other["random_return"] != often["random_return"]
    paths = Path(often["run_dir"]) / "checkpoint.pt", undisturbed(name) / "checkpoint.pt"
    agents = [torch.load(path, weights_only=True)["agent"] for path in paths]
    torch.testing.assert_close(*agents, rtol=0, atol=0)


@pytest.mark.deep
@pytest.mark.parametrize("name", SUITE)
def test_a_finished_run_can_be_made_longer(name, capsys, tmp_path):
    """Here by a renamed copy of the script. Its training is that of a longer run. It can be played,
    also after its replay buffer was deleted."""
    import shutil
    import sys

    mine = shutil.copy(ROOT / f"{name}.py", tmp_path / "my copy.py")
    run_dir = shutil.copytree(undisturbed(name), tmp_path / "run")
    longer = ["--resume", run_dir, "--total-frames", "5e3", "--delete-replay"]
    for words in (longer, ["--evaluate", run_dir]):
        out = subprocess.check_output([sys.executable, mine, *words], text=True)
        assert '"script": "my copy"' in out.splitlines()[-1]
    folders = run_dir, undisturbed(name, "--total-frames 5000")
    rows = [[row for row in metrics(folder) if row["train/return"]] for folder in folders]
    assert rows[0] == rows[1]
    run_here(name, f"--resume {run_dir} --total-frames 6000", status=2)
    assert "error: --resume: the run's replay buffer was deleted" in capsys.readouterr().err
    (run_dir / "replay").mkdir()  # an interrupted copy of the folder, say
    run_here(name, f"--resume {run_dir} --total-frames 6000", status=2)
    assert "is missing or cut short" in capsys.readouterr().err


@pytest.mark.deep
@pytest.mark.parametrize("name", SCRIPTS)
def test_load_agent_gives_the_trained_agent(name):
    import importlib

    agent = importlib.import_module(name).load_agent(undisturbed(name))
    payload = torch.load(undisturbed(name) / "checkpoint.pt", weights_only=True)
    torch.testing.assert_close(agent.state_dict(), payload["agent"], rtol=0, atol=0)
