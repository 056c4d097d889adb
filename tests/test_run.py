"""Whole tiny runs: what they leave, and that a run which was killed or stopped goes on exactly."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from conftest import (
    DEEP,
    LOOPS,
    ROOT,
    SCRIPTS,
    SUITE,
    TINY,
    command,
    metrics,
    run,
    run_here,
    summary,
    tiny_args,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

OFTEN = " --checkpoint-every-minutes 1e-9"  # a checkpoint wherever one may be made
BURST = " --pretrain-updates 400"  # at the end of the warm-up


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """get(script, more flags): the folder of a run that nobody disturbed, made when asked for."""
    done = {}

    def get(name, flags=""):
        if (name, flags) not in done:
            runs = tmp_path_factory.mktemp("undisturbed")
            numbers = run_here(name, f"{TINY[name]} {flags} --video --runs-dir {runs}")
            done[name, flags] = Path(numbers["run_dir"])
        return done[name, flags]

    return get


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def assert_same(one, two, path="checkpoint"):
    """Nested containers of tensors and plain values are equal, bit for bit; times do not count."""
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            if not str(key).endswith("wall_s"):
                assert_same(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    else:
        assert one == two, path


def assert_same_run(reference, run_dir):
    """Rows, weights, optimizers and counters are those of the undisturbed run."""
    assert metrics(reference) == metrics(run_dir)
    one, two = checkpoint(reference), checkpoint(run_dir)
    for key in one.keys() - {"args"}:
        assert_same(one[key], two[key], key)


def start(name, flags, runs, code=None):
    """A run in the background. `code` is executed in it first."""
    words = command(name, f"{TINY[name]} {flags} --runs-dir {runs}")
    if code:
        code += "import runpy, sys\ndel sys.argv[0]\n"
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        words = [sys.executable, "-c", code, *words[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, **pipes, preexec_fn=hear_ctrl_c)


def hear_ctrl_c():
    """In a new process: behind a shell's & it would ignore SIGINT, behind nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_until(process, runs, reached):
    """Waits until reached(rows of metrics.csv) holds for a run that has a checkpoint."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        for run_dir in Path(runs).glob("*/"):
            if (run_dir / "checkpoint.pt").exists():
                rows = metrics(run_dir) if (run_dir / "metrics.csv").exists() else []
                if reached(rows):
                    return run_dir
        time.sleep(0.01)
    raise AssertionError("too slow")


def resume(name, run_dir, flags=""):
    return run_here(name, f"--resume {run_dir} {flags}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_and_what_it_leaves(name, undisturbed):
    run_dir = undisturbed(name)
    numbers = json.loads((run_dir / "summary.json").read_text())
    total = {"pearl_pixels": 350}.get(name, 4000)
    assert numbers["script"] == name and numbers["frames"] >= total and numbers["updates"] > 10
    assert numbers["eval_return"] is not None and numbers["random_return"] is not None
    rows = metrics(run_dir)
    frames = [int(row["frames"]) for row in rows]
    assert frames == sorted(frames) and frames[-1] == numbers["frames"]
    losses = [k for k in rows[-1] if k.startswith("loss/")]
    trained = [row for row in rows if row[losses[0]]]
    assert losses and all(trained[-1][k] != trained[0][k] for k in losses)
    events = EventAccumulator(str(run_dir)).Reload()
    assert set(events.Tags()["scalars"]) == {k for k in rows[0] if "/" in k} | {"time/wall_s"}
    films = sorted((run_dir / "videos").iterdir())
    frames = imageio.imread(films[0])
    assert frames.shape[1:] == (256, 256, 3) and len(frames) >= 10 and frames.std() > 10
    assert all(imageio.imread(i).std() > 5 for i in (run_dir / "images").iterdir())
    assert json.loads((run_dir / "args.json").read_text())["seed"] == 1
    assert (run_dir / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text()
    assert (run_dir / "replay" / "obs").stat().st_size > 0


@pytest.mark.parametrize("name", SUITE)
def test_the_first_burst_is_due_when_the_warmup_ends(name):
    flags = "--warmup-steps 60 --pretrain-updates 10 --updates-per-step 0.5"
    module = importlib.import_module(name)
    due = [module.updates_due(tiny_args(module, flags), step) for step in (59, 60, 61, 62, 64)]
    assert due == [0, 10, 10, 11, 12]


def test_a_run_counts_the_frames_that_were_simulated(tmp_path):
    """Three episodes of 34 steps, the last of which has 10 frames in place of 30."""
    flags = f"{TINY['sac_ae']} --action-repeat 30 --total-frames 3000 --runs-dir {tmp_path}"
    assert run_here("sac_ae", flags)["frames"] == 3000


@pytest.mark.parametrize("name", SUITE)
def test_rows_come_at_the_ends_of_episodes_and_evaluations(name, undisturbed):
    rows = metrics(undisturbed(name))
    returns = [row["frames"] for row in rows if row["train/return"]]
    assert returns == ["1000", "2000", "3000", "4000"]
    assert [row["frames"] for row in rows if row["eval/return"]] == ["2000", "4000"]
    assert all(int(row["steps"]) * 20 == int(row["frames"]) for row in rows)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_trained_agent_is_played_and_filmed(name, undisturbed, tmp_path, capsys):
    """With its own arguments, by the script of its folder too; other flags are refused by name."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed(name), run_dir)
    trained = json.loads((run_dir / "summary.json").read_text())
    played = run_here(name, f"--evaluate {run_dir} --eval-episodes 1")
    assert played["eval_return"] == trained["eval_return"]  # the same episode
    assert len(imageio.imread(run_dir / "evaluation.gif")) >= 10
    flags = f"--evaluate {run_dir}/checkpoint.pt --seed 5 --eval-episodes 2 --no-video"
    assert run_here(name, flags)["eval_return"] != trained["eval_return"]
    run_here(name, f"--evaluate {run_dir} --gamma 0.5", status=2)
    assert "error: --gamma: " in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_is_the_undisturbed_run(name, undisturbed, tmp_path):
    """kill -9 when there are a few rows; again later; and rows that came after the checkpoint."""
    process = start(name, "--video" + OFTEN, tmp_path)
    run_dir = wait_until(process, tmp_path, lambda rows: len(rows) >= 2)
    process.kill()
    process.wait()
    resume(name, run_dir)
    assert_same_run(undisturbed(name), run_dir)


@pytest.mark.deep
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_ten_random_moments(name, undisturbed, tmp_path):
    """Wherever it is, the start of PyTorch included, until the run ends by itself."""
    import random

    seconds = random.Random(name)
    process = start(name, "--video" + OFTEN, tmp_path)
    run_dir = wait_until(process, tmp_path, lambda rows: True)
    for _ in range(10):
        time.sleep(seconds.uniform(0, 3))
        process.kill()
        process.wait()
        process = subprocess.Popen(
            command(name, f"--resume {run_dir}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(seconds.uniform(0, 12))
    process.kill()
    process.wait()
    resume(name, run_dir)
    assert_same_run(undisturbed(name), run_dir)


DIES_IN_A_SAVE = """
import os, signal
replace, calls = os.replace, []
def dies(*paths):
    calls.append(paths)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = dies
"""


@pytest.mark.deep
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_in_a_save(name, undisturbed, tmp_path):
    """After the temporary file was written, before it takes the place of the checkpoint."""
    process = start(name, "--video" + OFTEN, tmp_path, DIES_IN_A_SAVE)
    assert process.wait() == -signal.SIGKILL, process.communicate()
    run_dir = next(tmp_path.iterdir())
    assert (run_dir / "checkpoint.part").exists()
    resume(name, run_dir)
    assert_same_run(undisturbed(name), run_dir)


@pytest.mark.deep
@pytest.mark.parametrize("name", SUITE)
def test_killed_in_a_burst_of_updates(name, undisturbed, tmp_path):
    process = start(name, "--video" + OFTEN + BURST, tmp_path)

    def in_the_burst(rows):
        saved = checkpoint(next(tmp_path.iterdir()))["progress"]["updates"]
        return 0 < saved < 400

    run_dir = wait_until(process, tmp_path, in_the_burst)
    process.kill()
    process.wait()
    resume(name, run_dir)
    assert_same_run(undisturbed(name, BURST), run_dir)


SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"]


@pytest.mark.parametrize(
    "name, signal_name",
    [("sac_ae", "SIGTERM")]
    + [pytest.param("sac_ae", s, marks=pytest.mark.deep) for s in SIGNALS if s != "SIGTERM"]
    + [pytest.param(n, "SIGTERM", marks=pytest.mark.deep) for n in SCRIPTS[1:]],
)
def test_a_signal_stops_with_a_checkpoint(name, signal_name, undisturbed, tmp_path):
    """Soon, with the command that resumes the run, which then is the undisturbed one."""
    process = start(name, "--video", tmp_path)
    run_dir = wait_until(process, tmp_path, lambda rows: len(rows) >= 1)
    number = getattr(signal, signal_name)
    process.send_signal(number)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors and "will save and stop" in errors
    assert f"--resume {run_dir}" in out.splitlines()[-1]
    resume(name, run_dir)
    assert_same_run(undisturbed(name), run_dir)


@pytest.mark.deep
def test_a_signal_stops_a_burst_and_an_evaluation(undisturbed, tmp_path):
    """In the burst at the next update, in an evaluation at the end of its episode."""
    for where, flags in (("burst", BURST), ("evaluation", " --eval-episodes 30")):
        runs = tmp_path / where
        process = start("sac_ae", "--video" + OFTEN + flags, runs)
        rows_first = 1 if where == "burst" else 2
        run_dir = wait_until(process, runs, lambda rows, n=rows_first: len(rows) >= n)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        resume("sac_ae", run_dir)
        assert_same_run(undisturbed("sac_ae", flags), run_dir)


def test_a_second_signal_ends_at_once(tmp_path):
    process = start("sac_ae", "--eval-episodes 100000", tmp_path)
    wait_until(process, tmp_path, lambda rows: len(rows) >= 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) in (-signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.parametrize("name", LOOPS)
def test_checkpoints_and_evaluations_change_no_number(name, undisturbed, tmp_path):
    flags = f"{TINY[name]} --eval-every-frames 100000"
    often = run_here(name, f"{flags} --runs-dir {tmp_path}/often {OFTEN}")
    other = run_here(name, f"{flags} --runs-dir {tmp_path}/other --seed 2")
    one, two = checkpoint(undisturbed(name)), checkpoint(often["run_dir"])
    assert_same(one["agent"], two["agent"])
    assert other["random_return"] != often["random_return"]


@pytest.mark.parametrize("name", ["sac_ae", *DEEP])
def test_a_finished_run_can_be_made_longer(name, undisturbed, tmp_path):
    """It then is what a longer run would have been, but for the evaluation at its first end."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed(name), run_dir)
    assert resume(name, run_dir, "--total-frames 6e3")["frames"] == 6000
    longer = undisturbed(name, "--total-frames 6000")
    assert metrics(run_dir) == metrics(longer)


def test_a_renamed_copy_resumes_and_plays(undisturbed, tmp_path):
    """cp sac_ae.py sac_mine.py is how people start."""
    mine = tmp_path / "sac mine.py"
    shutil.copy(ROOT / "sac_ae.py", mine)
    run_dir = tmp_path / "my run"
    shutil.copytree(undisturbed("sac_ae"), run_dir)
    for words in (["--resume", run_dir, "--total-frames", "5000"], ["--evaluate", run_dir]):
        process = subprocess.run([sys.executable, mine, *words], capture_output=True, text=True)
        assert summary(process)["script"] == "sac mine"


def test_a_run_in_a_thread(tmp_path):
    """As a notebook does it; no signal is caught there, and none is left caught."""
    import concurrent.futures

    import sac_ae

    before = signal.getsignal(signal.SIGINT)
    words = f"{TINY['sac_ae']} --runs-dir {tmp_path}".split()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(sac_ae.main, words).result() == 0
    assert signal.getsignal(signal.SIGINT) == before
    assert sac_ae.Args(env_id="walker-walk").action_repeat == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_load_agent_gives_an_agent_that_acts(name, undisturbed):
    module = importlib.import_module(name)
    agent = module.load_agent(undisturbed(name))
    assert_same(agent.state_dict(), checkpoint(undisturbed(name))["agent"])
    env = module.PixelEnv(agent.args)
    if name != "pearl_pixels":
        action, carry = agent.act(env.reset(seed=0), None, explore=False)
        step = env.step(action.cpu().numpy())
        assert agent.act(step, carry, explore=False)[0].shape == (env.spec.action_dim,)


@pytest.mark.deep
def test_python_oo_and_a_home_folder(tmp_path):
    """No docstrings; and ~ in a path."""
    words = command("sac_ae", f"{TINY['sac_ae']} --runs-dir ~/runs --delete-replay")
    env = {**os.environ, "HOME": str(tmp_path)}
    process = subprocess.run([words[0], "-OO", *words[1:]], capture_output=True, text=True, env=env)
    run_dir = Path(summary(process)["run_dir"])
    assert run_dir.parent == tmp_path / "runs" and not (run_dir / "replay").exists()
    again = run("sac_ae", f"--resume {run_dir} --total-frames 5000")
    assert again.returncode == 2 and "deleted" in again.stderr


@pytest.mark.deep
def test_weights_and_biases_goes_on_in_the_same_run(tmp_path):
    """A stand-in for the package notes what it was told."""
    log = tmp_path / "calls"
    (tmp_path / "wandb.py").write_text(
        f"def init(**kwargs): open({str(log)!r}, 'a').write(repr(sorted(kwargs.items())) + '\\n')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    flags = TINY["sac_ae"] + f" --eval-every-frames 100000 --runs-dir {tmp_path / 'runs'}"
    run_dir = summary(run("sac_ae", flags + " --track", env=env))["run_dir"]
    summary(run("sac_ae", f"--resume {run_dir} --total-frames 5000", env=env))
    first, second = log.read_text().splitlines()
    assert f"('id', '{Path(run_dir).name}')" in first and "('id', " in second
    assert "('resume', 'allow')" in first and "('sync_tensorboard', True)" in first
