"""The benchmark's tools: commands, resuming, failures, statistics, plots, pages."""

import argparse
import contextlib
import csv
import hashlib
import html
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import imageio.v3 as imageio
import numpy as np
import pytest
import scipy.stats
import torch
import tyro
from conftest import ROOT, SCRIPTS, TINY, metrics

sys.path.insert(0, str(ROOT / "benchmark"))
import diff
import report
import studies

deep = pytest.mark.deep
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FLAGS = TINY["sac_ae"].replace("--env-id cartpole-balance ", "")


def bench(*words, root=ROOT, **kwargs):
    """A process of benchmark/run.py, which Ctrl-C reaches even if these tests run behind a shell's
    &."""
    command = [sys.executable, str(root / "benchmark" / "run.py"), *map(str, words)]

    def heed_signals():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, preexec_fn=heed_signals, **pipes, **kwargs)


def words(out, *others, seeds=(1,), tasks=("cartpole-balance",), flags=FLAGS):
    words = ["--scripts", "sac_ae", "--env-ids", *tasks, "--seeds", *seeds, "--out", out]
    return [*words, *others, "--", *flags.split()]


def one_folder(out, pattern="*"):
    (folder,) = out.glob(pattern)
    return folder


# ---- studies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_study_is_made_of_commands_that_the_scripts_take(name):
    """And SAC+GAARA's have the report's action repeat, so that its curves can stand beside them."""
    seen = set()
    for variant in studies.STUDIES[name].values():
        module = importlib.import_module(variant.script)
        args = tyro.cli(module.Args, args=["--env-id", variant.env_id, *variant.flags.split()])
        assert not [row for row in module.algorithm_checks(args) if row[1]]
        seen.add((variant.script, str(args)))
        missing = variant.published and not report.published(variant.published, variant.env_id)
        assert not missing or (variant.script, variant.env_id) == ("sac_gaara", "ball_in_cup-catch")
        assert variant.script != "sac_gaara" or args.action_repeat == 4
    assert len(seen) == len(studies.STUDIES[name])  # no two are the same


VARIANTS = {  # a page of benchmark/notes and the studies of its variants
    "sac_ae": ["sac-ae-alternation", "sac-ae-vae"],
    "sac_gaara": [f"gaara-figure-{i}" for i in range(3, 10)] + ["gaara-annealing"],
    "slac": ["slac-a-model", "slac-b-inputs", "slac-c-pretraining", "slac-d-updates"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_with_a_published_figure_are_in_a_study(name):
    """The flags of the table's rows, in the order in which they stand there."""
    text = (ROOT / "benchmark" / "notes" / f"{name}.md").read_text()
    text = text.split("## Variants\n")[1].split("\n## ")[0]
    known = [f" {v.flags} " for study in VARIANTS[name] for v in studies.STUDIES[study].values()]
    rows = [row.split("|") for row in text.splitlines() if row.startswith("| ")]
    rows = [row for row in rows if name == "sac_ae" or re.search(r"figure|\d / \d", row[3])]
    flags = [flag for row in rows for flag in row[2].split("`")[1::2] if flag.startswith("--")]
    flags = [flag for flag in flags if "variance" not in flag and "--obs state" not in flag]
    assert len(flags) > 4
    assert not [flag for flag in flags if not any(f" {flag} " in k for k in known)]


def test_studies_print_commands():
    command = [sys.executable, ROOT / "benchmark" / "studies.py"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert names == list(studies.STUDIES)
    lines = subprocess.run([*command, "slac-a-model"], capture_output=True, text=True).stdout
    assert "python slac.py --env-id cheetah-run --z2 deterministic  # partially stoch" in lines
    wrong = subprocess.run([*command, "slac-z"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "error: no study slac-z" in wrong.stderr


# ---- run ---------------------------------------------------------------------------------------


def test_dry_run_prints_the_product(tmp_path):
    flags = ["--dry-run", "--", "--image-size", "48"]
    tasks = ["cheetah-run", "walker-walk"]
    scripts = ["--scripts", "slac", "sac_ae", "--env-ids", *tasks, "--seeds", 3, 4]
    lines = bench(*scripts, "--out", tmp_path, *flags).communicate()[0].splitlines()
    wanted = itertools.product(["slac", "sac_ae"], tasks, [3, 4])
    for line, (script, task, seed) in zip(lines, wanted, strict=True):
        start = f"python {script}.py --delete-replay --env-id {task} --image-size 48 --seed {seed} "
        assert line.startswith(start)
        module = importlib.import_module(script)
        tyro.cli(module.Args, args=shlex.split(line)[2:])
    assert len({line.split("--runs-dir ")[1] for line in lines}) == 8
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_a_grid_and_only_the_method_drops_the_published_curve(tmp_path):
    import run

    def jobs(sweep, *flags):
        args = argparse.Namespace(study="", scripts=["slac"], env_ids=[], seeds=[1], sweep=sweep,
                                  flags=list(flags), out=str(tmp_path))  # fmt: skip
        return run.jobs_of(args)

    grid = jobs(["gamma=0.9,0.99", "hidden-dim=64,128"])
    ends = [f"--gamma {g} --hidden-dim {h}" for g in (0.9, 0.99) for h in (64, 128)]
    assert [job.flags for job in grid] == ends and len({job.folder for job in grid}) == 4
    assert jobs([], "--device", "cuda", "--no-video")[0].published == studies.CURVES["slac"]
    assert {job.published for job in [*grid, *jobs([], "--gamma", "0.9")]} == {""}


def test_a_killed_run_is_said_to_be_killed(tmp_path, monkeypatch):
    import run

    job = run.Job("slac", "", 1, "slac", "", tmp_path / "seed1")
    text = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(run.Job, "command", lambda job: ["-c", text])
    run.execute(job, {"OMP_NUM_THREADS": "1"})
    assert job.result()["failed"] == "killed by SIGKILL, probably as memory ran out"


BAD = ["", "--study curves --scripts slac", "--scripts slac cheetah", "--scripts slac -- word",
       "--study curves --env-ids cheetah-run", "--scripts slac --sweep gamma",
       "--scripts slac --out /proc/nowhere"]  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_bad_usage_of_run(line, tmp_path):
    """One line that says what is wrong; above all, nothing is run."""
    process = bench(*line.split(), cwd=tmp_path)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "error: " in errors.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_slots_share_cores_and_gpus(monkeypatch):
    import run

    cores = os.cpu_count()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for share, wanted in ((0.5, "3355"), (0.34, "3355"), (0.33, "3335"), (1.0, "3579")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,9")  # as a scheduler gave them
        envs = [run.environment(slot, 4, share, run.gpus()) for slot in range(4)]
        for name in ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID"):
            assert "".join(env[name] for env in envs) == wanted
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run.environment(0, 4, 0, []) == {"OMP_NUM_THREADS": str(max(1, cores // 4))}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run.environment(0, 4, 0, []) == {"OMP_NUM_THREADS": "7"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A task that works, and one that does not exist."""
    out = tmp_path_factory.mktemp("finished")
    process = bench(*words(out, "--workers", 2, tasks=("cartpole-balance", "cartpole-dance")))
    output, errors = process.communicate(timeout=600)
    return out, process.returncode, output, errors


def test_a_failed_run_stops_no_other_and_the_exit_status_says_so(finished):
    out, code, output, errors = finished
    assert code == 1, errors
    table = output.strip().split("\n\n")[-1].splitlines()
    states = [line.split("seed ")[1].split()[1] for line in table[:-1]]
    assert states == ["finished", "failed"]
    assert table[0].split("  ")[-1].startswith("return ") and "4,000 of 4,000 frames" in table[0]
    assert "exit status 2" in table[1] and "env-id" in table[1]
    assert table[-1].startswith("1 finished, 1 failed")


def test_what_is_collected(finished):
    """meta.json and the rows of each seed; for those that failed, why."""
    out = finished[0]
    folder = one_folder(out, "*balance*")
    meta = json.loads((folder / "meta.json").read_text())
    (run,) = meta["runs"]
    assert run["seed"] == 1 and run["frames"] == 4000 and run["wall_s"] > 0
    assert meta["command"].startswith("python sac_ae.py --env-id cartpole-balance --action-repeat")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert run["commit"].startswith(commit.stdout.strip()) and run["threads"] >= 1
    (run_dir,) = (folder / "seed1").glob("*__1__*")
    text = (run_dir / "sac_ae.py").read_bytes()
    assert run["sha256"] == hashlib.sha256(text).hexdigest()
    assert "cores" in meta["hardware"]
    assert (folder / "seed1.csv").read_bytes() == (run_dir / "metrics.csv").read_bytes()
    assert not (run_dir / "replay").exists()  # or a study would fill the disk
    (run,) = json.loads((one_folder(out, "*dance*") / "meta.json").read_text())["runs"]
    assert "exit status 2" in run["failed"]


def test_the_same_command_again_skips_what_is_finished_and_tries_the_rest(finished):
    out = finished[0]
    command = words(out, "--dry-run", tasks=("cartpole-balance", "cartpole-dance"))
    (line,) = bench(*command).communicate()[0].splitlines()
    assert "cartpole-dance" in line
    folder = one_folder(out, "*balance*")
    shutil.copytree(folder / "seed1", folder / "seed2")
    before = (folder / "seed1" / "log.txt").stat().st_mtime_ns
    process = bench(*words(out))
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert output.count("finished") == 2 and "running" not in output
    meta = json.loads((folder / "meta.json").read_text())
    assert [run["frames"] for run in meta["runs"]] == [4000, 4000]  # seed 2 stays in meta.json
    assert (folder / "seed1" / "log.txt").stat().st_mtime_ns == before


def test_a_renamed_copy_is_a_script_too(tmp_path):
    """Any script at the root, such as sac_mine.py; what is not there is refused."""
    (tmp_path / "benchmark").mkdir()
    for name in ("run.py", "studies.py"):
        shutil.copy(ROOT / "benchmark" / name, tmp_path / "benchmark")
    shutil.copy(ROOT / "sac_ae.py", tmp_path / "sac_mine.py")
    line = bench("--scripts", "sac_mine", "--dry-run", root=tmp_path).communicate()[0]
    assert line.startswith("python sac_mine.py --delete-replay --seed 1 --runs-dir ")
    other = bench("--scripts", "sac_ae", "--dry-run", root=tmp_path)
    assert "sac_mine" in other.communicate()[1] and other.returncode == 2


def wait_for_checkpoint(out, process, seconds=300):
    until = time.monotonic() + seconds
    while not list(out.glob("*/seed1/*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def rows_of(out):
    return metrics(one_folder(out, "*/seed1/*__1__*"))


@pytest.fixture
def undisturbed(finished):
    return metrics(one_folder(finished[0], "*balance*/seed1/*__1__*"))


@deep
@pytest.mark.parametrize("engine, number", [("local", signal.SIGINT), ("ray", signal.SIGTERM)])
def test_a_signal_stops_all_runs_with_a_checkpoint_and_the_command_goes_on(
    tmp_path, undisturbed, engine, number
):
    pytest.importorskip("ray" if engine == "ray" else "json")
    command = words(tmp_path, "--engine", engine)
    process = bench(*command)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "failed" not in one_folder(tmp_path, "*/*/job.json").read_text()
    line = bench(*command[: command.index("--")], "--dry-run", "--", *FLAGS.split())
    assert "--resume" in line.communicate()[0]
    assert bench(*command).wait(600) == 0
    assert rows_of(tmp_path) == undisturbed


def processes():
    """(process number, its parent's, words of its command) of all (Linux)."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = re.search(r"PPid:\s+(\d+)", (path / "status").read_text())[1]
            yield int(path.name), int(parent), (path / "cmdline").read_bytes().decode().split("\0")


def run_and_parent(folder):
    """Process numbers of the run in this folder and of what started it."""
    found = [p for p in processes() if "sac_ae.py" in p[2] and str(folder) in p[2]]
    return found[0][:2]


def test_two_at_once_do_not_write_to_the_same_runs(tmp_path):
    with filelock.FileLock(tmp_path / "lock"):
        second = bench(*words(tmp_path))
        assert "another benchmark/run.py" in second.communicate()[1] and second.returncode == 1


@linux
@deep
def test_a_killed_run_is_resumed_by_the_next_command(tmp_path, undisturbed):
    """And while it was away, no process of it went on."""
    process = bench(*words(tmp_path))
    wait_for_checkpoint(tmp_path, process)
    process.kill()
    process.communicate()
    run_dir = one_folder(tmp_path, "*/seed1/*__1__*")
    time.sleep(0.5)
    assert not any(str(run_dir.parent) in command for *_, command in processes())
    assert bench(*words(tmp_path)).wait(600) == 0
    assert rows_of(tmp_path) == undisturbed


@linux
@deep
def test_ray_tries_again_when_a_worker_is_killed(tmp_path, undisturbed):
    """The killed worker's run dies with it, and another worker resumes it."""
    pytest.importorskip("ray")
    process = bench(*words(tmp_path, "--engine", "ray"))
    wait_for_checkpoint(tmp_path, process)
    _, worker = run_and_parent(one_folder(tmp_path, "*/seed1"))
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    log = one_folder(tmp_path, "*/seed1/log.txt").read_text()
    assert log.count("$ python") == 2 and "--resume" in log
    assert rows_of(tmp_path) == undisturbed


# ---- report ------------------------------------------------------------------------------------


def write_group(folder, label, env_id, curves, failed=(), published="", random=5.0):
    """A folder as run.py collects it, from {seed: returns at 1000, 2000, ... frames}."""
    folder.mkdir(parents=True)
    runs = []
    for seed, values in curves.items():
        with open(folder / f"seed{seed}.csv", "w") as file:
            writer = csv.writer(file)
            writer.writerow(["frames", "eval/return", "loss/critic"])
            for i, value in enumerate(values):
                writer.writerows([[1000 * i + 500, "", 1.0], [1000 * i + 1000, value, 1.0]])
        frames = 1000 * len(values)
        runs.append(
            {"seed": seed, "failed": "exit status 1: out of memory"}
            if seed in failed
            else {
                "seed": seed,
                "frames": frames,
                "wall_s": 120.0,
                "random_return": random,
                "env_id": env_id,
            }
        )
    meta = {
        "command": f"python x.py --env-id {env_id} --seed N",
        "label": label,
        "published": published,
        "hardware": "a machine",
        "runs": runs,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def test_iqm_and_its_interval():
    """By hand; and the interval covers the true value as often as it says."""
    assert report.iqm(np.array([1.0, 100.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0])) == 3.5
    assert report.iqm(np.array([1.0, 2.0, 6.0])) == 3.0
    rng, hits = np.random.default_rng(0), 0
    for _ in range(150):
        low, high = report.interval(rng.normal(10.0, 3.0, 20))
        hits += low < 10.0 < high
    assert 0.88 < hits / 150 < 0.98
    assert report.interval(np.array([3.0, 9.0, 4.0])).tolist() == [3, 9]  # too few: the range


def test_the_interval_is_stratified_by_task():
    """Tasks of 0 and of 100: drawn as a whole they would mix, each for itself they do not."""
    rng = np.random.default_rng(0)
    easy, hard = 100 + rng.normal(0, 1, 10), rng.normal(0, 1, 10)
    low, high = report.interval(easy, hard)
    drawn = [np.concatenate([rng.choice(easy, 10), rng.choice(hard, 10)]) for _ in range(4000)]
    brute = scipy.stats.trim_mean(drawn, 0.25, axis=1)
    np.testing.assert_allclose([low, high], np.percentile(brute, [2.5, 97.5]), atol=0.3)


def test_failures_are_shown_and_end_the_mean(tmp_path):
    """The mean goes as far as all seeds got; the failed one is named, with its last return."""
    write_group(
        tmp_path / "a",
        "mine",
        "cheetah-run",
        {1: [10, 20, 30, 40], 2: [20, 30], 3: [30, 40, 50, 60]},
        failed=[2],
    )
    (curve,) = report.load([tmp_path])
    x, y = curve.table()
    assert x.tolist() == [1000, 2000] and y.tolist() == [[10, 20], [20, 30], [30, 40]]
    text = report.report([curve, curve._replace(label="again")])
    assert "cheetah-run: mine and again: not compared, as seeds failed." in text
    assert "| cheetah-run | mine | 3 | 2,000 | 30 (20 to 40) | 40, 30 (failed), 60 |" in text
    assert "Failed: mine, cheetah-run, seed 2: exit status 1: out of memory" in text
    assert "| 5 | - | 2.0 |" in text and "Hardware: a machine." in text


def test_a_seed_that_never_began_is_a_failure_too(tmp_path):
    write_group(tmp_path / "a", "mine", "cheetah-run", {1: [10, 20]})
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    meta["runs"].append({"seed": 7})
    (tmp_path / "a" / "meta.json").write_text(json.dumps(meta))
    text = report.report(report.load([tmp_path]))
    assert "| 2,000 | 20 (20 to 20) | 20, - (failed)" in text  # and the others are shown
    assert "seed 7: not finished" in text


def test_comparisons_need_five_seeds(tmp_path):
    rng = np.random.default_rng(0)

    def group(name, n, level):
        write_group(
            tmp_path / name, name, "cheetah-run", {s: level + rng.normal(0, 5, 4) for s in range(n)}
        )

    group("few", 3, 300)
    for name, level in (("low", 100), ("high", 200), ("also low", 100)):
        group(name, 8, level)
    lines = report.comparisons(report.load([tmp_path])).splitlines()
    assert len(lines) == 6 and sum("3 seeds are too few" in line for line in lines) == 3
    verdict = {line.split(": ")[1]: line.split(", ")[-1] for line in lines if "few" not in line}
    assert verdict == {
        "also low and high": "the second is better.",
        "also low and low": "no difference is shown.",
        "high and low": "the first is better.",
    }


def test_area_tasks_and_the_published_value(tmp_path):
    """Mean over the run by trapezoids; all tasks together; the published curve where we end."""
    for task in ("cheetah-run", "walker-walk"):
        write_group(
            tmp_path / task,
            f"sac_ae {task}",
            task,
            {1: [0, 10, 20], 2: [0, 10, 20]},
            published="SAC+AE",
        )
    curves = report.load([tmp_path])
    assert curves[0].published == "SAC+AE"
    text = report.report(curves)
    assert "20 (20 to 20) | 20, 20 | 10 (10 to 10)" in text
    assert "- sac_ae, cheetah-run, walker-walk, 4 runs: 20 (20 to 20)" in text
    x, y, std, text = report.published("SAC+AE", "cheetah-run")
    assert text == "SAC+AE, n = 10, read off a plot" and np.isnan(std).all()
    long = {1: np.linspace(0, 400, 500), 2: np.linspace(0, 400, 500)}
    write_group(tmp_path / "long", "long", "cheetah-run", long, published="SAC+AE")
    text = report.report(report.load([tmp_path / "long"]))
    assert f"| {np.interp(500_000, x, y):.0f} | 2.0 |" in text


def test_run_folders_are_read_as_the_scripts_leave_them(finished, tmp_path):
    """Grouped by their arguments; the label says what differs; unfinished ones count as failed."""
    run_dir = one_folder(finished[0], "*balance*/seed1/*__1__*")
    for tau, seed in itertools.product((0.01, 0.02), (1, 2)):
        copy = tmp_path / f"{run_dir.name}{tau}{seed}"
        copy.mkdir()
        shutil.copy(run_dir / "metrics.csv", copy)
        args = json.loads((run_dir / "args.json").read_text())
        (copy / "args.json").write_text(json.dumps(args | {"critic_tau": tau, "seed": seed}))
        if tau == 0.01:  # the others have not finished
            shutil.copy(run_dir / "summary.json", copy)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "args.json").write_text('{"seed": 3}')
    one, two = sorted(report.load([tmp_path]), key=lambda c: c.label)
    assert one.random[1] == json.loads((run_dir / "summary.json").read_text())["random_return"]
    assert one.published == ""  # other arguments than the script's own
    assert (one.label, two.label) == ("sac_ae critic_tau=0.01", "sac_ae critic_tau=0.02")
    assert sorted(one.rows) == [1, 2] and not one.failed and sorted(two.failed) == [1, 2]


def test_the_command_writes_a_report_with_plots(finished, tmp_path):
    """Opened: the panels are not empty and each curve's colour is there."""
    pytest.importorskip("matplotlib")
    command = [
        sys.executable,
        ROOT / "benchmark" / "report.py",
        finished[0],
        ROOT / "benchmark" / "results" / "smoke",
        "--out",
        tmp_path,
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "report.md").read_text()
    assert "cartpole-dance" in text and "exit status 2" in text and "pearl_pixels" in text
    for name in ("curves", "adaptation"):
        assert f"]({name}.png)" in text
        picture = imageio.imread(tmp_path / f"{name}.png")[..., :3]
        assert 400 <= picture.shape[1] <= 1100
        colours = {tuple(c) for c in picture.reshape(-1, 3)}
        assert (0, 114, 178) in colours  # the first curve
    nothing = subprocess.run([*command[:2], tmp_path / "images"], capture_output=True, text=True)
    assert nothing.returncode == 1 and "error: no meta.json" in nothing.stderr


def test_adaptation_shows_what_the_true_state_would_bring(tmp_path):
    """Returns by number of trajectories, and dashed those with the true state: the same colour."""
    pytest.importorskip("matplotlib")
    rows = {}
    for s in (1, 2):
        means = {f"eval/return_{k}": 10.0 * k + s for k in range(3)}
        true = {f"eval/true_state_return_{k}": 10.0 * k + s + 5 for k in range(3)}
        rows[s] = [{"frames": 1e3, **means, **true}]
    curve = report.Curve("design 1", "cheetah-vel", "", rows, {}, {}, {}, "")
    plain = {s: [{k: v for k, v in r[0].items() if "true" not in k}] for s, r in rows.items()}
    counts = []
    for c in (curve, curve._replace(rows=plain)):
        assert report.adaptation([c], tmp_path / "a.png")
        picture = imageio.imread(tmp_path / "a.png")[..., :3]
        counts.append((picture == (0, 114, 178)).all(-1).sum())
    assert counts[0] > 1.3 * counts[1]
    assert not report.adaptation([], tmp_path / "b.png") and not (tmp_path / "b.png").exists()


def test_the_smoke_report_is_that_of_the_recorded_runs():
    """benchmark/results/smoke/report.md; `python benchmark/report.py benchmark/results/smoke`."""
    folder = ROOT / "benchmark" / "results" / "smoke"
    assert (folder / "report.md").read_text().endswith(report.report(report.load([folder])))


# ---- diff --------------------------------------------------------------------------------------


def test_a_page_shows_both_sides_of_every_hunk(tmp_path):
    diff.write([("sac_ae", "sac_gaara")], tmp_path)
    page = (tmp_path / "sac_ae-sac_gaara.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for line in (ROOT / "sac_gaara.py").read_text().splitlines():
        if "contrast" in line:
            assert line.strip() in text
    assert "def soft_update" not in text  # the same in both, and not near a difference
    assert page.count("<table") == 1 and "&nbsp;" not in page and "nowrap" not in page
    assert 'href="style.css"' in page
    assert (tmp_path / "style.css").read_text().startswith("body {")


# ---- speed -------------------------------------------------------------------------------------


def test_the_ratios_that_the_readme_names_are_what_was_recorded():
    """On a CPU to the authors' code, on a GPU of bf16 with CUDA graphs to neither."""
    folder = ROOT / "benchmark" / "results" / "speed"
    texts = "".join(path.read_text() for path in folder.glob("*.txt"))
    ratios = [float(ratio) for ratio in re.findall(r"the authors': ([\d.]+)x", texts)]
    with open(folder / "h100.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    value = {(row["subject"], row["quantity"]): float(row["value"]) for row in rows}
    gains = [
        value[f"{name} --precision bf16", "updates/s, captured"]
        / value[f"{name} --precision fp32", "updates/s"]
        for name in SCRIPTS
    ]
    readme = (ROOT / "README.md").read_text()
    for numbers, heading in ((ratios, ""), (gains, "#on-an-h100")):
        text = (
            f"[{min(numbers):.1f} to {max(numbers):.1f} times](benchmark/notes/speed.md{heading})"
        )
        assert text in readme


def test_plain_runs_of_published_settings_get_the_published_curve(tmp_path):
    """So do longer ones; rounding gives no -0."""
    from dataclasses import asdict

    import sac_ae

    args = json.loads(json.dumps(asdict(sac_ae.Args(seed=3, total_frames=7000, device="cuda"))))
    for folder, more in (("a__sac_ae__3__1", {}), ("b__sac_ae__3__2", {"gamma": 0.5})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "args.json").write_text(json.dumps(args | more))
    assert sorted(c.published for c in report.load([tmp_path])) == ["", "SAC+AE"]
    assert report.whole(-0.3) == "0"
