"""`comp lit`: a run in the Language Interpretability Tool (Tenney et al. 2020, arXiv:2008.05122), in the browser.

Its data are the run's out-of-fold rows, each predicted by the fold model that did not see it, and the test table,
predicted by the mean of the models. A text that is edited in the tool goes to the model of its row. Extra `lit`.

The tool's icons are a font from the web: without a network their names stand in their place, and all else works.
"""

from __future__ import annotations

import threading
import webbrowser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comp.data.frames import listed
from comp.data.tables import Table, read_test, read_train, table_of
from comp.model.losses import build_decoder
from comp.model.text_model import VECTOR
from comp.progress import open_progress
from comp.ship.loaded import Floats, LoadedRun, load
from comp.training.oof import read_rows
from comp.training.predict import predict

__all__ = ["Rows", "RunPredictor", "held_out_rows", "lit_parts", "open_lit", "serve", "unlabelled_rows"]

FOLD = "model_fold"
"""Field that says which model predicts a row: a fold's number, or ALL."""
ALL = "all"
ROWS = 2000
"""Rows of a data set that the tool shows with ease."""
SEED = 0


@dataclass(frozen=True)
class Rows:
    """A data set as the tool takes it: examples of one spec."""

    examples: list[dict[str, Any]]
    total: int
    """Rows there are; the examples may be a sample."""


class RunPredictor:
    """Predicts examples by the models of a run, each by that of its fold; what was predicted once is remembered."""

    def __init__(self, run: LoadedRun) -> None:
        self.run = run
        self.folds = {str(fold): fold for fold in run.folds}
        self.has_vectors = not run.folder.classical.exists()
        self._model: Any = run.build()
        if self.has_vectors:
            self._model.with_vectors = True
        self._loaded: int | str | None = None
        self._known: dict[tuple[str, ...], tuple[Floats, Floats]] = {}
        self._lock = threading.Lock()  # the tool asks from several threads, and there is one model

    def predict(self, examples: Sequence[Mapping[str, Any]]) -> list[tuple[Floats, Floats]]:
        """Return (prediction (K,), vector (F,); empty for classical runs) of each example, in their order."""
        keys = [(str(one.get(FOLD) or ALL), *map(str, self._texts(one))) for one in examples]
        with self._lock:
            fresh = list(dict.fromkeys(key for key in keys if key not in self._known))
            if fresh:
                self._predict(fresh)
            return [self._known[key] for key in keys]

    def _texts(self, example: Mapping[str, Any]) -> list[str]:
        return [example.get(column) or "" for column in self.run.config.competition.text_columns]

    def _predict(self, keys: Sequence[tuple[str, ...]]) -> None:
        wanted = {key[0] for key in keys}
        if strange := wanted - {*self.folds, ALL}:
            raise ValueError(f"{FOLD} '{strange.pop()}': allowed are {', '.join([*self.folds, ALL])}")
        sums: dict[tuple[str, ...], list[tuple[Floats, Floats]]] = {key: [] for key in keys}
        parts = [(fold, [key for key in keys if key[0] in (name, ALL)]) for name, fold in self.folds.items()]
        progress = open_progress(sum(len(own) for _, own in parts), "rows for the tool", "row")
        try:
            for fold, own in parts:
                if own:
                    values, vectors = self._by(fold, own, progress.advance)
                    for key, value, vector in zip(own, values, vectors, strict=True):
                        sums[key].append((value, vector))
        finally:
            progress.close()
        for key, found in sums.items():
            self._known[key] = (np.mean([one[0] for one in found], axis=0), np.mean([one[1] for one in found], axis=0))

    def _by(
        self, fold: int | str, keys: Sequence[tuple[str, ...]], on_rows: Callable[[int], Any]
    ) -> tuple[Floats, Floats]:
        """Return (N, K) predictions and (N, F) vectors by the model of one fold."""
        run = self.run
        competition = run.config.competition
        columns = {competition.id: [str(place) for place in range(len(keys))]}
        columns |= {name: [key[1 + place] for key in keys] for place, name in enumerate(competition.text_columns)}
        table = table_of(pd.DataFrame(columns), competition, source="the tool")
        content = run.read(table, cache=None)
        if self._loaded != fold:
            run.fill(self._model, fold)
            self._loaded = fold
        if not self.has_vectors:
            return run.predict_with(self._model, fold, content, on_rows), np.zeros((len(keys), 0))
        decoder = build_decoder(run.task, run.classes.get(run.task.name, []))
        found = predict(
            self._model,
            content,
            table.ids,
            decoders={run.task.name: decoder, VECTOR: lambda vector: vector.float()},
            runtime=run.runtime,
            on_batch=on_rows,
            batch_tokens=run.batch_tokens,
        )
        return found.values[run.task.name], found.values[VECTOR]


# --- the data --------------------------------------------------------------------------------------------------------


def _examples(run: LoadedRun, table: Table, places: Sequence[int], folds: Sequence[str], targets: bool) -> list[Any]:
    """Return examples of some rows of a table: id, texts, target columns, and which model predicts them."""
    names, task = run.config.competition.text_columns, run.task
    kinds = _kinds(run, table) if targets else {}
    found = []
    for place, fold in zip(places, folds, strict=True):
        one: dict[str, Any] = {run.config.competition.id: str(table.ids[place]), FOLD: fold}
        one |= {name: str(texts[place]) for name, texts in zip(names, table.texts, strict=True)}
        for column, (name, labels) in enumerate(kinds.items()):
            value = table.targets[task.name][place, column]
            one[name] = float(f"{value:.7g}") if labels is None else labels[int(value)]
        found.append(one)
    return found


def _kinds(run: LoadedRun, table: Table | None) -> dict[str, list[str] | None]:
    """Return target column -> its labels, or None for numbers and soft labels; {} for a column per class."""
    task = run.task
    if task.kind == "multiclass":
        return {} if len(task.targets) > 1 else {task.targets[0]: run.classes[task.name]}
    hard = task.kind in ("binary", "multilabel")
    if hard and table is not None:
        hard = bool(np.isin(table.targets[task.name], (0.0, 1.0)).all())
    return {name: ["0", "1"] if hard else None for name in task.targets}


def _sampled(count: int, most: int) -> list[int]:
    chosen = np.random.default_rng(SEED).permutation(count)[:most]
    return sorted(int(place) for place in chosen)


def held_out_rows(run: LoadedRun, most: int = ROWS) -> tuple[Rows, Table]:
    """Return the out-of-fold rows of a run as examples, a sample of `most`, and the training table.

    Raises ValueError when no fold held rows out, or the table has not all of them any more.
    """
    folds = [fold for fold in run.folds if isinstance(fold, int)]
    if not folds:
        raise ValueError(f"{run.folder.path} has no finished fold with held-out rows to look at")
    rows = read_rows(run.folder, folds)
    table = read_train(run.config.competition, run.config.tasks, classes=run.classes)
    places = pd.Index(table.ids).get_indexer(pd.Index(rows["id"]))
    if (places < 0).any():
        lost = list(rows["id"][places < 0])
        raise ValueError(f"{run.config.competition.train} lacks rows that {run.folder.path} held out: {listed(lost)}")
    chosen = _sampled(len(rows), most)
    folds_of = [str(rows["fold"].iloc[place]) for place in chosen]
    return Rows(_examples(run, table, [int(places[place]) for place in chosen], folds_of, True), len(rows)), table


def unlabelled_rows(run: LoadedRun, most: int = ROWS) -> Rows | None:
    """Return the rows of the test table as examples; None where the config names none, or it is gone."""
    file = run.config.competition.test
    if file is None or not Path(file).exists():
        return None
    table = read_test(file, run.config.competition, empty=True)
    chosen = _sampled(len(table), most)
    return Rows(_examples(run, table, chosen, [ALL] * len(chosen), False), len(table))


# --- the tool --------------------------------------------------------------------------------------------------------


def lit_parts(run: LoadedRun, rows: Mapping[str, Rows], table: Table | None) -> tuple[Any, dict[str, Any]]:
    """Return a run as a model of the tool's, and its data sets: name -> data set."""
    lit = _lit()
    types, kinds = lit.types, _kinds(run, table)
    predictor, task = RunPredictor(run), run.task
    texts: dict[str, Any] = {name: types.TextSegment() for name in run.config.competition.text_columns}
    choice = types.CategoryLabel(vocab=[*predictor.folds, ALL], required=False)
    targets = {
        name: types.Scalar(required=False) if labels is None else types.CategoryLabel(vocab=labels, required=False)
        for name, labels in kinds.items()
    }
    outputs: dict[str, Any] = {}
    if task.kind == "multiclass":
        parent = task.targets[0] if kinds else None
        outputs[f"predicted_{task.name}"] = types.MulticlassPreds(vocab=run.output_names, parent=parent)
    else:
        for name, labels in kinds.items():
            outputs[f"predicted_{name}"] = (
                types.RegressionScore(parent=name)
                if labels is None
                else types.MulticlassPreds(vocab=labels, null_idx=0, parent=name)
            )
    if predictor.has_vectors:
        outputs["vector"] = types.Embeddings()

    class RunModel(lit.model.Model):  # type: ignore[name-defined]
        """A run of comp's: each row by the model of its fold."""

        predictor: RunPredictor

        @classmethod
        def init_spec(cls) -> None:
            return None  # the page cannot load another one

        def input_spec(self) -> dict[str, Any]:
            return {**texts, FOLD: choice}

        def output_spec(self) -> dict[str, Any]:
            return outputs

        def predict(self, inputs: Iterable[Mapping[str, Any]], **_: Any) -> list[dict[str, Any]]:
            return [self._told(*found) for found in self.predictor.predict(list(inputs))]

        def _told(self, values: Floats, vector: Floats) -> dict[str, Any]:
            found: dict[str, Any] = {}
            if task.kind == "multiclass":
                found[f"predicted_{task.name}"] = values
            for place, (name, labels) in enumerate(kinds.items() if task.kind != "multiclass" else ()):
                one = float(values[place])
                found[f"predicted_{name}"] = one if labels is None else np.array([1 - one, one])
            return {**found, "vector": vector} if self.predictor.has_vectors else found

    class RunRows(lit.dataset.Dataset):  # type: ignore[name-defined]
        """Rows of a run."""

        def __init__(self, own: Rows, about: str, with_targets: bool) -> None:
            self._examples = own.examples
            self._about, self._with = about, with_targets

        @classmethod
        def init_spec(cls) -> None:
            return None

        def description(self) -> str:
            return self._about

        def spec(self) -> dict[str, Any]:
            own = {run.config.competition.id: types.StringLitType(), **texts, FOLD: choice}
            return {**own, **(targets if self._with else {})}

    model = RunModel()
    model.predictor = predictor
    about = {"dev": "out-of-fold rows, each predicted by the fold model that did not see it"}
    about["test"] = "the test table, predicted by the mean of the models"
    return model, {name: RunRows(own, about[name], name == "dev") for name, own in rows.items()}


@dataclass(frozen=True)
class _Lit:
    types: Any
    model: Any
    dataset: Any
    dev_server: Any
    server_flags: Any


def _lit() -> _Lit:
    """Import the tool. Raises ValueError when it is not there."""
    try:
        from absl import flags
        from lit_nlp import dev_server, server_flags
        from lit_nlp.api import dataset, model, types
    except ImportError as fault:
        raise ValueError(
            f"comp lit needs the Language Interpretability Tool, which cannot be imported ({fault}): `pip install "
            "lit-nlp` (or the extra comp[lit]); it wants NumPy below 2, so best in an environment of its own"
        ) from None
    except AttributeError as fault:  # shap 0.45, which it pins, with NumPy 2
        raise ValueError(
            f"comp lit: a package of lit-nlp does not go with this NumPy ({fault}): `pip install -U shap`, or NumPy "
            "below 2 in an environment of its own"
        ) from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["lit"])  # its options are absl's, which must be parsed before they can be read
    return _Lit(types, model, dataset, dev_server, server_flags)


def open_lit(
    path: str | Path, *, weights: str = "best", most: int = ROWS, say: Callable[[str], None] = print
) -> tuple[Any, Any]:
    """Return the tool as a WSGI application for a run, and the run as its model, all rows predicted.

    `weights`: best | last | averaged. `most`: rows of a data set. Raises ValueError when the tool is absent or the path
    is no run with out-of-fold rows.
    """
    if most < 1:
        raise ValueError(f"--rows {most}: at least 1 is needed")
    lit = _lit()
    run = load(path, weights=weights)
    dev, table = held_out_rows(run, most)
    test = unlabelled_rows(run, most)
    rows = {"dev": dev} if test is None or not test.examples else {"dev": dev, "test": test}
    for name, own in rows.items():
        sampled = f" of {own.total:,}, drawn at random (--rows)" if len(own.examples) < own.total else ""
        say(f"{name}: {len(own.examples):,} rows{sampled}")
    model, datasets = lit_parts(run, rows, table)
    model.predictor.predict([one for own in rows.values() for one in own.examples])
    options = lit.server_flags.get_flags() | {
        "server_type": "external",
        "page_title": f"{run.folder.name}: {run.config.competition.name}",
    }
    return lit.dev_server.Server({run.folder.name: model}, datasets, **options).serve(), model


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 5432,
    browse: bool = True,
    weights: str = "best",
    most: int = ROWS,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a run in the tool until Ctrl-C. `browse`: open it in a browser. See `open_lit`.

    Raises ValueError when the port cannot be had, too.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: allowed are 0 (any that is free) to 65535")
    _lit()
    from werkzeug.serving import make_server

    application, _ = open_lit(path, weights=weights, most=most, say=say)
    try:
        server = make_server(host, port, application, threaded=True)
    except (OSError, SystemExit) as fault:  # werkzeug ends the process when a port is taken
        raise ValueError(f"--host {host} --port {port} cannot be had ({fault}); name another --port") from None
    address = f"http://{host}:{server.server_port}/"
    say(f"{path} in the Language Interpretability Tool: {address}  (Ctrl-C ends it)")
    if browse:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("")
    finally:
        server.server_close()
