"""The smoke runs learn: much better than random, from pixels, within minutes. SMOKE_SEEDS="1 2 3"
chooses the seeds (CI takes one), SMOKE_THREADS how many cores a run has."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, run, summary

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", os.environ.get("SMOKE_SEEDS", "1 2 3").split())
@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke_run_learns(name, seed, tmp_path):
    """1.5 times the random policy's return plus 10, and 3 standard errors above it; PEARL's return
    after two trajectories of context 3 standard errors above that after none."""
    threads = os.environ.get("SMOKE_THREADS", str(os.cpu_count()))
    env = {**os.environ, "OMP_NUM_THREADS": threads}
    numbers = summary(run(name, f"--smoke --seed {seed} --runs-dir {tmp_path}", env=env))
    with open(Path(numbers["run_dir"], "metrics.csv"), newline="") as file:
        spread = float(list(csv.DictReader(file))[-1].get("eval/return_std", "nan"))
    random_return, trained, seconds = (
        numbers[k] for k in ("random_return", "eval_return", "wall_s")
    )
    print(
        f"{name} seed {seed}: random {random_return:.1f}, trained {trained:.1f} +- {spread:.1f}, "
        f"{seconds:.0f} s"
    )
    if name == "pearl_pixels":  # context helps, by 3 standard errors of the gain
        gain, error = numbers["gain"]
        assert gain > 3 * error and gain > 4
        return
    error = spread / 9**0.5  # of the mean of ten, from their population standard deviation
    assert trained >= 1.5 * random_return + 10 and trained - 3 * error > random_return


@pytest.mark.parametrize("seed", [1, 2])
def test_states_adapt_to_a_direction(tmp_path, seed):
    """PEARL on cheetah-dir from states, less than a minute on one core."""
    flags = (
        "--env-id cheetah-dir --obs-mode state --trajectory-steps 50 --total-frames 14400 "
        "--initial-steps 200 --tasks-per-iteration 2 --prior-steps 100 --extra-steps 100 "
        "--updates-per-iteration 100 --meta-batch 4 --batch-size 32 --context-size 32 "
        "--latent-dim 2 --kl-lambda 0.01 --gamma 0.9 --lr 1e-3 --tau 0.01 --hidden-dim 128 "
        "--context-dim 128 --context-trajectories 2 --eval-every-frames 4000 --eval-episodes 10 "
        "--device cpu --no-video"
    )
    numbers = summary(run("pearl_pixels", f"{flags} --seed {seed} --runs-dir {tmp_path}"))
    (zero, *_), _, (two, *_) = numbers["return_by_context"]
    assert two > 50 and two - zero > 40, numbers


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_speed_benchmark_runs(name, tmp_path):
    """All quantities of a script, with the machine, on the screen and in a CSV."""
    words = [sys.executable, ROOT / "benchmark" / "speed.py", "--scripts", name, "--rounds", "1"]
    process = subprocess.run(
        [*words, "--csv", tmp_path / "speed.csv"], capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr
    table = [line for line in process.stdout.splitlines() if line.startswith("|")]
    heads, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    shown = dict(zip(heads, row, strict=True))
    with open(tmp_path / "speed.csv", newline="") as file:
        cells = {cell["quantity"]: cell for cell in csv.DictReader(file)}
    assert row[0] == name and all("cores" in cell["hardware"] for cell in cells.values())
    for head in ("updates/s", "frames/s, images too", "steps/s, end to end", "peak GiB"):
        value = float(cells[head]["value"])
        assert value > 0 and float(shown[head].replace(",", "")) == pytest.approx(value, abs=0.51)
