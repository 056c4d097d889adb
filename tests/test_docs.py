"""The pages do not rot: sizes, generated parts, links, commands, metrics, differences, messages."""

import importlib
import re
import shlex
import subprocess
import sys

import exercises
import pytest
import tyro
from conftest import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark"))
import diff
import docs
import studies

README = (ROOT / "README.md").read_text()
page = pytest.mark.parametrize("path", docs.PAGES, ids=lambda path: path.stem)


@page
def test_generated_parts_are_fresh(path):
    """`python benchmark/docs.py` mends them."""
    assert docs.mended(path) == path.read_text()


def test_the_readme_and_the_first_diff_stay_short():
    """`diff -u sac_ae.py sac_gaara.py` is what a reader learns SAC+GAARA from."""
    assert len(README.encode()) <= 12 * 1024 and len(README.splitlines()) <= 160
    added, removed, hunks = diff.counts(diff.read("sac_ae"), diff.read("sac_gaara"))
    assert added <= 150 and removed <= 25 and hunks <= 16


@page
def test_lines_and_cells_stay_short(path):
    lines = path.read_text().splitlines()
    assert [line for line in lines if len(line) > 300 and line[0] != "|"] == []
    cells = [cell for line in lines if line.startswith("| ") for cell in line.split(" | ")]
    assert [cell for cell in cells if len(cell) > 160] == []


@page
def test_every_relative_link_leads_somewhere(path):
    """To a file, or a heading of it; and where its text is the name of a test, to that test."""
    links = re.findall(r"\[([^][]*)\]\(([^)#:]*)#?([^):]*)\)", path.read_text())
    for text, target, place in links:
        file = path.parent / target if target else path
        assert file.exists(), target
        if place and file.suffix == ".md":  # GitHub's name of a heading
            headings = re.findall(r"^#+ (.*)$", file.read_text().lower(), re.M)
            assert place in [re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in headings], place
        if re.fullmatch(r"`test_\w+`", text):
            assert f"def {text[1:-1]}(" in file.read_text(), text


@page
def test_every_command_of_a_script_parses_and_every_study_exists(path):
    """And a tool's text has the flags that are given to it."""
    text = path.read_text().replace("\\\n", " ")
    for tool, flags in re.findall(r"python ((?:benchmark|tests)/\w+\.py)([^`\n]*)", text):
        own = re.findall(r" (--[a-z][\w-]+)", flags.partition(" -- ")[0])
        assert [flag for flag in own if flag not in (ROOT / tool).read_text()] == [], tool
    named = re.findall(r"(?:--study|studies\.py) ([a-z][\w-]+)", text)
    assert set(named) <= studies.STUDIES.keys()
    for script, flags in re.findall(rf"python ({'|'.join(SCRIPTS)})\.py([^`\"\n&]*)", text):
        tyro.cli(importlib.import_module(script).Args, args=shlex.split(flags))


@pytest.mark.deep
@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_metrics_and_differences_of_a_script_and_its_page_agree(name):
    """Flags with values parse; the code names no other differences than the docstring."""
    text = (docs.NOTES / f"{name}.md").read_text()
    for flags in re.findall(r"`(--[^`]+ [^`]+)`", text):
        tyro.cli(importlib.import_module(name).Args, args=flags.split())

    _, docstring, code = (ROOT / f"{name}.py").read_text().split('"""', 2)
    listed = re.findall(r"^(D\d+) ", docstring, re.M)
    assert listed == [f"D{i}" for i in range(1, len(listed) + 1)]
    assert set(re.findall(r"\bD\d+\b", code)) <= set(listed)

    kinds = r"(?:loss|stat|train|time)/\w+"
    first_cells = re.findall(r"^\| ([^|]+)", text.split("## Metrics")[1], re.M)
    assert set(re.findall(kinds, " ".join(first_cells))) == set(re.findall(f'"({kinds})"', code))


@pytest.mark.deep
def test_troubleshooting_quotes_the_scripts():
    """Word for word, but for dots and names."""
    code = (ROOT / "sac_ae.py").read_text()
    for message in re.findall("^\\| `error: (?!command 'bazel')(.+?)`", README, re.M):
        pieces = re.split(r"--[\w-]+: |MUJOCO_GL: |loss/critic|nan|\.\.\.", message)
        assert [piece for piece in pieces if piece not in code] == [], message


@pytest.mark.deep
def test_the_readmes_equality_with_other_code_is_what_was_recorded():
    limits = {"slac.pytorch": 2.5e-6, "dreamerv2": 4e-6}  # others: double precision
    for difference, other in re.findall(r"\[(\d\S+)\]\(.*/(.+)\.txt", "\n".join(docs.equality())):
        assert float(difference) <= limits.get(other, 2e-11), other


@pytest.mark.deep
@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_the_bugs_of_the_exercises_are_caught(number, tmp_path):
    """By the test that is named: it fails with the bug, as it does not in the suite."""
    exercises.plant(number, tmp_path / "copy")
    command = [sys.executable, "-m", "pytest", "-qx", f"tests/{exercises.EXERCISES[number][2]}"]
    process = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert process.returncode == 1 and "1 failed" in process.stdout, process.stdout[-500:]
