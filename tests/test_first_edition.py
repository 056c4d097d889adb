"""Ten updates of tiny agents give the numbers of the first edition, which first_edition.json holds.

The weights are set by their names and the random numbers by seeds, so that neither the order in
which an agent makes its networks nor anything that another test did has an effect.

    pytest -m deep tests/test_first_edition.py          # the scripts beside tests/
    python tests/test_first_edition.py --check DIR      # the scripts in DIR
    python tests/test_first_edition.py --record DIR     # writes the file anew (its tiny_agent then
                                                        # has to build the first edition's agents)
"""

import importlib
import json
import math
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

pytestmark = pytest.mark.deep

COMMIT = "c9e1325"  # the first edition
FILE = Path(__file__).with_name("first_edition.json")
UPDATES = 10
# Two threads, other kernels for convolutions, or first weights that differ by 1e-7 of themselves
# make up to a quarter of these differences. Rarely they make larger ones, where a ReLU without a
# gradient gets a tiny one, which Adam turns into whole steps.
METRIC_TOLERANCE = 3e-5  # relative; besides, 1e-6 absolute
TENSOR_TOLERANCE = 2e-5  # of a tensor's norm

# Small networks; and the terms that are tiny as published are made large enough to be seen.
CONVS = "--image-size 24 --filters 4 --conv-strides 2 2 --latent-weight 1e-2 "
CONVS += "--decoder-weight-decay 1e-2 "
SAC = "--device cpu --pretrain-updates 10 --batch-size 4 --hidden-dim 16 --alpha-lr 1e-2 " + CONVS
TINY = {
    "sac_ae": SAC,
    "sac_gaara": SAC + "--crop-size 20",
    "slac": "--device cpu --image-size 16 --model-batch-size 2 --sac-batch-size 4 --channels 4 8 "
    "--actions 3 --feature-dim 8 --z1-dim 4 --z2-dim 8 --hidden-dim 16",
    "dreamerv2": "--device cpu --image-size 13 --decoder-kernels 5 5 --batch-size 2 "
    "--sequence-length 6 --depth 4 --categoricals 3 --classes 4 --deter-dim 8 --hidden-dim 8 "
    "--head-dim 8 --head-layers 2 --horizon 3 --free-nats 0 --weight-decay 1e-4",
    "pearl_pixels": "--device cpu --env-id pendulum-goal2 --total-frames 350 --trajectory-steps 25 "
    "--initial-steps 25 --tasks-per-iteration 2 --prior-steps 25 --extra-steps 25 --meta-batch 2 "
    "--batch-size 4 --context-size 8 --hidden-dim 16 --context-dim 16 --feature-dim 8 "
    "--latent-dim 2 " + CONVS,
}
RESET = "--reset all --reset-every-updates 5 --catch-up-updates 0 "
CASES = [  # the script and its flags; those of test_gpu.py and one more
    ("sac_ae", "--pretrain-updates 0 --decoder-every-updates 3"),
    ("sac_ae", "--reconstruction vae --kl-weight 1e-3 --actor-trains-encoder"),
    ("sac_gaara", "--pretrain-updates 0 --contrast-decay 0.05"),
    ("sac_gaara", "--pretrain-updates 0 --contrast-decay 0.05 --anneal lr"),
    ("sac_gaara", "--contrast-step joint --contrast-decay 0.05 --obs-crop random"),
    ("slac", "--pretrain-updates 5"),
    ("slac", "--pretrain-updates 0 --z2 recurrent --critic-input history"),
    ("dreamerv2", ""),
    ("dreamerv2", "--model-every-updates 2 --target-every-updates 3 --shift 2"),
    ("dreamerv2", RESET + "--discount-head --infonce-weight 1 --spr-weight 1 --mask-ratio 0.5"),
    ("dreamerv2", "--kl-scale 1000 --free-nats 0.13"),  # clips gradients; some KLs are constant
    ("pearl_pixels", ""),
    ("pearl_pixels", "--obs-mode state --critic q --next-obs-in-context"),
    ("pearl_pixels", "--obs-mode cnn-rl"),
    ("pearl_pixels", "--obs-mode cnn-test --oracle"),
    ("pearl_pixels", "--obs-mode ae"),
]

# The gradient of DreamerV2's actor changes on purpose, and with the actor what the critic learns
# from. Of these metrics the first update counts, of these weights nothing. The world model learns
# from the replay buffer alone and is compared to the end.
CHANGED = {  # how a name begins, how many of its numbers count
    "metric loss/actor": 1,
    "metric loss/critic": 1,
    "metric stat/entropy": 1,
    "metric stat/imagined_return": 1,
    "weight actor.": 0,
    "weight critic.": 0,
    "weight target_critic.": 0,
}


def tiny_agent(module, flags):
    """An agent, a replay buffer of noise, and the random numbers that batches are drawn with."""
    args = tyro.cli(module.Args, args=[*TINY[module.__name__].split(), *flags.split()])
    rng, states = np.random.default_rng(1), args.obs == "state"
    shape = (4,) if states else (3, args.image_size, args.image_size)
    spec = module.EnvSpec(shape, 2, 4)
    agent = module.Agent(args, spec)
    folder = tempfile.mkdtemp()
    if module.__name__ == "pearl_pixels":
        length = args.trajectory_steps + 1
        buffer = module.TaskBuffer(folder, 200, args, spec)
        buffer.rl = buffer.enc = [[0, 2 * length], [length]]  # starts of two tasks' trajectories
    else:
        buffer, length = module.ReplayBuffer(folder, 200, args, spec), 40
    for t in range(160):
        first, state = t % length == 0, np.float32(rng.standard_normal(4))
        obs = state if states else rng.integers(0, 256, shape, dtype=np.uint8)
        action = np.float32((not first) * rng.uniform(-1, 1, 2))
        discount = float(first or rng.random() < 0.7)  # often 0, so that it has an effect
        buffer.add(module.Step(obs, state, action, rng.random(), discount, first, False, 2))
    return agent, buffer, rng


def first_name(name):
    """What the first edition called a weight. The present one permutes before it flattens and after
    it unflattens, so that the layers behind that have later places."""
    for new, old in (("decoder.4.", "decoder.3."), ("decoder.6.", "decoder.5."),
                     ("cnn.6.", "cnn.5."), ("cnn.7.", "cnn.6.")):  # fmt: skip
        if name.removeprefix("target_").startswith(new):
            return name.replace(new, old)
    return name


def channels_last(values, name, channels):
    """The first edition flattened feature maps with the channels first, the present one has them
    last: the values of a linear layer between convs and features, if it is one, at their places."""
    dim = int(name.endswith(("head.fc.weight", "log_std.weight", "cnn.5.weight")))
    into_convs = name.startswith("decoder.0.")
    if not (dim or into_convs):
        return values
    order = np.arange(values.shape[dim]).reshape(channels, -1).T.ravel()
    return values.take(order, dim)


@torch.no_grad()
def set_weights(agent):
    """Gives each tensor random values that depend on its name alone. What stays as it is: log
    alpha, a single number that an argument sets, and DreamerV2's count of resets, an integer.
    PEARL's mean and deviation of states are set too, or nothing would show whether they are used.
    """
    for name, tensor in agent.state_dict().items():
        if tensor.ndim == 0 or not tensor.is_floating_point():
            continue
        name = first_name(name) if hasattr(agent.args, "filters") else name
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape)
        if tensor.ndim >= 2:
            values /= math.sqrt(tensor[0].numel())  # fan-in
        else:
            around_one = name.endswith(("weight", "state_std"))  # a LayerNorm's
            values = around_one + 0.1 * values
        if hasattr(agent.args, "filters"):
            values = channels_last(values, name, agent.args.filters)
        tensor.copy_(torch.from_numpy(values))


def digest(tensor):
    """Sum and Euclidean norm."""
    tensor = tensor.detach().double()
    return [tensor.sum().item(), tensor.norm().item()]


def digests(batch, prefix="batch"):
    """{name: digest} of a batch, which may consist of several."""
    out = {}
    for name, value in batch.items():
        name = f"{prefix} {name}"
        out |= digests(value, name) if isinstance(value, dict) else {name: digest(value)}
    return out


def numbers(script, flags):
    """{name: numbers} of the first batch, of all metrics, one of each update or None where it has
    none, and of the weights at the end."""
    module = importlib.import_module(script)
    agent, buffer, rng = tiny_agent(module, flags)
    set_weights(agent)
    out = {}
    for i in range(UPDATES):
        agent.updates = i
        batch = agent.sample(buffer, rng)
        if i == 0:
            out |= digests(batch)
        torch.manual_seed(1000 + i)
        with module.autocast(agent.args):
            metrics = agent.update(batch)
        for name, value in metrics.items():
            out.setdefault(f"metric {name}", [None] * UPDATES)[i] = float(value)
    filters = hasattr(agent.args, "filters")
    for name, tensor in agent.state_dict().items():
        out[f"weight {first_name(name) if filters else name}"] = digest(tensor)
    return out


def differences(script, now, was):
    """A line for each name whose numbers differ."""
    out = [f"{name}: gone" for name in sorted(was.keys() - now.keys())]
    out += [f"{name}: new" for name in sorted(now.keys() - was.keys())]
    for name in [name for name in was if name in now]:
        changed = CHANGED if script == "dreamerv2" else {}
        count = min([n for start, n in changed.items() if name.startswith(start)], default=UPDATES)
        for i, (a, b) in enumerate(zip(now[name][:count], was[name][:count], strict=True)):
            if name.startswith("metric"):
                place, tolerance = f"update {i}", METRIC_TOLERANCE * abs(b or 0) + 1e-6
            else:  # a sum of numbers of both signs is as exact as their norm
                place, tolerance = ("sum", "norm")[i], TENSOR_TOLERANCE * was[name][1]
            if a != b and (None in (a, b) or not abs(a - b) <= tolerance):
                out.append(f"{name}, {place}: {a}, was {b}")
                break
    return out


def report(script, flags):
    """The first names that differ; empty where none does."""
    was = json.loads(FILE.read_text())["cases"][f"{script} {flags}"]
    lines = differences(script, numbers(script, flags), was)
    return "\n".join([*lines[:10], *[f"and {len(lines) - 10} more"] * (len(lines) > 10)])


@pytest.mark.parametrize(("script", "flags"), CASES)
def test_the_numbers_are_those_of_the_first_edition(script, flags):
    text = report(script, flags)
    if text:
        pytest.fail(f"{script} {flags}\n{text}", pytrace=False)


def record():
    """Writes FILE: nine digits, a line for each name."""
    cases = []
    for script, flags in CASES:
        lines = []
        for name, values in numbers(script, flags).items():
            values = [v if v is None else float(f"{v:.9g}") for v in values]
            assert all(v is None or math.isfinite(v) for v in values), (script, flags, name)
            lines.append(f"{json.dumps(name)}: {json.dumps(values, separators=(',', ':'))}")
        cases.append(json.dumps(f"{script} {flags}") + ": {\n" + ",\n".join(lines) + "\n}")
    head = {"commit": COMMIT, "torch": torch.__version__, "command": f"python {' '.join(sys.argv)}"}
    text = json.dumps(head)[:-1] + ',\n"cases": {\n' + ",\n".join(cases) + "\n}}\n"
    FILE.write_text(text)


if __name__ == "__main__":
    option, folder = sys.argv[1:]
    sys.path.insert(0, str(Path(folder).resolve()))
    if option == "--record":
        record()
    elif option == "--check":
        texts = {f"{script} {flags}": report(script, flags) for script, flags in CASES}
        for case, text in texts.items():
            print(case, text or "the same", sep="\n")
        sys.exit(any(texts.values()))
