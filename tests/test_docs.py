"""The pages do not rot: sizes, generated parts, links, commands, metrics, differences, messages."""

import functools
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
import docs
import studies

README, INDEX, *NOTES = docs.PAGES
TEXT = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
page = pytest.mark.parametrize("path", docs.PAGES, ids=lambda path: path.stem)
script = pytest.mark.parametrize("name", SCRIPTS)


def section(path, heading):
    return path.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text):
    """Cells of the rows of tables; a bar that is written \\| belongs to its cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@page
def test_sizes(path):
    text = path.read_text()
    lines = text.splitlines()
    if path == README:
        assert len(text.encode()) <= 12 * 1024 and len(lines) <= 160
    assert path != INDEX or len(lines) <= 120
    assert [line for line in lines if len(line) > 300 and not line.startswith("|")] == []
    assert [cell for row in rows(text) for cell in row if len(cell) > 160] == []
    assert not re.search(r"/(work|root|home|tmp)/", text)  # paths of somebody's machine


@page
def test_generated_parts_are_fresh(path):
    """`python benchmark/docs.py` mends them."""
    assert docs.mended(path) == path.read_text()


def test_a_stale_part_is_noticed():
    path = docs.NOTES / "sac_ae.md"
    text = path.read_text()
    for old, new in (("| critic | ", "| cri | "), ("sac_ae.py#L", "sac_ae.py#L1")):
        assert docs.mended(path, text.replace(old, new, 1)) == text != text.replace(old, new, 1)
    with pytest.raises(ValueError, match="stands in 0 lines"):
        docs.mended(path, text.replace("[`moved_by_actor = ", "[`moved_by_nobody = "))


@pytest.mark.deep
def test_the_picture_of_metrics_is_fresh(tmp_path):
    pytest.importorskip("matplotlib")
    import imageio.v3 as imageio

    docs.draw(tmp_path / "metrics.png")
    pair = tmp_path / "metrics.png", docs.RESULTS / "smoke" / "metrics.png"
    one, two = (imageio.imread(path)[..., :3].astype(float) for path in pair)
    assert one.shape == two.shape and abs(one - two).mean() < 1


def test_recorded_equality_with_other_code():
    """benchmark/results/equal: what equal.py printed, with the command and the commits."""
    paths = sorted((docs.RESULTS / "equal").glob("*.txt"))
    assert {path.stem for path in paths} == docs.EQUAL.keys()
    for path in paths:
        text = path.read_text()
        difference = float(re.search(r"largest difference of all: (\S+)", text)[1])
        assert difference < (1e-5 if "slac" in path.name else 1e-11), path.name  # README's claim
        assert text.startswith("$ python benchmark/equal.py") and "commit " in text


def test_the_claimed_speed_is_what_was_recorded():
    ratios = [float(row[4].split()[0]) for row in rows("\n".join(docs.peers()))[2:]]
    assert f"[{min(ratios):.1f} to {max(ratios):.1f} times]" in README.read_text()


@page
def test_every_relative_link_leads_somewhere(path):
    """To a file, a line of it, a heading, and for the name of a test to a file that has it."""
    for words, link in re.findall(r"\[([^][]*)\]\(([^)]+)\)", path.read_text()):
        target, _, place = link.partition("#")
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), link
        if re.fullmatch(r"L\d+", place):
            assert int(place[1:]) <= len(file.read_text().splitlines()), link
        elif place:  # GitHub's names of headings
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            names = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert place in names, link
        if words.startswith("`test_") and not words.endswith(".py`"):
            assert f"def {words.strip('`')}(" in file.read_text(), words


@functools.cache
def help_of(tool):
    """A tool's help; the text of one that has none."""
    command = [sys.executable, ROOT / tool, "--help"]
    text = (ROOT / tool).read_text()
    if "argparse" in text:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text


@page
def test_every_command_parses(path):
    """The scripts' flags by their own parser, those of tools by --help, studies by name."""
    text = path.read_text().replace("\\\n", " ")
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    lines += re.findall(r"`((?:python|uv run|pip) [^`]+)`", text)
    for line in filter(None, lines):
        for part in line.split(" && "):
            command, *words = shlex.split(part, comments=True)
            known = "apt-get cd diff git pip python python3 tensorboard ."
            assert command in known.split(), line
            if not command.startswith("python") or words[0] == "-m":
                continue
            tool, *flags = words
            own, _, others = " ".join(flags).partition("-- ")
            if (stem := tool.removesuffix(".py")) in SCRIPTS:
                tyro.cli(importlib.import_module(stem).Args, args=flags)
            assert stem in SCRIPTS or all(
                flag in help_of(tool) for flag in own.split() if flag.startswith("--")
            ), line
            assert not others or tyro.cli(importlib.import_module("slac").Args, args=others.split())
            named = [word for word in flags if re.match(r"(sac|gaara|slac|dreamerv2|pearl)-", word)]
            assert set(named) <= studies.STUDIES.keys(), line


@script
def test_every_flag_on_a_page_is_one_of_its_script(name):
    """And flags with values parse, as those of the variants."""
    module = importlib.import_module(name)
    fields = {field.name for field in module.dataclasses.fields(module.Args)}
    for span in re.findall(r"`(--[^`]+)`", (docs.NOTES / f"{name}.md").read_text()):
        for flag in re.findall(r"--(?:no-)?([a-z][\w-]*)", span):
            assert flag.replace("-", "_") in fields, span
        if " " in span:
            tyro.cli(module.Args, args=span.split())


@script
def test_every_metric_is_in_the_table_of_its_page(name):
    table = section(docs.NOTES / f"{name}.md", "Metrics")
    known = {metric for row in rows(table) for metric in re.findall(r"`(\w+/\w+)`", row[0])}
    text = TEXT[name].replace('f"{prefix}return_{k}"', '"eval/return_k"')
    text = text.replace('f"{prefix}gain', '"eval/gain').replace('_{k}"', '_k"')
    used = set(re.findall(r'"((?:loss|stat|train|eval|time)/\w+)"', text))
    assert len(used) >= 10 and used <= known, used ^ known


@script
def test_every_difference_is_on_its_page_and_marked_where_it_is(name):
    _, docstring, code = TEXT[name].split('"""', 2)
    listed = re.findall(r"^(D\d+) ", docstring, re.M)
    assert listed == [f"D{i}" for i in range(1, len(listed) + 1)] and len(listed) >= 6
    assert set(re.findall(r"\b(D\d+)\b", code)) <= set(listed)
    text = (docs.NOTES / f"{name}.md").read_text()
    assert all(f"[{number}](../../{name}.py#L" in text for number in listed)


def test_troubleshooting_quotes_the_scripts():
    """Each piece between the dots, word for word; a name stands for what a message is about."""
    messages = [row[0].strip("`") for row in rows(section(README, "Troubleshooting"))[2:]]
    assert len(messages) == 8
    ours = [m for m in messages if m.startswith("error: ") and "bazel" not in m]
    assert len(ours) >= 6
    for message in ours:
        for flag in re.findall(r"--([\w-]+)", message):
            assert f'"{flag.replace("-", "_")}"' in TEXT["sac_ae"], message
        text = re.sub(r"error: (--[\w-]+: |\w+/\w+)?|MUJOCO_GL: ", "", message)
        for piece in text.replace("nan", "...").split("..."):
            assert piece in TEXT["sac_ae"], message


@pytest.mark.deep
@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_the_bugs_of_the_exercises_are_caught(number, tmp_path):
    """By the test that is named: it fails with the bug, as it does not in the suite."""
    _, wrong, name = exercises.EXERCISES[number]
    exercises.plant(number, tmp_path / "copy")
    assert any(wrong in (tmp_path / "copy" / f"{script}.py").read_text() for script in SCRIPTS)
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{name}"]
    process = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert process.returncode == 1 and "1 failed" in process.stdout, process.stdout[-500:]
