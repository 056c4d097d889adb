"""Learning curves and tables of any number of runs, with every seed and every failure shown.

    python benchmark/report.py benchmark/results/smoke             folders that run.py collected
    python benchmark/report.py runs --out report                   or run folders, as scripts leave

Writes report.md, curves.png and, for PEARL, adaptation.png to --out (the first folder). Thin lines
are seeds; the thick one is their interquartile mean (with three seeds or fewer the mean) as far as
all of them got, its band the 95 % bootstrap interval, stratified by task where there are several;
with fewer than five seeds, where that would be too narrow, the band goes from least to largest.
Dashed: published, from benchmark/published. Dotted: the random policy (PEARL: without context).
Where a task has more than seven curves, only the thick lines are drawn, and ends.png has the rest.
"""

import argparse
import csv
import hashlib
import importlib
import itertools
import json
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import run
import scipy.stats
import studies

sys.path.append(str(run.ROOT))  # for the scripts
PUBLISHED = Path(__file__).resolve().parent / "published"
RETURNS = "eval/return", "eval/return_2", "eval/return_1"  # PEARL's with two trajectories or one
ENOUGH = 5  # seeds; with fewer a difference between two curves is no finding
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
LENGTH = {"total_frames", "eval_every_frames"}
NOT_THE_METHOD = run.NOT_THE_METHOD - LENGTH | {"resume", "evaluate", "smoke"}


class Curve(NamedTuple):
    """The runs of one command: {seed: value} each; a seed may be in `failed` and `rows`."""

    label: str
    env_id: str
    published: str  # name of a published curve, or ""
    rows: dict  # metrics.csv, a list of {column: float}
    failed: dict  # why
    random: dict  # the random policy's return
    minutes: dict
    hardware: str
    flags: str = ""

    def points(self, seed):
        """Frames and returns (n,) of a seed's evaluations."""
        pairs = [
            (row["frames"], next((row[key] for key in RETURNS if key in row), None))
            for row in self.rows[seed]
        ]
        pairs = [(x, y) for x, y in pairs if y is not None]
        return np.array(pairs).reshape(-1, 2).T

    def table(self):
        """Frames (n,) that all seeds have passed, and their returns there (seeds, n), or None."""
        curves = [self.points(seed) for seed in self.rows]
        curves = [curve for curve in curves if curve.size]  # some may have failed before
        if not curves:
            return None
        first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        grid = np.unique(np.concatenate([x[(first <= x) & (x <= last)] for x, _ in curves]))
        return (grid, np.array([np.interp(grid, x, y) for x, y in curves])) if grid.size else None


def iqm(*samples, axis=-1):
    """Interquartile mean over the values of all samples, along the last axis."""
    return scipy.stats.trim_mean(np.concatenate(samples, axis=-1), 0.25, axis=axis)


def interval(*samples):
    """95 % interval of the IQM; each sample (..., n), a task's seeds, is drawn anew from itself.
    With fewer seeds than ENOUGH it would be too narrow: then the least and the largest value."""
    if min(sample.shape[-1] for sample in samples) < ENOUGH:
        values = np.concatenate(samples, -1)
        return np.stack([values.min(-1), values.max(-1)])
    result = scipy.stats.bootstrap(
        samples,
        iqm,
        axis=-1,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return np.stack(result.confidence_interval)


def read_rows(path):
    """metrics.csv as a list of {column: number}; empty cells are left out."""
    with open(path, newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def random_return(summary):
    """The random policy's; or PEARL's without any context."""
    return summary.get("return_by_context", [[summary["random_return"]]])[0][0]


def collected(folder):
    """The Curve of a folder with meta.json and seedN.csv."""
    meta = json.loads((folder / "meta.json").read_text())
    runs = {run["seed"]: run for run in meta["runs"]}
    paths = {seed: folder / f"seed{seed}.csv" for seed in runs}
    rows = {seed: read_rows(path) for seed, path in paths.items() if path.exists()}
    failed = {seed: run["failed"] for seed, run in runs.items() if "failed" in run}
    failed |= {
        seed: "not finished"
        for seed, run in runs.items()
        if seed not in failed and "frames" not in run
    }
    random = {seed: random_return(run) for seed, run in runs.items() if "random_return" in run}
    task = meta["command"].partition("--env-id ")[2].partition(" ")[0]
    task = next((run["env_id"] for run in runs.values() if "env_id" in run), task)
    minutes = {seed: run["wall_s"] / 60 for seed, run in runs.items() if "wall_s" in run}
    label = meta.get("label", folder.name).removesuffix(task).strip()
    curve = meta.get("published", "")
    flags = meta["command"].replace(f"--env-id {task}", "")
    return Curve(label, task, curve, rows, failed, random, minutes, meta["hardware"], flags)


def as_published(script, args):
    """Whether arguments, without those that do not change the method, are the script's own."""
    try:
        defaults = vars(importlib.import_module(script).Args(env_id=args["env_id"]))
    except ImportError:  # a renamed copy that is gone
        return False
    defaults = json.loads(json.dumps(defaults))  # as in the file
    return all(defaults.get(k) == v for k, v in args.items() if k not in LENGTH | {"code"})


def loose(folders):
    """Curves of run folders as the scripts leave them, one per set of arguments but the seed; the
    label names what differs between those of one script and task."""
    groups = {}
    for folder in folders:
        args = json.loads((folder / "args.json").read_text())
        if not {"env_id", "seed", "total_frames", "action_repeat"} <= args.keys():
            continue  # another program's
        script, seed = (folder.name.split("__") + [folder.name])[1], args["seed"]
        args = {k: v for k, v in args.items() if k not in NOT_THE_METHOD}
        if (code := folder / f"{script}.py").exists():  # as it was when the run began
            args["code"] = hashlib.sha256(code.read_bytes()).hexdigest()[:8]
        runs = groups.setdefault((script, args["env_id"], json.dumps(args)), {})
        if not (seed in runs and (runs[seed] / "summary.json").exists()):
            runs[seed] = folder  # the same run again is no other seed
    curves = []
    for (script, task, text), runs in groups.items():
        args = json.loads(text)
        others = [json.loads(t) for s, e, t in groups if (s, e) == (script, task)]
        differs = [k for k in args if any(other.get(k) != args[k] for other in others)]
        label = " ".join([script, *(f"{k}={args[k]}" for k in differs)])
        rows = {
            s: read_rows(folder / "metrics.csv")
            for s, folder in runs.items()
            if (folder / "metrics.csv").exists()
        }
        ended = {s: json.loads((folder / "summary.json").read_text()) for s, folder in runs.items()
                 if (folder / "summary.json").exists()}  # fmt: skip
        failed = dict.fromkeys(runs.keys() - ended.keys(), "not finished")
        random = {s: random_return(summary) for s, summary in ended.items()}
        devices = ", ".join(sorted({summary["device"] for summary in ended.values()}))
        minutes = {s: r[-1]["time/wall_s"] / 60 for s, r in rows.items() if r}
        curve = studies.CURVES.get(script, "") if as_published(script, args) else ""
        curves.append(Curve(label, task, curve, rows, failed, random, minutes, devices))
    return curves


def load(folders):
    """The Curves of everything below these folders."""
    metas = sorted({path.parent for folder in folders for path in folder.rglob("meta.json")})
    runs = sorted(
        {
            path.parent
            for folder in folders
            for path in folder.rglob("args.json")
            if not any(meta in path.parents for meta in metas)
        }
    )
    curves, names = [collected(folder) for folder in metas], [folder.name for folder in metas]
    labels = [(c.env_id, c.label) for c in curves]
    curves = [
        c._replace(label=f"{c.label} ({name})") if labels.count((c.env_id, c.label)) > 1 else c
        for c, name in zip(curves, names, strict=True)
    ]  # of different studies
    return in_order(curves + loose(runs))


def in_order(curves):
    """As a study has them, if one has all their labels."""
    for study in studies.STUDIES.values():
        labels = [label.removesuffix(v.env_id).strip() for label, v in study.items()]
        if {c.label for c in curves} <= set(labels):
            return sorted(curves, key=lambda c: labels.index(c.label))
    return curves


def published_rows():
    """All rows of published/*.csv."""
    paths = sorted(PUBLISHED.glob("*.csv"))
    return [row for path in paths for row in csv.DictReader(path.read_text().splitlines())]


def kind(source):
    """What a published curve consists of, if that is not the mean policy's evaluations."""
    kinds = {"training returns": "training returns", "stochastic evaluation": "sampled policy",
             "read off the plot": "read off a plot"}  # fmt: skip
    return "".join(f", {text}" for words, text in kinds.items() if words in source)


def published(name, env_id):
    """Frames, means, standard deviations (NaN if unknown) and a description of a published curve,
    or None."""
    rows = [row for row in published_rows() if (row["algorithm"], row["env_id"]) == (name, env_id)]
    if not rows:
        return None
    x, y, std = (
        np.array([float(row[key] or "nan") for row in rows]) for key in ("frames", "mean", "std")
    )
    return x, y, std, f"{name}, n = {rows[0]['n_seeds']}{kind(rows[0]['source'])}"


def whole(value):
    """Rounded, and never "-0"."""
    return str(round(value))


def number(low_high, value):
    """A value with its interval, if there is one."""
    low, high = low_high
    return f"{whole(value)} ({whole(low)} to {whole(high)})"


def summary_table(curves):
    """Markdown: a row per curve, and a section of failures."""
    least = any(0 < len(c.rows) < ENOUGH for c in curves)
    note = " (least to largest, where there are fewer than five seeds)" * least
    columns = ["task", "curve", "seeds", "frames", "return at the end" + note, "of each seed",
               "mean over the run", "random policy (PEARL: no context)", "published there",
               "minutes"]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "| - " * len(columns) + "|"]
    for c in curves:
        seeds, ends = sorted(c.rows.keys() | c.failed.keys(), key=str), []
        for seed in seeds:
            y = c.points(seed)[1] if seed in c.rows else []
            ends.append((whole(y[-1]) if len(y) else "-") + " (failed)" * (seed in c.failed))
        cells = [c.env_id, c.label, str(len(seeds)), "-", "-", ", ".join(ends), "-", "-", "-", "-"]
        if c.table():
            x, y = c.table()
            area = np.trapezoid(y, x, axis=1) / (x[-1] - x[0]) if len(x) > 1 else y[:, 0]
            cells[3] = f"{x[-1]:,.0f}"
            cells[4], cells[6] = (number(interval(v), iqm(v)) for v in (y[:, -1], area))
            reference = published(c.published, c.env_id)
            if reference and reference[0][0] <= x[-1] <= reference[0][-1]:
                cells[8] = whole(np.interp(x[-1], *reference[:2]))
        if c.random:
            cells[7] = whole(np.mean(list(c.random.values())))
        if c.minutes:
            cells[9] = f"{np.median(list(c.minutes.values())):.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    for c in curves:
        for seed, why in sorted(c.failed.items(), key=str):
            lines.append(f"\nFailed: {c.label}, {c.env_id}, seed {seed}: {why}")
    machines = sorted({c.hardware for c in curves} - {""})
    return "\n".join([*lines, *(f"\nHardware: {machine}." for machine in machines)])


def comparisons(curves):
    """Markdown: which pairs of curves on a task differ at the end. Tests replace
    bootstrapped intervals here: with five seeds these are too narrow, and find a difference among
    66 pairs of equal curves every other time."""
    pairs, lines, tested = list(itertools.combinations(curves, 2)), [], []
    for a, b in [(a, b) for a, b in pairs if a.env_id == b.env_id]:
        name, (one, two) = f"{a.env_id}: {a.label} and {b.label}", (a.table(), b.table())
        n = min(len(c.rows) for c in (a, b))
        if a.failed or b.failed:
            lines.append(f"- {name}: not compared, as seeds failed.")
        elif n < ENOUGH or not (one and two):
            lines.append(f"- {name}: {n} seeds are too few to compare; at least {ENOUGH}.")
        elif abs(one[0][-1] - two[0][-1]) > 0.01 * one[0][-1]:  # more than a short episode
            lines.append(
                f"- {name}: not compared, as they end at {one[0][-1]:,.0f} and "
                f"{two[0][-1]:,.0f} frames."
            )
        else:
            ends = one[1][:, -1], two[1][:, -1]
            tested.append((a, b, *map(iqm, ends), scipy.stats.mannwhitneyu(*ends).pvalue))
    adjusted = scipy.stats.false_discovery_control([p for *_, p in tested]) if tested else []
    found = [pair for pair, q in zip(tested, adjusted, strict=True) if q <= 0.05]
    if tested:
        lines.append(
            "- Mann-Whitney tests at a false discovery rate of 5 % (Benjamini and Hochberg): "
            f"{len(found)} of {len(tested)} pairs differ."
        )
    for a, b, one, two, p in sorted(found, key=lambda pair: (pair[0].env_id, pair[-1])):
        (more, better), (less, worse) = sorted([(one, a.label), (two, b.label)], reverse=True)
        text = f"{better} ({whole(more)}) is better than {worse} ({whole(less)})"
        lines.append(f"- {a.env_id}: {text}, p = {p:.3f}.")
    return "\n".join(lines)


def over_tasks(curves):
    """Markdown: the IQM of each label (and its flags) over all tasks of the suite and all seeds,
    where there are several tasks and all runs ended; a task twice is another experiment."""
    lines, groups = [], {}
    for c in curves:
        if ":" not in c.env_id and not by_context(c)[0].size:  # returns from 0 to 1000
            groups.setdefault((c.label, c.flags), []).append(c)
    for (label, _), group in groups.items():
        tasks = [c.env_id for c in group]
        if len(group) == len(set(tasks)) > 1 and all(c.table() and not c.failed for c in group):
            ends = [c.table()[1][:, -1] for c in group]
            value = number(interval(*ends), iqm(*ends))
            lines.append(f"- {label}, {', '.join(tasks)}, {sum(map(len, ends))} runs: {value}")
    return "\n".join(lines)


def panels(tasks):
    """A figure with titled axes for each task, two in a row, as wide as a README shows."""
    from matplotlib.figure import Figure

    columns, rows = min(len(tasks), 2), -(-len(tasks) // 2)
    figure = Figure((5 * columns, 3.6 * rows), layout="constrained", dpi=100)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(tasks))]
    for axis, task in zip(axes, tasks, strict=True):
        axis.set(title=task, ylabel="return")
        axis.grid(alpha=0.3)
    return figure, axes


def colour_of(curves):
    """{label: colour}, the same in all panels."""
    labels = dict.fromkeys(curve.label for curve in curves)
    return dict(zip(labels, itertools.cycle(COLOURS), strict=False))


def is_crowded(curves):
    """Whether a panel has more curves than there are colours."""
    return len(curves) > len(COLOURS)


def seeds_and_band(curve):
    """What a legend says of a curve's seeds and band."""
    text = f"{len(curve.rows.keys() | curve.failed.keys())} seeds"
    text += f", {len(curve.failed)} failed" * bool(curve.failed)
    band = "least to largest" if len(curve.rows) < ENOUGH else "95 % interval"
    return text + f", band: {band}" * (len(curve.rows) > 1)


def draw(curves, path, per_script=False):
    """One panel per task, or per script and task."""
    groups = {}
    for c in curves:
        title = f"{c.label.split()[0]}, {c.env_id}" if per_script else c.env_id
        groups.setdefault(title, []).append(c)
    figure, axes = panels(groups)
    colours = colour_of(curves)
    for axis, here in zip(axes, groups.values(), strict=True):
        # what all curves share is the legend's title
        one_note = len(here) > 1 and len({seeds_and_band(c) for c in here}) == 1
        for c in here:
            colour = colours[c.label]
            style = ("-", (0, (4, 1)), (0, (1, 1)))[here.index(c) // len(COLOURS) % 3]
            drawn = c.table()
            for seed in c.rows if not is_crowded(here) else ():
                x, y = c.points(seed)
                axis.plot(x, y, color=colour, lw=0.7, alpha=0.5)
                if seed in c.failed and len(x):
                    axis.plot(x[-1], y[-1], "x", color=colour, ms=9, mew=2)
            label = c.label if one_note else f"{c.label} ({seeds_and_band(c)})"
            if drawn:
                x, y = drawn
                label = textwrap.fill(label, 38)
                axis.plot(x, iqm(y.T), color=colour, lw=2.5, ls=style, label=label)
                if not is_crowded(here):
                    axis.fill_between(
                        x, *interval(y.T), color=colour, alpha=0.6 / max(4, len(here)), lw=0
                    )
            else:
                axis.plot([], [], color=colour, lw=2.5, label=textwrap.fill(label, 38))
            reference = published(c.published, c.env_id)
            if reference:
                end = max([c.points(s)[0][-1] for s in c.rows if c.points(s).size], default=np.inf)
                keep = reference[0] <= 1.05 * end
                x, y, std = (values[keep] for values in reference[:3])
                label = f"published: {reference[3]}"
                if not np.isnan(std).all():
                    label += ", band: standard deviation"
                    axis.fill_between(x, y - std, y + std, color=colour, alpha=0.07, lw=0)
                axis.plot(x, y, color=colour, lw=1.5, ls="--", label=textwrap.fill(label, 38))
        rows = [row for c in here for run in c.rows.values() for row in run]
        if any("eval/return_0" in row for row in rows):  # a PEARL without context is its own
            for c in here:
                if c.random:
                    y = np.mean(list(c.random.values()))
                    axis.axhline(y, color=colours[c.label], lw=1.2, ls=":")
            axis.plot([], [], color="grey", lw=1.2, ls=":", label="without context, at the end")
        elif randoms := [value for c in here for value in c.random.values()]:
            axis.axhline(np.mean(randoms), color="grey", lw=1.2, ls=":", label="random policy")
        axis.set(xlabel="frames", xlim=(0, None))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e3:g}k" if x < 1e6 else f"{x / 1e6:g}M")
        title = seeds_and_band(here[0]) if one_note else ""
        if is_crowded(here):
            title = title.partition(", band")[0]
            low, high = axis.get_ylim()
            axis.set_ylim(low, 2 * high - low)  # room for the legend
        axis.legend(title=title, fontsize=8, title_fontsize=8, ncols=2 if len(here) > 4 else 1)
    figure.savefig(path)


def draw_ends(curves, path):
    """Returns at the end of the runs, a row for each curve, where they are many; a panel per task.
    Gives whether it has drawn."""
    tasks = list(dict.fromkeys(c.env_id for c in curves if c.table()))
    if not any(is_crowded([c for c in curves if c.env_id == task]) for task in tasks):
        return False
    figure, axes = panels(tasks)
    for axis, task in zip(axes, tasks, strict=True):
        here = [c for c in curves if c.env_id == task and c.table()]
        for row, c in enumerate(here):
            ends = c.table()[1][:, -1]
            axis.plot(
                ends, [row] * len(ends), "o", color=COLOURS[0], ms=4, alpha=0.4, label="seeds"
            )
            label = "95 % interval" if len(ends) >= ENOUGH else "least to largest"
            axis.plot(interval(ends), [row, row], color=COLOURS[0], lw=2, label=label)
            axis.plot(iqm(ends), row, "D", color=COLOURS[0], ms=6, label="interquartile mean")
        if randoms := [value for c in here for value in c.random.values()]:
            axis.axvline(np.mean(randoms), color="grey", lw=1.2, ls=":", label="random policy")
        axis.set(xlabel="return at the end", ylabel=None, ylim=(len(here) - 0.5, -0.5))
        axis.set_yticks(range(len(here)), [c.label for c in here])
    known = {label: line for line, label in zip(*axes[0].get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known, loc="outside lower center", fontsize=8, ncols=4)
    figure.savefig(path)
    return True


def by_context(curve, prefix="eval/return_"):
    """Numbers k of trajectories of context (n,), and PEARL's returns with them at the end of the
    runs (seeds, n)."""
    last = [[r for r in rows if f"{prefix}0" in r][-1:] for rows in curve.rows.values()]
    last = [row[0] for row in last if row]
    ks = [k for k in range(20) if last and all(f"{prefix}{k}" in row for row in last)]
    return np.array(ks), np.array([[row[f"{prefix}{k}"] for k in ks] for row in last])


def adaptation(curves, path):
    """PEARL's return by number of trajectories of context at the end of the runs, a panel per task;
    dashed: the same agents with the true state in place of the CNN's estimate. Gives whether it has
    drawn."""
    curves = [c for c in curves if by_context(c)[0].size]
    tasks = list(dict.fromkeys(c.env_id for c in curves))
    if not tasks:
        return False
    figure, axes = panels(tasks)
    colours = colour_of(curves)
    one_note = len({seeds_and_band(c) for c in curves}) == 1
    kinds = ("eval/return_", "o-", ""), ("eval/true_state_return_", "s--", ", true state")
    for axis, task in zip(axes, tasks, strict=True):
        here = [c for c in curves if c.env_id == task]
        lines = [(c, *kind) for c in here for kind in kinds if by_context(c, kind[0])[0].size]
        for i, (c, prefix, style, note) in enumerate(lines):
            ks, y = by_context(c, prefix)
            x = ks + 0.05 * (i - (len(lines) - 1) / 2)  # side by side
            middle, colour = iqm(y.T), colours[c.label]
            ends = np.abs(interval(y.T) - middle)
            label = f"{c.label}{note}" + f" ({seeds_and_band(c)})" * (not one_note)
            label = textwrap.fill(label, 38)
            axis.errorbar(x, middle, ends, fmt=style, color=colour, lw=1.5, ms=4, label=label)
            axis.plot(x, y.T, ".", color=colour, ms=3, alpha=0.5)
        axis.set(xlabel="trajectories of context")
        axis.xaxis.get_major_locator().set_params(integer=True)
    known = {}
    for axis in axes:
        known |= {name: line for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    title = seeds_and_band(curves[0]).replace("band", "line") if one_note else ""
    place = {"loc": "outside lower center", "ncols": 2 * len(axes[:2])}
    figure.legend(known.values(), known, title=title, fontsize=8, title_fontsize=8, **place)
    figure.savefig(path)
    return True


def report(curves, per_script=False):
    """The text of report.md. Scripts whose sizes differ are not compared."""
    parts = [summary_table(curves)]
    for title, text in (
        ("All tasks together", over_tasks(curves)),
        ("Comparisons", "" if per_script else comparisons(curves)),
    ):
        parts += [f"**{title}**", text] if text else []
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="where the report goes (the first folder)")
    parser.add_argument("--published", metavar="NAME", help="a curve of published/, beside all")
    parser.add_argument(
        "--per-script", action="store_true", help="a panel each, as where their sizes differ"
    )
    args = parser.parse_args()
    curves, out = load(args.folders), args.out or args.folders[0]
    if args.published:
        known = sorted({row["algorithm"] for row in published_rows()})
        if args.published not in known:
            parser.error(f"published/ has {', '.join(known)} and not {args.published}")
        curves = [c._replace(published=args.published) for c in curves]
    if not curves:
        sys.exit(f"error: no meta.json and no run folders in {', '.join(map(str, args.folders))}")
    out.mkdir(parents=True, exist_ok=True)
    draw(curves, out / "curves.png", args.per_script)
    extra = "\n![Returns at the end](ends.png)\n" * draw_ends(curves, out / "ends.png")
    extra += "\n![Adaptation](adaptation.png)\n" * adaptation(curves, out / "adaptation.png")
    text = report(curves, args.per_script)
    (out / "report.md").write_text(f"![Learning curves](curves.png)\n{extra}\n{text}")
    print(text)


if __name__ == "__main__":
    main()
