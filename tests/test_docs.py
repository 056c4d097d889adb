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


def cells(text):
    """Of each row of the tables; a bar that is written \\| belongs to its cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@page
def test_sizes_and_generated_parts(path):
    """`python benchmark/docs.py` mends the latter."""
    text = path.read_text()
    assert docs.mended(path) == text
    lines = text.splitlines()
    assert path != README or (len(text.encode()) <= 12 * 1024 and len(lines) <= 160)
    assert path != INDEX or len(lines) <= 120
    assert [line for line in lines if len(line) > 300 and line[0] != "|"] == []
    assert [cell for row in cells(text) for cell in row if len(cell) > 160] == []
    assert not re.search(r"/(work|root|home|tmp)/", text)  # paths of somebody's machine


def test_a_stale_part_is_noticed():
    path = docs.NOTES / "sac_ae.md"
    fresh = docs.mended(path)
    for old, new in (("| critic | ", "| cri | "), ("sac_ae.py#L", "sac_ae.py#L1")):
        stale = fresh.replace(old, new, 1)
        assert stale != fresh == docs.mended(path, stale)
    with pytest.raises(ValueError, match="stands in 0 lines"):
        docs.mended(path, fresh.replace("[`moved_by_actor = ", "[`moved_by_nobody = "))


@pytest.mark.deep
def test_the_picture_of_metrics_is_fresh(tmp_path):
    pytest.importorskip("matplotlib")
    import imageio.v3 as imageio

    docs.draw(tmp_path / "metrics.png")
    pair = tmp_path / "metrics.png", docs.RESULTS / "smoke" / "metrics.png"
    one, two = (imageio.imread(path)[..., :3].astype(float) for path in pair)
    assert one.shape == two.shape and abs(one - two).mean() < 1


def test_the_readmes_claims_are_what_was_recorded():
    """Equality with other code, by what equal.py printed; and speed beside it."""
    limits = {"slac.pytorch": 2.5e-6, "dreamerv2": 4e-6}  # others: double precision
    for row in cells("\n".join(docs.equality()))[2:]:
        difference, stem = re.search(r"\[(.*)\].*/(.*)\.txt", row[2]).groups()
        assert float(difference) <= limits.get(stem, 2e-11), stem
    for stem in ("pytorch_sac_ae", "SAC-GAARA"):
        text = (docs.RESULTS / "equal" / f"{stem}.txt").read_text()
        assert re.findall(r"that differ in .*: (\d+)", text) == ["0"] * 6, stem
    ratios = [float(row[4].split()[0]) for row in cells("\n".join(docs.peers()))[2:]]
    assert f"[{min(ratios):.1f} to {max(ratios):.1f} times]" in README.read_text()


@page
def test_every_relative_link_leads_somewhere(path):
    """To a file, a line or a heading of it; the name of a test leads to a file that has it."""
    links = re.findall(r"\[([^][]*)\]\(([^)#]*)#?([^)]*)\)", path.read_text())
    for words, target, place in (link for link in links if not link[1].startswith("http")):
        file = path.parent / target if target else path
        assert file.exists(), target
        if re.fullmatch(r"L\d+", place):
            assert int(place[1:]) <= len(file.read_text().splitlines()), words
        elif place:  # GitHub's names of headings
            heads = re.findall(r"^#+ (.*)$", file.read_text().lower(), re.M)
            assert place in [re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in heads], place
        if re.fullmatch(r"`test_\w+`", words):
            assert f"def {words[1:-1]}(" in file.read_text(), words


@functools.cache
def help_of(tool):
    """What a tool's --help prints; its text, if it has none."""
    text = (ROOT / tool).read_text()
    command = [sys.executable, str(ROOT / tool), "--help"]
    return subprocess.check_output(command, text=True) if "argparse" in text else text


@page
def test_every_command_parses(path):
    """The scripts' flags by their own parser, those of tools by --help, studies by name."""
    text = re.sub(r"```(?:python|diff).*?```", "", path.read_text(), flags=re.S)
    text = text.replace("\\\n", " ").replace(" && ", "\n")
    blocks = re.findall(r"```bash\n(.*?)\n```", text, re.S)
    lines = "\n".join(blocks + re.findall(r"`((?:python|pip) [^`]+)`", text)).splitlines()
    for command, *words in map(shlex.split, lines):
        assert re.fullmatch(r"apt-get|cd|diff|git|pip|python3?|tensorboard|\.", command), command
        if command == "python" and words[0] != "-m":
            tool, *flags = words
            own = flags[: [*flags, "--"].index("--")]
            if tool[:-3] in SCRIPTS:
                tyro.cli(importlib.import_module(tool[:-3]).Args, args=flags)
            else:
                assert not [f for f in own if f[:2] == "--" and f not in help_of(tool)], words
            named = [w for w in words if re.match(r"(sac|gaara|slac|dreamerv2|pearl)-", w)]
            assert set(named) <= studies.STUDIES.keys(), words


@script
def test_flags_metrics_and_differences_of_a_script_and_its_page_agree(name):
    """Flags with values parse, as those of the variants; lines name no other differences."""
    text = (docs.NOTES / f"{name}.md").read_text()
    module = importlib.import_module(name)
    fields = {field.name for field in module.dataclasses.fields(module.Args)}
    for span in re.findall(r"`(--[^`]+)`", text):
        flags = re.findall(r"--(?:no-)?([a-z][\w-]*)", span)
        assert {flag.replace("-", "_") for flag in flags} <= fields, span
        assert " " not in span or tyro.cli(module.Args, args=span.split())

    table = cells(text.split("## Metrics")[1])
    known = {metric for row in table for metric in re.findall(r"`(\w+/\w+)`", row[0])}
    used = set(re.findall(r'"((?:loss|stat|train|eval|time)/\w+)"', TEXT[name]))
    for prefix in re.findall(r'report\(.*, "(eval/\w*)"\)', TEXT[name]):  # PEARL's
        used -= {prefix}
        used |= {prefix + end for end in ("return_k", "gain", "gain_error")}
    assert len(used) >= 10 and used == known

    _, docstring, code = TEXT[name].split('"""', 2)
    listed = re.findall(r"^(D\d+) ", docstring, re.M)
    assert listed == [f"D{i}" for i in range(1, len(listed) + 1)] and len(listed) >= 6
    assert set(re.findall(r"\b(D\d+)\b", code)) <= set(listed)
    assert all(f"[{number}](../../{name}.py#L" in text for number in listed)


def test_troubleshooting_quotes_the_scripts():
    """The pieces between dots, word for word. The other messages are pip's and dm_control's."""
    section = README.read_text().split("## Troubleshooting")[1].split("\n## ")[0]
    messages = [row[0].strip("`") for row in cells(section)[2:]]
    ours = [m for m in messages if m.startswith("error: ") and "bazel" not in m]
    assert len(messages) == 8 and len(ours) == 6
    for message in ours:
        flag, text = re.match(r"error: (?:(--[\w-]+|MUJOCO_GL): |\w+/\w+)?(.*)", message).groups()
        name = (flag or "").removeprefix("--").replace("-", "_")
        assert not name or f'"{name}"' in TEXT["sac_ae"], message
        pieces = re.split(r"\.\.\.|nan", text)
        assert [piece for piece in pieces if piece not in TEXT["sac_ae"]] == [], message


@pytest.mark.deep
@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_the_bugs_of_the_exercises_are_caught(number, tmp_path):
    """By the test that is named: it fails with the bug, as it does not in the suite."""
    exercises.plant(number, tmp_path / "copy")
    words = f"-m pytest -q -x tests/{exercises.EXERCISES[number][2]}".split()
    command = [sys.executable, *words]
    process = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert process.returncode == 1 and "1 failed" in process.stdout, process.stdout[-500:]
