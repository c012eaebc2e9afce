"""Jobs on a Ray cluster: one task for each, whose machine may die.

A task whose process or machine is gone is done again by Ray, elsewhere; training then goes on from the state that the
fold has saved, on storage that all machines see under one path, and ends with the same bits (on the same kind of
device). Where a machine is only cut off, its task may still write when another one has begun: files are whole all the
same, but stop such a machine.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comp.progress import ProgressLines
from comp.runtime import Stopper
from comp.training.job import Found, Function, How, Job, Outcome, Say, do, read_more
from comp.worker import thread_variables

__all__ = ["Cluster", "find_ray"]

RETRIES = 5  # of a task whose process is gone
GIB = 2**30


class Cluster:
    """At most `how.num` jobs at a time, each with `how.resources`. Raises ValueError when no machine has those."""

    def __init__(self, fn: Function, jobs: Sequence[Job], how: How, say: Say) -> None:
        self.fn, self.todo, self.how, self.say = fn, deque(jobs), how, say
        self.ray = find_ray()

    def run(self) -> Found:
        """Do the jobs; return their outcomes by name, and the signal that stopped them, if any."""
        ray, mine = self.ray, not self.ray.is_initialized()
        if mine:
            ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=True)
        try:
            return self._run(self._remote())
        finally:
            if mine:
                ray.shutdown()

    def _remote(self) -> Any:
        """Return the task, which asks for what there is on one machine at least."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        wanted = _named(self.how.resources)
        if "GPU" not in wanted and any(node.get("GPU", 0) >= 1 for node in nodes):
            wanted["GPU"] = 1.0
        check_nodes(wanted, nodes)
        path = os.pathsep.join(dict.fromkeys(str(Path(part).absolute()) for part in sys.path))
        own = {name: wanted.pop(name, 0.0) for name in ("CPU", "GPU", "memory")}
        return self.ray.remote(
            num_cpus=own["CPU"],
            num_gpus=own["GPU"],
            **({"memory": int(own["memory"])} if own["memory"] else {}),
            resources=wanted,
            max_retries=RETRIES,
            max_calls=1,  # a process for each job: nothing of one is left for the next
            runtime_env={"env_vars": {**thread_variables(int(own["CPU"])), "PYTHONPATH": path}},
        )(_do)

    def _run(self, remote: Any) -> Found:
        ray, here = self.ray, str(Path.cwd())
        running: dict[Any, Job] = {}
        outcomes: dict[str, Outcome] = {}
        stopping = False
        with Stopper() as stopper:
            while self.todo or running:
                while self.todo and len(running) < self.how.num:
                    job = self.todo.popleft()
                    running[remote.remote(self.fn, job.arguments, job.name, here)] = job
                if stopper.signal is not None and not stopping:
                    stopping = True
                    self.todo.clear()
                    self.say("stopping: every job finishes its step and saves; Ctrl-C again ends them at once")
                    for task in running:
                        ray.cancel(task, force=False)
                for task in ray.wait(list(running), timeout=0.5)[0] if running else []:
                    job = running.pop(task)
                    outcomes[job.name] = self._outcome(job, task, stopping)
        return outcomes, stopper.signal

    def _outcome(self, job: Job, task: Any, stopping: bool) -> Outcome:
        try:
            kind, value = self.ray.get(task)
        except self.ray.exceptions.RayError as fault:
            if stopping:
                return Outcome(job, "stopped", "stopped; what it had saved is whole")
            reason = str(fault).strip().splitlines()[0]
            kind, value = (
                "failed",
                f"ended after {RETRIES} more tries ({type(fault).__name__}: {reason}){read_more(job)}",
            )
        if kind == "failed":
            self.say(f"{job.name} {value}; the others go on")
        return Outcome(job, kind, value)


def find_ray() -> Any:
    """Return the module ray, told to count nobody's use. Raises ValueError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # or of lines that are alike in two folds one is lost
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of a change to come
    try:
        import ray
    except ImportError:
        raise ValueError("--on ray needs the package ray: pip install 'comp[ray]'") from None
    return ray


def _named(resources: Mapping[str, float]) -> dict[str, float]:
    """Return the resources by Ray's names, memory in bytes."""
    found = {{"cpu": "CPU", "gpu": "GPU"}.get(name, name): number for name, number in resources.items()}
    return {name: number * GIB if name == "memory" else number for name, number in found.items()}


def check_nodes(wanted: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ValueError unless a machine has all that a job asks for: Ray would wait for one for ever."""
    if any(all(node.get(name, 0) >= number for name, number in wanted.items()) for node in nodes):
        return

    def told(resources: Mapping[str, float]) -> str:
        return ", ".join(
            f"{name.lower() if name in ('CPU', 'GPU') else name} {number / GIB if name == 'memory' else number:g}"
            for name, number in sorted(resources.items())
            if not name.startswith(("node:", "object_store")) and number
        )

    there = "; ".join(told(node) for node in nodes) or "none"
    raise ValueError(
        f"no machine of the Ray cluster has what a job asks for ({told(wanted)}); its machines have: {there}. Ask for "
        "less with --resources, or add a machine"
    )


def _do(fn: Function, arguments: tuple[Any, ...], name: str, folder: str) -> tuple[str, Any]:
    """Do a job on whatever machine this is; what it says goes to the one who asked, by Ray."""
    try:
        os.chdir(folder)
    except OSError:
        return (
            "failed",
            f"failed: {folder} is not there on {os.uname().nodename}; all machines must see it by this path",
        )

    def say(line: str) -> None:
        print(line if line.startswith(name) else f"{name}: {line}", flush=True)

    def opener(total: int, label: str, done: int = 0, to_come: float = 0) -> ProgressLines:
        return ProgressLines(total, name, done=done, named=True)

    return do(fn, arguments, say=say, opener=opener)
