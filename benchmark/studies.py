"""The experiments of the papers and studies behind the scripts, by name, as command lines.

    python benchmark/studies.py                        # names of the studies
    python benchmark/studies.py dreamerv2-efficiency   # the commands of one
"""

import sys

# What Bednarz's study puts together, and DreamerV2 can do without. The sizes are the studies' own
# where they have one; how far resets are apart and the weights of the losses are ours.
EFFICIENCY = {
    "replay ratio": "--updates-per-step 1",
    "resets": "--reset transition --reset-every-updates 10000 --reset-alpha 0.8",
    "shift": "--shift 3",
    "contrastive": "--infonce-weight 1",
    "SPR": "--spr-weight 1",
    "masked": "--mask-ratio 0.5",
}


def without(parts, name):
    """All flags of {part: flags} but those of one part."""
    return " ".join(flags for part, flags in parts.items() if part != name)


STUDIES = {  # name: (script, flags of every run, {variant: its flags})
    "dreamerv2-replay-ratio": ("dreamerv2", "--env-id cheetah-run --total-frames 250000", {
        **{f"{n} updates per step": f"--updates-per-step {n}" for n in (0.2, 0.5, 1, 2)},
        "model 1, behavior 0.2": "--updates-per-step 1 --behavior-every-updates 5",
        "model 0.2, behavior 1": "--updates-per-step 1 --model-every-updates 5",
    }),
    "dreamerv2-resets": ("dreamerv2", "--env-id cheetah-run --total-frames 250000 "
                         "--updates-per-step 1 --reset-every-updates 10000", {
        kind: f"--reset {kind}" for kind in ("none", "transition", "actor-critic", "all")}),
    "dreamerv2-efficiency": ("dreamerv2", "--env-id cheetah-run --total-frames 250000", {
        "none": "",
        "all": without(EFFICIENCY, None),
        **{f"all but {name}": without(EFFICIENCY, name) for name in EFFICIENCY},
        **{f"{name} alone": flags for name, flags in EFFICIENCY.items()},
    }),
}  # fmt: skip


def commands(study):
    """{variant: command line} of a study."""
    script, common, variants = STUDIES[study]
    return {name: f"python {script}.py {common} {flags}".strip()
            for name, flags in variants.items()}


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] not in STUDIES:
        sys.exit(f"error: no study {sys.argv[1]}, but {', '.join(STUDIES)}")
    for line in commands(sys.argv[1]).items() if sys.argv[1:] else STUDIES:
        print(line if isinstance(line, str) else f"{line[1]}  # {line[0]}")
