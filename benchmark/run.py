"""Runs scripts x tasks x seeds, each as the command a person would type, and picks up what is left.

    python benchmark/run.py --scripts sac_ae slac --env-ids cheetah-run walker-walk --seeds 1 2 3
    python benchmark/run.py --study gaara-figure-3 --seeds 1 2 --workers 4 --gpus-per-run 0.5
    python benchmark/run.py --scripts slac --seeds 1 2 3 -- --smoke        flags for the scripts
    python benchmark/run.py --scripts slac --sweep gamma=0.9,0.99 -- --smoke      a grid of them
    python benchmark/run.py ... --dry-run                                  only prints the commands
    python benchmark/run.py ... --engine ray                               the same as Ray tasks

The same command again skips finished runs, resumes interrupted ones and tries failed ones again.
A script is any at the root of the repository, such as your renamed copy of one. OUT/GROUP/ holds
meta.json and seedN.csv of each command, which report.py reads, and a folder for each seed with
log.txt and the run's own folder, without the replay buffer once the run has finished. Ctrl-C stops
all runs with a checkpoint. The exit status is 1 if a run has not finished. With --engine ray all
machines must share this folder and OUT.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import filelock
import studies

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sac_ae", "sac_gaara", "slac", "dreamerv2", "pearl_pixels"]
ALL_SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))  # your own, too
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1  # stop a run
STOPPED = [status for number in SIGNALS for status in (128 + number, -number)]
EVERY_S = 30.0  # how often the table is made anew [s]
RUN_GIB = 2.8  # what the largest full-size run takes (the README's table) [GiB]
# Flags that do not change the method, so that the published curve stays beside a run with them.
NOT_THE_METHOD = {"seed", "runs_dir", "device", "track", "video", "delete_replay", "cuda_graph",
                  "compile", "threads", "replay_device", "total_frames", "eval_every_frames",
                  "checkpoint_every_minutes"}  # fmt: skip


class Job(NamedTuple):
    """One run: a seed of a group, which is one command."""

    script: str
    flags: str  # all but --seed
    seed: int
    label: str  # of the group's curve
    published: str  # the curve beside it
    folder: Path  # OUT/GROUP/seedN

    def command(self):
        """The words of the command for a new run or, after a stop, for going on with it."""
        for run in self.run_dirs():
            if (run / "checkpoint.pt").exists():
                return [f"{self.script}.py", "--resume", str(run)]
        flags = ["--delete-replay", *shlex.split(self.flags), "--seed", str(self.seed)]
        return [f"{self.script}.py", *flags, "--runs-dir", str(self.folder)]

    def run_dirs(self):
        """The run's own folders: none before it begins, else one."""
        return [path.parent for path in self.folder.glob("*/args.json")]

    def result(self):
        """What is known of the run: with what it began, and its "summary" if it has finished; or
        why it "failed"."""
        result = {}
        with contextlib.suppress(OSError, ValueError):  # not there yet, or only half written
            result = json.loads((self.folder / "job.json").read_text())
            for path in self.folder.glob("*/summary.json"):
                result["summary"] = json.loads(path.read_text())
        return result

    def note(self, **about):
        """Keeps for result() what is known besides the summary."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "job.json").write_text(json.dumps(about))

    def progress(self):
        """The last row of metrics.csv, with the return of the newest evaluation, and the frames in
        all; or ({}, 0)."""
        for run in self.run_dirs():
            with contextlib.suppress(OSError, IndexError, ValueError):
                total = json.loads((run / "args.json").read_text())["total_frames"]
                with open(run / "metrics.csv", newline="") as file:
                    rows = list(csv.DictReader(file))
                returns = [row.get("eval/return") or row.get("eval/return_2") for row in rows]
                return rows[-1] | {"return": [r for r in returns if r][-1:]}, total
        return {}, 0


def jobs_of(args):
    """All jobs that the arguments ask for, the seeds of a group one after the other."""
    names = {word[2:].removeprefix("no-").replace("-", "_") for word in args.flags
             if word.startswith("--")}  # fmt: skip
    as_published = not args.sweep and names <= NOT_THE_METHOD | {"precision"}
    if args.study:
        variants = studies.STUDIES[args.study]
    else:
        variants = {
            f"{script} {task}".strip(): studies.Variant(
                script, task, "", studies.CURVES.get(script, "")
            )
            for script in args.scripts
            for task in args.env_ids or [""]
        }
    for name, values in (sweep.split("=") for sweep in args.sweep):
        variants = {
            f"{label} {name} {value}": v._replace(flags=f"{v.flags} --{name} {value}".strip())
            for label, v in variants.items()
            for value in values.split(",")
        }
    jobs = []
    for label, variant in variants.items():
        task = f"--env-id {variant.env_id}" * bool(variant.env_id)
        flags = " ".join(filter(None, [task, variant.flags, shlex.join(args.flags)]))
        words = [args.study or "", label, shlex.join(args.flags)]
        name = "__".join(filter(None, (re.sub(r"[^\w.]+", "-", w).strip("-") for w in words)))
        digest = hashlib.sha256(f"{variant.script} {flags}".encode()).hexdigest()[:8]
        name = f"{name[:50]}-{digest}"  # other flags: another folder
        for seed in args.seeds:
            folder = Path(args.out).resolve() / name / f"seed{seed}"
            published = variant.published * as_published
            jobs.append(Job(variant.script, flags, seed, label, published, folder))
    return list(dict.fromkeys(jobs))


def gpus():
    """Names of the GPUs for CUDA_VISIBLE_DEVICES: those that it has now, or all."""
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return listed.split(",")[:count]


def environment(slot, workers, gpus_per_run, names):
    """Variables of a run in this slot: its share of the cores, and its GPU of those with these
    names if it is to have one."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    env = {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    if "OMP_NUM_THREADS" in os.environ:
        env = {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
    if gpus_per_run:
        name = env["CUDA_VISIBLE_DEVICES"] = names[slot // int(1 / gpus_per_run)]
        if name.isdigit() and "MUJOCO_EGL_DEVICE_ID" not in os.environ:
            env["MUJOCO_EGL_DEVICE_ID"] = name  # it renders there, too
    return env


def die_with_parent():
    """In a new process: a worker that is killed takes its run along (Linux), so that nobody else
    resumes a run that still goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def execute(job, env, started=None):
    """Runs a job to its end, whatever that is. KeyboardInterrupt, or a signal to the process given
    to `started`, stops it with a checkpoint."""
    command = job.command()
    threads = int(env["OMP_NUM_THREADS"])
    about = {"commit": commit(), "sha256": sha256(job.script), "hardware": hardware()}
    job.note(threads=threads, **about)
    if "--resume" not in command:
        for run in job.run_dirs():  # died before its first checkpoint
            shutil.rmtree(run)
    with open(job.folder / "log.txt", "a") as log:
        print(f"$ python {shlex.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        if started:
            started(process)
        try:
            while process.poll() is None:
                time.sleep(0.2)  # wait() would not be woken by ray.cancel
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)  # Ray's workers have SIGINT blocked
            process.wait()
    if "summary" in job.result() or process.returncode in STOPPED:
        return
    log = (job.folder / "log.txt").read_text().rpartition("\n$ python")[2]
    lines = [line.strip("│╭╰─╯ ") for line in log.splitlines()[1:] if re.search("[a-z]{3}", line)]
    errors = [line for line in lines if re.search("rror:|nrecognized", line)]
    why = (errors or lines or [""])[-1]
    status = process.returncode
    text = f"exit status {status}: {why[:200]}"
    if status < 0:
        text = f"killed by {signal.Signals(-status).name}"
        text += ", probably as memory ran out" * (-status == signal.SIGKILL)
    job.note(failed=text)


def collect(jobs):
    """Writes OUT/GROUP/meta.json and seedN.csv for all seeds that have run, failed ones too."""
    for first in {job.folder.parent: job for job in jobs}.values():
        folder, runs = first.folder.parent, []
        seeds = {
            int(path.name[4:])
            for path in folder.glob("seed*")
            if path.is_dir() and path.name[4:].isdigit()
        }
        seeds |= {job.seed for job in jobs if job.folder.parent == folder}
        for seed in sorted(seeds):
            job = first._replace(seed=seed, folder=folder / f"seed{seed}")
            result = job.result()
            summary = result.pop("summary", {})
            summary.pop("run_dir", None)
            runs.append({"seed": job.seed, **result, **summary})
            for run in job.run_dirs():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(run / "metrics.csv", folder / f"seed{job.seed}.csv")
        with contextlib.suppress(OSError, ValueError):  # seeds whose folders were removed since
            before = json.loads((folder / "meta.json").read_text())["runs"]
            runs += [run for run in before if run["seed"] not in seeds]
            runs.sort(key=lambda run: run["seed"])
        meta = {
            "command": f"python {first.script}.py {first.flags} --seed N",
            "label": first.label,
            "published": first.published,
            "hardware": "; ".join(dict.fromkeys(r.get("hardware", hardware()) for r in runs)),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "mujoco")},
            "runs": runs,
        }
        if any(len(run) > 1 for run in runs) or folder.exists():
            (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def sha256(script):
    """Of a script's text."""
    return hashlib.sha256((ROOT / f"{script}.py").read_bytes()).hexdigest()


def commit():
    """The commit that is checked out, and whether files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):  # no git
        process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        return process.stdout.strip() or "unknown"
    return "unknown"


def hardware():
    """Processor, number of cores, and the GPUs."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    parts = [names[0] if names else platform.processor(), f"{os.cpu_count()} cores"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts += subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
    return ", ".join(filter(None, parts))


def table(jobs, running, began, workers):
    """Prints one line per run: its state, frames, return, and the time that is left; and an
    estimate for all, from the runs that have begun."""
    width, states = max(len(job.folder.parent.name) for job in jobs), []
    whole, left = {}, {}  # minutes of a whole run {script: [...]}, and that a run still takes
    for job in jobs:
        result, (row, total) = job.result(), job.progress()
        state = "running" if job in running else "waiting"
        for key, known in {"summary": "finished", "failed": "failed"}.items():
            state = known if key in result else state
        states.append(state)
        parts = [f"{job.folder.parent.name:{width}}", f"seed {job.seed:<3}", f"{state:8}"]
        frames, minutes = int(row.get("frames") or 0), float(row.get("time/wall_s") or 0) / 60
        if frames:
            parts.append(f"{frames:,} of {total:,} frames")
            whole.setdefault(job.script, []).append(minutes * total / frames)
        parts += [f"return {float(value):.1f}" for value in row.get("return", [])]
        if state in ("running", "waiting"):
            left[job] = minutes * (total / frames - 1) if frames else None
        if frames and state == "running":
            parts.append(f"{left[job]:.0f} min left")
        print("  ".join([*parts, result.get("failed", "")]).rstrip())
    text = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    text += f"; {(time.monotonic() - began) / 60:.0f} min so far"
    if left and all(job.script in whole for job in left):
        times = [statistics.mean(whole[job.script]) if t is None else t for job, t in left.items()]
        text += f", about {max(sum(times) / workers, max(times)):.0f} min left"
    print(text + "\n", flush=True)


def run_local(jobs, args, show):
    """As many processes at a time as there are workers; each has a slot with cores and a GPU."""
    slots, processes, running, stopping = queue.Queue(), {}, set(), threading.Event()
    for slot in range(args.workers):
        slots.put(slot)

    def started(job, process):
        processes[job] = process
        if stopping.is_set():
            process.send_signal(signal.SIGTERM)

    def work(job):
        slot = slots.get()
        running.add(job)
        try:
            env = environment(slot, args.workers, args.gpus_per_run, gpus())
            if not stopping.is_set():
                execute(job, env, functools.partial(started, job))
        except Exception as e:  # a fault of this job stops no other
            job.note(failed=f"{type(e).__name__}: {e}"[:200])
        finally:
            running.discard(job)
            processes.pop(job, None)
            slots.put(slot)

    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        pending = {pool.submit(work, job) for job in jobs}
        try:
            while pending:
                _, pending = concurrent.futures.wait(
                    pending, EVERY_S, concurrent.futures.FIRST_COMPLETED
                )
                show(running)
        except KeyboardInterrupt:
            print("\nstopping all runs with a checkpoint", file=sys.stderr)
            stopping.set()
            for process in list(processes.values()):
                process.send_signal(signal.SIGTERM)
            raise


def run_ray(jobs, args, show):
    """Each job is a task; Ray tries it again, on another machine perhaps, if its worker dies."""
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ray.init replaces
    nodes, cluster = [node["Resources"] for node in ray.nodes()], ray.cluster_resources()
    if args.gpus_per_run > cluster.get("GPU", 0):
        sys.exit("error: no GPU in this Ray cluster; leave out --gpus-per-run")
    share = max(1, -(-int(cluster["CPU"]) // args.workers))  # no more than --workers fit
    share = int(min(share, max(node.get("CPU", 0) for node in nodes)))  # and each on one node
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}
    options = {"num_cpus": share, "num_gpus": args.gpus_per_run, "max_retries": 3}
    work = ray.remote(**options)(lambda job: execute(job, env))
    pending = {work.remote(job): job for job in jobs}
    try:
        while pending:
            done, _ = ray.wait(list(pending), timeout=EVERY_S)
            for ref in done:
                job = pending.pop(ref)
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as e:
                    job.note(failed=str(e).strip().splitlines()[-1][:200])
            show({job for job in pending.values() if job.folder.exists()})
    except KeyboardInterrupt:
        for ref in pending:
            ray.cancel(ref)
        print("\nstopping all runs with a checkpoint", file=sys.stderr)
        ray.wait(list(pending), num_returns=len(pending))
        raise
    finally:
        ray.shutdown()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scripts", nargs="+", default=[], choices=ALL_SCRIPTS)
    parser.add_argument("--env-ids", nargs="+", help="tasks (each script's default)")
    parser.add_argument("--study", choices=studies.STUDIES, help="of studies.py, instead of both")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--sweep", nargs="+", default=[], metavar="FLAG=A,B", help="all of a grid")
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--gpus-per-run", type=float, default=0.0, help="0.5: two share one (0)")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be run")
    parser.add_argument("flags", nargs="*", help="of the scripts, after --")
    args = parser.parse_args()
    if bool(args.study) == bool(args.scripts) or args.study and args.env_ids:
        parser.error("give --scripts (and --env-ids), or a --study, which has its own")
    if args.flags and not args.flags[0].startswith("-"):
        parser.error(f"{args.flags[0]} is not a flag of the scripts; those come after --")
    if not all(re.fullmatch(r"[\w-]+=[^=]+", sweep) for sweep in args.sweep):
        parser.error(f"--sweep takes FLAG=A,B,C and not {' '.join(args.sweep)}")
    swept = {"--" + sweep.partition("=")[0] for sweep in args.sweep}
    if both := swept & {word.partition("=")[0] for word in args.flags}:
        parser.error(f"{', '.join(both)} is in --sweep and after --")
    if args.workers < 1 or not 0 <= args.gpus_per_run <= 1:
        parser.error("--workers must be at least 1, --gpus-per-run from 0 to 1")
    jobs = jobs_of(args)
    todo = [job for job in jobs if "summary" not in job.result()]
    for job in jobs:
        if job.result().get("sha256", sha256(job.script)) != sha256(job.script):
            parser.error(f"{job.script}.py has changed since the runs in --out; use another one")
    if args.dry_run:
        for job in todo:
            print("python", shlex.join(job.command()))
        return 0
    share = int(1 / args.gpus_per_run) if args.gpus_per_run else 0
    if share and args.engine == "local" and args.workers > share * len(gpus()):
        parser.error(f"{len(gpus())} GPUs here have room for {share * len(gpus())} --workers")
    if args.engine == "local" and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30  # [GiB]
        if args.workers * RUN_GIB > memory:
            print(f"warning: {args.workers} full-size runs at once may need "
                  f"{args.workers * RUN_GIB:.0f} GiB of memory; here are {memory:.0f}")  # fmt: skip
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "lock").touch()
    except OSError as e:
        parser.error(f"--out cannot be written: {e}")
    lock = filelock.FileLock(Path(args.out) / "lock")  # two would write to the same runs
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        sys.exit(f"error: another benchmark/run.py is at work in {args.out}; see --out")
    began = time.monotonic()
    for number in SIGNALS:  # all as Ctrl-C; but nohup ignores SIGHUP, and a shell's & SIGINT
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)

    def show(running):
        collect(jobs)  # for a report of what there is so far
        table(jobs, running, began, args.workers)

    try:
        {"local": run_local, "ray": run_ray}[args.engine](todo, args, show)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        collect(jobs)
    table(jobs, set(), began, args.workers)
    return int(any("summary" not in job.result() for job in jobs))


if __name__ == "__main__":
    sys.exit(main())
