"""Runs that must learn, much better than random; from pixels within minutes. SMOKE_SEEDS="1 2 3"
chooses the seeds, SMOKE_THREADS how many cores a run has."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, metrics, run, summary


@pytest.mark.slow
@pytest.mark.parametrize("seed", os.environ.get("SMOKE_SEEDS", "1 2 3").split())
@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke_run_learns(name, seed, tmp_path):
    """1.5 times the random policy's return plus 10, and 3 standard errors above it; PEARL's return
    after two trajectories of context 3 standard errors above that after none."""
    threads = os.environ.get("SMOKE_THREADS", str(os.cpu_count()))
    env = {**os.environ, "OMP_NUM_THREADS": threads}
    numbers = summary(run(name, f"--smoke --seed {seed} --runs-dir {tmp_path}", env=env))
    print({key: numbers[key] for key in ("script", "random_return", "eval_return", "wall_s")})
    if name == "pearl_pixels":
        gain, error = numbers["gain"]
        assert gain > 3 * error and gain > 4
        return
    random_return, trained = numbers["random_return"], numbers["eval_return"]
    error = float(metrics(numbers["run_dir"])[-1]["eval/return_std"]) / 9**0.5  # of ten episodes
    assert trained >= 1.5 * random_return + 10 and trained - 3 * error > random_return


def test_states_adapt_to_a_direction(tmp_path):
    """PEARL on cheetah-dir from states learns in less than a minute on one core."""
    flags = (
        "--env-id cheetah-dir --obs-mode state --trajectory-steps 50 --total-frames 14400 "
        "--initial-steps 200 --tasks-per-iteration 2 --prior-steps 100 --extra-steps 100 "
        "--updates-per-iteration 100 --meta-batch 4 --batch-size 32 --context-size 32 "
        "--latent-dim 2 --kl-lambda 0.01 --gamma 0.9 --lr 1e-3 --tau 0.01 --hidden-dim 128 "
        "--context-dim 128 --context-trajectories 2 --eval-every-frames 4000 --eval-episodes 10 "
        "--device cpu --no-video"
    )
    numbers = summary(run("pearl_pixels", f"{flags} --runs-dir {tmp_path}"))
    (zero, *_), _, (two, *_) = numbers["return_by_context"]
    assert two > 50 and two - zero > 40, numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_speed_benchmark_runs(name):
    """A number of each kind on the screen."""
    words = [sys.executable, ROOT / "benchmark" / "speed.py", "--scripts", name, "--rounds", "1"]
    table = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    heads, _, row = (line.split("|") for line in table.splitlines() if line.startswith("|"))
    shown = {
        head.strip(): cell.strip().replace(",", "") for head, cell in zip(heads, row, strict=True)
    }
    for head in ("updates/s", "frames/s, images too", "steps/s, end to end", "peak GiB"):
        assert float(shown[head]) > 0
