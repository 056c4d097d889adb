"""The promises about the text of the scripts: copies that stay equal, sizes, arguments.

python tests/test_shared.py --fix sac_ae.py    gives that script's text to the other scripts
"""

import ast
import collections
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sac_ae.py", "sac_gaara.py", "slac.py", "dreamerv2.py", "pearl_pixels.py"]
# The design's promise is 1050, 1160, 1180, 1320 and 1460 lines. A trial set it, which lacked what
# the shared part has beside: one line for each fault of usage, memory, disk and OpenGL; locks,
# --evaluate, load_agent, Weights & Biases, growing files, environments of one's own. Later came
# --compile, --threads, --replay-device, and a loop that a GPU need not wait for: 65 lines.
CAPS = {
    "sac_ae.py": 1290,
    "sac_gaara.py": 1395,
    "slac.py": 1425,
    "dreamerv2.py": 1575,
    "pearl_pixels.py": 1630,
}
EACH = tuple(SCRIPTS)
VARIES = {  # name: (scripts with a text of their own, or two that share one; all others share
    # another, the reason)
    "Args": (EACH, "the algorithms' hyperparameters; a field that two scripts have is one text in "
             "both but for its default"),
    "SMOKE": (EACH, "the configuration that was measured to learn in minutes, per algorithm"),
    "ACTION_REPEAT": (("slac.py", "dreamerv2.py", "pearl_pixels.py"), "SAC+AE's and SLAC's papers "
                      "list different repeats, DreamerV2 has 2 everywhere, PEARL 1"),
    "MAY_BE_ZERO": (EACH[2:], "names fields of Args; SAC+GAARA adds two in the next line"),
    "AT_MOST_ONE": (EACH[2:], "names fields of Args; SAC+AE and SAC+GAARA name the same ones"),
    "algorithm_checks": (EACH, "refuses what only this script's arguments can get wrong"),
    "updates_due": (("dreamerv2.py",), "adds the catch-up updates of its resets"),
    "load_task": (("pearl_pixels.py",), "tasks are the suite's, with a target or changed physics"),
    "weight_init": (("slac.py", "dreamerv2.py"), "SAC+AE: (delta-)orthogonal; SLAC: Xavier, zero "
                    "biases; DreamerV2: the same, and LayerNorm back to its start for resets"),
    "mlp": (("dreamerv2.py", "pearl_pixels.py"), "SAC+AE, SAC+GAARA, SLAC: two ReLU layers; "
            "DreamerV2: four ELU layers; PEARL: three ReLU layers and a last one near zero"),
    "minimize": (("dreamerv2.py",), "DreamerV2 clips the norm of each optimizer's gradient"),
    "tanh_gaussian": (("slac.py",), "1e-6 under the logarithm in the authors' SAC+AE, which PEARL "
                      "shares; exact in SLAC"),
    "Encoder": (EACH, "four published networks; SAC+GAARA's is SAC+AE's with a tanh that can be "
                "switched off"),
    "Decoder": (("slac.py", "dreamerv2.py"), "SAC+AE, SAC+GAARA and PEARL mirror the same convs, "
                "SLAC and DreamerV2 have published decoders of their own"),
    "Actor": (("slac.py", "dreamerv2.py"), "a head on the encoder's convs in SAC+AE and SAC+GAARA; "
              "SLAC's reads histories or z; DreamerV2's is a truncated normal"),
    "Cadence": (("slac.py", "dreamerv2.py"), "what moves at every Nth update differs"),
    "Agent": (EACH, "the algorithm; what SAC+AE and SAC+GAARA share in it, two other tests keep"),
    "evaluate": (("pearl_pixels.py",), "returns of each held-out task by number of trajectories of "
                 "context, not of one policy by episode"),
    "play": (("pearl_pixels.py",), "films a task before and after it is known"),
    "train": (("pearl_pixels.py",), "iterations over tasks: collect by the prior, by the "
              "posterior, then update; the others update after every step"),
}  # fmt: skip


def existing(root=ROOT):
    return [name for name in SCRIPTS if (root / name).exists()]


def blocks(path):
    """{name: (text with decorators and the comments glued on top, first line, last line)}."""
    lines, out = path.read_text().splitlines(keepends=True), {}
    for node in ast.parse("".join(lines)).body:
        targets = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#") and "# ----" not in lines[first - 1]:
            first -= 1
        for name in [node.name] if hasattr(node, "name") else targets:
            out[name] = ("".join(lines[first : node.end_lineno]), first, node.end_lineno)
    return out


def args_fields(path):
    """{field: (type, comment)} of the Args dataclass; the comment is the flag's help. What it adds
    in brackets, as the paper's value, may differ."""
    lines = path.read_text().splitlines()
    tree = ast.parse("\n".join(lines)).body
    body = next(node for node in tree if getattr(node, "name", "") == "Args").body
    help_text = {n: lines[n.lineno - 1].partition("  # ")[2].partition(" (")[0] for n in body}
    return {
        n.target.id: (ast.unparse(n.annotation), help_text[n])
        for n in body
        if isinstance(n, ast.AnnAssign)
    }


def owner(name, script, varies):
    """The entry of VARIES that gives a script its own text of `name`, or None."""
    return next((o for o in varies.get(name, ((), ""))[0] if script in o.split()), None)


def drift(root=ROOT, varies=VARIES):
    """What differs between the scripts and should not: a list of texts."""
    found = {name: blocks(root / name) for name in existing(root)}
    copies, problems = collections.defaultdict(dict), []
    for script, named in found.items():
        for name, (text, *_) in named.items():
            copies[name][script] = text
    for name, texts in copies.items():
        groups = collections.defaultdict(dict)  # of scripts that must have one text
        for script, text in texts.items():
            groups[owner(name, script, varies)][script] = text
        firsts = [next(iter(group.values())) for group in groups.values()]
        if len(set(firsts)) < len(firsts):
            problems.append(f"VARIES gives {name} texts of their own that are not: mend the entry")
        for group in groups.values():
            (first, text), *others = group.items()
            for script, other in others:
                if other != text:
                    pair = text.splitlines(), other.splitlines()
                    lines = difflib.unified_diff(*pair, first, script, lineterm="", n=1)
                    problems.append(f"{name} has drifted\n" + "\n".join(lines))
    for a in found:
        for b in found:  # one order, or diff shows moves
            one, two = ([n for n in found[x] if n in found[a] and n in found[b]] for x in (a, b))
            if one != two:
                x, y = next((x, y) for x, y in zip(one, two, strict=True) if x != y)
                problems.append(f"{a} and {b} order {x} and {y} differently")
    first_seen = {}
    for script in found:
        fields = args_fields(root / script) if "Args" in found[script] else {}
        for field, here in fields.items():
            there, where = first_seen.setdefault(field, (here, script))
            if here != there:
                problems.append(f"Args.{field} is {here} in {script}, {there} in {where}")
    return problems


def fix(source, root=ROOT, varies=VARIES):
    """Gives the shared blocks of `source` to every other script."""
    good = blocks(root / source)
    for path in (root / name for name in existing(root) if name != source):
        lines = path.read_text().splitlines(keepends=True)
        for name, (_, first, last) in sorted(blocks(path).items(), key=lambda item: -item[1][1]):
            if name in good and owner(name, source, varies) == owner(name, path.name, varies):
                lines[first:last] = [good[name][0]]
        path.write_text("".join(lines))


def test_shared_blocks_are_identical():
    assert drift() == []


TOY = """import re


@dataclass
class Args:
    lr: float = 1  # step


def a():
    {}


def b():
    pass
"""


def test_drift_is_found_and_mended(tmp_path):
    (tmp_path / "sac_ae.py").write_text(TOY.format("return 1"))
    other = tmp_path / "slac.py"
    other.write_text(TOY.format("return 1"))
    assert drift(tmp_path, {}) == []
    assert "mend the entry" in drift(tmp_path, {"a": (("slac.py",), "")})[0]
    other.write_text(TOY.format("return 2"))
    assert "a has drifted" in drift(tmp_path, {})[0]
    assert drift(tmp_path, {"a": (("slac.py",), "")}) == []
    (tmp_path / "dreamerv2.py").write_text(TOY.format("return 3"))  # frees one, not all others
    assert "a has drifted" in drift(tmp_path, {"a": (("slac.py",), "")})[0]
    fix("sac_ae.py", tmp_path, {"a": (("slac.py",), "")})
    assert "return 2" in other.read_text()
    fix("slac.py", tmp_path, {"a": (("slac.py dreamerv2.py",), "")})  # two that share one
    assert "return 2" in (tmp_path / "dreamerv2.py").read_text()
    assert drift(tmp_path, {"a": (("slac.py dreamerv2.py",), "")}) == []
    fix("sac_ae.py", tmp_path, {})
    assert drift(tmp_path, {}) == []
    other.write_text(TOY.format("return 1").replace("# step", "# size"))
    assert any("Args.lr" in problem for problem in drift(tmp_path, {"Args": (EACH, "")}))
    head, a, b = TOY.format("return 1").partition("def b")[0], "", "def b():\n    pass\n\n\n"
    other.write_text(head.replace("def a", b + "def a") + a)
    assert any("order" in problem for problem in drift(tmp_path, {}))


def test_size_and_line_ends():
    for name in existing():
        text = (ROOT / name).read_bytes().decode()
        lines = text.splitlines()
        assert "\r" not in text and "\t" not in text
        assert len(lines) <= CAPS[name], f"{name} has {len(lines)} lines"
        assert max(map(len, lines)) <= 100


def test_the_diff_of_sac_ae_and_sac_gaara_stays_small():
    """It is what a reader learns SAC+GAARA from: diff -u sac_ae.py sac_gaara.py."""
    pair = [(ROOT / f"{name}.py").read_text().splitlines() for name in ("sac_ae", "sac_gaara")]
    lines = list(difflib.unified_diff(*pair, lineterm=""))[2:]
    added, removed, hunks = (sum(line.startswith(c) for line in lines) for c in "+-@")
    assert added <= 150 and removed <= 25 and hunks <= 16, (added, removed, hunks)


def test_scripts_stand_alone():
    names = {Path(name).stem for name in SCRIPTS} | {"tests", "benchmark"}
    for name in existing():
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {i.split(".")[0] for i in imported} & names


def test_inline_metadata_is_requirements_txt():
    wanted = (ROOT / "requirements.txt").read_text().split()
    for name in existing():
        block = re.search(r"# /// script\n(.*?)# ///\n", (ROOT / name).read_text(), re.S)[1]
        text = "\n".join(line[2:] for line in block.splitlines())
        assert re.search(r"dependencies = (\[.*?\])", text, re.S)
        assert ast.literal_eval(re.search(r"dependencies = (\[.*?\])", text, re.S)[1]) == wanted


def test_every_argument_is_read_and_explained():
    for name in existing():
        text = (ROOT / name).read_text()
        for field, (_, comment) in args_fields(ROOT / name).items():
            assert len(comment) > 5, field
            read = re.search(rf'\b(args|self)\.{field}\b|"--{field}" in words', text)
            assert read, f"{name} never reads {field}"


def test_every_loss_line_names_its_equation():
    for name in existing():
        tags = re.findall(r"\[([A-Z][\w+]*) [^\]\n]+\]", (ROOT / name).read_text())
        assert len(tags) >= 5


if __name__ == "__main__":
    if "--fix" in sys.argv:
        fix(sys.argv[-1])
    report = drift()
    print("\n\n".join(report) or "the shared blocks are identical")
    sys.exit(bool(report))
