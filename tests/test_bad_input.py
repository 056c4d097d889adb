"""Bad usage: exit status 2 and one line that names the flag and the remedy; nothing is written.
And what ends a run later: exit status 1 and one line."""

import importlib
import math
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import LOOPS, SCRIPTS, SUITE, TINY, metrics, run, summary

OWN_TASKS = Path(__file__).parent / "own_tasks.py"
BAD = [  # of every script: flags, the flag that is named, a word of the remedy
    ("--env-id cheeta-run", "--env-id", "cheetah-"),  # unknown: the nearest are named
    ("--seed -1", "--seed", "above zero"),
    ("--total-frames 0", "--total-frames", "above zero"),
    ("--eval-every-frames 0", "--eval-every-frames", "above zero"),
    ("--gamma nan", "--gamma", "finite"),
    ("--gamma 1.5", "--gamma", "at most 1"),
    ("--device gpu", "--device", "cuda:1"),
    ("--resume /nowhere", "--resume", "/nowhere"),
    ("--evaluate /nowhere", "--evaluate", "/nowhere"),
    ("--track", "--track", "pip install wandb"),
    ("--runs-dir /dev/null/runs", "--runs-dir", "cannot be made"),
]
SUITE_ONLY = [
    ("--total-frames 900", "--total-frames", "warm-up"),
    ("--replay-capacity 3", "--replay-capacity", "1000"),
    ("--env-id nowhere.py:task", "--env-id", "cannot be imported"),
    ("--env-id nowhere:task", "--env-id", "cannot be imported"),
    (f"--env-id {OWN_TASKS}:nothing", "--env-id", "no function nothing"),
    (f"--env-id {OWN_TASKS}:without_physics", "--env-id", "no physics"),
    (f"--env-id {OWN_TASKS}:without_bounds", "--env-id", "no bounds"),
    (f"--env-id {OWN_TASKS}:without_last_observation", "--env-id", "no observation"),
]
FAMILY = [  # of SAC+AE and its descendant
    ("--alpha-beta1 1", "--alpha-beta1", "below 1"),
    ("--conv-strides 2 0", "--conv-strides", "above zero"),
    ("--freeze-encoder --actor-trains-encoder", "--freeze-encoder", "drop one"),
]
OWN = {
    "sac_ae": [
        *FAMILY,
        ("--image-size 2", "--image-size", "raise it"),
        ("--obs state", "--obs", "--reconstruction none --frame-stack 1"),
    ],
    "sac_gaara": [
        *FAMILY,
        ("--crop-size 101", "--image-size", "--crop-size"),
        ("--contrast discriminator --reconstruction none", "--contrast", "--reconstruction"),
        ("--contrast-step joint --contrast none", "--contrast-step", "needs a decoder"),
        ("--contrast-step joint --anneal lr", "--anneal", "use loss"),
    ],
    "slac": [
        ("--image-size 40", "--image-size", "multiple of 16"),
        ("--z2 recurrent --no-temporal", "--temporal", "use --temporal"),
        ("--actions 1", "--actions", "2"),
    ],
    "dreamerv2": [
        ("--image-size 84", "--image-size", "64"),
        ("--sequence-length 251", "--sequence-length", "between 2 and 250"),
        ("--model-every-updates 2 --behavior-every-updates 3", "--model-every-updates", "1"),
        ("--horizon 1", "--horizon", "2 at least"),
        ("--spr-weight 1 --sequence-length 5", "--spr-weight", "--sequence-length"),
    ],
    "pearl_pixels": [
        ("--action-repeat 4", "--action-repeat", "leave it out"),
        ("--trajectory-steps 201", "--trajectory-steps", "200"),
        ("--prior-steps 0", "--prior-steps", "raise it"),
        ("--total-frames 20000", "--total-frames", "initial"),
        ("--oracle --latent-dim 1 --env-id reacher-goal", "--latent-dim", "2 numbers"),
    ],
}


def assert_refused(status, errors, flag, remedy):
    lines = [line for line in errors.splitlines() if line.strip() and "%|" not in line]
    assert status == 2 and len(lines) == 1, errors
    assert lines[0].startswith(f"error: {flag}: ") and remedy in lines[0], lines[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_usage_is_refused_in_one_line(name, tmp_path, capsys):
    main = importlib.import_module(name).main
    for flags, flag, remedy in BAD + SUITE_ONLY * (name in SUITE) + OWN[name]:
        where = "" if "--runs-dir" in flags else f" --runs-dir {tmp_path}/runs"
        status = main((flags + where).split())
        assert_refused(status, capsys.readouterr().err, flag, remedy)
        assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("name", LOOPS)
def test_the_parser_refuses_typos_and_explains_every_flag(name):
    process = run(name, "--bach-size 3")
    assert process.returncode == 2 and "Traceback" not in process.stderr
    module = importlib.import_module(name)
    text = run(name, "--help").stdout
    for field in module.dataclasses.fields(module.Args):
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize("words, flag", [
    ("MUJOCO_GL=disable", "MUJOCO_GL"), ("MUJOCO_GL=glx", "MUJOCO_GL"),
    ("MUJOCO_EGL_DEVICE_ID=GPU-1", "MUJOCO_GL"), ("MUJOCO_EGL_DEVICE_ID=", "MUJOCO_GL"),
])  # fmt: skip
def test_no_opengl_is_one_line_with_the_remedy(words, flag, tmp_path):
    """Also where states are seen and only films need it; a forwarded display does no harm."""
    states = f"--obs state --reconstruction none --frame-stack 1 --runs-dir {tmp_path}"
    name, value = words.split("=")
    for flags in ("", states) if words == "MUJOCO_GL=disable" else ("",):
        process = run("sac_ae", flags, env={**os.environ, name: value})
        assert_refused(process.returncode, process.stderr, flag, "egl")
        assert name in process.stderr and not list(tmp_path.iterdir())


@pytest.mark.deep
def test_a_forwarded_display_does_no_harm(tmp_path):
    """ssh -X sets it. Another MUJOCO_GL than egl is used only if somebody asks for it."""
    env = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    env["DISPLAY"] = "localhost:10.0"
    summary(run("sac_ae", f"{TINY['sac_ae']} --runs-dir {tmp_path}", env=env))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("finished")
    return summary(run("sac_ae", f"{TINY['sac_ae']} --runs-dir {runs}"))["run_dir"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned_by_checkpoint",)


def flip(path):
    """Flips one bit of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200 + info.file_size // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "flipped": flip,
    "foreign": lambda p: torch.save({"args": {"other": 1}}, p),
    "evil": lambda p: torch.save({"args": Evil()}, p),
    "gone": lambda p: p.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused(finished, tmp_path, damage, capsys):
    import sac_ae

    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    DAMAGE[damage](run_dir / "checkpoint.pt")
    for flag in ("--resume", "--evaluate"):
        status = sac_ae.main([flag, str(run_dir)])
        assert_refused(status, capsys.readouterr().err, flag, "not a checkpoint")
    assert not os.path.exists("/tmp/pwned_by_checkpoint")


def test_a_resumed_run_refuses_other_arguments_by_name(finished, capsys):
    import sac_ae

    for flags, flag in (("--gamma 0.5", "--gamma"), ("--seed 5", "--seed")):
        status = sac_ae.main(["--resume", finished, *flags.split()])
        assert_refused(status, capsys.readouterr().err, flag, "the run has")


def test_two_processes_cannot_run_in_one_folder(finished, capsys):
    from filelock import FileLock

    import sac_ae

    with FileLock(finished + "/lock"):
        status = sac_ae.main(["--resume", finished, "--total-frames", "5000"])
    assert_refused(status, capsys.readouterr().err, "--resume", "another process")


def test_a_file_system_without_locks_is_a_warning(finished, tmp_path, capsys, monkeypatch):
    import sac_ae

    def no_locks(*_, **__):
        raise OSError(37, "No locks available")

    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    monkeypatch.setattr(sac_ae.FileLock, "acquire", no_locks)
    assert sac_ae.main(["--resume", str(run_dir)]) == 0
    assert "cannot be locked" in capsys.readouterr().out


def test_a_busy_machine_and_slow_bfloat16_are_told(capsys, monkeypatch):
    """Runs side by side wait for each other's threads; and the number of threads, which changes the
    numbers in their last digits, is recorded."""
    import sac_ae

    before = torch.get_num_threads()
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    monkeypatch.setattr(Path, "read_text", lambda path: "flags: avx avx2")
    words = f"{TINY['sac_ae']} --precision bf16".split()
    try:
        assert sac_ae.parse_args([*words, "--threads", "2"])[0].threads == 2
        assert torch.get_num_threads() == 2
        assert sac_ae.parse_args(words)[0].threads == 2  # PyTorch's present number
        lines = capsys.readouterr().err.splitlines()[:2]
    finally:
        torch.set_num_threads(before)
    assert "bf16" in lines[0] and "--threads 1" in lines[1]
    monkeypatch.setattr(Path, "read_text", lambda path: "flags: avx512_bf16")
    sac_ae.parse_args([*words, "--threads", "1"])
    assert capsys.readouterr().err == ""


def test_a_disk_that_is_too_small_is_refused_at_the_start(tmp_path, capsys, monkeypatch):
    """posix_fallocate takes the room of the whole replay buffer at once."""
    import sac_ae

    flags = f"{TINY['sac_ae']} --runs-dir {tmp_path} --total-frames 1e15".split()
    status = sac_ae.main(flags)
    assert_refused(status, capsys.readouterr().err, "--runs-dir", "no room")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LOOPS)
def test_a_disk_that_fills_later_ends_the_run_in_one_line(name, tmp_path, capsys, monkeypatch):
    """And the run goes on from its last checkpoint with the command of that line."""
    module = importlib.import_module(name)
    real, calls = module.save_checkpoint, []

    def full(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(module, "save_checkpoint", full)
    flags = f"{TINY[name]} --runs-dir {tmp_path} --checkpoint-every-minutes 1e-9"
    assert module.main(flags.split()) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "No space left" in last and "to resume: python" in last
    monkeypatch.undo()
    words = last.partition(" --resume ")[2].split()
    assert module.main(["--resume", *words]) == 0


@pytest.mark.parametrize("name", LOOPS)
def test_nan_ends_the_run_by_name_and_nothing_is_saved(name, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(name)
    update, made = module.Agent.update, []

    def nan(self, batch):
        made.append(1)
        metrics = update(self, batch)
        if len(made) > 8:
            metrics["loss/critic"] = torch.tensor(math.nan)
        return metrics

    monkeypatch.setattr(module.Agent, "update", nan)
    assert module.main(f"{TINY[name]} --runs-dir {tmp_path}".split()) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: loss/critic is nan after")
    args, payload = module.read_checkpoint(next(tmp_path.iterdir()), "resume")
    assert payload["progress"]["updates"] <= 8
    assert all(v.isfinite().all() for v in payload["agent"].values())


@pytest.mark.parametrize("where", ["training", "evaluation"])
@pytest.mark.parametrize("name", LOOPS)
def test_an_episode_that_diverges_is_discarded(name, where, tmp_path, capsys, monkeypatch):
    """dm_control raises PhysicsError. The run goes on with a warning, and so does its resume."""
    module = importlib.import_module(name)
    step, steps = module.PixelEnv.step, []

    def diverges(self, action):
        film = self.largest_image > self.args.image_size
        if self.pixels and film == (where == "evaluation"):
            steps.append(1)
            if len(steps) == 15:
                raise module.control.PhysicsError("mjWARN_BADQACC")
        return step(self, action)

    monkeypatch.setattr(module.PixelEnv, "step", diverges)
    flags = TINY[name].replace("--no-video", "--video")
    assert module.main(f"{flags} --runs-dir {tmp_path}".split()) == 0
    out = capsys.readouterr()
    assert (out.out + out.err).count("is discarded: mjWARN_BADQACC") == 1


def test_memory_that_is_short_is_one_line(tmp_path, capsys):
    import sac_ae

    flags = f"{TINY['sac_ae']} --runs-dir {tmp_path} --hidden-dim 2000000"
    assert sac_ae.main(flags.split()) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: memory: ") and "smaller networks" in last


@pytest.mark.deep
def test_a_first_burst_is_logged_every_1000_updates(tmp_path):
    """And without a terminal there is a line of progress at least every minute."""
    flags = f"{TINY['sac_ae']} --total-frames 3000 --pretrain-updates 2000 --runs-dir {tmp_path}"
    process = run("sac_ae", flags)
    updates = [int(row["updates"]) for row in metrics(summary(process)["run_dir"])]
    assert {1000, 2000} < set(updates)
    assert "updates" in process.stderr
