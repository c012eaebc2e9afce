"""The held-out rows of a fold: scored during training, their predictions kept for the best and the last weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from comp.config import Task
from comp.data.batches import count_tokens, sorted_batches
from comp.data.tables import Table
from comp.data.tokens import Encoded
from comp.metrics import METRICS, evaluate, evaluate_known, is_better
from comp.model.losses import build_decoder
from comp.model.text_model import TextModel
from comp.progress import DELAY, open_progress
from comp.runs import write_atomic
from comp.runtime import Runtime
from comp.training import oof
from comp.training.checkpoint import BestWeights, step_of
from comp.training.decision import Decision, where_seen
from comp.training.early import Evaluation, blocks
from comp.training.predict import Predictions, batch_tokens_of, predict
from comp.training.ranks import ALONE, OneRank

__all__ = ["HeldOut"]

GPU_LOOKS = 32  # a look is a sync point


class HeldOut:
    """Scores `model` on `rows` of `table`; keeps the best weights, for `best_path`.

    `metrics`: one per task; the first task's decides which weights are best. `decide`: how many rows it takes (see
    early.py): full = all; exact = until the best can no longer be beaten; race = until a test at `error_rate` has
    decided, or the estimate from `race_percent` of the rows. Predictions of a row that was not scored are NaN. `seed`:
    of the order of a race.
    """

    def __init__(
        self,
        model: TextModel,
        encoded: Encoded,
        rows: NDArray[np.int64],
        *,
        table: Table,
        tasks: Sequence[Task],
        metrics: Sequence[str],
        runtime: Runtime,
        best_path: Path,
        decide: Literal["full", "exact", "race"] = "full",
        error_rate: float = 0.05,
        race_percent: float = 100,
        seed: int = 0,
        ranks: OneRank = ALONE,
    ) -> None:
        self.model, self.encoded, self.rows = model, encoded, rows
        self.ids, self.classes, self.tasks = table.ids, table.classes, tasks
        self.metrics, self.runtime, self.ranks = metrics, runtime, ranks
        self.kept = BestWeights(best_path)
        self.decoders = {task.name: build_decoder(task, table.classes.get(task.name, [])) for task in tasks}
        self.targets = {name: values[rows] for name, values in table.targets.items()}
        self.decide = decide
        self.decision = Decision(
            tasks[0],
            metrics[0],
            self.targets[tasks[0].name].astype(np.float64),
            encoded.lengths[rows],
            self._looks(seed),
            decide=decide,
            error_rate=error_rate,
            race_percent=race_percent,
        )
        self.best: Predictions | None = None
        self.last: Predictions | None = None
        self.averaged: Predictions | None = None
        self.history: list[NDArray[np.float32]] = []
        """Predictions (N, K) of the first task at each evaluation."""
        self.best_mean: float | None = None
        """Mean loss of the best, estimated while not all of its rows are scored."""
        self.last_mean: float | None = None
        self.best_weights: dict[str, torch.Tensor] | None = None
        """On the CPU, while the best has rows that are not scored: a later race may want them."""
        self.num_scored = 0
        """Rows predicted in evaluations."""

    def _looks(self, seed: int) -> list[NDArray[np.int64]]:
        everything = np.arange(len(self.rows))
        if self.decide == "full" or not len(self.rows):
            return [everything]
        if self.decide == "race":
            return blocks(self.targets[self.tasks[0].name].astype(np.float64), seed=seed)
        # The very batches of a full evaluation, so that the predictions are the same bits.
        batches = self._batches(everything)
        most = len(batches) if self.runtime.device.type == "cpu" else GPU_LOOKS
        return [np.concatenate([batches[k] for k in part]) for part in _runs(len(batches), most)]

    def _batches(self, places: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        lengths = self.encoded.lengths[self.rows[places]]
        return [places[part] for part in sorted_batches(lengths, max_tokens=batch_tokens_of(self.runtime))]

    def padding(self) -> float | None:
        """Return the share of padding among the tokens of a whole evaluation; None without held-out rows."""
        if not len(self.rows):
            return None
        batches = [self.rows[part] for look in self.decision.looks for part in self._batches(look)]
        real, padded = count_tokens(self.encoded, batches)
        return 1 - real / padded

    def evaluate(self, best_score: float | None = None, full: bool = True) -> Evaluation:
        """Predict the rows and score the first task: all rows when it must be `full`, or as many as decide.

        `best_score` is what `keep_best` was last called after. A score that is no better than the best is never
        returned as better, estimate or not, but for a tie in the end, which is marked.
        """
        self.last, self.last_mean = self._nothing(), None
        verdict, difference = 0, 0.0
        for places in self.decision.order(None if self.best is None else self._first(self.best), full):
            self._add(self.last, places)
            if not all(np.isfinite(values[places]).all() for values in self.last.values.values()):
                return Evaluation(float("nan"), best_score)
            if not full and self.decide != "full" and self.best is not None:
                self._add_best(places)
                verdict, difference = self.decision.verdict(self._first(self.last), self._first(self.best))
            if verdict:
                break
        last = self._first(self.last)
        self.history.append(last.astype(np.float32))
        share = self._share(self.last)
        if not verdict and share < 1:  # the first, of a race that is capped
            self.last_mean = self.decision.mean(last)
            return Evaluation(METRICS[self.metrics[0]].of_mean(self.last_mean), best_score, share)
        if not verdict:
            if self.decide == "race":
                self.decision.foretold = last
            known, tie = self._complete(best_score)
            if known is not None and not np.isfinite(known):  # on rows that a race had not come to
                return Evaluation(float("nan"), best_score)
            return Evaluation(self._score(self.last), known, tie=tie)
        assert best_score is not None and self.best_mean is not None
        self.last_mean = self.decision.estimated(last, self.best_mean, difference)
        score = METRICS[self.metrics[0]].of_mean(self.last_mean)
        if verdict < 0 and is_better(self.metrics[0], score, best_score):  # by a rounding
            score = best_score
        return Evaluation(score, best_score, share)

    def _first(self, found: Predictions) -> NDArray[np.float64]:
        return found.values[self.tasks[0].name]

    def _add_best(self, places: NDArray[np.int64]) -> None:
        """Predict by the best weights, too, what a race wants to compare and they are not scored on yet."""
        assert self.best is not None
        if self.decide == "race" and np.isnan(self._first(self.best)[places]).any():
            with self._best_in():
                self._add(self.best, places)

    def _complete(self, best_score: float | None) -> tuple[float | None, bool]:
        """Score what is left of the best; return its score, which until then was an estimate, and whether it is a tie.

        The score is None, nothing to beat, where some of that says already that the latest weights, scored on all rows,
        are to be kept: by the race, or because it is a tie.
        """
        if self.best is None or self.best_weights is None:
            return best_score, False
        assert self.last is not None
        last, best = self._first(self.last), self._first(self.best)
        with self._best_in():
            rest = [places for places in self.decision.looks if np.isnan(best[places]).any()]
            while rest:
                seen = where_seen(best)
                wins = self.decision.raced(last, best, seen)[0] > 0
                if wins or self.decision.tied(last, best, seen):
                    return None, not wins
                places = rest.pop(0)
                while rest and len(places) + len(rest[0]) <= len(seen):  # twice as many each time: larger batches
                    places = np.concatenate([places, rest.pop(0)])
                self._add(self.best, places)
                if not np.isfinite(best[places]).all():
                    return float("nan"), False
        self.best_weights = None
        self.best_mean = self.decision.mean(best)
        return self._score(self.best), False

    def _nothing(self) -> Predictions:
        return Predictions(self.ids[self.rows], {})

    def _add(self, found: Predictions, places: NDArray[np.int64]) -> None:
        """Predict the rows at `places` by the weights in the model, into `found`."""
        part = self._values(self.rows[places])
        self.num_scored += len(places)
        for name, values in part.items():
            if name not in found.values:
                found.values[name] = np.full((len(self.rows), values.shape[1]), np.nan)
            found.values[name][places] = values

    @contextmanager
    def _best_in(self) -> Iterator[None]:
        """Put the best weights into the model; its own come back bit by bit."""
        assert self.best_weights is not None
        own = self._weights()
        kept = {name: tensor.detach().clone() for name, tensor in own.items()}
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(self.best_weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(kept[name])

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return what training can change: all but frozen parameters."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    def try_weights(self) -> float:
        """Score the weights in the model, by the way."""
        return self._score(self._predict())

    def keep_averaged(self) -> float:
        """Score the weights in the model, an average, and keep their predictions."""
        self.averaged = self._predict()
        return self._score(self.averaged)

    def _predict(self) -> Predictions:
        return Predictions(self.ids[self.rows], self._values(self.rows))

    def _values(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Predict `rows` of the table by the weights in the model, each rank a part of them."""
        own = self.ranks.part(rows)
        found = None
        batches = sorted_batches(self.encoded.lengths[own], max_tokens=batch_tokens_of(self.runtime))
        with self.ranks.in_step(len(batches)):
            if len(own):
                progress = open_progress(len(own), "evaluating", "row", delay=DELAY)
                try:
                    found = predict(
                        self.model,
                        self.encoded,
                        self.ids,
                        decoders=self.decoders,
                        runtime=self.runtime,
                        rows=own,
                        on_batch=progress.advance,
                        halving=not self.ranks.sharded,  # a pass that failed here is one that the others wait for
                    )
                finally:
                    progress.close()
        return self.ranks.together(None if found is None else found.values, len(rows))

    def _score(self, found: Predictions) -> float:
        first = self.tasks[0].name
        if not all(np.isfinite(values).all() for values in found.values.values()):
            return float("nan")
        return evaluate(self.metrics[0], self.targets[first], found.values[first], self.tasks[0].kind)

    def others(self) -> dict[str, float]:
        """Return what is logged beside the first task's score.

        "valid/<task>" -> score of the latest predictions, for the auxiliary tasks that can be scored: in a race over
        the rows that were, which are a fair sample; where `exact` stopped they are the worst ones, and none is
        returned. Unless all rows are always scored, "valid/rows" and "valid/best_rows" -> their share, for the latest
        weights and for the best: below 1 their score is an estimate.
        """
        assert self.last is not None
        values, rows = self.last.values, self._share(self.last)
        found: dict[str, float | None] = {}
        if self.decide != "full":
            found = {"valid/rows": rows, "valid/best_rows": 1.0 if self.best is None else self._share(self.best)}
        if self.decide == "race" or rows == 1:
            seen = np.isfinite(values[self.tasks[0].name]).all(axis=1)
            for task, metric in zip(self.tasks[1:], self.metrics[1:], strict=True):
                own = self.targets[task.name][seen], values[task.name][seen]
                found[f"valid/{task.name}"] = evaluate_known(metric, *own, task.kind)
        return {name: score for name, score in found.items() if score is not None}

    def _share(self, found: Predictions) -> float:
        """Return the share of the rows that have predictions."""
        return len(where_seen(self._first(found))) / len(self.rows)

    @property
    def scored_share(self) -> float:
        """Rows predicted in evaluations, over those that full evaluations would have predicted; 0 without any."""
        return round(self.num_scored / max(1, len(self.history) * len(self.rows)), 4)

    def keep_best(self, step: int) -> None:
        """Keep the latest predictions, and the weights that made them at `step`, as the best."""
        assert self.last is not None
        self.best, self.best_mean, self.best_weights = self.last, self.last_mean, None
        weights = self.ranks.weights(self.model)
        if self.ranks.first:
            self.kept.keep(weights, step)
        if self._share(self.best) < 1:
            same = {} if self.ranks.sharded else self.kept.waiting
            self.best_weights = {
                name: same[name] if name in same else tensor.detach().to("cpu", copy=True)
                for name, tensor in self._weights().items()
            }
        elif self.decide != "full":
            self.best_mean = self.decision.mean(self._first(self.best))

    def settle(self, best_step: int) -> tuple[int, float] | None:
        """Make sure that the best predictions are those of the best weights on disk.

        A killed run may leave weights that are newer than its state; where going on does not repeat it bit by bit
        (another machine), they stay. Then the model gets those weights, the rows are predicted anew, and their step
        and score are returned.
        """
        step = self.ranks.of_first(step_of(self.kept.path) if self.ranks.first else None)
        if step is None or step == best_step:
            return None
        self.ranks.read_weights(self.kept.path, self.model)
        self.best = self._predict()
        return step, self._score(self.best)

    def state_dict(self) -> dict[str, Any]:
        """Return the predictions that the end of the fold needs."""
        kept = {"best": self.best, "last": self.last}
        history = [torch.from_numpy(values) for values in self.history]
        foretold = self.decision.foretold
        race = {
            "best_mean": self.best_mean,
            "best_weights": self.best_weights,
            "num_scored": self.num_scored,
            "foretold": None if foretold is None else torch.from_numpy(foretold),
        }
        return {"history": history, "race": race} | {
            kind: {name: torch.from_numpy(values) for name, values in found.values.items()}
            for kind, found in kept.items()
            if found is not None
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        kept = {
            kind: Predictions(self.ids[self.rows], {name: values.numpy() for name, values in found.items()})
            for kind, found in state_dict.items()
            if kind in ("best", "last")
        }
        race = state_dict["race"]
        self.best_mean, self.best_weights, self.num_scored = race["best_mean"], race["best_weights"], race["num_scored"]
        foretold = race.get("foretold")  # None, or of a run that was stopped before there was one
        self.decision.foretold = None if foretold is None else foretold.numpy()
        self.history = [values.numpy() for values in state_dict["history"]]
        self.best, self.last = kept.get("best"), kept.get("last")

    def write_history(self, path: Path) -> None:
        """Write the predictions of the first task at each evaluation: id, then eval<i>_<output>."""
        names = oof.output_names(self.tasks[0], self.classes)
        columns: dict[str, Any] = {"id": self.ids[self.rows]}
        for number, values in enumerate(self.history):
            columns |= {f"eval{number}_{name}": values[:, place] for place, name in enumerate(names)}
        frame = pd.DataFrame(columns)
        write_atomic(path, lambda temporary: frame.to_parquet(temporary, index=False))

    def write(self, path: Path, fold: int) -> None:
        """Write the fold's out-of-fold rows."""
        assert self.best is not None and self.last is not None
        assert self._share(self.best) == self._share(self.last) == 1, "the last evaluation scores all rows of both"
        oof.write(
            path,
            fold=fold,
            tasks=self.tasks,
            classes=self.classes,
            targets=self.targets,
            best=self.best,
            last=self.last,
            averaged=self.averaged,
        )


def _runs(number: int, most: int) -> list[range]:
    """Part 0..number - 1 into at most `most` runs of nearly equal length."""
    cuts = [number * k // min(most, number) for k in range(min(most, number) + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]
