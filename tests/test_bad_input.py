"""Bad usage of every script: exit status 2, one line that names the flag, nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, SUITE, TINY, command, run, summary

pytestmark = pytest.mark.parametrize("name", SCRIPTS)

BAD = [  # of every script
    ("--env-id cheeta-run", "--env-id", "cheetah-"),  # unknown: the nearest are named
    ("--env-id cheetahrun", "--env-id", "cheetah-"),
    ("--env-id dm_control-cheetah-run", "--env-id", "cheetah-"),
    ("--env-id -", "--env-id", "cartpole-"),
    ("--seed -1", "--seed", "above zero"),
    ("--seed 2147483648", "--seed", "above 2147483647"),
    ("--image-size 5000", "--image-size", "above 4096"),
    ("--total-frames 0", "--total-frames", "above zero"),
    ("--action-repeat -2", "--action-repeat", "above zero"),
    ("--eval-every-frames 0", "--eval-every-frames", "above zero"),
    ("--gamma nan", "--gamma", "finite"),
    ("--replay-capacity 3", "--replay-capacity", "1000"),
    ("--image-size -84", "--image-size", "above zero"),
    ("--eval-episodes 0", "--eval-episodes", "above zero"),
    ("--device cuda:77", "--device", "try auto"),
    ("--device quantum", "--device", "try auto"),
    ("--resume /nowhere", "--resume", "/nowhere"),
    ("--evaluate /nowhere", "--evaluate", "/nowhere"),
    ("--track", "--track", "pip install wandb"),
    ("--device meta", "--device", "try auto"),
    ("--runs-dir /dev/null/runs", "--runs-dir", "cannot be made"),
]
BAD_SUITE = [  # of those that run one task
    ("--env-id cheetah-walk", "--env-id", "cheetah-run"),
    ("--total-frames 900", "--total-frames", "--warmup-steps"),
    ("--updates-per-step nan", "--updates-per-step", "finite"),
    ("--updates-per-step inf", "--updates-per-step", "finite"),
    ("--total-frames 9999999999 --replay-capacity 999999999", "--replay-capacity", "at most"),
]
FAMILY = [  # of SAC+AE and its descendant
    ("--alpha-beta1 1", "--alpha-beta1", "below 1"),
    ("--conv-strides", "--conv-strides", "one conv layer"),
    ("--freeze-encoder --actor-trains-encoder", "--freeze-encoder", "drop one"),
    ("--gamma 1.5", "--gamma", "above 1"),
    ("--conv-strides 2 0", "--conv-strides", "above zero"),
    ("--conv-strides 2 11", "--conv-strides", "above 10"),
]
OWN = {
    "sac_ae": [
        *FAMILY,
        ("--image-size 2", "--image-size", "from 15 on"),
        ("--obs state", "--obs", "--reconstruction none --frame-stack 1"),
    ],
    "sac_gaara": [
        *FAMILY,
        ("--crop-size 2", "--crop-size", "from 15 on"),
        ("--crop-size 101", "--image-size", "below the --crop-size"),
        ("--image-size 64", "--image-size", "below the --crop-size"),
        ("--obs state", "--obs", "--reconstruction none --contrast none --frame-stack 1"),
        ("--contrast discriminator --reconstruction none", "--contrast", "drop --reconstruction"),
        ("--contrast-step joint --reconstruction none", "--contrast-step", "add both"),
        ("--contrast-step joint --contrast none", "--contrast-step", "add both"),
        ("--contrast-step joint --contrast discriminator", "--contrast-step", "add both"),
        ("--contrast-step joint --anneal lr", "--anneal", "use loss"),
        ("--contrast-weight 0", "--contrast-weight", "above zero"),
    ],
    "slac": [
        ("--image-size 40", "--image-size", "use 32 or 48"),
        ("--channels", "--channels", "one conv layer"),
        ("--channels 8 0", "--channels", "above zero"),
        ("--z2 recurrent --no-temporal", "--temporal", "drop --no-temporal"),
        ("--z1 deterministic --no-temporal", "--temporal", "drop --no-temporal"),
        ("--warmup-steps 7", "--actions", "--warmup-steps"),
        ("--actions 1", "--actions", "at least 2"),
        ("--actions 1500", "--actions", "below 1000"),
        ("--gamma 1.5", "--gamma", "above 1"),
        ("--decoder-variance 0", "--decoder-variance", "above zero"),
        ("--total-frames 10000", "--total-frames", "--warmup-steps"),
    ],
    "dreamerv2": [
        ("--image-size 84", "--image-size", "use 64"),
        ("--decoder-kernels 5 5", "--image-size", "use 13"),
        ("--decoder-kernels", "--decoder-kernels", "two conv layers"),
        ("--decoder-kernels 64", "--decoder-kernels", "two conv layers"),
        ("--decoder-kernels 3 3 --image-size 7", "--decoder-kernels", "image than 7"),
        ("--decoder-kernels 5 0", "--decoder-kernels", "above zero"),
        ("--sequence-length 1", "--sequence-length", "between 2 and 250"),
        ("--sequence-length 251", "--sequence-length", "between 2 and 250"),
        ("--sequence-length 51 --replay-capacity 200", "--replay-capacity", "1000"),
        ("--action-repeat 1 --sequence-length 251 --replay-capacity 1001", "--sequence-length",
         "between 2 and 250"),
        ("--model-every-updates 2 --behavior-every-updates 3", "--model-every-updates", "be 1"),
        ("--warmup-steps 20", "--sequence-length", "between 2 and 10"),
        ("--horizon 1", "--horizon", "at least 2"),
        ("--spr-weight 1 --sequence-length 5", "--spr-weight", "--sequence-length 6"),
        ("--mask-ratio 1.1", "--mask-ratio", "above 1"),
        ("--head-layers 101", "--head-layers", "above 100"),
        ("--reset-alpha 2", "--reset-alpha", "above 1"),
        ("--kl-balance 1.2", "--kl-balance", "above 1"),
    ],
    "pearl_pixels": [
        ("--env-id cheetah-run", "--env-id", "cheetah-vel"),
        ("--action-repeat 4", "--action-repeat", "leave it out"),
        ("--conv-strides", "--conv-strides", "one conv layer"),
        ("--image-size 12", "--image-size", "from 31 on"),
        ("--trajectory-steps 201", "--trajectory-steps", "the family's 200"),
        ("--prior-steps 0", "--prior-steps", "more than 0"),
        ("--total-frames 20000", "--total-frames", "20000 initial"),
        ("--tau 1.5", "--tau", "above 1"),
        ("--task-seed 4294967296", "--task-seed", "above 4294967295"),
        ("--replay-capacity 1000", "--replay-capacity", "at least"),
        ("--total-frames 9999999999 --replay-capacity 99999999999", "--replay-capacity", "at most"),
        ("--oracle --latent-dim 1 --env-id reacher-goal", "--latent-dim", "2 numbers"),
    ],
}


def assert_refused(process, flag, remedy):
    assert process.returncode == 2, (process.returncode, process.stdout, process.stderr)
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith(f"error: {flag}: ") and remedy in lines[0]


def test_refused(name, tmp_path, monkeypatch, capsys):
    """All cases in this process, and the first of the script's own as a user would meet it."""
    module, none = __import__(name), lambda *_: pytest.fail("it trains")
    monkeypatch.setattr(module, "train", none)
    for flags, flag, remedy in BAD + BAD_SUITE * (name in SUITE) + OWN[name]:
        where = "" if "--runs-dir" in flags else f" --runs-dir {tmp_path}/runs"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *(flags + where).split()])
        with pytest.raises(SystemExit) as end:
            module.main(module.parse_args())
        errors = capsys.readouterr().err
        assert_refused(SimpleNamespace(returncode=end.value.code, stdout=flags, stderr=errors),
                       flag, remedy)
        assert not list(tmp_path.iterdir())
    flags, flag, remedy = OWN[name][0]
    assert_refused(run(name, f"{flags} --runs-dir {tmp_path}/runs"), flag, remedy)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--bach-size 3", "--gamma three", "--render pretty", "7"])
def test_typos_are_refused_by_the_parser(name, flags):
    process = run(name, flags)
    assert process.returncode == 2 and "Traceback" not in process.stderr


def test_help_lists_every_flag_with_its_meaning(name):
    module = __import__(name)
    text = run(name, "--help").stdout
    fields = module.dataclasses.fields(module.Args)
    for field in fields:
        assert re.search(rf"--{field.name.replace('_', '-')}\b", text)
    assert text.count("(default:") + text.count("(optional)") >= len(fields)
    smoke = run(name, "--smoke --help").stdout  # those of a smoke run
    assert f"(default: {module.SMOKE['image_size']})" in smoke and smoke != text


def test_bad_usage_does_not_wait_for_pytorch(name, tmp_path):
    """Where importing torch fails, --help and a wrong task still answer."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert run(name, "--help", env=env).returncode == 0
    assert_refused(run(name, "--env-id cheetah-walk", env=env), "--env-id", "cheetah-")
    assert "imported" in run(name, "", env=env).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="there Triton does not come with PyTorch")
def test_triton_is_imported_before_opengl(name, tmp_path):
    """Triton 3.7, after Mesa, kills the process: each has an LLVM. Here it is a stand-in."""
    (tmp_path / "triton.py").write_text("import sys\nprint({'OpenGL', 'mujoco'} & {*sys.modules})")
    process = run(name, "--env-id cheetah-walk", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout == "set()\n"
    assert_refused(process, "--env-id", "cheetah-")  # for which dm_control was imported


@pytest.mark.shared
@pytest.mark.parametrize("value, word", [("glx", "glx"), ("disable", "disable")])
def test_no_renderer(name, tmp_path, value, word):
    process = run(name, f"--runs-dir {tmp_path}/runs", env={**os.environ, "MUJOCO_GL": value})
    assert_refused(process, "MUJOCO_GL", word)
    assert all(w in process.stderr for w in ("egl", "osmesa", "glfw", "apt-get install"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """Run folders by script, made when asked for."""
    folders = {}

    def get(name):
        if name not in folders:
            runs = tmp_path_factory.mktemp("finished")
            folders[name] = summary(run(name, f"{TINY[name]} --runs-dir {runs}"))["run_dir"]
        return folders[name]

    return get


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned_by_checkpoint",)


def flip(path):
    """Flips one bit in the middle of the largest member of the archive."""
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200 + info.file_size // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("hello"),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "flipped": flip,
    "folder": lambda p: (p.unlink(), p.mkdir()),
    "foreign": lambda p: torch.save({"format": 1, "script": "other"}, p),
    "not a checkpoint": lambda p: torch.save([1, 2, 3], p),
    "evil": lambda p: torch.save({"format": 1, "script": Evil()}, p),
    "gone": lambda p: p.unlink(),
}


@pytest.mark.shared
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(name, finished, tmp_path, damage, capsys):
    """In this process, to be quick: read_checkpoint is all that --resume and --evaluate use."""
    module, run_dir = __import__(name), tmp_path / "run"
    shutil.copytree(finished(name), run_dir)
    DAMAGE[damage](run_dir / "checkpoint.pt")
    payload = module.read_checkpoint(run_dir, "resume", "cpu")  # the one before is used
    assert payload["progress"]["step"] < 200
    assert "going on from previous.pt" in capsys.readouterr().err
    assert not (run_dir / "checkpoint.pt").exists()  # or the next save would make it previous.pt
    if damage != "gone":
        os.replace(run_dir / "damaged.pt", run_dir / "checkpoint.pt")
    if damage != "gone":
        DAMAGE[damage](run_dir / "previous.pt")
    else:
        (run_dir / "previous.pt").unlink()
    with pytest.raises(SystemExit) as exit:
        module.read_checkpoint(run_dir, "resume", "cpu")
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: --resume: ")
    assert not os.path.exists("/tmp/pwned_by_checkpoint")


@pytest.mark.shared
def test_refused_from_the_command_line(name, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished(name), run_dir)
    for file in ("checkpoint.pt", "previous.pt"):
        DAMAGE["evil"](run_dir / file)
    assert_refused(run(name, f"--resume {run_dir}"), "--resume", "no checkpoint")
    assert_refused(run(name, f"--evaluate {run_dir}"), "--evaluate", "no checkpoint")
    assert_refused(run(name, f"--evaluate {tmp_path}"), "--evaluate", "is missing")
    for text in ("{", "[]"):
        (run_dir / "args.json").write_text(text)
        assert_refused(run(name, f"--resume {run_dir}"), "--resume", "not a run folder")
    assert not os.path.exists("/tmp/pwned_by_checkpoint")


@pytest.mark.shared
def test_damaged_replay(name, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished(name), run_dir)
    flip(sorted((run_dir / "replay").iterdir())[0])
    assert_refused(run(name, f"--resume {run_dir} --total-frames 5000"), "--resume", "replay")


@pytest.mark.shared
def test_args_that_do_not_match_the_checkpoint(name, finished, tmp_path):
    """args.json was edited, or belongs to another run."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished(name), run_dir)
    saved = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps({**saved, "seed": 5}))
    assert_refused(run(name, f"--resume {run_dir}"), "--seed", "the run has 1")


@pytest.mark.shared
def test_without_the_gl_libraries(name, tmp_path):
    """The libraries are hidden behind an empty folder, in a mount namespace of its own."""
    script = "for f in $(find /usr/lib -name 'lib*GL*.so*'); do mount --bind /dev/null $f; done; "
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if not sys.platform.startswith("linux") or probe.returncode:
        pytest.skip("needs the right to make a mount namespace")
    words = " ".join(command(name, f"--runs-dir {tmp_path}/runs"))
    process = subprocess.run(["unshare", "-m", "sh", "-c", script + words], text=True,
                             capture_output=True)
    assert_refused(process, "MUJOCO_GL", "osmesa")
