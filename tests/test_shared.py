"""The promises about the text of the scripts: copies that stay equal, sizes, arguments.

python tests/test_shared.py --fix sac_ae.py    gives that script's text to the other scripts
"""

import itertools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# 20 lines of each give --help titles
CAPS = {"sac_ae": 1317, "sac_gaara": 1421, "slac": 1445, "dreamerv2": 1601, "pearl_pixels": 1650}
SCRIPTS = AE, GAARA, SLAC, DREAMER, PEARL = list(CAPS)
TEXT = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
VARIES = {  # scripts with a text of their own, and why; all others share one text
    "Args": SCRIPTS,  # the algorithms' hyperparameters
    "SMOKE": SCRIPTS,  # what was measured to learn in minutes
    "ACTION_REPEAT": [SLAC],  # the papers list different repeats
    "MAY_BE_ZERO": [SLAC, DREAMER, PEARL],  # names fields of Args
    "AT_MOST_ONE": [SLAC, DREAMER, PEARL],  # names fields of Args
    "algorithm_checks": SCRIPTS,  # refuses what only this script's arguments can get wrong
    "updates_due": [DREAMER],  # adds the catch-up updates of its resets
    "load_task": [PEARL],  # tasks have a target or changed physics
    "weight_init": [SLAC, DREAMER],  # Xavier; DreamerV2 also sets LayerNorm back, for resets
    "mlp": [DREAMER, PEARL],  # four ELU layers; three ReLU layers and a last one near zero
    "minimize": [DREAMER],  # clips the norm of each optimizer's gradient
    "tanh_gaussian": [SLAC],  # exact; the authors' SAC+AE has 1e-6 under the logarithm
    "Encoder": SCRIPTS,  # published networks; a tanh can be switched off in SAC+GAARA's
    "Decoder": [SLAC, DREAMER],  # published; the others mirror the encoder
    "Actor": [SLAC, DREAMER],  # reads histories or z; a truncated normal
    "Cadence": [SLAC, DREAMER],  # what moves at every Nth update differs
    "Agent": SCRIPTS,  # the algorithm
    "evaluate": [PEARL],  # returns of each task by number of trajectories
    "play": [PEARL],  # films a task before and after it is known
    "train": [PEARL],  # iterations over tasks: collect by prior and posterior, then update
}


def blocks(text):
    """{name: text} of a script's classes, functions and constants, in their order."""
    found = {}
    code = text.split('"""', 2)[2]
    # Two empty lines, and perhaps a headline, stand between them; or a line begins a constant.
    for block in re.split(r"\n\n\n(?:# ----.*\n+)?|\n(?=[A-Z])", code)[1:]:
        name = re.search(r"^(?:class |def )?(\w+)", block, re.M)[1]
        found.setdefault(name, block)
    return found


def mended(script, source):
    """A script's text with another's blocks in place of those that all scripts share."""
    text, good = TEXT[script], blocks(TEXT[source])
    for name, block in blocks(text).items():
        if name in good and not {script, source} & set(VARIES.get(name, [])):
            text = text.replace(f"\n{block}\n", f"\n{good[name]}\n", 1)
    return text


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_shared_text_is_the_same_and_in_the_same_order(a, b):
    one, two = blocks(TEXT[a]), blocks(TEXT[b])
    shared = [name for name in one if name in two]
    assert shared == [name for name in two if name in one]
    for name in shared:
        if not {a, b} & set(VARIES.get(name, [])):
            assert one[name] == two[name], name


@pytest.mark.deep
def test_fix_mends_shared_text_and_leaves_the_algorithm(monkeypatch):
    monkeypatch.setitem(TEXT, SLAC, TEXT[SLAC].replace("self", "this"))
    fixed = blocks(mended(SLAC, AE))
    assert fixed["ReplayBuffer"] == blocks(TEXT[AE])["ReplayBuffer"]
    assert fixed["Agent"] == blocks(TEXT[SLAC])["Agent"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_stands_alone(script):
    """It imports no other one, and its first lines name the requirements, for uv."""
    assert len(TEXT[script].splitlines()) <= CAPS[script]
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", TEXT[script], re.M))
    assert not imported & {*SCRIPTS, "tests", "benchmark"}
    metadata = TEXT[script].split("# dependencies = ")[1].split("# ///")[0]
    wanted = (ROOT / "requirements.txt").read_text().split()
    assert re.findall('"(.*?)"', metadata) == wanted


def test_every_argument_is_read_and_explained():
    """Two scripts explain an argument alike; a value of the paper, in brackets, may differ."""
    explained = {}
    for text in TEXT.values():
        args = blocks(text)["Args"]
        titles = re.findall(r"^    # (\w+)", args, re.M)
        assert titles == ["run", "data", "networks", "losses", "variants"]
        fields = re.findall(r"^    (\w+): (.+) = .*?  # (.+?)(?: \(|$)", args, re.M)
        assert len(fields) == len(re.findall(r"^    \w+: ", args, re.M))
        for field, *meaning in fields:
            assert explained.setdefault(field, meaning) == meaning, field
            assert re.search(rf'\b(args|self)\.{field}\b|"--{field}" in words', text), field


if __name__ == "__main__":
    if "--fix" in sys.argv:
        for script in SCRIPTS:
            (ROOT / f"{script}.py").write_text(mended(script, Path(sys.argv[-1]).stem))
    sys.exit(pytest.main(["-q", __file__]))
