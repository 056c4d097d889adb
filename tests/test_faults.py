"""Faults injected into every script: what a run survives, what stops it, what it never loses.

The README's table of promises names the tests; test_every_promise_has_its_test keeps it so. Most of
it happens in this process, with tiny runs; what takes long is marked slow.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, TINY, command, run, summary
from test_run import Stop, assert_same, metrics

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(params=SCRIPTS)
def module(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=[
    name if name in ("sac_ae", "pearl_pixels") else pytest.param(name, marks=pytest.mark.slow)
    for name in SCRIPTS])
def loop(request):
    """Scripts with a training loop of their own; the others, which share one, are slow tests."""
    return importlib.import_module(request.param)


def tiny_args(module, flags=""):
    args = tyro.cli(module.Args, args=f"{TINY[module.__name__]} {flags}".split())
    module.check_args(args)
    return args


def train(module, run_dir, after=10**9, resume=False, flags=""):
    """A run in this process: the summary's numbers and the last checkpoint."""
    run_dir.mkdir(exist_ok=True)
    args = tiny_args(module, flags)
    payload = module.read_checkpoint(run_dir, "resume", "cpu") if resume else None
    numbers = module.train(args, run_dir, Stop(after), payload)
    path = run_dir / "checkpoint.pt"
    return numbers, torch.load(path, weights_only=True) if path.exists() else None


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder and last checkpoint of a script's run that nothing disturbed."""
    @functools.cache
    def get(module):
        run_dir = tmp_path_factory.mktemp(module.__name__)
        return run_dir, train(module, run_dir)[1]
    return get


def is_whole(module, run_dir, reference):
    """The run ended as the undisturbed one, bit by bit."""
    folder, checkpoint = reference
    assert_same(checkpoint, torch.load(run_dir / "checkpoint.pt", weights_only=True))
    assert metrics(folder) == metrics(run_dir)


# ---- killed ------------------------------------------------------------------------------------

KILL = """
import os, random, runpy, signal, sys, time, torch
write, when = torch.save, {when}
def save(payload, file):  # {when}: at the so-manyth file that is written, in the middle of it
    global when
    when -= 1
    if when == 0:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(payload, file)
torch.save = save
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed(name, flags, moment):
    """Runs a script and kills it: after so many seconds, or (negative) at the nth file it writes.
    True if it was still alive."""
    code = KILL.format(when=-moment if moment < 0 else 10**9)
    process = subprocess.Popen([sys.executable, "-c", code, *command(name, flags)[1:]],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment if moment > 0 else 100)
    alive = process.poll() in (None, -signal.SIGKILL)
    process.kill()
    process.wait()
    return alive


def kill_again_and_again(module, tmp_path, reference, moments):
    """A run that is killed at these moments and resumed each time; begun anew where it had no
    checkpoint yet."""
    name, flags = module.__name__, f"{TINY[module.__name__]} --runs-dir {tmp_path}"
    for moment in moments:
        folders = [d for d in tmp_path.iterdir() if (d / "checkpoint.pt").exists()
                   or (d / "previous.pt").exists()]  # fmt: skip
        if not folders:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
        if not killed(name, f"--resume {folders[0]}" if folders else flags, moment):
            break
    (run_dir,) = tmp_path.iterdir()
    summary(run(name, f"--resume {run_dir}" if (run_dir / "checkpoint.pt").exists() else flags))
    *_, run_dir = sorted(tmp_path.iterdir())
    is_whole(module, run_dir, reference)


def test_killed_in_the_middle_of_a_save(loop, tmp_path, undisturbed):
    """kill -9 while a checkpoint, or a part of the replay buffer, is half written."""
    kill_again_and_again(loop, tmp_path, undisturbed(loop), [-4, -2])


@pytest.mark.slow
def test_killed_at_ten_random_moments(module, tmp_path, undisturbed):
    reference = undisturbed(module)
    began = time.monotonic()
    summary(run(module.__name__, f"{TINY[module.__name__]} --runs-dir {tmp_path / 'whole'}"))
    duration = time.monotonic() - began
    for i in range(10):
        moments = [random.Random(i).uniform(0.3, 1.0) * duration]
        (tmp_path / str(i)).mkdir()
        kill_again_and_again(module, tmp_path / str(i), reference, moments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_two_stop_at_once(loop, tmp_path, undisturbed, number):
    """In mid-episode; a second signal while the first is being obeyed ends the process."""
    name = loop.__name__
    process = subprocess.Popen(
        command(name, f"{TINY[name]} --runs-dir {tmp_path}"), stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    if number == signal.SIGINT:
        while "once more" not in process.stderr.readline():
            pass
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    (run_dir,) = tmp_path.iterdir()
    if number == signal.SIGTERM:
        assert process.returncode == 143 and "once more" in errors and "Traceback" not in errors
        assert f"--resume {run_dir}" in output
    else:
        assert process.returncode in (-number, 130)
    summary(run(name, f"--resume {run_dir}"))
    is_whole(loop, run_dir, undisturbed(loop))


# ---- the disk ----------------------------------------------------------------------------------

DISK = """
mount -t tmpfs -o size=20m tmpfs {folder} || exit 77
{python} {command} --runs-dir {folder}/runs > {out} 2>&1 &
while ! ls {folder}/runs/*/checkpoint.pt > /dev/null 2>&1; do
    kill -0 $! || exit 78
    sleep 0.02
done
{fault}
wait $! || exit 79
{mend}
cp -r {folder}/runs {out}.runs
"""
FULL = "cat /dev/zero > {folder}/filler 2> /dev/null"
READ_ONLY = "mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"


def on_a_disk(module, tmp_path, fault, mend):
    """What a run prints whose disk, a file system of its own, gets a fault after the first
    checkpoint; and its folder. Skips where mounting is not allowed."""
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("needs the right to make a mount namespace")
    folder, name = tmp_path / "disk", module.__name__
    folder.mkdir()
    flags = TINY[name].replace("--no-video", "")
    script = DISK.format(folder=folder, python=sys.executable, out=tmp_path / "out",
                         command=" ".join(command(name, flags)[1:]),
                         fault=fault.format(folder=folder), mend=mend.format(folder=folder))
    process = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
    text = (tmp_path / "out").read_text()
    if process.returncode == 77:
        pytest.skip("needs the right to mount")
    assert process.returncode == 0, (process.returncode, text[-2000:])
    return text, next((tmp_path / "out.runs").iterdir())


@linux
def test_a_full_disk_costs_warnings_and_not_the_run(loop, tmp_path, undisturbed):
    """Of checkpoints and images (metrics and TensorBoard: test_run.py). What was saved before is
    whole, and the run goes on from there once there is room."""
    text, run_dir = on_a_disk(loop, tmp_path, FULL, "rm {folder}/filler")
    assert text.splitlines()[-1].startswith("summary {")
    for what in ("checkpoint", "images"):
        assert f"warning: {what} not written: [Errno 28]" in text, text[-3000:]
    assert "Traceback" not in text
    assert not list(run_dir.rglob("*.part"))
    summary(run(loop.__name__, f"--resume {run_dir} --no-video"))
    is_whole(loop, run_dir, undisturbed(loop))


@linux
def test_a_disk_that_becomes_read_only_costs_warnings(loop, tmp_path, undisturbed):
    text, run_dir = on_a_disk(loop, tmp_path, READ_ONLY, "true")
    assert text.splitlines()[-1].startswith("summary {")
    assert "warning: checkpoint not written" in text and "Read-only file system" in text
    assert "Traceback" not in text
    summary(run(loop.__name__, f"--resume {run_dir} --no-video"))
    is_whole(loop, run_dir, undisturbed(loop))


@linux
@pytest.mark.shared
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_disk_that_is_full_at_the_start_is_refused(name, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    words = " ".join(command(name, f"--runs-dir {tmp_path}/runs"))
    process = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=16k none {tmp_path} && {words}"],
        capture_output=True, text=True)
    assert process.returncode == 2 and "error: --runs-dir: " in process.stderr
    assert "No space left" in process.stderr and "Traceback" not in process.stderr


def test_a_folder_that_is_deleted_costs_warnings(loop, tmp_path, monkeypatch, capsys):
    update, run_dir = loop.Agent.update, tmp_path / "run"

    def deletes(self, batch):
        if self.updates == 5:
            shutil.rmtree(run_dir)
        return update(self, batch)

    monkeypatch.setattr(loop.Agent, "update", deletes)
    numbers, checkpoint = train(loop, run_dir)
    assert checkpoint is None and math.isfinite(numbers["eval_return"])
    assert "warning: checkpoint not written" in capsys.readouterr().err


@pytest.mark.shared
@pytest.mark.parametrize("what", ["mimsave", "imwrite"])
def test_a_picture_that_cannot_be_written_costs_a_warning(module, tmp_path, monkeypatch, what,
                                                          capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.imageio, what, full)
    flags = "--video"
    numbers, checkpoint = train(module, tmp_path / "run", flags=flags)
    assert checkpoint and "warning: images not written" in capsys.readouterr().err
    assert len(metrics(tmp_path / "run")) > 2


# ---- checkpoints and replay --------------------------------------------------------------------


@pytest.fixture(scope="session")
def half_done(tmp_path_factory):
    """A run of the script that was stopped, and its folder."""
    @functools.cache
    def get(module):
        run_dir = tmp_path_factory.mktemp(f"half_{module.__name__}")
        train(module, run_dir, {"pearl_pixels": 16}.get(module.__name__, 120))
        return run_dir
    return get


def refused(capsys, flag, call, *args, **kwargs):
    """That the call ends with exit status 2 and one line which names the flag; the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*args, **kwargs)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"error: {flag}: "), lines
    return lines[0]


def test_a_flipped_bit_in_any_member_of_a_checkpoint_is_noticed(module, half_done, tmp_path):
    """One bit in the middle of each member of the archive, in turn."""
    source = (half_done(module) / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(source)
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.file_size]
    assert len(members) > 20
    places = []
    for info in members:
        name, extra = source[info.header_offset + 26 : info.header_offset + 28], 30
        extra += int.from_bytes(name, "little")
        extra += int.from_bytes(source[info.header_offset + 28 : info.header_offset + 30], "little")
        places.append(info.header_offset + extra + info.file_size // 2)
    for place in places:
        data = bytearray(source)
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(Exception):  # noqa: B017  whatever: read_checkpoint catches all
            module.read_file(path)
    path.write_bytes(source)
    module.read_file(path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_unusable_checkpoints_are_refused(module, half_done, tmp_path, capsys):
    """Missing, empty, cut off, of another script, with code in it, in place of both files."""
    source, other = half_done(module), SCRIPTS[SCRIPTS.index(module.__name__) - 1]
    pwned = tmp_path / "pwned"
    faults = {
        "gone": lambda path: path.unlink(),
        "empty": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
        "foreign": lambda path: shutil.copy(
            half_done(importlib.import_module(other)) / "checkpoint.pt", path),
        "evil": lambda path: torch.save({"format": 1, "script": Evil(pwned)}, path),
        "number": lambda path: torch.save(torch.zeros(3), path),
    }
    for fault, inject in faults.items():
        run_dir = tmp_path / fault
        shutil.copytree(source, run_dir)
        shutil.copy(run_dir / "checkpoint.pt", run_dir / "previous.pt")
        inject(run_dir / "checkpoint.pt")
        module.read_checkpoint(run_dir, "resume", "cpu")  # the one before is as good
        shutil.rmtree(run_dir)
        shutil.copytree(source, run_dir)
        shutil.copy(run_dir / "checkpoint.pt", run_dir / "previous.pt")
        for name in ("checkpoint.pt", "previous.pt"):
            inject(run_dir / name)
        line = refused(capsys, "--resume", module.read_checkpoint, run_dir, "resume", "cpu")
        assert fault != "foreign" or other in line
    assert not pwned.exists()


def test_a_checkpoint_of_another_shape_or_task_is_refused(module, half_done, tmp_path, capsys,
                                                          monkeypatch):
    """args.json was edited: every field that may not change is named, the others go on."""
    source, allowed = half_done(module), set()
    monkeypatch.setattr(module, "train", lambda *_: {"frames": 10**9})
    env = module.make_env(tiny_args(module), 0)
    monkeypatch.setattr(module, "make_env", lambda *_: SimpleNamespace(spec=env.spec, close=list))
    for field in dataclasses.fields(module.Args):
        run_dir, args = tmp_path / field.name, tiny_args(module)
        shutil.copytree(source, run_dir)
        args.resume, was = str(run_dir), getattr(args, field.name)
        new = (not was if isinstance(was, bool) else was + 1 if isinstance(was, (int, float))
               else (*was, 1) if isinstance(was, tuple) else f"{was}x")
        if field.name in {"resume", "evaluate", "device", "runs_dir", "env_id"}:
            continue  # say what to do, not how the run is
        setattr(args, field.name, new)
        if field.name in module.FREE_ON_RESUME:
            module.main(args)
            allowed.add(field.name)
        else:
            flag = "--" + field.name.replace("_", "-")
            assert "the run has" in refused(capsys, flag, module.main, args)
    assert {"total_frames", "eval_episodes", "precision"} <= allowed


def test_a_missing_or_torn_part_of_the_replay_is_refused(module, half_done, tmp_path, capsys):
    for fault in ("missing", "torn"):
        run_dir = tmp_path / fault
        shutil.copytree(half_done(module), run_dir)
        last = sorted((run_dir / "replay").iterdir())[-1]
        text = last.read_bytes()
        last.unlink()
        if fault == "torn":
            last.write_bytes(text[:99])
        refused(capsys, "--resume", train, module, run_dir, resume=True)


# ---- numbers that are none ---------------------------------------------------------------------


def stops_and_spares_the_checkpoint(module, run_dir, reference, monkeypatch, inject, match):
    """A stopped run is resumed under a fault: it ends with an error that names what is wrong, and
    without the fault it still goes on from where it was, as if nothing had happened."""
    with monkeypatch.context() as patch:
        inject(patch)
        with pytest.raises(BaseException, match=match) as error:
            train(module, run_dir, resume=True)
    assert not isinstance(error.value, SystemExit) or isinstance(error.value.code, str)
    train(module, run_dir, resume=True)
    is_whole(module, run_dir, reference)


def nan_loss(module, patch):
    update = module.Agent.update

    def broken(self, batch):
        metrics = update(self, batch)
        return {**metrics, next(iter(metrics)): torch.tensor(math.nan)}

    patch.setattr(module.Agent, "update", broken)


def nan_action(module, patch):
    act = module.Agent.act

    def broken(self, step, carry, explore):
        action, carry = act(self, step, carry, explore)
        return action * (math.nan if explore else 1.0), carry

    patch.setattr(module.Agent, "act", broken)


def nan_reward(module, patch):
    add = module.ReplayBuffer.add
    patch.setattr(module.ReplayBuffer, "add", lambda self, step: add(
        self, step._replace(reward=math.nan)))


def failing_environment(module, patch):
    see = module.PixelEnv._see

    def broken(self, time_step, reward):
        if len(self.actions) == 20:
            raise RuntimeError("Physics state is invalid")
        return see(self, time_step, reward)

    patch.setattr(module.PixelEnv, "_see", broken)


@pytest.mark.parametrize(("inject", "match"), [
    (nan_loss, "error: loss/.* is nan after"), (nan_action, "error: the action is nan"),
    (nan_reward, "error: loss/.* is nan after"),
    (failing_environment, "Physics state is invalid")])
def test_what_stops_a_run_spares_its_checkpoint(loop, half_done, tmp_path, undisturbed, monkeypatch,
                                                inject, match):
    """A loss, an action, a reward that is NaN; an environment that raises."""
    shutil.copytree(half_done(loop), tmp_path / "run")
    stops_and_spares_the_checkpoint(loop, tmp_path / "run", undisturbed(loop), monkeypatch,
                                    lambda patch: inject(loop, patch), match)


STATES = {"sac_ae": "--obs state --reconstruction none --frame-stack 1",
          "sac_gaara": "--obs state --reconstruction none --contrast none --frame-stack 1",
          "pearl_pixels": "--obs-mode state"}


@pytest.mark.parametrize("name", STATES)
def test_an_observation_that_is_nan_stops_the_run(name, tmp_path, monkeypatch):
    """Of states, as pixels cannot be NaN."""
    module = importlib.import_module(name)
    see = module.PixelEnv._see

    def broken(self, time_step, reward):
        step = see(self, time_step, reward)
        nothing = np.full_like(step.obs, math.nan)
        return step._replace(obs=nothing, state=nothing) if len(self.actions) == 20 else step

    monkeypatch.setattr(module.PixelEnv, "_see", broken)
    with pytest.raises(SystemExit, match="error: .* is nan after"):
        train(module, tmp_path / "run", flags=STATES[name])


# ---- two at once, clocks -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_cannot_run_in_one_folder(name, half_done, tmp_path, capsys, monkeypatch):
    module, run_dir = importlib.import_module(name), tmp_path / "run"
    shutil.copytree(half_done(module), run_dir)
    args = dataclasses.replace(tiny_args(module), resume=str(run_dir))
    with module.FileLock(run_dir / "lock"):
        assert "another process" in refused(capsys, "--resume", module.main, args)
    monkeypatch.setattr(module, "train", lambda *_: {"frames": 10**9})
    module.main(args)


def test_clocks_that_jump_change_nothing(loop, tmp_path, undisturbed, monkeypatch):
    """The clock of the day goes a year back and forth at random."""
    jumps = random.Random(0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-3e7, 3e7))
    train(loop, tmp_path / "run")
    monkeypatch.undo()
    is_whole(loop, tmp_path / "run", undisturbed(loop))
    rows = loop.csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    seconds = [float(row["time/wall_s"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[-1] < 600


# ---- arguments ---------------------------------------------------------------------------------

NOT_NUMBERS = {"resume", "evaluate", "runs_dir", "env_id", "device", "smoke", "track"}
WRONG = {int: ["0", "-1", "1000000000000", "nan", "1.5", "x"],
         float: ["0", "-1", "1e30", "nan", "inf", "x"], bool: ["maybe"]}


def cases(module):
    """(field, value) of every field of Args and what may go wrong with its type."""
    for field in dataclasses.fields(module.Args):
        if field.name in NOT_NUMBERS:
            continue
        kind = field.type if isinstance(field.type, type) else None
        if "tuple" in str(field.type):
            values = ["0", "-1", "1000000000", "nan", "x", ""]
        else:
            values = WRONG.get(kind, ["x"])
        yield from ((field.name, value) for value in values)


def line_for(module, name, value):
    """The tiny run's flags with one of them set to this value."""
    return [*TINY[module.__name__].split(), "--" + name.replace("_", "-"), *value.split()]


def check(module, name, value):
    args = tyro.cli(module.Args, args=line_for(module, name, value))
    module.check_args(args)
    return args


def accepted(module, capsys=None):
    """The cases that the arguments' checks let pass; the others are refused in one line."""
    out = []
    for name, value in cases(module):
        try:
            check(module, name, value)
            out.append((name, value))
        except SystemExit as end:
            assert end.code == 2, (name, value, end.code)
            if capsys:
                text = capsys.readouterr().err
                assert "Traceback" not in text and "--" in text, (name, value, text)
                if text.startswith("error: "):
                    assert len(text.strip().splitlines()) == 1, text
    return out


def test_every_argument_with_senseless_values(module, capsys):
    """Of every field of Args, so that a new one is covered by itself: what is below zero, infinite,
    no number or of another type is refused; zero where it means something passes."""
    passed = accepted(module, capsys)
    for name, value in passed:
        assert value in ("0", "1000000000000", "1000000000", "1e30", ""), (name, value)
        assert value != "0" or name in module.MAY_BE_ZERO, name
    assert ("eval_every_frames", "1000000000000") in passed
    assert len(list(cases(module))) > 150


@pytest.mark.slow
def test_what_the_checks_let_pass_runs(module, tmp_path):
    """Trains, or is refused, or ends with a line that says that memory is short or what became NaN;
    where as much was asked for that it goes on, a signal stops it."""
    for name, value in accepted(module):
        flags = [*line_for(module, name, value), "--runs-dir", str(tmp_path)]
        process = subprocess.Popen([sys.executable, str(ROOT / f"{module.__name__}.py"), *flags],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=60)  # or it hangs
        ended = "summary {" in output or "error: " in errors  # and the signal came after that
        assert ended or process.returncode in (0, 1, 2, 143), (name, value, errors)
        assert "Traceback" not in errors, (name, value, errors)
        if process.returncode == 1:
            last = errors.strip().splitlines()[-1]
            assert re.match("error: (memory: |.* is (nan|inf) after)", last), (name, value, errors)


@pytest.mark.shared
def test_short_memory_ends_in_one_line(module):
    """Other errors keep their traceback."""
    for error in (MemoryError(), MemoryError("Unable to allocate 7.28 TiB for an array"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
                  torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nGPU 0")):
        with pytest.raises(SystemExit, match="^error: memory: [^\n]+$"), module.require_memory():
            raise error
    with pytest.raises(RuntimeError, match="shapes"), module.require_memory():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_batches_larger_than_the_data(module, tmp_path):
    flag = {"slac": "--sac-batch-size 600 --model-batch-size 9"}.get(
        module.__name__, "--batch-size 600")
    if module.__name__ == "dreamerv2":
        flag = "--batch-size 90"  # sequences of 6
    numbers, _ = train(module, tmp_path / "run", after={"pearl_pixels": 20}.get(
        module.__name__, 80), flags=flag)
    assert numbers["updates"] > 5


SIZES = {"sac_ae": "--conv-strides 2 1 1 1", "sac_gaara": "--conv-strides 2 1 1 1",
         "slac": "--channels 4 4 8 8", "dreamerv2": "", "pearl_pixels": "--conv-strides 2 2 2"}


def try_size(module, size, capsys):
    """None if an image of this size trains; else the line that refuses it."""
    flags = f"{SIZES[module.__name__]} --image-size {size}"
    try:
        args = tiny_args(module, flags)
    except SystemExit as end:
        assert end.code == 2
        return capsys.readouterr().err
    args.device, images = "cpu", torch.uint8
    spec = module.EnvSpec((3, size, size), images, 2, 4)
    agent, rng = module.Agent(args, spec), np.random.default_rng(0)
    pearl = module.__name__ == "pearl_pixels"
    kind = module.TaskBuffer if pearl else module.ReplayBuffer
    buffer = kind(60, spec, "cpu", *[26] * pearl)
    if pearl:
        buffer.watch([0.0], [[0]], [[0]], args.latent_dim)
    for t in range(40):
        image = rng.integers(0, 256, spec.obs_shape, dtype=np.uint8)
        buffer.add(module.Step(image, np.zeros(4, np.float32), np.zeros(2, np.float32), 1.0, 1.0,
                               t == 0, False))
    losses = agent.update(agent.sample(buffer, rng))
    assert all(value.isfinite() for value in losses.values())
    return None


def test_images_of_every_size_train_or_are_refused(module, capsys):
    """1 to 130 pixels; the sizes that a refusal names work."""
    seen = {size: try_size(module, size, capsys) for size in range(1, 131)}
    assert None in seen.values()
    for size, line in seen.items():
        if line is not None:
            assert line.count("\n") == 1 and "--" in line
            named = [int(n) for n in re.findall(r"\d+", line.partition(":")[2].replace(
                f"{size} ", "", 1))]
            works = [n for n in named if n in seen and seen[n] is None]
            assert works, (size, line)


# ---- soak --------------------------------------------------------------------------------------


@linux
@pytest.mark.slow
def test_soak(module, tmp_path):
    """SOAK_MINUTES (30) of smoke training: once the first third is over and the replay buffer full,
    memory and open files stay what they are. PEARL, whose buffer is never full, makes many updates
    per trajectory."""
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    flags = f"--smoke --total-frames 2_000_000 --replay-capacity 1000 --runs-dir {tmp_path}"
    if module.__name__ == "pearl_pixels":
        flags = flags.replace("1000", "3000000 --updates-per-iteration 10000")
    process = subprocess.Popen(command(module.__name__, flags), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    folder, began, seen = Path("/proc", str(process.pid)), time.monotonic(), []
    while time.monotonic() - began < 60 * minutes:
        time.sleep(1)
        assert process.poll() is None, process.communicate()
        status = (folder / "status").read_text()  # also what the system has swapped out
        kib = sum(int(n) for n in re.findall(r"(?:RssAnon|VmSwap):\s+(\d+)", status))
        seen.append((kib / 1024, len(os.listdir(folder / "fd"))))
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 143
    third = len(seen) // 3
    early, late = seen[third : 2 * third], seen[-third:]
    (path,) = tmp_path.glob("*/checkpoint.pt")
    rows = torch.load(path)["row"]
    print(f"{module.__name__}: {rows} rows; MiB and files after a third", *early[0], "at the end",
          *late[-1])
    assert module.__name__ == "pearl_pixels" or rows > 4 * 1000  # the buffer was full by then
    (rss, files), (rss_late, files_late) = (
        (np.median([m for m, _ in part]), max(f for _, f in part)) for part in (early, late))
    assert rss_late < 1.05 * rss + 20 and files_late <= files + 2


def test_every_promise_has_its_test():
    """The rows of the README's table name tests that exist."""
    text = (ROOT / "README.md").read_text().split("## What is promised")[1].split("\n## ")[0]
    rows = [row for row in text.splitlines() if row.startswith("| ") and "test_" in row]
    assert len(rows) >= 15
    for row in rows:
        for name, file in re.findall(r"\[`(test_\w+)`\]\(tests/(\w+\.py)\)", row):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)
