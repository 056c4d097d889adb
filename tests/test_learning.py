"""The smoke runs learn: much better than random, from pixels, within minutes. SMOKE_SEEDS="1 2 3"
chooses the seeds (CI takes one), SMOKE_THREADS how many cores a run has."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, run, summary


@pytest.mark.slow
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
    print(f"{name} seed {seed}: random {numbers['random_return']:.1f}, trained "
          f"{numbers['eval_return']:.1f} +- {spread:.1f}, {numbers['wall_s']:.0f} s")
    if name == "pearl_pixels":  # context helps, by 3 standard errors of the gain
        gain, error = numbers["gain"]
        assert gain > 3 * error and gain > 4
        return
    assert numbers["eval_return"] >= 1.5 * numbers["random_return"] + 10
    error = spread / 9**0.5  # of the mean of ten, from their population standard deviation
    assert numbers["eval_return"] - 3 * error > numbers["random_return"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_speed_benchmark_runs(name, tmp_path):
    """All quantities of a script, with the machine, on the screen and in a CSV."""
    command = [sys.executable, str(ROOT / "benchmark" / "speed.py"), "--scripts", name,
               "--rounds", "1", "--csv", str(tmp_path / "speed.csv")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    heads, _, *rows = [line.split(" | ") for line in process.stdout.splitlines()
                       if line.startswith("|")]
    assert [row[0].strip("| ") for row in rows] == [name]
    with open(tmp_path / "speed.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    assert all("cores" in cell["hardware"] and float(cell["value"]) > 0 for cell in cells)
    for row in rows:
        named = dict(zip(heads, row, strict=True))
        for head in ("updates/s", "frames/s, images too", "steps/s, end to end", "peak GiB"):
            (value,) = [float(cell["value"]) for cell in cells
                        if (cell["subject"], cell["quantity"]) == (row[0].strip("| "), head)]
            assert float(named[head].replace(",", "")) == pytest.approx(value, abs=0.51)
        assert float(named["busy with updates"]) > 0
