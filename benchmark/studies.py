"""The experiments of the papers and studies behind the scripts, by name.

    python benchmark/studies.py                          names of the studies
    python benchmark/studies.py gaara-figure-3           the commands of one
    python benchmark/run.py --study gaara-figure-3 --seeds 1 2 3

What a variant shows stands in benchmark/notes/, on the page of its script.
"""

import sys
from typing import NamedTuple


class Variant(NamedTuple):
    """One curve: a script on a task with flags, and the published curve beside it, if any (its
    column `algorithm` in published/*.csv)."""

    script: str
    env_id: str
    flags: str = ""
    published: str = ""


TASKS = "cheetah-run", "walker-walk", "finger-spin", "ball_in_cup-catch"
CURVES = {"sac_ae": "SAC+AE", "sac_gaara": "SAC+GAARA (anneal to 0.5)",
          "slac": "SLAC (decoder variance 0.1)", "dreamerv2": "DreamerV2"}  # fmt: skip
LENGTH = "--total-frames 1_440_000"  # of the report's runs
BASELINE = "--contrast none --image-size 84 --replay-capacity 100000"  # its SAC+AE
FINAL, REPORT = "SAC+GAARA (anneal to 0.5)", "SAC+AE (GAARA report baseline)"
LECTURE = "--smoke --threads 1 --no-video"  # minutes per run on one core
DREAMER = "--total-frames 250000"
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
SMALL_EFFICIENCY = EFFICIENCY | {
    "replay ratio": "--updates-per-step 1",  # 0.5 is the smoke run's
    "resets": "--reset transition --reset-every-updates 800 --catch-up-updates 100",
    "shift": "--shift 2",
}
# What stands between images and PEARL, by Marshall & Khasar.
DESIGNS = {
    "states": "--obs-mode state", "states, oracle": "--obs-mode state --oracle",
    "design 1": "--obs-mode cnn-test", "design 2": "--obs-mode cnn",
    "design 3": "--obs-mode cnn-rl", "end to end": "--obs-mode critic",
    "end to end, reconstruction": "--obs-mode ae",
}  # fmt: skip


def without(parts, name):
    """All flags of {part: flags} but those of one part."""
    return " ".join(flags for part, flags in parts.items() if part != name)


def each(script, env_id, flags, common=""):
    """{label: Variant} of {label: its flags} and flags that all of them have."""
    return {k: Variant(script, env_id, f"{common} {v}".strip()) for k, v in flags.items()}


def on(tasks, script, flags, common):
    """The variants of each() on several tasks, which the labels name."""
    variants = {}
    for task in tasks:
        for label, variant in each(script, task, flags, common).items():
            variants[f"{label} {task}"] = variant
    return variants


def gaara(env_id, curves):
    """Variants of {label: (its flags, published curve)} at the report's length."""
    return {label: Variant("sac_gaara", env_id, f"{flags} {LENGTH}".strip(), published)
            for label, (flags, published) in curves.items()}  # fmt: skip


STUDIES = {
    "curves": {f"{script} {env_id}": Variant(script, env_id, "", published)
               for env_id in TASKS for script, published in CURVES.items()},  # GAARA: no cup
    "sac-ae-alternation": each("sac_ae", "cheetah-run", {
        "SAC+AE": "",
        **{f"alternating, every {n}": f"--freeze-encoder --decoder-every-updates {n}"
           for n in (1, 10, 100, 1000)},
        **{f"joint, every {n}": f"--decoder-every-updates {n}" for n in (10, 100, 1000)},
        "random features": "--freeze-encoder --reconstruction none",
        "no reconstruction": "--reconstruction none",
    }),
    "sac-ae-vae": each("sac_ae", "cheetah-run", {
        "SAC+AE": "",
        **{f"beta {beta}": f"--reconstruction vae --kl-weight {weight} --latent-weight 0"
           for beta, weight in ((0.01, "3.15e-7"), (0.1, "3.15e-6"), (1, "3.15e-5"))},
        "actor gradient": "--reconstruction vae --latent-weight 0 --actor-trains-encoder",
    }),
    "lecture-sac-ae": on(("finger-spin", "cheetah-run"), "sac_ae", {
        "SAC+AE": "", "no reconstruction": "--reconstruction none",
        "SAC+VAE": "--reconstruction vae --kl-weight 1.39e-5 --latent-weight 0",  # beta 0.1
        "SAC from states": "--obs state --reconstruction none --frame-stack 1",
        "random encoder": "--freeze-encoder --reconstruction none",
        "alternating, every 100": "--freeze-encoder --decoder-every-updates 100",
        "alternating, every 1": "--freeze-encoder",
    }, f"{LECTURE} --eval-every-frames 12000"),
    "gaara-figure-3": gaara("cheetah-run", {
        "SAC+AE": (BASELINE, REPORT), "annealed to 0.5": ("", FINAL),
        "annealed to 0.2": ("--contrast-floor 0.2", "SAC+GAARA (anneal to 0.2)"),
        "annealed to 0.06": ("--contrast-floor 0.06 --replay-capacity 100000",
                             "SAC+GAARA (anneal to 0.06)"),
        "not annealed": ("--contrast-floor 1", "SAC+GAARA (no annealing)"),
    }),
    **{f"gaara-figure-{figure}": gaara(env_id, {"SAC+AE": (BASELINE, REPORT), "final": ("", FINAL)})
       for figure, env_id in ((4, "cheetah-run"), (5, "walker-walk"), (6, "finger-spin"))},
    "gaara-figure-7": gaara("cheetah-run", {"release 1": (
        "--obs-crop random --contrast-step joint --no-train-similarity --contrast-weight 2e-8 "
        "--replay-capacity 100000", "SAC+GAARA release 1 (combined loss)")}),
    "gaara-figure-8": gaara("cheetah-run", {"release 2": (
        "--obs-crop random", "SAC+GAARA release 2 (random-crop anchors)")}),
    "gaara-figure-9": gaara("cheetah-run", {"decoder as discriminator": (
        "--contrast discriminator --contrast-floor 1", "SAC+GAARA decoder as discriminator")}),
    "gaara-annealing": gaara("cheetah-run", {
        "published": ("", FINAL), "not annealed": ("--contrast-floor 1", ""),
        "learning rate": ("--anneal lr", ""),
        "one joint loss": ("--contrast-step joint --contrast-weight 1e-3 --contrast-floor 0 "
                           "--contrast-decay 2e-9", ""),
    }),
    # The weight falls from 1 to 0.06 within two thirds of a run; at 1e-6 it would stay at 1.
    "lecture-gaara": each("sac_gaara", "finger-spin", {
        "annealed to 0.5": "", "annealed to 0.2": "--contrast-floor 0.2",
        "annealed to 0.06": "--contrast-floor 0.06", "not annealed": "--contrast-floor 1",
        "learning rate annealed": "--anneal lr",
        "one joint loss": "--contrast-step joint --contrast-weight 1e-3 --contrast-floor 0 "
                          "--contrast-decay 4.2e-7",
        "release 1": "--obs-crop random --contrast-step joint --no-train-similarity "
                     "--contrast-weight 2e-8",
        "release 2": "--obs-crop random",
        "decoder as discriminator": "--contrast discriminator --contrast-floor 1",
        "SAC+AE": "--contrast none --image-size 40",
        "CURL": "--reconstruction none --obs-crop random --no-latent-tanh --contrast-floor 1 "
                "--pretrain-updates 1",
        "RAD": "--reconstruction none --contrast none --obs-crop random",
    }, f"{LECTURE} --total-frames 30000 --eval-every-frames 10000 --contrast-decay 4.2e-4"),
    "slac-a-model": each("slac", "cheetah-run", {
        "fully stochastic": "", "partially stochastic": "--z2 deterministic",
        "fully deterministic": "--z1 deterministic --z2 deterministic",
        "VAE, two latents": "--no-temporal", "VAE, one latent": "--z2 none --no-temporal",
        "filter, one latent": "--z2 none --updates-per-step 3",
        "recurrent state": "--z2 recurrent",
    }),
    "slac-b-inputs": each("slac", "cheetah-run", {
        "actor: history, critic: latent": "", "both: history": "--critic-input history",
        "both: latent": "--actor-input latent",
        "actor: latent, critic: history": "--actor-input latent --critic-input history",
    }),
    "slac-c-pretraining": each("slac", "cheetah-run", {
        f"{n:,} updates": f"--pretrain-updates {n}" for n in (0, 10_000, 50_000, 100_000)}),
    "slac-d-updates": each("slac", "cheetah-run", {
        f"{n} per step": f"--updates-per-step {n}" for n in (1, 2, 3)}),
    "lecture-slac": each("slac", "walker-stand", {
        "SLAC": "", "partially stochastic": "--z2 deterministic",
        "fully deterministic": "--z1 deterministic --z2 deterministic",
        "VAE, two latents": "--no-temporal", "VAE, one latent": "--z2 none --no-temporal",
        "filter, one latent": "--z2 none", "recurrent state": "--z2 recurrent",
        "actor and critic: history": "--critic-input history",
        "actor and critic: latent": "--actor-input latent",
        "actor: latent, critic: history": "--actor-input latent --critic-input history",
        "no pretraining": "--pretrain-updates 0", "1000 updates before": "--pretrain-updates 1000",
    }, f"{LECTURE} --total-frames 12000"),
    "lecture-slac-updates": each("slac", "walker-stand", {
        f"{n} per step": f"--updates-per-step {n}" for n in (1, 2, 3)},
        f"{LECTURE} --total-frames 8000"),
    "slac-gym": {name: Variant(
        "slac", f"benchmark/gym_tasks.py:{name}", f"--action-repeat {repeat} "
        f"--warmup-steps 10000 --total-frames {frames}", "SLAC (OpenAI Gym)")
        for name, repeat, frames in (("half_cheetah", 1, 1_000_000), ("walker2d", 4, 4_000_000),
                                     ("hopper", 2, 2_000_000), ("ant", 4, 4_000_000))},
    "dreamerv2-replay-ratio": each("dreamerv2", "cheetah-run", {
        **{f"{n} updates per step": f"--updates-per-step {n}" for n in (0.2, 0.5, 1, 2)},
        "model 1, behavior 0.2": "--updates-per-step 1 --behavior-every-updates 5",
        "model 0.2, behavior 1": "--updates-per-step 1 --model-every-updates 5",
    }, DREAMER),
    "dreamerv2-resets": each("dreamerv2", "cheetah-run", {
        kind: f"--reset {kind}" for kind in ("none", "transition", "actor-critic", "all")},
        f"{DREAMER} --updates-per-step 1 --reset-every-updates 10000"),
    "dreamerv2-augmentations": each("dreamerv2", "cheetah-run", {
        "none": "", **{k: EFFICIENCY[k] for k in ("shift", "contrastive", "SPR", "masked")},
    }, DREAMER),
    "dreamerv2-efficiency": each("dreamerv2", "cheetah-run", {
        "none": "",
        "all": without(EFFICIENCY, None),
        **{f"all but {name}": without(EFFICIENCY, name) for name in EFFICIENCY},
        **{f"{name} alone": flags for name, flags in EFFICIENCY.items()},
    }, DREAMER),
    "lecture-dreamerv2": each("dreamerv2", "cartpole-swingup", {
        "none": "", "replay ratio halved": "--updates-per-step 0.25",
        "all": without(SMALL_EFFICIENCY, None),
        **{f"all but {name}": without(SMALL_EFFICIENCY, name) for name in SMALL_EFFICIENCY},
        **{f"{name} alone": flags for name, flags in SMALL_EFFICIENCY.items()},
    }, f"{LECTURE} --total-frames 12000 --eval-every-frames 4000"),
    "pearl-velocities": each("pearl_pixels", "cheetah-vel", {
        "PEARL from states": "", "oracle": "--oracle"},
        "--obs-mode state --total-frames 308000 --initial-steps 400 --prior-steps 200 "
        "--extra-steps 200 --updates-per-iteration 300 --meta-batch 8 --latent-dim 3 "
        "--gamma 0.95 --lr 1e-3 --tau 0.01 --hidden-dim 128 --context-dim 128 "
        "--context-trajectories 2 --eval-every-frames 50000 --no-video"),
    "pearl-designs-smoke": each("pearl_pixels", "pendulum-goal2", {
        "design 1, cnn-test": "--obs-mode cnn-test", "design 2, cnn": "--obs-mode cnn",
        "design 3, cnn-rl": "--obs-mode cnn-rl"}, "--smoke"),
    "pearl-designs": each("pearl_pixels", "cheetah-vel", DESIGNS),
    "lecture-pearl": {
        **on(["pendulum-goal2"], "pearl_pixels", DESIGNS, f"{LECTURE} --total-frames 22000"),
        **on(["pendulum-goal"], "pearl_pixels", DESIGNS,
             f"{LECTURE} --total-frames 16500 --eval-every-frames 8300 --eval-episodes 8"),
    },
}  # fmt: skip


def commands(study):
    """{label: command line} of a study."""
    return {
        label: f"python {v.script}.py --env-id {v.env_id} {v.flags}".strip()
        for label, v in STUDIES[study].items()
    }


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    if sys.argv[1:] and sys.argv[1] not in STUDIES:
        sys.exit(f"error: no study {sys.argv[1]}, but {', '.join(STUDIES)}")
    for line in commands(sys.argv[1]).items() if sys.argv[1:] else STUDIES:
        print(line if isinstance(line, str) else f"{line[1]}  # {line[0]}")
