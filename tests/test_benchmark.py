"""The benchmark's tools: commands, resuming, failures, statistics, published curves."""

import importlib
import itertools
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from conftest import ROOT, TINY, metrics, run_here

sys.path.insert(0, str(ROOT / "benchmark"))
import report
import run
import studies

RUN = [sys.executable, str(ROOT / "benchmark" / "run.py")]


def test_every_study_is_made_of_commands_that_the_scripts_take():
    for variant in itertools.chain(*(study.values() for study in studies.STUDIES.values())):
        module = importlib.import_module(variant.script)
        words = ["--env-id", variant.env_id, *variant.flags.split()]
        default = module.Args(**module.SMOKE) if "--smoke" in words else None
        args = tyro.cli(module.Args, args=words, default=default)
        assert not [flag for flag, wrong, _ in module.algorithm_checks(args) if wrong], variant


@pytest.mark.deep
def test_dry_run_prints_the_product(tmp_path):
    words = "--scripts slac sac_ae --env-ids cheetah-run walker-walk --sweep gamma=0.9,0.99 "
    words += f"--seeds 3 4 --out {tmp_path} --dry-run -- --image-size 48"
    process = subprocess.run([*RUN, *words.split()], capture_output=True, text=True)
    lines = process.stdout.splitlines()
    wanted = itertools.product(
        ["slac", "sac_ae"], ["cheetah-run", "walker-walk"], [0.9, 0.99], [3, 4]
    )
    for line, (script, task, gamma, seed) in zip(lines, wanted, strict=True):
        start = f"python {script}.py --delete-replay --env-id {task} --gamma {gamma} "
        assert line.startswith(f"{start}--image-size 48 --seed {seed} --runs-dir {tmp_path}")
    assert len({line.split("--runs-dir ")[1] for line in lines}) == 16
    assert not list(tmp_path.iterdir())


@pytest.mark.deep
@pytest.mark.parametrize(
    "line",
    [
        "",
        "--study curves --scripts slac",
        "--scripts cheetah",
        "--scripts slac -- word",
        "--scripts slac --sweep gamma",
        "--scripts slac --workers 0",
        "--scripts slac --out /proc/nowhere",
    ],
)
def test_bad_usage_is_refused_and_nothing_is_run(line, tmp_path):
    words = [*RUN, *line.split()]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and "error: " in process.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.deep
def test_a_failed_run_is_named_and_the_same_command_tries_only_that_one(tmp_path):
    """SAC+AE finishes; SLAC refuses the flags, which are not its own."""
    pytest.importorskip("matplotlib")
    words = [*RUN, "--scripts", "sac_ae", "slac", "--workers", "2", "--out", str(tmp_path)]
    flags = ["--", *TINY["sac_ae"].split()]
    process = subprocess.run([*words, *flags], capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    finished, failed, count = process.stdout.strip().splitlines()[-3:]
    assert "finished  4,000 of 4,000 frames  return " in finished
    assert "failed" in failed and "exit status 2: Unrecognized options: --batch-size" in failed
    assert count.startswith("1 finished, 1 failed")

    (folder,) = tmp_path.glob("sac_ae*")
    (run_dir,) = folder.glob("seed1/*__1__*")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["command"].startswith("python sac_ae.py --env-id cartpole-balance --action-repeat")
    assert meta["runs"][0]["frames"] == 4000 and meta["runs"][0]["sha256"] == run.sha256("sac_ae")
    assert (folder / "seed1.csv").read_bytes() == (run_dir / "metrics.csv").read_bytes()
    assert not (run_dir / "replay").exists()  # or a study would fill the disk

    again = subprocess.run([*words, "--dry-run", *flags], capture_output=True, text=True)
    (line,) = again.stdout.splitlines()
    assert line.startswith("python slac.py")
    job = folder / "seed1" / "job.json"
    job.write_text(job.read_text().replace(run.sha256("sac_ae"), "of the script before a change"))
    changed = subprocess.run([*words, *flags], capture_output=True, text=True)
    assert changed.returncode == 2 and "sac_ae.py has changed" in changed.stderr

    out = tmp_path / "report"
    tool = [sys.executable, ROOT / "benchmark" / "report.py", tmp_path, "--out", out]
    assert subprocess.run(tool).returncode == 0
    text = (out / "report.md").read_text()
    assert "| cartpole-balance | sac_ae | 1 | 4,000 |" in text
    assert "Failed: slac, cartpole-balance, seed 1: exit status 2" in text
    assert (out / "curves.png").stat().st_size > 10_000


@pytest.mark.deep
@pytest.mark.parametrize(
    "engine, number",
    [("local", signal.SIGTERM), ("local", signal.SIGKILL), ("ray", signal.SIGTERM)],
)
def test_the_same_command_goes_on_exactly_after_a_stop_or_a_kill(tmp_path, engine, number):
    pytest.importorskip("ray" if engine == "ray" else "torch")
    out = tmp_path / "out"
    words = ["--scripts", "sac_ae", "--engine", engine, "--out", str(out)]
    command = [*RUN, *words, "--", *TINY["sac_ae"].split()]
    process = subprocess.Popen(command)
    while not list(out.glob("*/seed1/*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(300) == (130 if number == signal.SIGTERM else -number)

    assert subprocess.run(command).returncode == 0
    (log,) = out.glob("*/seed1/log.txt")
    assert "--resume" in log.read_text()
    (run_dir,) = out.glob("*/seed1/*__1__*")
    undisturbed = run_here("sac_ae", f"{TINY['sac_ae']} --runs-dir {tmp_path}")
    assert metrics(run_dir) == metrics(undisturbed["run_dir"])


@pytest.mark.deep
def test_the_interval_is_the_bootstrap_of_the_iqm_within_each_task():
    """Agarwal et al. 2021, https://arxiv.org/abs/2108.13264. The tasks' levels are 0 and 100: drawn
    as a whole they would mix, each for itself they do not."""
    assert report.iqm(np.array([1.0, 100.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0])) == 3.5
    rng = np.random.default_rng(0)
    easy, hard = 100 + rng.normal(0, 1, 10), rng.normal(0, 1, 10)
    drawn = [np.concatenate([rng.choice(easy, 10), rng.choice(hard, 10)]) for _ in range(4000)]
    iqms = np.sort(drawn)[:, 5:15].mean(1)
    wanted = np.percentile(iqms, [2.5, 97.5])
    np.testing.assert_allclose(report.interval(easy, hard), wanted, atol=0.3)
    assert report.interval(np.array([3.0, 9.0, 4.0])).tolist() == [3, 9]  # least and largest


@pytest.mark.deep
def test_a_report_names_failures_and_adds_up_tasks():
    """By hand. A mean goes as far as all its seeds got. The published value there is interpolated.
    The recorded report is that of the recorded runs."""

    def rows(*returns):
        return [{"frames": 1000.0 * i, "eval/return": value} for i, value in enumerate(returns, 1)]

    whole = {seed: rows(0, 10, 20) for seed in (1, 2)}
    cut = {1: rows(10, 20, 30, 40), 2: rows(20, 30), 3: rows(30, 40, 50, 60)}
    failed = {2: "out of memory", 7: "not finished"}
    curves = [
        report.Curve("sac_ae", "cheetah-run", "", whole, {}, {1: 5.0}, {1: 2.0}, ""),
        report.Curve("sac_ae", "walker-walk", "", whole, {}, {1: 5.0}, {1: 2.0}, ""),
        report.Curve("mine", "walker-walk", "", cut, failed, {}, {}, ""),
        report.Curve("long", "finger-spin", "SAC+AE", {1: rows(*range(500))}, {}, {}, {}, ""),
    ]
    text = report.report(curves)
    assert "| 3,000 | 20 (20 to 20) | 20, 20 | 10 (10 to 10) | 5 | - | 2.0 |" in text
    assert "- sac_ae, cheetah-run, walker-walk, 4 runs: 20 (20 to 20)" in text
    assert "| mine | 4 | 2,000 | 30 (20 to 40) | 40, 30 (failed), 60, - (failed) |" in text
    assert "Failed: mine, walker-walk, seed 2: out of memory" in text
    assert "walker-walk: sac_ae and mine: not compared, as seeds failed." in text
    frames, returns, _, source = report.published("SAC+AE", "finger-spin")
    assert source == "SAC+AE, n = 10, read off a plot"
    assert f"| - | {np.interp(500_000, frames, returns):.0f} | - |" in text

    smoke = ROOT / "benchmark" / "results" / "smoke"
    text = report.report(report.load([smoke]), per_script=True)
    assert (smoke / "report.md").read_text().endswith(text)


@pytest.mark.deep
def test_comparisons_need_five_seeds_and_find_no_more_than_there_is():
    rng = np.random.default_rng(0)

    def verdicts(**levels):
        """What the report says of curves {label: (seeds, mean)}."""
        curves = []
        for label, (n, level) in levels.items():
            runs = {s: [{"frames": 1e6, "eval/return": rng.normal(level, 5)}] for s in range(n)}
            curves.append(report.Curve(label, "cheetah-run", "", runs, {}, {}, {}, ""))
        return report.comparisons(curves)

    text = verdicts(few=(3, 300), low=(5, 100), high=(5, 200), same=(5, 100))
    assert text.count("3 seeds are too few") == 3
    assert text.count("cheetah-run: high (") == 2
    assert "is better than low (" in text and "is better than same (" in text
    equal = [verdicts(**{str(i): (5, 100) for i in range(12)}) for _ in range(20)]
    assert sum(": 0 of 66 pairs differ" not in text for text in equal) <= 2


@pytest.mark.deep
@pytest.mark.parametrize("n, drawn", [(7, False), (8, True)])
def test_more_curves_than_colours_get_a_picture_of_their_ends(tmp_path, n, drawn):
    pytest.importorskip("matplotlib")
    rows = {seed: [{"frames": 1000.0, "eval/return": 3.0 * seed}] for seed in range(5)}
    curves = [report.Curve(str(i), "cheetah-run", "", rows, {}, {0: 1.0}, {}, "") for i in range(n)]
    assert report.draw_ends(curves, tmp_path / "ends.png") is drawn
    assert (tmp_path / "ends.png").exists() is drawn


@pytest.mark.deep
def test_published_curves_stand_beside_published_settings_only(tmp_path):
    """What changes no number of the method keeps the curve; a sweep or another gamma does not."""
    known = {row["algorithm"] for row in report.published_rows()}
    for study in studies.STUDIES.values():
        assert {variant.published for variant in study.values()} <= known | {""}
    base = {"study": "", "scripts": ["sac_ae"], "env_ids": [], "seeds": [1], "out": tmp_path}
    for flags, sweep, wanted in (
        (["--device", "cuda", "--no-video"], [], "SAC+AE"),
        (["--gamma", "0.9"], [], ""),
        ([], ["gamma=0.9,0.99"], ""),
    ):
        args = SimpleNamespace(**base, flags=flags, sweep=sweep)
        assert {job.published for job in run.jobs_of(args)} == {wanted}
    for folder, gamma in (("a__sac_ae__3__1", 0.99), ("b__sac_ae__3__2", 0.5)):
        args = importlib.import_module("sac_ae").Args(
            seed=3, total_frames=7000, device="cuda", gamma=gamma
        )
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "args.json").write_text(json.dumps(vars(args)))
    assert sorted(curve.published for curve in report.load([tmp_path])) == ["", "SAC+AE"]
