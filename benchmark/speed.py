"""How fast each script is on this machine, at its default configuration.

    python benchmark/speed.py                               every script
    python benchmark/speed.py --peer DIR [-- FLAGS]         one, and its authors' code in DIR

Times are medians. What is compared runs in turns, each in a process of its own, so that other load
on the machine hits both and neither profits from the other's settings. DIR is a checkout, see
authors.py; FLAGS are of our script, as those of CURL:

    python benchmark/speed.py --peer curl -- --reconstruction none --obs-crop random \
        --no-latent-tanh --contrast-floor 1

and oyster beside PEARL from states: -- --obs-mode state --batch-size 256.
"""

import argparse
import importlib
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [n for n in ("sac_ae", "sac_gaara", "slac", "dreamerv2", "pearl_pixels")
           if (ROOT / f"{n}.py").exists()]


def environment(module, env_id):
    """Functions to time: physics alone, and one image by physics.render and by PixelEnv."""
    import numpy as np
    from dm_control import suite

    raw = suite.load(*env_id.split("-", 1), {"random": 1})
    raw.reset()
    exact, fast = (module.PixelEnv(env_id, 1, 1, 84, render) for render in ("exact", "fast"))
    action = np.zeros(raw.action_spec().shape)
    return {
        "physics": lambda: raw.step(action),
        "physics.render": lambda: raw.physics.render(84, 84, camera_id=exact.camera_id),
        "render exact": lambda: exact.render(84).copy(),
        "render fast": lambda: fast.render(84).copy(),
    }


def filled(module, args):
    """An agent at its default configuration, a replay buffer with 1000 rows of noise, a rng."""
    import numpy as np
    import torch

    spec = module.EnvSpec((3, args.image_size, args.image_size), torch.uint8, 6)
    buffer, rng = module.ReplayBuffer(1000, spec, args.device), np.random.default_rng(0)
    for t in range(1000):
        image = rng.integers(0, 256, spec.obs_shape, dtype=np.uint8)
        action, first = rng.uniform(-1, 1, 6), t % 251 == 0
        buffer.add(module.Step(image, None, action, rng.random(), 1.0, first, False))
    return module.Agent(args, spec), buffer, rng


def filled_tasks(module, args):
    """The same for PEARL: five trajectories of each training task."""
    import numpy as np
    import torch

    states = args.obs_mode == "state"
    module.check_algorithm(args)
    module.check_run(args, None)
    shape = (17,) if states else (3, args.image_size, args.image_size)
    spec = module.EnvSpec(shape, torch.float32 if states else torch.uint8, 6, 17)
    agent, rng, (thetas, _) = module.Agent(args, spec), np.random.default_rng(0), module.split(args)
    rows = 5 * len(thetas) * (args.trajectory_steps + 1)
    buffer = module.TaskBuffer(rows, spec, args.device, args.trajectory_steps)
    starts = [[] for _ in thetas]
    buffer.watch(thetas, starts, starts, args.latent_dim)
    for row in range(rows):
        t, state = row % (args.trajectory_steps + 1), np.float32(rng.standard_normal(17))
        if t == 0:
            starts[row // (5 * (args.trajectory_steps + 1))].append(row)
        obs = state if states else rng.integers(0, 256, shape, dtype=np.uint8)
        action = np.float32(rng.uniform(-1, 1, 6))
        buffer.add(module.Step(obs, state, action, rng.random(), 1.0, t == 0, False))
    return agent, buffer, rng


def own(name, device, env_id, flags):
    """Functions to time of one of the scripts. Of two updates one has an actor step."""
    import tyro

    module = importlib.import_module(name)
    if name == "pearl_pixels":
        agent, buffer, rng = filled_tasks(
            module, tyro.cli(module.Args, args=["--device", device, *flags]))
        return {"sample": lambda: agent.sample(buffer, rng), "two updates": lambda: (
            agent.update(agent.sample(buffer, rng)), agent.update(agent.sample(buffer, rng)))}
    always = ["--device", device, "--pretrain-updates", "0"]
    agent, buffer, rng = filled(module, tyro.cli(module.Args, args=always + flags))

    def update():
        return agent.update(agent.sample(buffer, rng))

    return {**environment(module, env_id), "sample": lambda: agent.sample(buffer, rng),
            "two updates": lambda: (update(), update())}


def peer(folder, device):
    """The same of the authors' code."""
    import authors

    module, utils = authors.load(folder)
    if authors.which(folder) == "rlkit/torch/sac/sac.py":
        algorithm = authors.make_pearl(module, utils, 16, 256)
        authors.fill_pearl(algorithm, 16)

        def train():
            algorithm._do_training(range(16))

        return {"sample": lambda: (algorithm.sample_sac(range(16)),
                                   algorithm.sample_context(range(16))),
                "two updates": lambda: (train(), train())}
    agent, log = authors.make_agent(module, folder, device), authors.Log()
    if authors.which(folder) == "slac/algo.py":
        authors.fill_slac(agent, utils)

        def update():
            agent.update_latent(log)
            agent.update_sac(log)

        sizes = agent.batch_size_latent, agent.batch_size_sac
        return {"sample": lambda: (agent.buffer.sample_latent(sizes[0]),
                                   agent.buffer.sample_sac(sizes[1])),
                "two updates": lambda: (update(), update())}
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

    return {"sample": getattr(buffer, "sample_cpc", getattr(buffer, "sample", None)),
            "two updates": pair}


def work(calls, device):
    """A worker: for each name on standard input, runs that function and prints its milliseconds."""
    import torch

    for name in calls:
        calls[name]()
    print("ready", *calls, sep="\t", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        calls[line.strip()]()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        print(1e3 * (time.perf_counter() - began), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # peak memory [GiB]


def in_turns(subjects, rounds, flags, script_flags):
    """{subject: {function: median ms}} and {subject: peak GiB}, one worker per subject."""
    workers, times = {}, {}
    for subject in subjects:
        command = [sys.executable, __file__, *flags, "--worker", subject, "--", *script_flags]
        workers[subject] = subprocess.Popen(command, stdin=subprocess.PIPE, text=True,
                                            stdout=subprocess.PIPE)
    for subject, worker in workers.items():
        names = worker.stdout.readline().strip().split("\t")[1:]
        times[subject] = {name: [] for name in names}
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
    return medians, peaks


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--env-id", default="cheetah-run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="how often each is timed (10)")
    parser.add_argument("--peer", help="folder with the authors' code, see authors.py")
    parser.add_argument("flags", nargs="*", help="of our script, after --")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker == args.peer:
            return work(peer(args.peer, args.device), args.device)
        sys.path.insert(0, str(ROOT))
        return work(own(args.worker, args.device, args.env_id, args.flags), args.device)

    import torch

    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, Python "
          f"{platform.python_version()}, torch {torch.__version__}, {args.device}, {args.env_id}")
    flags = ["--device", args.device, "--env-id", args.env_id]
    if args.peer:
        import authors

        args.scripts = [authors.PEERS[authors.which(args.peer)][0]]
        flags += ["--peer", args.peer]
    for name in args.scripts:
        subjects = [name, args.peer] if args.peer else [name]
        times, peaks = in_turns(subjects, args.rounds, flags, args.flags)
        for subject in subjects:
            print(f"\n{subject}: milliseconds; peak memory {peaks[subject]:.1f} GiB")
            for key, ms in times[subject].items():
                print(f"    {key:16}{ms:10.2f}")
        ours = times[name]
        print(f"    updates/s {2000 / ours['two updates']:.2f}")
        if "physics" in ours:
            exact, fast = (ours["physics.render"] / ours[f"render {k}"] for k in ("exact", "fast"))
            print(f"    against physics.render: exact {exact:.2f}x, fast {fast:.1f}x")
        if args.peer:
            ratio = times[args.peer]["two updates"] / ours["two updates"]
            print(f"    updates as fast as the authors': {ratio:.2f}x")


if __name__ == "__main__":
    main()
