"""The READMEs do not rot: generated parts are fresh, commands parse, links lead somewhere, and the
exercises' bugs are each caught by the test that is named for them."""

import importlib
import re
import shlex
import subprocess
import sys

import exercises
import numpy as np
import pytest
import tyro
from conftest import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark"))
import docs

READMES = [ROOT / "README.md", ROOT / "benchmark" / "README.md"]


@pytest.mark.parametrize("path", READMES, ids=str)
def test_generated_parts_are_fresh(path):
    """`python benchmark/docs.py` mends them."""
    assert docs.mended(path) == path.read_text()


def test_the_first_page_stays_short():
    assert len(READMES[0].read_text().splitlines()) <= 350


def test_a_stale_part_is_noticed(tmp_path):
    text = READMES[0].read_text()
    for old, new in (("| `slac` | KL", "| `slac` | K"), ("sac_ae.py#L", "sac_ae.py#L1"),
                     ("[`sac_ae`](sac_ae.py) | SAC+AE", "[`sac_ae`](sac_ae.py) | SAC")):
        path = tmp_path / "README.md"
        path.write_text(text.replace(old, new, 1))
        assert path.read_text() != text and docs.mended(path) == text
    path.write_text(text.replace("[`self.moved_by_actor = convs if`]", "[`self.moved_by`]"))
    with pytest.raises(ValueError, match="stands in"):
        docs.mended(path)


def test_the_picture_of_metrics_is_fresh(tmp_path):
    pytest.importorskip("matplotlib")
    import imageio.v3 as imageio

    docs.draw(tmp_path / "metrics.png")
    one, two = (imageio.imread(path)[..., :3].astype(float) for path in (
        tmp_path / "metrics.png", docs.RESULTS / "smoke" / "metrics.png"))
    assert one.shape == two.shape and np.abs(one - two).mean() < 1


def test_recorded_equality_with_other_code():
    """benchmark/results/equal: what equal.py printed, with the command and the commits."""
    paths = sorted((docs.RESULTS / "equal").glob("*.txt"))
    assert len(paths) == 7
    for path in paths:
        text = path.read_text()
        difference = float(re.search(r"largest difference of all: (\S+)", text)[1])
        assert difference < (1e-5 if "slac" in path.name else 1e-9), path.name
        assert text.startswith("$ python benchmark/equal.py") and "commit " in text


def anchors(path):
    """GitHub's names of a file's headings."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", READMES, ids=str)
def test_every_relative_link_leads_somewhere(path):
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    assert len(links) > 20
    for link in links:
        target, _, place = link.partition("#")
        if not target.startswith("http"):
            file = path.parent / target if target else path
            assert file.exists(), link
            if re.fullmatch(r"L\d+", place):
                assert int(place[1:]) <= len(file.read_text().splitlines()), link
            elif place:
                assert place in anchors(file), link


def commands():
    """Lines of the READMEs' code blocks and all that stands in backticks and begins so."""
    for path in READMES:
        text = path.read_text().replace("\\\n", " ")
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            yield from block.strip().splitlines()
        yield from re.findall(r"`((?:python|uv run) [^`]+)`", text)


def test_every_command_parses(capsys):
    """The scripts' flags by their own parser, of tools by --help; modules by name."""
    seen = set()
    for line in commands():
        for part in line.split(" && "):
            words = shlex.split(part)
            if words[0] == "uv":
                words = ["python", *words[2:]]
            if words[0] in ("python", "python3") and words[1].endswith(".py"):
                assert (ROOT / words[1]).exists(), line
                stem, flags = words[1].removesuffix(".py"), words[2:]
                seen.add(stem)
                if stem in SCRIPTS:
                    tyro.cli(importlib.import_module(stem).Args, args=flags)
                elif "/" in stem:
                    command = [sys.executable, str(ROOT / words[1]), "--help"]
                    text = subprocess.run(command, capture_output=True, text=True).stdout
                    for flag in [f for f in flags[: [*flags, "--"].index("--")]
                                 if f.startswith("--")]:  # fmt: skip
                        assert flag in text or flag == "--fix", line
            else:
                assert words[0] in ("python3", "python", ".", "pip", "apt-get", "tensorboard"), line
                if words[1] == "-m":
                    assert words[2] in ("venv", "pytest"), line
    assert seen > {"sac_ae", "benchmark/speed", "benchmark/run", "benchmark/docs"}


def test_every_metric_of_the_scripts_is_in_the_glossary():
    glossary = READMES[0].read_text().split("| metric |")[1].split("\n\n")[0]
    known = set(re.findall(r"`(\w+/\w+)`", glossary))
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text()
        names = set(re.findall(r'"((?:loss|stat|train|time)/\w+)"', text))
        assert names <= known, names - known


def test_troubleshooting_quotes_the_scripts():
    """The errors in its table are ours, word for word but for what is filled in."""
    source = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)
    section = READMES[0].read_text().split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `error: ([^`]+)`", section, re.M)
    assert len(messages) >= 7
    for message in messages:
        words = message.split(": ")[-1].split()
        if "is nan" in message or "bazel" in message:
            continue  # a loss's name; another program's message
        pieces = [" ".join(words[:3]), " ".join(words[-2:]), " ".join(words[1:3])]
        assert any(piece in source for piece in pieces), message


def test_every_difference_is_in_the_readme():
    text = READMES[0].read_text()
    for name in SCRIPTS:
        docstring = (ROOT / f"{name}.py").read_text().split('"""')[1]
        numbers = re.findall(r"^(D\d+) ", docstring, re.M)
        assert len(numbers) >= 6
        for number in numbers:
            shared = name == "sac_gaara" and int(number[1:]) <= 6  # SAC+AE's
            assert shared or f"[{number}]({name}.py#L" in text, (name, number)


def test_differences_are_marked_where_they_are():
    """No line names a difference that its docstring does not list in order, D1, D2, ..."""
    for name in SCRIPTS:
        _, docstring, code = (ROOT / f"{name}.py").read_text().split('"""', 2)
        listed = re.findall(r"^(D\d+) ", docstring, re.M)
        assert listed == [f"D{i}" for i in range(1, len(listed) + 1)]
        marked = set(re.findall(r"\b(D\d+)\b", code))
        assert marked <= set(listed), (name, marked)


@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_the_bugs_of_the_exercises_are_caught(number, tmp_path):
    """By the test that is named: it fails with the bug, as it does not in the suite."""
    right, wrong, name = exercises.EXERCISES[number]
    exercises.plant(number, tmp_path / "copy")
    assert any((tmp_path / "copy" / f"{s}.py").read_text().count(wrong) for s in SCRIPTS)
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{name}"]
    process = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert process.returncode == 1 and "1 failed" in process.stdout, process.stdout[-500:]
