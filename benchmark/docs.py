"""Makes the parts of the pages that come from the code and the results.

    python benchmark/docs.py            mends the pages and draws the metrics of the smoke runs
    python benchmark/docs.py --check    changes nothing; exit status 1 if a page is stale
    python benchmark/docs.py --runs DIR    takes films and pictures of seed 1 from the smoke runs
                                           that benchmark/run.py left in DIR

The pages are README.md, benchmark/README.md and benchmark/notes/*.md. From `<!-- docs.py NAME -->`
to the next empty line stands what the function NAME here returns; links in it begin with a slash,
which stands for the root of the repository. In a link such as [`text`](file.py#L12) the number is
that of the only line of the file that has this text.
"""

import argparse
import csv
import importlib
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import diff
import report
from run import SCRIPTS
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
NOTES = ROOT / "benchmark" / "notes"
PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md", *sorted(NOTES.glob("*.md"))]
NEW = {  # in each, against the one before
    "sac_ae": "SAC, and an encoder that the critic and a reconstruction train",
    "sac_gaara": "a contrastive loss between two crops; CURL and RAD by switches",
    "slac": "a latent model of sequences in place of the autoencoder",
    "dreamerv2": "a recurrent model, inside which the policy learns without images",
    "pearl_pixels": "SAC on many tasks, with an inferred task variable",
}
PEERS = {  # file in results/speed: (what is timed, the other code)
    "sac_ae": ("`sac_ae.py`", "pytorch_sac_ae"),
    "sac_gaara": ("`sac_gaara.py`", "SAC-GAARA"),
    "sac_gaara-curl": ("`sac_gaara.py` as CURL, batches of 128", "curl"),
    "slac": ("`slac.py`", "slac.pytorch, a port"),
    "dreamerv2": ("`dreamerv2.py`, equal networks, batches, horizon", "dreamer-torch, a port"),
    "pearl_pixels": ("`pearl_pixels.py` from states, 16 tasks of 256 transitions", "oyster"),
}
EQUAL = {  # file in results/equal: (script, the other's repository and commit)
    "pytorch_sac_ae": ("sac_ae", "denisyarats/pytorch_sac_ae", "7fa560e"),
    "SAC-GAARA": ("sac_gaara", "Otsuts/SAC-GAARA", "4a8f240"),
    "SAC-GAARA-4fe3771": ("sac_gaara", "Otsuts/SAC-GAARA", "4fe3771"),
    "curl": ("sac_gaara", "MishaLaskin/curl", "8416d6e"),
    "slac": ("slac", "alexlee-gk/slac", "14a366e"),
    "slac.pytorch": ("slac", "toshikwa/slac.pytorch", "8b9d520"),
    "dreamerv2": ("dreamerv2", "danijar/dreamerv2", "07d906e"),
    "dreamer-torch": ("dreamerv2", "jsikyoon/dreamer-torch", "7c2331a"),
    "oyster": ("pearl_pixels", "katerakelly/oyster", "44e20fd"),
}
ROWS = {  # of the pictures that the scripts leave
    "sac_ae": ["image", "reconstruction"],
    "sac_gaara": ["anchor", "positive", "reconstruction\nof the anchor"],
    "slac": ["truth", "posterior", "prior after\nthe first image", "prior"],
    "dreamerv2": ["truth", "model, sees\nfive images", "difference"],
}
CHEETAH = 6, 17  # actions and numbers of the state of the default tasks


def lines_of(name):
    """A script's lines."""
    return (ROOT / f"{name}.py").read_text().splitlines()


def docstring(name):
    return "\n".join(lines_of(name)).split('"""')[1]


def measured(file):
    """{(subject, quantity): number} of a table in results/speed."""
    with open(RESULTS / "speed" / file, newline="") as rows:
        return {(r["subject"], r["quantity"]): float(r["value"]) for r in csv.DictReader(rows)}


def rows_to_table(*rows):
    """Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "| - " * len(rows[0]) + "|", *body]


# ---- README.md ---------------------------------------------------------------------------------


def screen():
    """What the first run prints, by the recorded smoke run with seed 1."""
    folder = RESULTS / "smoke" / "sac_ae"
    run = json.loads((folder / "meta.json").read_text())["runs"][0]
    with open(folder / "seed1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first, *_, last = [
        f"{int(row['frames']):,} frames: evaluation {float(row['eval/return']):.1f} +- "
        f"{float(row['eval/return_std']):.1f}"
        for row in rows
        if row["eval/return"]
    ]
    row = next(row for row in rows if int(row["frames"]) > 0.8 * run["frames"])
    seconds = float(row["time/wall_s"])
    text = f"{int(row['frames']):,} frames, {int(row['updates']):,} updates, "
    text += f"{int(row['frames']) / seconds:.0f} frames/s, return {float(row['train/return']):.1f}"
    form = "{percentage:3.0f}%|{bar:20}| {desc} [{elapsed}<{remaining}]"  # the script's
    counts = int(row["updates"]), run["updates"], seconds
    bar = tqdm.format_meter(*counts, prefix=text, bar_format=form).replace(": [", " [")
    run_dir = f"runs/{run['env_id']}__sac_ae__1__20260101-120000"
    numbers = {key: run[key] for key in ("env_id", "script", "seed", "device")}
    numbers["run_dir"] = run_dir
    for key in ("frames", "updates", "wall_s", "random_return", "eval_return"):
        numbers[key] = round(run[key], 1)
    return [
        "```",
        f"{run['env_id']}, seed 1, {run['device']}, in {run_dir}",
        f"random policy: {run['random_return']:.1f} over 10 episodes",
        first,
        bar,
        last,
        f"summary {json.dumps(numbers)}",
        "```",
    ]


def scripts():
    """The scripts in the order in which to read them."""
    rows = [("file", "lines", "of them networks and `Agent`", "new in it")]
    for name in SCRIPTS:
        lines = lines_of(name)
        first, last = (
            next(i for i, line in enumerate(lines) if line.startswith(f"# ---- {word}"))
            for word in ("networks", "environment")
        )
        link = f"[`{name}.py`](/{name}.py)"
        rows.append((link, f"{len(lines):,}", str(last - first), NEW[name]))
    return rows_to_table(*rows)


def duration(seconds):
    hours = seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.0f} hours" if hours >= 2 else f"{60 * hours:.0f} minutes"


def costs():
    """Time, memory and disk of each script's default run: its counts from the script's arguments,
    its speed from what speed.py measured."""
    sys.path.insert(0, str(ROOT))
    heads = ["script", "default run", "2 CPU cores", "RAM", "an H100", "GPU memory", "disk"]
    rows = [heads]
    for name in SCRIPTS:
        module = importlib.import_module(name)
        args = module.Args()
        steps = math.ceil(args.total_frames / args.action_repeat)
        if name == "pearl_pixels":  # as train() counts; a speed is one of steps with their updates
            visits = len(module.plan(args, 0)), len(module.plan(args, 1))
            iterations = math.ceil((steps / args.trajectory_steps - visits[0]) / visits[1])
            episodes = visits[0] + iterations * visits[1]
            replay, warmup, burst = episodes * (args.trajectory_steps + 1), 0, 0
        else:
            replay = steps + args.total_frames // 1000 + 1000
            warmup, burst = args.warmup_steps, args.pretrain_updates
        row_bytes = 3 * args.image_size**2 + 4 * (sum(CHEETAH) + 2) + 8
        disk = replay * row_bytes / 2**30
        cells = [f"{args.total_frames:,} frames, {args.env_id}"]
        for file, subject, updates in (
            ("cpu.csv", name, "updates/s"),
            ("h100.csv", f"{name} --precision bf16", "updates/s, captured"),
        ):
            speed = measured(file)
            seconds = (steps - warmup) / speed[subject, "steps/s, end to end"]
            seconds += burst / speed[subject, updates]
            gib = speed[subject, "peak GiB"] + disk * (file == "h100.csv")
            cells += [duration(seconds), f"{gib:.1f} GiB"]
        rows.append((f"`{name}.py`", *cells, f"{disk:.1f} GiB"))
    return rows_to_table(*rows)


# ---- the pages of the algorithms ---------------------------------------------------------------


def picture(name):
    """The data flow as the script's docstring draws it."""
    drawn = [part for part in docstring(name).split("\n\n") if part.startswith("    ")][0]
    return ["```", *(line[4:] for line in drawn.strip("\n").splitlines()), "```"]


def trains(name):
    """What moves by one step on a loss: TRAINS in tests/conftest.py, which tests hold."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TRAINS

    losses = dict(TRAINS["sac_ae"] if name == "sac_gaara" else {}) | TRAINS[name]
    cells = [(loss, ", ".join(f"`{p}`" for p in sorted(ps))) for loss, ps in losses.items()]
    return rows_to_table(("loss", "what a step on it moves"), *cells)


def deviations(name):
    """What the docstring lists as differing from paper and authors' code; each number links to the
    first line that carries it, or to the docstring."""
    lines, items = lines_of(name), []
    end = [i for i, line in enumerate(lines, 1) if line == '"""'][0]
    for text in re.findall(r"^(D\d+ +.+(?:\n    .+)*)", docstring(name), re.M):
        number, text = " ".join(text.split()).split(" ", 1)
        places = [i for i, line in enumerate(lines, 1) if re.search(rf"\b{number}\b", line)]
        place = next((i for i in places if i > end), places[0])
        item = f"- [{number}](/{name}.py#L{place}) {text}"
        items += textwrap.wrap(item, 140, subsequent_indent="  ", break_on_hyphens=False)
    return items


def equations(name):
    """The lines that carry the name of an equation, and those of an algorithm in its order."""
    found = []
    for i, line in enumerate(lines_of(name), 1):
        code, _, comment = line.partition("  # ")
        for tag in re.findall(r"\[([A-Z][\w+&]* [^\]\n]+)\]", comment):
            text = code.strip().replace("|", "\\|")
            step = "alg. " in tag
            key = step, *(int(n) for n in re.findall(r"\d+", tag) if step)
            found.append((key, (tag, f"[{i}](/{name}.py#L{i})", f"`{text}`")))
    rows = [row for _, row in sorted(found, key=lambda item: item[0])]
    return rows_to_table(("equation", "line", "code"), *rows)


def published(file, *frames):
    """Returns of published/FILE.csv at these numbers of frames; tasks or algorithms are rows,
    whichever are more."""
    with open(ROOT / "benchmark" / "published" / f"{file}.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    value = {(r["algorithm"], r["env_id"], int(r["frames"])): float(r["mean"]) for r in rows}
    heads, sides = (list(dict.fromkeys(r[key] for r in rows)) for key in ("algorithm", "env_id"))
    swap = len(heads) > len(sides)
    if swap:
        heads, sides = sides, heads
    table = [("algorithm" if swap else "task", *heads)]
    for side in sides:
        keys = [(side, head) if swap else (head, side) for head in heads]
        numbers = [[value.get((*key, int(f))) for f in frames] for key in keys]
        cells = [" / ".join("-" if v is None else f"{v:.0f}" for v in vs) for vs in numbers]
        table.append((side, *("" if set(cell) <= set("- /") else cell for cell in cells)))
    return rows_to_table(*table)


# ---- results.md --------------------------------------------------------------------------------


def smoke():
    """What the smoke runs reached; seeds 1, 2, 3 and so on."""
    heads = ["script", "task", "frames", "random policy (PEARL: no context)", "return", "minutes"]
    rows = [heads]
    for name in SCRIPTS:
        runs = json.loads((RESULTS / "smoke" / name / "meta.json").read_text())["runs"]
        minutes = sorted(run["wall_s"] for run in runs)[len(runs) // 2] / 60
        random = [r.get("return_by_context", [[r["random_return"]]])[0][0] for r in runs]
        texts = [f"{runs[0]['frames']:,}", ", ".join(f"{round(v, 1) + 0.0:.1f}" for v in random)]
        texts += [", ".join(f"{run['eval_return']:.0f}" for run in runs), f"{minutes:.0f}"]
        rows.append((f"[`{name}.py`](/benchmark/results/smoke/{name})", runs[0]["env_id"], *texts))
    return rows_to_table(*rows)


def study(name):
    """What a study reached at the end of its runs: on each task the interquartile mean, its 95 %
    interval, and every seed; and the random policy."""
    curves = report.load([RESULTS / name])
    tasks = list(dict.fromkeys(curve.env_id for curve in curves))
    cells = {}
    for c in curves:
        ends = c.table()[1][:, -1]
        text = report.number(report.interval(ends), report.iqm(ends))
        cells[c.label, c.env_id] = f"{text}: {', '.join(map(report.whole, ends))}"
    for task in tasks:
        values = [value for c in curves if c.env_id == task for value in c.random.values()]
        cells["random policy", task] = f"{report.whole(min(values))} to {report.whole(max(values))}"
    labels = ["random policy", *dict.fromkeys(c.label for c in curves)]
    rows = ((label, *(cells.get((label, task), "") for task in tasks)) for label in labels)
    return rows_to_table(("variant", *tasks), *rows)


def contexts(name):
    """What a study of PEARL reached at the end of its runs, by trajectories of context: IQMs, and
    with two trajectories the 95 % interval and every seed; and the untrained policy."""
    rows, untrained = [], {}
    for path in (RESULTS / name).glob("*/meta.json"):
        for run in json.loads(path.read_text())["runs"]:
            untrained.setdefault(run["env_id"], []).append(run["random_return"])
    for task, values in untrained.items():
        values = f"{min(values):.1f} to {max(values):.1f}"
        rows.append((task, "untrained policy", values, "", ""))
    for c in report.load([RESULTS / name]):
        zero, one, two = report.by_context(c)[1].T[:3]
        low, high = report.interval(two)
        seeds = ", ".join(f"{value:.1f}" for value in two)
        text = f"{report.iqm(two):.1f} ({low:.1f} to {high:.1f}): {seeds}"
        rows.append((c.env_id, c.label, *(f"{report.iqm(y):.1f}" for y in (zero, one)), text))
    head = "family", "variant", "no context", "one trajectory", "two trajectories, each seed"
    return rows_to_table(head, *sorted(rows, key=lambda row: row[0]))


def equality():
    """The largest difference of losses and parameters from other code, from what equal.py wrote."""
    rows = [("script", "the other code", "largest difference")]
    for stem, (name, repository, commit) in EQUAL.items():
        text = (RESULTS / "equal" / f"{stem}.txt").read_text()
        found = re.findall(r"largest difference of (?:losses|weights): (\S+)", text)
        found = found or re.findall(r"(?:difference|relative) (\d.*e[-+]\d+)", text)
        largest = max(map(float, found))
        link = f"[{repository}](https://github.com/{repository}) ({commit})"
        place = f"/benchmark/results/equal/{stem}.txt"
        rows.append((f"`{name}.py`", link, f"[{largest:.1e}]({place})"))
    return rows_to_table(*rows)


# ---- speed.md ----------------------------------------------------------------------------------


def peers():
    """Ratios to the authors' code, from what speed.py printed."""
    rows = [("time of two updates and their batches", "the other code", "ours", "theirs", "")]
    for stem, (ours, theirs) in PEERS.items():
        text = (RESULTS / "speed" / f"{stem}.txt").read_text()
        times = [float(ms) / 1000 for ms in re.findall(r"two updates +(\d+\.\d+)", text)]
        ratio = re.search(r"the authors': (\d+\.\d\d)x", text)[1]
        rows.append((ours, theirs, *(f"{time:.2f} s" for time in times), f"{ratio} times"))
    return rows_to_table(*rows)


def rates():
    """What speed.py measured on a CPU, at the default configurations."""
    cells = measured("cpu.csv")
    heads = [q for q in dict.fromkeys(q for _, q in cells) if not q.startswith("ms, ")]
    rows = [
        (f"`{name}.py`", *(f"{cells[name, q]:,.{2 * (cells[name, q] < 100)}f}" for q in heads))
        for name in SCRIPTS
    ]
    return rows_to_table(("default configuration", *heads), *rows)


def gpu():
    """What speed.py measured on a GPU: updates/s eager and captured, and the rest in bf16."""
    cells = measured("h100.csv")
    captured, ratio = "updates/s, captured", "two updates, captured, times as fast as the peer's"
    columns = {
        "updates/s, eager": ("fp32", "updates/s"),
        **{f"captured, {p}": (p, captured) for p in ("fp32", "tf32", "bf16")},
        "steps/s, end to end, bf16": ("bf16", "steps/s, end to end"),
        "busy with updates": ("bf16", "busy with updates"),
        "peak GiB": ("bf16", "peak GiB"),
        **{f"captured {p} against the other code": (p, ratio) for p in ("fp32", "bf16")},
    }
    rows = []
    for name in SCRIPTS:
        values = [cells.get((f"{name} --precision {p}", q)) for p, q in columns.values()]
        texts = ["" if v is None else f"{v:,.{1 * (v < 100) + (v < 10)}f}" for v in values]
        rows.append((f"[`{name}.py`](/benchmark/results/speed/h100/{name}.txt)", *texts))
    return rows_to_table(("default configuration", *columns), *rows)


# ---- benchmark/README.md -----------------------------------------------------------------------


def pairs():
    """How much differs between two scripts, and the command that shows it."""
    rows = [("command", "lines added", "removed", "hunks")]
    for a, b in diff.PAIRS:
        counts = diff.counts(diff.read(a), diff.read(b))
        rows.append((f"`python benchmark/diff.py {a} {b}`", *map(str, counts)))
    return rows_to_table(*rows)


# ---- mending -----------------------------------------------------------------------------------


def mended(path, text=None):
    """The text of a page as it should be; raises where a link's text is not that of one line."""
    text = path.read_text() if text is None else text
    wrong = []

    def block(match):
        name, *words = match[1].split()
        made = "\n".join(globals()[name](*words))
        made = re.sub(
            r"\]\(/([^)]+)", lambda m: f"]({os.path.relpath(ROOT / m[1], path.parent)}", made
        )
        return f"<!-- docs.py {match[1]} -->\n{made}\n"

    def anchor(match):
        code, file = match[1], match[2]
        lines = (path.parent / file).read_text().splitlines()
        found = [i for i, line in enumerate(lines, 1) if code in line]
        if len(found) != 1:
            wrong.append(f"{path.name}: `{code}` stands in {len(found)} lines of {file}")
        return f"[`{code}`]({file}#L{found[0] if found else 0})"

    text = re.sub(r"<!-- docs.py (.*?) -->\n(.+\n)*", block, text)
    text = re.sub(r"\[`([^`]+)`\]\(([\w./]+\.py)#L\d+\)", anchor, text)
    if wrong:
        raise ValueError("\n".join(wrong))
    return text


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


def label(strip, rows, path):
    """Draws a strip of images with the names of its rows; where it is a sequence, with the time."""
    from matplotlib.figure import Figure

    height, width = strip.shape[:2]
    side = height // len(rows)
    figure = Figure((8, 0.3 + 7 * height / width), layout="constrained", dpi=90)
    axis = figure.add_subplot()
    axis.imshow(strip, interpolation="nearest")
    axis.set_yticks([side * (i + 0.5) for i in range(len(rows))], rows, fontsize=9)
    axis.set_xticks([side * (i + 0.5) for i in range(width // side)], range(1, width // side + 1))
    axis.set_xlabel("time [steps]" if "truth" in rows else "sample", fontsize=9)
    axis.tick_params(length=0, labelsize=9)
    figure.savefig(path)


def take(folder):
    """Takes the last film, shortened, and the last picture, labelled, of each script's seed 1."""
    import imageio.v3 as imageio
    import numpy as np
    from PIL import Image

    for name in SCRIPTS:
        (run_dir,) = folder.glob(f"{name}__*/seed1/*__1__*")
        film = imageio.imread(sorted((run_dir / "videos").iterdir())[-1])[:60]
        film = [np.asarray(Image.fromarray(image).resize((160, 160))) for image in film]
        imageio.imwrite(RESULTS / "smoke" / f"{name}.gif", film, duration=80, loop=0)
        pictures = [imageio.imread(path) for path in sorted((run_dir / "images").iterdir())]
        path = RESULTS / "smoke" / f"{name}.png"
        if name in ROWS:
            label(pictures[-1], ROWS[name], path)
        else:  # PEARL's z, early, in the middle and at the end
            chosen = [pictures[i] for i in (0, len(pictures) // 2, -1)]
            border = (5, 5), (5, 5), (0, 0)
            chosen = [np.pad(picture, border, constant_values=200) for picture in chosen]
            imageio.imwrite(path, np.concatenate(chosen, 1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="of the smoke runs")
    args = parser.parse_args()
    if args.runs:
        take(args.runs)
    stale = []
    for path in PAGES:
        text = mended(path)
        if text != path.read_text():
            stale.append(path.name)
            if not args.check:
                path.write_text(text)
    if not args.check:
        draw(RESULTS / "smoke" / "metrics.png")
    print("stale: " + ", ".join(stale) if stale else "nothing was stale")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
