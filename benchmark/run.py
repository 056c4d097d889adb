"""Runs scripts x tasks x seeds, each as the command a person would type, and picks up what is left.

    python benchmark/run.py --scripts sac_ae slac --env-ids cheetah-run walker-walk --seeds 1 2 3
    python benchmark/run.py --study gaara-figure-3 --seeds 1 2 --workers 4 --gpus-per-run 0.5
    python benchmark/run.py --scripts slac --seeds 1 2 3 -- --smoke        flags for the scripts
    python benchmark/run.py ... --dry-run                                  only prints the commands
    python benchmark/run.py ... --engine ray                               the same as Ray tasks

The same command again skips finished runs, resumes interrupted ones and tries failed ones again.
OUT/GROUP/ holds meta.json and seedN.csv of each command, which report.py reads, and a folder for
each seed with log.txt and the run's own folder. Ctrl-C stops all runs with a checkpoint. The exit
status is 1 if a run failed. With --engine ray all machines must share this folder and OUT.
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
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import filelock
import studies

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sac_ae", "sac_gaara", "slac", "dreamerv2", "pearl_pixels"]
EVERY_S = 30.0  # how often the table is made anew [s]


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
            if (run / "checkpoint.pt").exists() or (run / "previous.pt").exists():
                return [f"{self.script}.py", "--resume", str(run)]
        return [f"{self.script}.py", *shlex.split(self.flags), "--seed", str(self.seed),
                "--runs-dir", str(self.folder)]  # fmt: skip

    def run_dirs(self):
        """The run's own folders: none before it begins, else one."""
        return [path.parent for path in self.folder.glob("*/args.json")]

    def result(self):
        """What is known of the finished or failed run: {"summary": ...} or {"failed": why}."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def progress(self):
        """The last row of metrics.csv and the frames in all, or ({}, 0)."""
        for run in self.run_dirs():
            with contextlib.suppress(OSError, IndexError, ValueError):
                total = json.loads((run / "args.json").read_text())["total_frames"]
                with open(run / "metrics.csv", newline="") as file:
                    return list(csv.DictReader(file))[-1], total
        return {}, 0


def jobs_of(args):
    """All jobs that the arguments ask for, the seeds of a group one after the other."""
    if args.study:
        variants = studies.STUDIES[args.study]
    else:
        tasks = args.env_ids or [""]
        variants = {f"{script} {task}".strip(): studies.Variant(
                        script, task, "", "" if args.flags else studies.CURVES.get(script, ""))
                    for script in args.scripts for task in tasks}  # fmt: skip
    jobs = []
    for label, variant in variants.items():
        task = f"--env-id {variant.env_id}" * bool(variant.env_id)
        flags = " ".join(filter(None, [task, variant.flags, shlex.join(args.flags)]))
        words = [args.study or "", label, shlex.join(args.flags)]
        name = "__".join(filter(None, (re.sub(r"[^\w.]+", "-", w).strip("-") for w in words)))
        if len(name) > 60:
            name = name[:50] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
        for seed in args.seeds:
            folder = Path(args.out).resolve() / name / f"seed{seed}"
            jobs.append(Job(variant.script, flags, seed, label, variant.published, folder))
    return jobs


def environment(slot, workers, gpus_per_run):
    """Variables of a run in this slot: its share of the cores, and its GPU if it is to have one."""
    env = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // workers))}
    if gpus_per_run:
        gpu = str(int(slot * gpus_per_run))
        env |= {"CUDA_VISIBLE_DEVICES": gpu, "MUJOCO_EGL_DEVICE_ID": gpu}
    return env


def die_with_parent():
    """In a new process: a worker that is killed takes its run along (Linux), so that nobody else
    resumes a run that still goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def execute(job, env, started=None):
    """Runs a job to its end, whatever that is, and writes result.json. KeyboardInterrupt, or a
    signal to the process given to `started`, stops it with a checkpoint and no result."""
    command, sources = job.command(), {"commit": commit(), "sha256": sha256(job.script)}
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "result.json").unlink(missing_ok=True)
    if "--resume" not in command:
        for run in job.run_dirs():  # died before its first checkpoint
            shutil.rmtree(run)
    with open(job.folder / "log.txt", "a") as log:
        print(f"$ python {shlex.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env={**os.environ, **env}, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)
        if started:
            started(process)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
    lines = (job.folder / "log.txt").read_text().strip().splitlines()
    stopped = process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    if process.returncode == 0:
        result = {"summary": json.loads(lines[-1].removeprefix("summary ")),
                  "threads": int(env["OMP_NUM_THREADS"]), **sources}  # fmt: skip
    elif stopped:
        return
    else:
        result = {"failed": f"exit status {process.returncode}: {lines[-1][:200]}"}
    (job.folder / "result.json").write_text(json.dumps(result))


def collect(jobs):
    """Writes OUT/GROUP/meta.json and seedN.csv for all seeds that have run, failed ones too."""
    for first in {job.folder.parent: job for job in jobs}.values():
        folder, runs = first.folder.parent, []
        for path in sorted(folder.glob("seed*/"), key=lambda path: int(path.name[4:])):
            job = first._replace(seed=int(path.name[4:]), folder=path)
            result = job.result()
            summary = result.pop("summary", {})
            summary.pop("run_dir", None)
            runs.append({"seed": job.seed, **result, **summary})
            for run in job.run_dirs():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(run / "metrics.csv", folder / f"seed{job.seed}.csv")
        meta = {"command": f"python {first.script}.py {first.flags} --seed N",
                "label": first.label, "published": first.published, "hardware": hardware(),
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "mujoco")},
                "runs": runs}  # fmt: skip
        if runs:
            (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def sha256(script):
    """Of a script's text."""
    return hashlib.sha256((ROOT / f"{script}.py").read_bytes()).hexdigest()


def commit():
    """The commit that is checked out, and whether files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return process.stdout.strip() or "unknown"


def hardware():
    """Processor, number of cores, and the GPUs."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()
                       if Path("/proc/cpuinfo").exists() else "")  # fmt: skip
    parts = [names[0] if names else platform.processor(), f"{os.cpu_count()} cores"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts += subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
    return ", ".join(filter(None, parts))


def table(jobs, running, began, workers):
    """Prints one line per run: its state, frames, return, and the time that is left; and an
    estimate for all, from the runs that have begun."""
    width, states = max(len(job.folder.parent.name) for job in jobs), []
    spent, whole = 0.0, {}  # minutes: of the runs so far, and of a whole run {script: [...]}
    for job in jobs:
        result, (row, total) = job.result(), job.progress()
        done = "finished" if "summary" in result else "failed" if result else "waiting"
        states.append("running" if job in running else done)
        parts = [f"{job.folder.parent.name:{width}}", f"seed {job.seed:<3}", f"{states[-1]:8}"]
        frames, minutes = int(row.get("frames") or 0), float(row.get("time/wall_s") or 0) / 60
        if frames:
            parts.append(f"{frames:,} of {total:,} frames")
            whole.setdefault(job.script, []).append(minutes * total / frames)
            spent += minutes
        score = row.get("eval/return") or row.get("eval/return_2")
        if score:
            parts.append(f"return {float(score):.1f}")
        if frames and job in running:
            parts.append(f"{minutes * (total / frames - 1):.0f} min left")
        print("  ".join([*parts, result.get("failed", "")]).rstrip())
    text = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    text += f"; {(time.monotonic() - began) / 60:.0f} min so far"
    if running and all(job.script in whole for job in jobs):
        left = sum(sum(whole[job.script]) / len(whole[job.script]) for job in jobs) - spent
        text += f", about {max(0.0, left) / workers:.0f} min left"
    print(text + "\n", flush=True)


def run_local(jobs, args, show):
    """As many processes at a time as there are workers; each has a slot with cores and a GPU."""
    slots, processes, running = queue.Queue(), {}, set()
    for slot in range(args.workers):
        slots.put(slot)

    def work(job):
        slot = slots.get()
        running.add(job)
        try:
            env = environment(slot, args.workers, args.gpus_per_run)
            execute(job, env, functools.partial(processes.__setitem__, job))
        finally:
            running.discard(job)
            processes.pop(job, None)
            slots.put(slot)

    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        pending = {pool.submit(work, job) for job in jobs}
        try:
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, EVERY_S, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                show(running)
        except KeyboardInterrupt:
            print("\nstopping all runs with a checkpoint", file=sys.stderr)
            for future in pending:
                future.cancel()
            for process in list(processes.values()):
                process.send_signal(signal.SIGINT)
            raise


def run_ray(jobs, args, show):
    """Each job is a task; Ray tries it again, on another machine perhaps, if its worker dies."""
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    share = max(1, int(ray.cluster_resources()["CPU"]) // args.workers)
    env = {"OMP_NUM_THREADS": str(share)}
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
                    job.folder.mkdir(parents=True, exist_ok=True)
                    failed = {"failed": str(e).strip().splitlines()[-1][:200]}
                    (job.folder / "result.json").write_text(json.dumps(failed))
            show({job for job in pending.values() if job.folder.exists()})
    except KeyboardInterrupt:
        for ref in pending:
            ray.cancel(ref)
        ray.wait(list(pending), num_returns=len(pending), timeout=60)
        raise
    finally:
        ray.shutdown()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--env-ids", nargs="+", help="tasks (each script's default)")
    parser.add_argument("--study", choices=studies.STUDIES, help="of studies.py, instead of both")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--gpus-per-run", type=float, default=0.0, help="0.5: two share one (0)")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be run")
    parser.add_argument("flags", nargs="*", help="of the scripts, after --")
    args = parser.parse_args()
    if args.workers < 1 or not 0 <= args.gpus_per_run <= 1:
        parser.error("--workers must be at least 1, --gpus-per-run from 0 to 1")
    jobs = jobs_of(args)
    todo = [job for job in jobs if "summary" not in job.result()]
    if args.dry_run:
        for job in todo:
            print("python", shlex.join(job.command()))
        return 0
    Path(args.out).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(Path(args.out) / "lock")  # two would write to the same runs
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        sys.exit(f"error: another benchmark/run.py is at work in {args.out}; see --out")
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        {"local": run_local, "ray": run_ray}[args.engine](
            todo, args, lambda running: table(jobs, running, began, args.workers))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        collect(jobs)
    table(jobs, set(), began, args.workers)
    return int(any("failed" in job.result() for job in jobs))


if __name__ == "__main__":
    sys.exit(main())
