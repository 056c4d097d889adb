"""The recipes of benchmark/notes/change.md, as a new user would try them."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, metrics, run, run_here, summary, tiny_args

PAGE = (ROOT / "benchmark/notes/change.md").read_text()
TASK, SKY, PLAY, FILM = re.findall(r"```python.*?\n(.*?)```", PAGE, re.S)
DIFFS = re.findall(r"```diff sac_ae.py\n(.*?)```", PAGE, re.S)


def changed_script():
    """sac_ae.py after all changes. What stands before one must be there exactly once."""
    text = (ROOT / "sac_ae.py").read_text()
    for hunk in re.split("^@@.*@@\n", "".join(DIFFS), flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert text.count(old) == 1, old
        text = text.replace(old, "".join(line[1:] for line in lines if line[0] != "-"))
    return text


def test_a_changed_algorithm_runs_before_a_distracting_background(tmp_path):
    (tmp_path / "distracting.py").write_text(SKY)
    (tmp_path / "sac_mine.py").write_text(changed_script())
    flags = f"{TINY['sac_ae']} --env-id {tmp_path}/distracting.py:cheetah --runs-dir {tmp_path}"
    run_dir = summary(run(tmp_path / "sac_mine", flags))["run_dir"]
    assert "loss/inverse" in metrics(run_dir)[-1]


@pytest.mark.deep
def test_own_tasks_and_a_trained_agent_in_a_notebook(tmp_path, capsys):
    """The puck is rewarded at the mark; the sky differs between episodes."""
    import sac_ae

    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "distracting.py").write_text(SKY)
    puck, cheetah = f"{tmp_path}/my_task.py:puck", f"{tmp_path}/distracting.py:cheetah"
    env = sac_ae.PixelEnv(tiny_args(sac_ae, f"--env-id {puck} --action-repeat 1"))
    step, total = env.reset(0), 0.0
    while not step.last:
        position, velocity, mark = step.state
        step = env.step([min(1.0, max(-1.0, 3 * (mark - position) - velocity))])
        total += step.reward
    assert total > 400 and step.reward > 0.95  # of 500 frames
    env = sac_ae.PixelEnv(tiny_args(sac_ae, f"--env-id {cheetah}"))
    first, second, again = (env.reset(seed).obs for seed in (1, 2, 1))
    assert (first == again).all() and (first != second).mean() > 0.3  # most of it is sky

    flags = f"{TINY['sac_ae']} --env-id {puck} --runs-dir {tmp_path}"
    names = {"RUN_DIR": run_here("sac_ae", flags)["run_dir"]}
    exec(PLAY, names)
    assert capsys.readouterr().out.endswith("in 25 steps\n") and len(names["images"]) == 25
    shown = FILM.replace("from IPython.display import Image", "Image = bytes")
    exec(shown.replace("\nImage(", "\nfilm = Image("), names)
    assert names["film"].startswith(b"GIF8")


@pytest.mark.deep
def test_a_changed_algorithm_can_be_recorded_and_a_frozen_weight_is_found(tmp_path):
    """The last is what the recipe of the additional loss warns of."""
    mine = changed_script().replace("0.9999**", "0.9**")
    frozen = mine.replace('batch["inverse_weight"] * inverse', "0.9**self.updates * inverse")
    assert frozen != mine
    for name, text in (("mine", mine), ("frozen", frozen)):
        path = tmp_path / f"sac_{name}.py"
        path.write_text(text)
        command = f"{sys.executable} -m pytest -q tests/test_gpu.py --script {path}"
        process = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == (name == "frozen"), process.stdout
