"""What texts laid end to end save: MiniLM on CLEAR's passages and Rotten Tomatoes' sentences, alternating.

    python benchmarks/packing.py                      # three rounds, ten minutes on two cores
    python benchmarks/packing.py --share 0.1 --try    # does it work? writes no result

An epoch of training in batches of 16 rows, forward and backward, and a prediction of the same rows in batches of 2,048
tokens: with model.attention blocked, bucketed by length and as they come from the shuffle, and with packed. Predictions
of the two may differ by 1e-5. Writes benchmarks/results/packing.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from finished_run import ROOT
from padding import BACKBONE, CLEAR

from comp.data.batches import collate, count_tokens, training_windows
from comp.data.tokens import Encoded, encode
from comp.kernels import device_name
from comp.model.losses import Decoder
from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.runtime import open_runtime
from comp.ship.demo import find_reviews, read_reviews
from comp.training.predict import predict

RESULT = ROOT / "benchmarks" / "results" / "packing.md"
ROWS = {"CLEAR": 160, "Rotten Tomatoes": 960}
WAYS = (("blocked", True), ("blocked", False), ("packed", True), ("packed", False))
NAMES = {True: "by length", False: "as shuffled"}


def train(model: TextModel, encoded: Encoded, bucketing: bool) -> tuple[float, float]:
    """Go forward and backward over an epoch; return seconds and padding's share of the tokens."""
    runtime = open_runtime("auto", "cpu")
    model.train()
    windows = training_windows(
        np.arange(len(encoded)), encoded.lengths, batch_size=16, bucketing=bucketing, seed=1, epoch=0
    )
    real, padded = count_tokens(encoded, [window[0] for window in windows])
    started = time.perf_counter()
    for window in windows:
        with runtime.autocast():
            output = model(collate(encoded, window[0]))["target"]
        output.square().mean().backward()
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - started, 0.0 if model.backbone.packs else 1 - real / padded


def measure(name: str, texts: Sequence[str], rounds: int) -> list[str]:
    """Return the rows of the table for one set of texts."""
    tokenizer = load_tokenizer(BACKBONE)
    encoded = encode(tokenizer, (list(texts),), max_length=256, cache=None)
    pooler, heads = {"name": "mean"}, {"target": 1}
    model = build_model(BACKBONE, tokenizer, pretrained=True, pooler=pooler, heads=heads, max_length=256, dropout=0.0)
    took: dict[tuple[str, bool], list[tuple[float, float]]] = {way: [] for way in WAYS}
    predicted: dict[str, list[float]] = {"sdpa": [], "blocked": [], "packed": []}
    values: dict[str, np.ndarray] = {}
    decoders: dict[str, Decoder] = {"target": lambda logits: logits}
    ids = np.arange(len(encoded)).astype(object)
    for number in range(rounds + 1):  # the first does not count
        for attention in predicted:
            model.backbone.attend(training=attention, evaluating=attention)
            for bucketing in (True, False) if attention != "sdpa" else ():
                found = train(model, encoded, bucketing)
                took[attention, bucketing] += [found] if number else []
            started = time.perf_counter()
            runtime = open_runtime("auto" if number else "fp32", "cpu")
            done = predict(model, encoded, ids, decoders=decoders, runtime=runtime)
            if number:
                predicted[attention].append(time.perf_counter() - started)
            else:
                values[attention] = done.values["target"]
            print(f"{name}, round {number}, {attention}", flush=True)
    apart = max(float(np.abs(values[one] - values["sdpa"]).max()) for one in ("blocked", "packed"))
    assert apart < 1e-5, f"predictions differ by {apart}"
    usual = [seconds for seconds, _ in took["blocked", True]]
    lines = []
    for attention, bucketing in WAYS:
        ratios = [own / other for (own, _), other in zip(took[attention, bucketing], usual, strict=True)]
        lines.append(
            f"| {name} | training, batches {NAMES[bucketing]} | {attention} | {took[attention, bucketing][0][1]:.1%} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    for attention, seconds in predicted.items():
        ratios = [own / other for own, other in zip(seconds, predicted["blocked"], strict=True)]
        lines.append(
            f"| {name} | prediction | {attention} | | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the rows")
    parser.add_argument("--try", dest="trial", action="store_true", help="print only, write no result")
    options = parser.parse_args()
    texts = {
        "CLEAR": list(pd.read_csv(CLEAR)["excerpt"]),
        "Rotten Tomatoes": [text for text, _ in read_reviews(find_reviews())],
    }
    lines = [
        "# Texts laid end to end",
        "",
        f"`python benchmarks/packing.py` on {device_name(torch.device('cpu'))}: MiniLM, {ROWS['CLEAR']} rows of CLEAR",
        f"and {ROWS['Rotten Tomatoes']:,} of Rotten Tomatoes, {options.rounds} rounds. Times against those of blocked,",
        "bucketed by length, in the same round: medians and ranges. Predictions in fp32 are the same to 1e-5.",
        "",
        "| texts | what | attention | padding | time |",
        "|---|---|---|---|---|",
    ]
    for name, rows in ROWS.items():
        many = max(32, int(rows * options.share))
        spread = np.linspace(0, len(texts[name]) - 1, many).astype(int)
        lines += measure(name, [texts[name][row] for row in spread], options.rounds)
    print("\n".join(lines))
    if not options.trial:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    assert Path(CLEAR).exists(), f"{CLEAR} is not there"
    main()
