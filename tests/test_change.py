"""The recipes of benchmark/notes/change.md, as a new user would try them."""

import contextlib
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, run, run_here, summary, tiny_args

import sac_ae

PAGE = (ROOT / "benchmark/notes/change.md").read_text()
TASK, SKY, PLAY, FILM = re.findall(r"```python.*?\n(.*?)```", PAGE, re.S)
ENCODER, LOSS = re.findall(r"```diff sac_ae.py\n(.*?)```", PAGE, re.S)


def changed(diff):
    """sac_ae.py after a change. What stands before it must be there exactly once."""
    text = (ROOT / "sac_ae.py").read_text()
    for hunk in re.split("^@@.*@@\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    "text, env_id", [(TASK, "my_task.py:puck"), (SKY, "distracting.py:cheetah")]
)
def test_environments_of_ones_own(tmp_path, text, env_id):
    path = tmp_path / env_id.split(":")[0]
    path.write_text(text)
    flags = f"{TINY['sac_ae']} --env-id {tmp_path}/{env_id} --runs-dir {tmp_path}"
    assert summary(run("sac_ae", flags))["updates"] > 100


def test_the_puck_is_rewarded_at_the_mark(tmp_path):
    (tmp_path / "my_task.py").write_text(TASK)
    args = tiny_args(sac_ae, f"--env-id {tmp_path}/my_task.py:puck --action-repeat 1")
    env = sac_ae.PixelEnv(args)
    step = env.reset(0)
    total = 0.0
    while not step.last:
        position, velocity, mark = step.state
        step = env.step(np.clip(np.array([3 * (mark - position) - velocity]), -1, 1))
        total += step.reward
    assert total > 400 and step.reward > 0.95  # of 500 frames


def test_the_sky_differs_between_episodes_and_the_cheetah_does_not(tmp_path):
    (tmp_path / "distracting.py").write_text(SKY)
    args = tiny_args(sac_ae, f"--env-id {tmp_path}/distracting.py:cheetah")
    env = sac_ae.PixelEnv(args)
    first, second, again = [env.reset(seed) for seed in (1, 2, 1)]
    assert (first.obs == again.obs).all() and (first.state == again.state).all()
    plain = sac_ae.PixelEnv(tiny_args(sac_ae, "--env-id cheetah-run")).reset(1)
    for other in (second, plain):  # most of the image is sky
        assert (first.obs != other.obs).mean() > 0.3


@pytest.mark.parametrize("diff", [ENCODER, LOSS], ids=["encoder", "loss"])
def test_changed_algorithms_run(tmp_path, diff):
    path = tmp_path / "sac_mine.py"
    path.write_text(changed(diff))
    words = [sys.executable, str(path), *TINY["sac_ae"].split(), "--runs-dir", str(tmp_path)]
    numbers = summary(subprocess.run(words, capture_output=True, text=True))
    columns = (tmp_path / numbers["run_dir"] / "metrics.csv").read_text().splitlines()[0]
    assert ("loss/inverse" in columns) == (diff == LOSS)


@pytest.mark.deep
def test_changed_algorithms_can_be_recorded_and_a_frozen_weight_is_found(tmp_path):
    """The last is what the recipe of the additional loss warns of."""
    loss = changed(LOSS).replace("0.9999**", "0.9**")
    frozen = loss.replace('batch["inverse_weight"] * inverse', "0.9**self.updates * inverse")
    assert frozen != loss
    for name, script in (("encoder", changed(ENCODER)), ("loss", loss), ("frozen", frozen)):
        path = tmp_path / f"sac_{name}.py"
        path.write_text(script)
        command = f"{sys.executable} -m pytest -q tests/test_gpu.py --script {path}"
        process = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == (name == "frozen"), process.stdout


def test_a_trained_agent_plays_in_a_notebook(tmp_path):
    numbers = run_here("sac_ae", f"{TINY['sac_ae']} --runs-dir {tmp_path}")
    names = {"RUN_DIR": numbers["run_dir"]}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(PLAY, names)
    assert out.getvalue().endswith("in 50 steps\n") and len(names["images"]) == 50
    shown = FILM.replace("from IPython.display import Image", "Image = bytes")
    exec(shown.replace("\nImage(", "\nfilm = Image("), names)
    assert names["film"].startswith(b"GIF8")
