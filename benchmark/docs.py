"""Makes the parts of README.md and benchmark/README.md that come from the code and the results.

    python benchmark/docs.py            mends both files, the pages of differences and the pictures
    python benchmark/docs.py --check    exit status 1 if the text of one of them is stale

From `<!-- docs.py NAME -->` to the next empty line stands what the function NAME here returns. In a
link such as [`text`](file.py#L12) the number is that of the line which has this text; it must be
the only one.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import diff
import numpy as np
import report
import studies
from run import SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
TITLES = {
    "sac_ae": "SAC+AE, [Yarats et al. 2019](https://arxiv.org/abs/1910.01741)",
    "sac_gaara": "SAC+GAARA, [Chen & Gong 2022](https://github.com/Otsuts/SAC-GAARA)",
    "slac": "SLAC, [Lee et al. 2020](https://arxiv.org/abs/1907.00953)",
    "dreamerv2": "DreamerV2, [Hafner et al. 2021](https://arxiv.org/abs/2010.02193)",
    "pearl_pixels": "PEARL from pixels, [Rakelly et al. 2019](https://arxiv.org/abs/1903.08254)",
}
NEW = {  # in each, against the one before
    "sac_ae": "SAC; an encoder that critic and reconstruction train",
    "sac_gaara": "a contrastive loss between two crops; CURL and RAD by switches",
    "slac": "a latent model of sequences in place of the autoencoder",
    "dreamerv2": "a recurrent model, in which the policy learns without images",
    "pearl_pixels": "SAC again, over many tasks, with an inferred task variable",
}
PEERS = {  # file in results/speed: (what is timed, the other code)
    "sac_ae": ("`sac_ae.py`", "pytorch_sac_ae"),
    "sac_gaara": ("`sac_gaara.py`", "SAC-GAARA"),
    "sac_gaara-curl": ("the same as CURL, batches of 128", "curl"),
    "slac": ("`slac.py`", "slac.pytorch, a port"),
    "dreamerv2": ("`dreamerv2.py`, equal networks, batches, horizon", "dreamer-torch, a port"),
    "pearl_pixels": ("`pearl_pixels.py` from states, 16 tasks of 256 transitions", "oyster"),
}


EQUAL = {  # file in results/equal: (script, the other's repository and commit)
    "pytorch_sac_ae": ("sac_ae", "denisyarats/pytorch_sac_ae", "7fa560e"),
    "SAC-GAARA": ("sac_gaara", "Otsuts/SAC-GAARA", "4a8f240"),
    "SAC-GAARA-4fe3771": ("sac_gaara", "Otsuts/SAC-GAARA", "4fe3771"),
    "curl": ("sac_gaara", "MishaLaskin/curl", "8416d6e"),
    "slac.pytorch": ("slac", "toshikwa/slac.pytorch", "8b9d520"),
    "dreamer-torch": ("dreamerv2", "jsikyoon/dreamer-torch", "7c2331a"),
    "oyster": ("pearl_pixels", "katerakelly/oyster", "44e20fd"),
}


def lines_of(name):
    """A script's lines."""
    return (ROOT / f"{name}.py").read_text().splitlines()


def rows_to_table(*rows):
    """Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "| - " * len(rows[0]) + "|", *body]


def scripts():
    """What each script is, its size, what its smoke runs of seeds 1, 2, 3 reached."""
    heads = ["script", "algorithm", "new in it", "lines (networks, losses, update)"]
    heads += ["smoke run, seeds 1, 2, 3 (random policy; PEARL: without context)"]
    heads += ["published, cheetah-run / walker-walk at 500,000 frames (own)"]
    rows = [heads]
    for name in SCRIPTS:
        lines = lines_of(name)
        first, last = (
            next(i for i, line in enumerate(lines) if line.startswith(f"# ---- {word}"))
            for word in ("networks", "environment")
        )
        runs = json.loads((RESULTS / "smoke" / name / "meta.json").read_text())["runs"]
        pearl = "return_by_context" in runs[0]
        returns = ", ".join(f"{run['eval_return']:.0f}" for run in runs)
        random = [run["return_by_context"][0][0] if pearl else run["random_return"] for run in runs]
        random = ", ".join(f"{value:.1f}" for value in random)
        minutes = sorted(run["wall_s"] for run in runs)[1] / 60
        note = "; after two trajectories" * pearl
        curves = [
            report.published(studies.CURVES.get(name), task)
            for task in ("cheetah-run", "walker-walk")
        ]
        scores = [f"{np.interp(5e5, *curve[:2]):.0f}" for curve in curves if curve]
        row = [f"[`{name}`]({name}.py)", TITLES[name], NEW[name]]
        row += [f"{len(lines)} ({last - first})"]
        row += [f"{runs[0]['env_id']} {returns} ({random}) in {minutes:.0f} minutes{note}"]
        row += [f"{' / '.join(scores)} (none yet)" if scores else ""]
        rows.append(row)
    return rows_to_table(*rows)


def picture(name):
    """The data flow as the script's docstring draws it."""
    text = "\n".join(lines_of(name)).split('"""')[1]
    drawn = [part for part in text.split("\n\n") if part.startswith("    ")][0]
    return ["```", *(line[4:] for line in drawn.strip("\n").splitlines()), "```"]


def trains():
    """What moves by one step on a loss: TRAINS in tests/conftest.py, which tests hold."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TRAINS

    rows = [("script", "loss: what its step moves")]
    for name, losses in TRAINS.items():
        cells = [
            f"{loss}: " + ", ".join(f"`{part}`" for part in sorted(parts))
            for loss, parts in losses.items()
        ]
        rows.append((f"`{name}`", "; ".join(cells)))
    return rows_to_table(*rows)


def equations():
    """The lines that carry the name of an equation or a line of an algorithm."""
    rows = [("script", "equation and line")]
    for name in SCRIPTS:
        found = {}
        for i, line in enumerate(lines_of(name), 1):
            for tag in re.findall(r"\[([A-Z][\w+&]* [^\]\n]+)\]", line.partition("  # ")[2]):
                found.setdefault(tag, []).append(f"[{i}]({name}.py#L{i})")
        cells = [f"{tag} {', '.join(places)}" for tag, places in found.items()]
        rows.append((f"`{name}`", "; ".join(cells)))
    return rows_to_table(*rows)


def deviations():
    """What the docstrings list as differing from papers and authors' code, a cell per script; each
    number links to its place."""
    rows, seen = [("script", "differences, and our choice")], set()
    for name in SCRIPTS:
        lines, cells = lines_of(name), []
        for text in re.findall(r"^(D\d+ +.+(?:\n    .+)*)", "\n".join(lines).split('"""')[1], re.M):
            number, text = " ".join(text.split()).split(" ", 1)
            if text in seen:
                continue  # SAC+GAARA begins with SAC+AE's
            seen.add(text)
            places = [i for i, line in enumerate(lines, 1) if re.search(rf"\b{number}\b", line)]
            cells.append(f"[{number}]({name}.py#L{places[-1]}) {text}")
        rows.append((f"`{name}`", "<br>".join(cells)))
    return rows_to_table(*rows)


def equality():
    """The largest difference of losses and parameters from other code, from what equal.py wrote."""
    rows = [("script", "the other code", "largest difference")]
    for stem, (name, repository, commit) in EQUAL.items():
        text = (RESULTS / "equal" / f"{stem}.txt").read_text()
        largest = max(float(x) for x in re.findall(r"(?:difference|relative) (\d.*e[-+]\d+)", text))
        link = f"[{repository}](https://github.com/{repository}) ({commit})"
        rows.append((f"`{name}.py`", link, f"[{largest:.0e}](results/equal/{stem}.txt)"))
    return rows_to_table(*rows)


def speed():
    """Ratios to the authors' code, from what speed.py printed."""
    rows = [("two updates, batches drawn", "ours", "theirs", "")]
    for stem, (ours, theirs) in PEERS.items():
        text = (RESULTS / "speed" / f"{stem}.txt").read_text()
        mine, other = (float(ms) / 1000 for ms in re.findall(r"two updates +(\d+\.\d+)", text))
        ratio = re.search(r"the authors': (\d+\.\d\d)x", text)[1]
        rows.append((f"{ours}; {theirs}", f"{mine:.2f} s", f"{other:.2f} s", f"{ratio} times"))
    return rows_to_table(*rows)


def rates():
    """What speed.py measured on a CPU, at the default configurations."""
    with open(RESULTS / "speed" / "cpu.csv", newline="") as file:
        cells = {
            (row["subject"], row["quantity"]): float(row["value"]) for row in csv.DictReader(file)
        }
    heads = [q for q in dict.fromkeys(q for _, q in cells) if not q.startswith("ms, ")]
    rows = [
        (f"`{name}.py`", *(f"{cells[name, q]:,.{2 * (cells[name, q] < 100)}f}" for q in heads))
        for name in SCRIPTS
    ]
    return rows_to_table(("default configuration", *heads), *rows)


def gpu():
    """What speed.py measured on a GPU: updates/s eager and captured, and the rest in bf16."""
    with open(RESULTS / "speed" / "h100.csv", newline="") as file:
        cells = {
            (*row["subject"].split(" --precision "), row["quantity"]): float(row["value"])
            for row in csv.DictReader(file)
        }
    captured = "updates/s, captured"
    columns = {
        "updates/s, eager": ("fp32", "updates/s"),
        **{f"captured, {p}": (p, captured) for p in ("fp32", "tf32", "bf16")},
        "steps/s, end to end, bf16": ("bf16", "steps/s, end to end"),
        "busy with updates": ("bf16", "busy with updates"),
        "peak GiB": ("bf16", "peak GiB"),
        **{
            f"{p} against the other code": (p, "two updates, captured, times as fast as the peer's")
            for p in ("fp32", "bf16")
        },
    }
    rows = []
    for name in SCRIPTS:
        values = [cells.get((name, *column)) for column in columns.values()]
        texts = ["" if v is None else f"{v:,.{1 * (v < 100) + (v < 10)}f}" for v in values]
        rows.append((f"[`{name}.py`](results/speed/h100/{name}.txt)", *texts))
    return rows_to_table(("default configuration", *columns), *rows)


def differences():
    """How much differs between two scripts, and the page that shows it."""
    rows = [("pair", "lines added", "removed", "hunks")]
    for a, b in diff.PAIRS:
        counts = diff.counts(diff.read(a), diff.read(b))
        rows.append((f"[{a}, {b}](diffs/{a}-{b}.html)", *map(str, counts)))
    return rows_to_table(*rows)


def mended(path):
    """The text of a README as it should be; raises where a link's text is not that of one line."""
    text = path.read_text()

    def block(match):
        name, *words = match[1].split()
        made = "\n".join(globals()[name](*words))
        return f"<!-- docs.py {match[1]} -->\n{made}\n"

    def anchor(match):
        code, file = match[1], match[2]
        found = [
            i for i, line in enumerate((ROOT / file).read_text().splitlines(), 1) if code in line
        ]
        if len(found) != 1:
            raise ValueError(f"{path.name}: `{code}` stands in {len(found)} lines of {file}")
        return f"[`{code}`]({file}#L{found[0]})"

    text = re.sub(r"<!-- docs.py (.*?) -->\n(.+\n)*", block, text)
    return re.sub(r"\[`([^`]+)`\]\((\w+\.py)#L\d+\)", anchor, text)


def draw(path):
    """The metrics of healthy smoke runs, seed 1 of each."""
    from matplotlib.figure import Figure

    wanted = {
        "sac_ae": ["loss/critic", "loss/reconstruction", "stat/alpha", "stat/entropy"],
        "sac_gaara": ["loss/contrastive"],
        "slac": ["loss/kl", "loss/image", "loss/reward"],
        "dreamerv2": ["stat/kl", "loss/image", "stat/imagined_return", "stat/entropy"],
        "pearl_pixels": ["loss/q", "loss/kl", "stat/posterior_var", "eval/gain"],
    }
    panels = [(name, metric) for name, metrics in wanted.items() for metric in metrics]
    figure = Figure((10, 8), layout="constrained", dpi=90)
    for i, (name, metric) in enumerate(panels):
        axis = figure.add_subplot(4, 4, i + 1)
        with open(RESULTS / "smoke" / name / "seed1.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get(metric)]
        frames = [float(row["frames"]) / 1000 for row in rows]
        axis.plot(frames, [float(row[metric]) for row in rows], color="#0072B2", lw=1.2)
        axis.set_title(f"{name}\n{metric}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.supxlabel("thousand frames", fontsize=9)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    stale = []
    for path in (ROOT / "README.md", ROOT / "benchmark" / "README.md"):
        text = mended(path)
        if text != path.read_text():
            stale.append(path.name)
            if not args.check:
                path.write_text(text)
    if not args.check:
        draw(RESULTS / "smoke" / "metrics.png")
        diff.write(diff.PAIRS, diff.DIFFS)
    print("stale: " + ", ".join(stale) if stale else "nothing was stale")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
