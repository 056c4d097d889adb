"""Two scripts side by side: an HTML page with what differs and a few lines around it.

python benchmark/diff.py sac_ae slac                 writes benchmark/diffs/sac_ae-slac.html
python benchmark/diff.py                             all pairs that benchmark/README.md names
"""

import argparse
import difflib
import html
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIFFS = ROOT / "benchmark" / "diffs"  # the pages, and their style sheet
PAIRS = [
    ("sac_ae", "sac_gaara"),
    ("sac_ae", "slac"),
    ("slac", "dreamerv2"),
    ("sac_ae", "pearl_pixels"),
]
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{a} and {b}</title>
<link rel="stylesheet" href="style.css"></head><body>
<h1>{a} and {b}</h1>
<p>{counts}. Green: only in {b}. Red: only in {a}. Yellow: changed within a line.</p>
{table}
</body></html>
"""


def counts(a, b):
    """Numbers of added and removed lines and of hunks, as `diff -u` prints them."""
    lines = list(difflib.unified_diff(a, b, lineterm=""))[2:]
    return tuple(sum(line.startswith(sign) for line in lines) for sign in "+-@")


def read(name):
    """A script's lines."""
    return (ROOT / f"{name}.py").read_text().splitlines()


def page(a, b):
    """The HTML page of two scripts, by their names without .py."""
    one, two = read(a), read(b)
    table = difflib.HtmlDiff().make_table(one, two, f"{a}.py", f"{b}.py", context=True, numlines=3)
    table = re.sub(r' (nowrap="nowrap"|id="[^"]*"|rules="\w+"|cell\w+="\d"|frame="\w+")', "", table)
    table = re.sub(r'<(t[dh]) class="diff_next">.*?</\1>', "", table).replace("&nbsp;", " ")
    table = re.sub(r"<colgroup></colgroup>\s*", "", table)
    table = table.replace("<thead>", '<col class="n"><col><col class="n"><col><thead>')
    added, removed, hunks = counts(one, two)
    text = f"{len(one)} and {len(two)} lines: {added} added, {removed} removed, in {hunks} hunks"
    return PAGE.format(a=html.escape(f"{a}.py"), b=html.escape(f"{b}.py"), counts=text, table=table)


def write(pairs, out):
    """Writes the pages of these pairs of scripts into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() != DIFFS:
        shutil.copy(DIFFS / "style.css", out)
    for a, b in pairs:
        path = out / f"{a}-{b}.html"
        path.write_text(page(a, b))
        print(path, *counts(read(a), read(b)))


def main():
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pair", nargs="*", metavar="SCRIPT", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=DIFFS)
    args = parser.parse_args()
    args.pair = [Path(name).stem for name in args.pair]  # slac, slac.py or a path
    if len(args.pair) not in (0, 2) or not set(args.pair) <= set(names):
        parser.error(f"two of {', '.join(names)}, or none for all pairs")
    write([args.pair] if args.pair else PAIRS, args.out)


if __name__ == "__main__":
    main()
