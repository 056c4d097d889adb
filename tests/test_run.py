"""Whole runs of every script, tiny: what they leave, that they repeat, that they can be resumed."""

import csv
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import SUITE, TINY, run, summary, tiny_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

WRITE = RecordWriter.write


class Stop:
    """Stands in for Interrupt: asks for a stop when it is looked at for the `after`th time."""

    def __init__(self, after=10**9):
        self.looks, self.after = 0, after

    @property
    def signal(self):
        self.looks += 1
        return 2 if self.looks >= self.after else 0


def train(module, run_dir, after=10**9, payload=None, **changes):
    """One train() call in this process."""
    args = tiny_args(module, **changes)
    run_dir.mkdir(exist_ok=True)
    numbers = module.train(args, run_dir, Stop(after), payload)
    return numbers, torch.load(run_dir / "checkpoint.pt", weights_only=True)


def metrics(run_dir):
    """Rows of metrics.csv without the times."""
    with open(Path(run_dir) / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time")}
                for row in csv.DictReader(file)]


def assert_same(one, two, path="checkpoint"):
    """Nested containers of tensors and plain values are equal, bit for bit; times do not count."""
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            if not str(key).startswith(("wall_s", "time", "args")):
                assert_same(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    else:
        assert one == two or one != one and two != two, path


@pytest.fixture(scope="module", params=SUITE)
def whole(request, tmp_path_factory):
    """A script's run from the command line that nobody disturbed: (script's name, summary)."""
    runs = tmp_path_factory.mktemp("whole")
    flags = TINY[request.param].replace("--no-video", "")
    return request.param, summary(run(request.param, f"{flags} --runs-dir {runs}"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """{script: (run folder, last checkpoint)} of runs in this process, made when asked for."""
    done = {}

    def get(module):
        if module not in done:
            run_dir = tmp_path_factory.mktemp("undisturbed")
            done[module] = run_dir, train(module, run_dir)[1]
        return done[module]

    return get


def test_a_run_and_what_it_leaves(whole):
    name, numbers = whole
    run_dir = Path(numbers["run_dir"])
    assert numbers["script"] == name and numbers["frames"] == 4000 and numbers["updates"] > 100
    assert numbers["device"] == "cpu" and numbers["seed"] == 1
    assert 100 < numbers["random_return"] < 500 and 0 <= numbers["eval_return"] <= 1000
    assert run_dir.name.startswith(f"cartpole-balance__{name}__1__")
    rows = metrics(run_dir)
    assert [int(r["frames"]) for r in rows] == [1000, 2000, 3000, 4000]
    assert all(int(r["steps"]) * 20 == int(r["frames"]) for r in rows)
    assert [bool(r["eval/return"]) for r in rows] == [False, True, False, True]
    assert float(rows[-1]["eval/return"]) == numbers["eval_return"]
    losses = [k for k in rows[0] if k.startswith("loss/")]
    assert losses and all(float(rows[-1][k]) != float(rows[-2][k]) for k in losses)
    events = EventAccumulator(str(run_dir)).Reload()
    assert set(events.Tags()["scalars"]) == {k for k in rows[0] if "/" in k} | {"time/wall_s"}
    assert events.Scalars("eval/return")[-1].step == 4000
    films = sorted((run_dir / "videos").iterdir())
    videos = [v for v in films if v.stem.isdigit()]
    assert [v.stem for v in videos] == ["000002000", "000004000"]
    assert len(films) == (4 if name == "dreamerv2" else 2)  # with its film of the model
    frames = imageio.imread(videos[0])
    assert frames.shape[1:] == (256, 256, 3) and 10 < len(frames) <= 50 and frames.std() > 10
    images = sorted((run_dir / "images").iterdir())
    assert len(images) == 2 * len({i.stem[10:] for i in images})
    assert all(imageio.imread(i).std() > 5 for i in images)
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["total_frames"] == 4000 and saved["action_repeat"] == 20


def test_every_trained_tensor_has_moved(whole):
    name, numbers = whole
    module = sys.modules.get(name) or __import__(name)
    args = tiny_args(module)
    torch.manual_seed(args.seed)
    env = module.make_env(args, args.seed)
    before = module.Agent(args, env.spec).state_dict()
    after = torch.load(Path(numbers["run_dir"], "checkpoint.pt"), weights_only=True)["agent"]
    still = [k for k in before if torch.equal(before[k], after[k])
             and before[k].is_floating_point()]  # not a count of resets
    assert not still


def test_play(whole):
    name, numbers = whole
    run_dir = Path(numbers["run_dir"])
    for target in (run_dir, run_dir / "previous.pt"):
        (run_dir / "evaluation.gif").unlink(missing_ok=True)
        process = run(name, f"--evaluate {target} --eval-episodes 2 --device cpu")
        played = summary(process)
        assert 10 < len(imageio.imread(run_dir / "evaluation.gif")) <= 50
        assert "returns: " in process.stdout
    last = summary(run(name, f"--evaluate {run_dir} --eval-episodes 1 --no-video --device cpu"))
    assert last["eval_return"] == numbers["eval_return"]  # one episode, the same seed
    assert played["frames"] < last["frames"] == 4000


def test_same_seed_same_run_and_evaluation_changes_nothing(script, undisturbed, tmp_path):
    reference, one = undisturbed(script)
    two = train(script, tmp_path / "two")[1]
    assert_same(one, two)
    assert metrics(reference) == metrics(tmp_path / "two")
    off = train(script, tmp_path / "off", eval_every_frames=10**9)[1]
    for key in ("agent", "optimizers", "numpy", "torch", "env"):
        assert_same(one[key], off[key])
    other = train(script, tmp_path / "other", seed=2)[1]
    assert one["agent"].keys() == other["agent"].keys() and one["numpy"] != other["numpy"]


@pytest.mark.parametrize("after", [2, 61, 66, 75, 130, 190])
def test_stopped_anywhere_and_resumed_is_the_same_run(script, undisturbed, tmp_path, after):
    """In the warm-up, in the first burst, in the middle of an episode; twice in one run."""
    reference, uninterrupted = undisturbed(script)
    run_dir = tmp_path / "run"
    train(script, run_dir, after)
    for again in (after // 2 + 5, 10**9):
        payload = script.read_checkpoint(run_dir, "resume", "cpu")
        resumed = train(script, run_dir, again, payload)[1]
    assert resumed["updates"] == uninterrupted["updates"]
    assert_same(uninterrupted, resumed)
    assert metrics(reference) == metrics(run_dir)


@pytest.mark.shared
def test_a_long_burst_is_logged_every_1000_updates(script, tmp_path):
    numbers, _ = train(script, tmp_path / "run", total_frames=1260, pretrain_updates=2100)
    assert numbers["updates"] == 2102
    rows = metrics(tmp_path / "run")
    assert [(r["frames"], r["updates"]) for r in rows] == [
        ("1000", "0"), ("1200", "1000"), ("1200", "2000"), ("1260", "2102")]
    assert (tmp_path / "run" / "previous.pt").exists()  # it was saved on the way
    assert all(r["loss/critic"] for r in rows[1:])


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not list(Path(path).glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    return next(Path(path).glob("*"))


@pytest.mark.shared
def test_a_second_signal_stops_at_once(script, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        interrupt = script.Interrupt()
        assert interrupt.signal == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_nan_weights_stop_the_run_before_they_act_or_are_saved(script, tmp_path):
    first = train(script, tmp_path / "run", after=55)[1]
    payload = script.read_checkpoint(tmp_path / "run", "resume", "cpu")
    for tensor in payload["agent"].values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    with pytest.raises(SystemExit, match="is nan after"):
        script.train(tiny_args(script), tmp_path / "run", Stop(), payload)
    assert_same(first, torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True))


@pytest.mark.shared
def test_metrics_csv_recovers_from_a_failed_write(script, tmp_path, capsys, monkeypatch):
    rows = []
    for folder in ("images", "videos"):
        (tmp_path / folder).mkdir()
    logger = script.Logger(tiny_args(script), tmp_path, 0, rows)
    logger.log({"frames": 1, "a/b": 0.5})
    monkeypatch.setattr(script.csv.DictWriter, "writeheader", lambda _: _full())
    logger.log({"frames": 2, "a/c": 0.5})  # a new column: the file is written anew, and that fails
    monkeypatch.undo()
    assert "warning: metrics not written" in capsys.readouterr().err
    logger.log({"frames": 3, "a/b": 1.5})
    logger.tensorboard(SummaryWriter.close)
    assert metrics(tmp_path) == [{"frames": "1", "a/b": "0.5", "a/c": ""},
                                 {"frames": "2", "a/b": "", "a/c": "0.5"},
                                 {"frames": "3", "a/b": "1.5", "a/c": ""}]


def _full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.shared
def test_tensorboard_recovers_from_a_failed_write(script, tmp_path, capsys, monkeypatch):
    """Its thread ends with the first error; once there is room, a new one writes a new file."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # Logger sets it
    for folder in ("images", "videos"):
        (tmp_path / folder).mkdir()
    logger = script.Logger(tiny_args(script), tmp_path, 0, [])
    logger.log({"frames": 1, "a/b": 0.5})
    logger.writer.flush()
    monkeypatch.setattr(RecordWriter, "write", _full)
    for frames in (2, 3):
        logger.log({"frames": frames, "a/b": 0.5})
        time.sleep(0.2)  # for the thread
    logger.show(3, {"grey": np.zeros((8, 8, 3), np.uint8)}, [], 1)
    errors = capsys.readouterr().err
    assert "ended: [Errno 28]" in errors and "warning: TensorBoard not written" in errors
    assert "Traceback" not in errors and (tmp_path / "images/000000003_grey.png").exists()
    monkeypatch.setattr(RecordWriter, "write", WRITE)
    logger.log({"frames": 4, "a/b": 1.5})
    logger.tensorboard(SummaryWriter.close)
    files = [EventAccumulator(str(path)).Reload() for path in tmp_path.glob("events*")]
    steps = [event.step for file in files for name in file.Tags()["scalars"]
             for event in file.Scalars(name)]
    assert sorted(steps) == [1, 4] and len(metrics(tmp_path)) == 4


def test_resume_extends_a_run_but_refuses_another(whole, tmp_path):
    name, numbers = whole
    run_dir = tmp_path / "run"
    shutil.copytree(numbers["run_dir"], run_dir)
    refused = run(name, f"--resume {run_dir} --gamma 0.5")
    assert refused.returncode == 2 and "--gamma" in refused.stderr
    longer = summary(run(name, f"--resume {run_dir} --total-frames 5000"))
    assert longer["frames"] == 5000 and longer["updates"] == numbers["updates"] + 50


@pytest.mark.shared
def test_weights_and_biases_is_imported_only_when_asked_for(script, tmp_path):
    """A stand-in for the package notes that it was imported and what it was told."""
    name, log = script.__name__, tmp_path / "calls"
    (tmp_path / "wandb.py").write_text(
        f"open({str(log)!r}, 'a').write('import')\n"
        f"def init(**kwargs): open({str(log)!r}, 'a').write(' '.join(kwargs))\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    flags = TINY[name] + f" --eval-every-frames 100000 --runs-dir {tmp_path / 'runs'}"
    summary(run(name, flags, env=env))
    assert not log.exists()
    summary(run(name, flags + " --track", env=env))
    assert log.read_text().startswith("import") and "sync_tensorboard" in log.read_text()
