"""How fast each script is on this machine, at its default configuration.

    python benchmark/speed.py                               every script
    python benchmark/speed.py --device cuda --precisions fp32 tf32 bf16
    python benchmark/speed.py --peer DIR [-- FLAGS]         one, and its authors' code in DIR

Prints a table and appends what was measured to --csv. Times are medians. What is compared runs in
turns, each in a process of its own, so that other load on the machine hits both and neither profits
from the other's settings. DIR is a checkout, see authors.py; FLAGS are of our script, as those of
CURL:

    python benchmark/speed.py --peer curl -- --reconstruction none --obs-crop random \
        --no-latent-tanh --contrast-floor 1

and oyster beside PEARL from states: -- --obs-mode state --batch-size 256.
"""

import argparse
import csv
import dataclasses
import fractions
import functools
import importlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import ALL_SCRIPTS, SCRIPTS, commit, hardware

ROOT = Path(__file__).resolve().parent.parent
ASKED = {"sac_ae": 1.15, "sac_gaara": 1.15, "slac": 1.7, "dreamerv2": 1.3,
         "pearl_pixels": 1.2}  # times as fast as the authors' update, on a CPU  # fmt: skip


def environment(module, args):
    """Functions to time: physics alone, one image by physics.render and by PixelEnv, and a step of
    the agent's environment."""
    import numpy as np

    env = module.PixelEnv(args)
    exact, fast = (
        module.PixelEnv(dataclasses.replace(args, render=render)) for render in ("exact", "fast")
    )
    raw = module.load_task(args.env_id, np.random.RandomState(1))
    raw.reset()
    action, size = np.zeros(env.spec.action_dim, np.float32), args.image_size
    now = {"step": env.reset(0)}

    def step():
        now["step"] = env.reset(0) if now["step"].last else env.step(action)

    return env, {
        "physics": lambda: raw.reset() if raw.step(action).last() else None,
        "physics.render": lambda: raw.physics.render(size, size, camera_id=0),
        "render exact": lambda: exact.render(size),
        "render fast": lambda: fast.render(size),
        "env step": step,
    }


def filled(module, args, spec, folder):
    """An agent at its default configuration, a replay buffer of noise with 1000 steps, or PEARL's
    with five trajectories of each training task, and random numbers for batches."""
    import numpy as np

    rng = np.random.default_rng(0)
    kind, episodes, rows = module.ReplayBuffer, 4, 251
    if hasattr(module, "TaskBuffer"):
        kind, rows = module.TaskBuffer, args.trajectory_steps + 1
        episodes = 5 * len(module.split(args)[0])
    buffer = kind(folder, episodes * rows + 1000, args, spec)
    for row in range(episodes * rows):
        first = row % rows == 0
        if first and kind is not module.ReplayBuffer:
            buffer.rl[row // (5 * rows)].append(row)
            buffer.enc[row // (5 * rows)].append(row)
        state = np.float32(rng.standard_normal(spec.state_dim))
        image = rng.integers(0, 256, spec.obs_shape, dtype=np.uint8)
        obs = image if len(spec.obs_shape) == 3 else state
        action = np.float32(rng.uniform(-1, 1, spec.action_dim))
        buffer.add(module.Step(obs, state, action, rng.random(), 1.0, first, False, 1))
    return module.Agent(args, spec), buffer, rng


def own(name, env_id, flags, folder):
    """Functions to time of one of the scripts, and facts about it. Of two updates one has an actor
    step. `end to end` is so many steps that a whole number of updates belongs to them."""
    module = importlib.import_module(name)
    pearl = hasattr(module, "TaskBuffer")
    if not pearl:
        flags = ["--pretrain-updates", "0", "--env-id", env_id, *flags]
    args, _ = module.parse_args(flags)
    env, calls = environment(module, args)
    agent, buffer, rng = filled(module, args, env.spec, folder)

    def updates(agent, n):
        for _ in range(n):
            with module.autocast(args):
                agent.update(agent.sample(buffer, rng))
            agent.updates += 1

    calls["sample"] = lambda: agent.sample(buffer, rng)
    calls["two updates"] = functools.partial(updates, agent, 2)
    for form in ("captured", "compiled") if args.device.startswith("cuda") else ():
        agent = module.Agent(args, env.spec)
        if form == "compiled":
            module.compile_parts(agent)
        module.record(agent, "update", getattr(agent, "cadence", tuple))
        module.record(agent, "act")
        calls[f"two updates, {form}"] = functools.partial(updates, agent, 2)
    if pearl:
        steps = len(module.plan(args, 1)) * args.trajectory_steps
        ratio = fractions.Fraction(args.updates_per_iteration, steps)
    else:
        ratio = fractions.Fraction(args.updates_per_step).limit_denominator(100)
    start = {"z": agent.prior(0.0)[0], "true_state": agent.true_state} if pearl else None
    now = {"step": env.reset(0), "carry": start}

    def end_to_end():
        for i in range(2 * ratio.denominator):  # actor and target move at every second update
            action, now["carry"] = agent.act(now["step"], now["carry"], explore=True)
            wait_for_action = action.cpu().numpy if pearl else module.to_host(action)
            due = ratio.numerator * (i + 1) // ratio.denominator
            updates(agent, due - ratio.numerator * i // ratio.denominator)
            now["step"] = env.step(wait_for_action())
            if not pearl:
                buffer.add(now["step"])
            if now["step"].last:
                now.update(step=env.reset(0), carry=start)

    calls["end to end"] = end_to_end
    facts = {
        "bytes per transition": sum(dtype.itemsize for dtype in buffer.types.values()),
        "action repeat": args.action_repeat,
        "steps": 2 * ratio.denominator,
        "updates": 2 * ratio.numerator,
    }
    return calls, facts, args.device


def peer(folder, device):
    """The same of the authors' code."""
    import authors

    module, utils = authors.load(folder)
    if authors.which(folder) == "rlkit/torch/sac/sac.py":
        algorithm = authors.make_pearl(module, utils, 16, 256)
        authors.fill_pearl(algorithm, 16)

        def train():
            algorithm._do_training(range(16))

        return {
            "sample": lambda: (
                algorithm.sample_sac(range(16)),
                algorithm.sample_context(range(16)),
            ),
            "two updates": lambda: (train(), train()),
        }
    agent, log = authors.make_agent(module, folder, device), authors.Log()
    if authors.which(folder) == "slac/algo.py":
        authors.fill_slac(agent, utils)

        def update():
            agent.update_latent(log)
            agent.update_sac(log)

        sizes = agent.batch_size_latent, agent.batch_size_sac
        return {
            "sample": lambda: (
                agent.buffer.sample_latent(sizes[0]),
                agent.buffer.sample_sac(sizes[1]),
            ),
            "two updates": lambda: (update(), update()),
        }
    if authors.which(folder) == "dreamer.py":
        (model, behavior), batch = agent, authors.dreamer_batch(0)

        def learn():
            start = model._train(batch)[0]
            behavior._train(start, lambda f, *_: model.heads["reward"](f).mode())

        return {"two updates": lambda: (learn(), learn())}
    buffer = authors.make_buffer(utils, folder, device)

    def pair():
        agent.update(buffer, log, 1)
        agent.update(buffer, log, 2)

    return {
        "sample": getattr(buffer, "sample_cpc", getattr(buffer, "sample", None)),
        "two updates": pair,
    }


def work(calls, facts, device):
    """A worker: for each name on standard input, runs that function and prints its milliseconds;
    at the end, its peak memory."""
    import torch

    cuda = device.startswith("cuda")
    for name in calls:
        for _ in range(12 if "captured" in name or "compiled" in name else 1):  # all are recorded
            calls[name]()
    print(json.dumps({"calls": list(calls), "facts": facts}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        calls[line.strip()]()
        if cuda:
            torch.cuda.synchronize()
        print(1e3 * (time.perf_counter() - began), flush=True)
    bytes_ = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((torch.cuda.max_memory_allocated() if cuda else bytes_) / 2**30)


def in_turns(subjects, rounds, flags, script_flags):
    """{subject: {function: median ms}}, {subject: facts}, {subject: peak GiB}; a worker each."""
    workers, times, facts = {}, {}, {}
    for subject in subjects:
        command = [sys.executable, __file__, *flags, "--worker", subject, "--", *script_flags]
        workers[subject] = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, stdout=subprocess.PIPE
        )
    for subject, worker in workers.items():
        ready = json.loads(worker.stdout.readline())
        times[subject], facts[subject] = {name: [] for name in ready["calls"]}, ready["facts"]
    for name in next(iter(times.values())):
        for i in range(rounds + 3):
            for subject, worker in workers.items():
                if name in times[subject]:
                    print(name, file=worker.stdin, flush=True)
                    ms = float(worker.stdout.readline())
                    if i >= 3:  # the first ones fill caches and memory pools
                        times[subject][name].append(ms)
    peaks = {s: float(w.communicate()[0]) for s, w in workers.items()}
    medians = {s: {n: statistics.median(t) for n, t in ts.items()} for s, ts in times.items()}
    return medians, facts, peaks


def rates(ms, facts, peak):
    """{quantity: number} of one of our scripts, from its milliseconds; see the table's heads."""
    update = min(time for name, time in ms.items() if name.startswith("two updates")) / 2
    out = {"updates/s": 2000 / ms["two updates"]}
    for form in ("captured", "compiled"):
        if f"two updates, {form}" in ms:
            out[f"updates/s, {form}"] = 2000 / ms[f"two updates, {form}"]
    out["frames/s, physics"] = 1000 / ms["physics"]
    out["frames/s, images too"] = 1000 * facts["action repeat"] / ms["env step"]
    out["steps/s, end to end"] = 1000 * facts["steps"] / ms["end to end"]
    out["busy with updates"] = facts["updates"] * update / ms["end to end"]
    return out | {"peak GiB": peak, "bytes per transition": facts["bytes per transition"]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=ALL_SCRIPTS)
    parser.add_argument("--env-id", default="cheetah-run", help="of all but PEARL (cheetah-run)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="how often each is timed (10)")
    parser.add_argument("--precisions", nargs="+", default=[], help="of our scripts (fp32)")
    parser.add_argument("--peer", help="folder with the authors' code, see authors.py")
    parser.add_argument("--csv", default="runs/speed.csv", help="appended to (runs/speed.csv)")
    parser.add_argument("flags", nargs="*", help="of our script, after --")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker == args.peer:
            return work(peer(args.peer, args.device), {}, args.device)
        sys.path.insert(0, str(ROOT))
        name, *precision = args.worker.split()
        flags = ["--device", args.device, *args.flags, *precision]
        with tempfile.TemporaryDirectory() as folder:
            return work(*own(name, args.env_id, flags, folder))

    import torch

    threads, table, rows = torch.get_num_threads(), {}, []
    print(
        f"{hardware()}, {threads} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {args.device}, {args.env_id}, commit {commit()}"
    )
    flags = ["--device", args.device, "--env-id", args.env_id]
    if args.peer:
        import authors

        args.scripts = [authors.PEERS[authors.which(args.peer)][0]]
        flags += ["--peer", args.peer]
    for name in args.scripts:
        ours = [f"{name} --precision {p}" for p in args.precisions] or [name]
        subjects = [*ours, args.peer] if args.peer else ours
        times, facts, peaks = in_turns(subjects, args.rounds, flags, args.flags)
        for subject in subjects:
            print(f"\n{subject}: milliseconds; peak memory {peaks[subject]:.1f} GiB")
            for key, ms in times[subject].items():
                print(f"    {key:24}{ms:10.2f}")
            rows += [(subject, f"ms, {key}", ms) for key, ms in times[subject].items()]
        for one in ours:
            ms = times[one]
            table[one] = rates(ms, facts[one], peaks[one])
            rows += [(one, key, value) for key, value in table[one].items()]
            exact, fast = (ms["physics.render"] / ms[f"render {k}"] for k in ("exact", "fast"))
            print(f"    {one} against physics.render: exact {exact:.2f}x, fast {fast:.1f}x")
            for key in [k for k in ms if args.peer and k.startswith("two updates")]:
                ratio = times[args.peer]["two updates"] / ms[key]
                text = f"    {one}, {key}, as fast as the authors': {ratio:.2f}x"
                print(f"{text}; asked on a CPU: {ASKED[name]}x")
                rows.append((one, f"{key}, times as fast as the peer's", ratio))
    heads = list(dict.fromkeys(key for row in table.values() for key in row))
    print("\n| " + " | ".join(["script", *heads]) + " |\n" + "| - " * (len(heads) + 1) + "|")
    for name, row in table.items():
        cells = [name, *(f"{row[h]:,.{2 * (row[h] < 100)}f}" if h in row else "" for h in heads)]
        print("| " + " | ".join(cells) + " |")
    path = Path(args.csv)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            columns = "hardware threads torch commit device flags subject quantity value"
            writer.writerow(columns.split())
        flags = " ".join(["--env-id", args.env_id, *args.flags])
        about = hardware(), threads, torch.__version__, commit(), args.device, flags
        writer.writerows(
            [*about, Path(subject).name, key, f"{value:.6g}"] for subject, key, value in rows
        )


if __name__ == "__main__":
    main()
