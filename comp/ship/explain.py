"""`comp explain`: which words push a run's out-of-fold prediction up or down, by integrated gradients.

Sundararajan, Taly & Yan 2017, arXiv:1703.01365, as implemented by Captum (extra `explain`). A row is explained by the
fold model that did not see it. Explained is the prediction itself for regression and ordinal tasks, else the log-odds
of an output, log(p / (1 - p)), so that softmax's other classes count.

The baseline is the same row with every token of its texts replaced by the mask token (padding, where the tokenizer has
none), special tokens kept: it is a choice, and another one gives other numbers. Not padding: its embedding is zero, and
a norm right behind it (DeBERTa) sends all points of the way but the first to one place, so that nothing is left to
integrate. Gradients run to the word embeddings only; positions, masks and what a pooler reads of the token ids stay
those of the row. A word has the sum of its tokens, over all windows that hold it. The sum over all words is the
prediction minus that of the baseline, but for the error of the numerical integral, which is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from comp.data.batches import Batch, collate
from comp.data.frames import read_frame
from comp.data.tables import Table, read_train
from comp.data.tokens import encode, places
from comp.model.losses import decode
from comp.model.sources import check_tokenizer, load_tokenizer
from comp.model.text_model import TextModel
from comp.progress import open_progress
from comp.runs import read_json
from comp.ship.loaded import LoadedRun, load

__all__ = ["Explanation", "Word", "explain_rows", "sample_rows"]

STEPS = 50
CHUNK = 8  # points of the integral in one pass


@dataclass(frozen=True)
class Word:
    """A word of a row's text, as the tokenizer cuts them."""

    field: int
    """Text column."""
    start: int
    end: int
    """Characters of the text."""
    weight: float
    """How much it pushes the explained number."""


@dataclass(frozen=True)
class Explanation:
    """One row, explained by one output of the fold model that did not see it."""

    id: str
    fold: int
    output: str
    texts: tuple[str, ...]
    words: list[Word]
    """In the order of the texts; words that were cut off are not among them."""
    value: float
    """The explained number: a prediction, or log-odds."""
    base: float
    """The same for the baseline."""
    delta: float
    """Sum of the weights minus (value - base): the error of the integral."""

    @property
    def error(self) -> float:
        """|delta| as a share of all pushes, up and down."""
        return abs(self.delta) / max(sum(abs(word.weight) for word in self.words), 1e-9)


def sample_rows(run: str | Path, number: int, seed: int = 0) -> list[str]:
    """Return the ids of `number` out-of-fold rows drawn at random (all, where there are fewer)."""
    loaded = load(run)
    ids = [name for fold in _numbers(loaded) for name in _rows(loaded, fold).index]
    chosen = np.random.default_rng(seed).permutation(len(ids))[:number]
    return [ids[place] for place in sorted(chosen.tolist())]


def explain_rows(
    run: str | Path, ids: Sequence[str], *, output: str | None = None, weights: str = "best", steps: int = STEPS
) -> list[Explanation]:
    """Explain the first task's prediction of out-of-fold rows.

    `output`: a target column, or a class; default: the first column, or the class that is predicted. `steps`: points of
    the integral. Raises ValueError when Captum is absent, the run or an id or an output does not fit, or a row was not
    held out by a finished fold.
    """
    captum = _captum()
    if steps < 2:
        raise ValueError(f"--steps {steps}: the integral needs at least 2 points; 50 are usual")
    # In float32, whatever the training: in half precision the integral does not add up.
    loaded = load(run, weights=weights, precision="fp32")
    if loaded.folder.classical.exists():
        raise ValueError(f"{run} is a classical run, which has no gradients; explain a run of `comp train`")
    if loaded.config.model.part == "decoder":
        raise ValueError(f"{run} reads the decoder half of its backbone (model.part), which cannot be explained yet")
    names = loaded.output_names
    if output is not None and output not in names:
        raise ValueError(f"--output '{output}': the outputs of task '{loaded.task.name}' are {', '.join(names)}")
    fold_of = {name: fold for fold in _numbers(loaded) for name in _rows(loaded, fold).index}
    strange = [name for name in ids if name not in fold_of]
    if strange:
        raise ValueError(
            f"--row {strange[0]}: no finished fold of {run} held out such a row: either every model has seen it, or it "
            "is not of the training table"
        )
    table = read_train(loaded.config.competition, loaded.config.tasks)
    place_of = {name: place for place, name in enumerate(table.ids)}
    lost = [name for name in ids if name not in place_of]
    if lost:
        raise ValueError(f"--row {lost[0]}: not in {loaded.config.competition.train} any more")
    tokenizer = load_tokenizer(str(loaded.folder.backbone))
    check_tokenizer(tokenizer, loaded.folder.backbone, read_json(loaded.folder.manifest).get("tokenizer"))
    model = loaded.build().requires_grad_(False)
    found: dict[str, Explanation] = {}
    progress = open_progress(len(ids), "rows explained", "row")
    try:
        for fold in sorted({fold_of[name] for name in ids}):
            loaded.fill(model, fold)
            for name in (name for name in ids if fold_of[name] == fold):
                row = _Row(loaded, model, tokenizer, table, place_of[name])
                found[name] = row.explain(captum, fold, output, steps)
                progress.advance()
    finally:
        progress.close()
    return [found[name] for name in ids]


def _captum() -> Any:
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise ValueError(
            "comp explain needs Captum, which is not installed: `pip install captum` (or the extra comp[explain])"
        ) from None
    return IntegratedGradients


def _numbers(loaded: LoadedRun) -> list[int]:
    folds = [fold for fold in loaded.folder.finished_folds() if isinstance(fold, int)]
    if not folds:
        raise ValueError(f"{loaded.folder.path} has no finished fold with held-out rows to explain")
    return folds


def _rows(loaded: LoadedRun, fold: int) -> pd.DataFrame:
    return read_frame(loaded.folder.fold(fold).oof, "id").set_index("id")


class _Row:
    """One row as the model reads it, and its texts as people do."""

    def __init__(self, run: LoadedRun, model: TextModel, tokenizer: Any, table: Table, place: int) -> None:
        self.run, self.model, self.name = run, model, str(table.ids[place])
        self.texts = tuple(column[place] for column in table.texts)
        cutting: Mapping[str, Any] = run.config.model.cutting
        encoded = encode(tokenizer, [[text] for text in self.texts], **cutting, cache=None)
        self.batch = collate(encoded, np.zeros(1, np.int64)).to(run.runtime.device)
        self.tokens = [
            tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False)
            for text in self.texts
        ]
        pieces = places(tokenizer, [len(tokens["input_ids"]) for tokens in self.tokens], **cutting)
        self.places = np.full((*self.batch.input_ids.shape, 2), -1)
        for piece, own in enumerate(pieces):
            where = np.flatnonzero(self.batch.mask[piece].cpu().numpy())
            self.places[piece, where] = own
        content = torch.from_numpy(self.places[:, :, 0] >= 0).to(self.batch.input_ids.device)
        blank = encoded.pad_id if tokenizer.mask_token_id is None else int(tokenizer.mask_token_id)
        self.base_ids = torch.where(content, blank, self.batch.input_ids)

    def explain(self, method: Any, fold: int, output: str | None, steps: int) -> Explanation:
        table = self.model.backbone.model.get_input_embeddings()
        real, base = (table(ids)[None] for ids in (self.batch.input_ids, self.base_ids))
        names = self.run.output_names
        with torch.no_grad():
            outputs = self._outputs(real)
        chosen = int(outputs[0].argmax()) if output is None and self.run.task.kind == "multiclass" else 0
        column = names.index(output) if output is not None else chosen

        def value(embeddings: torch.Tensor) -> torch.Tensor:
            return self._outputs(embeddings)[:, column]

        weights, delta = method(value).attribute(
            real, base, n_steps=steps, internal_batch_size=CHUNK, return_convergence_delta=True
        )
        with torch.no_grad():
            at_row, at_base = (float(value(one)) for one in (real, base))
        per_token = weights[0].sum(-1).double().cpu().numpy()
        words = list(self._words(per_token))
        return Explanation(self.name, fold, names[column], self.texts, words, at_row, at_base, float(delta))

    def _outputs(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return what is explained (n, K) at n points, word embeddings (n, P, T, H) of the row's P pieces."""
        batch = _tiled(self.batch, len(embeddings))
        table, whole = self.model.backbone.model.get_input_embeddings(), embeddings.flatten(0, 1)
        packing = self.model.backbone.packing(batch.mask)
        own = (batch.input_ids, whole) if packing is None else (packing.pack(batch.input_ids), packing.pack(whole))
        with _instead(table, *own):
            logits = self.model(batch)[self.run.task.name].float()
        kind = self.run.task.kind
        if self.run.task.loss.name == "ordinal":  # expected grade, also where whole ranks are predicted
            return float(self.run.classes[self.run.task.name][0]) + logits.sigmoid().sum(1, keepdim=True)
        if kind == "multiclass":
            others = torch.stack(
                [torch.cat([logits[:, :k], logits[:, k + 1 :]], 1).logsumexp(1) for k in range(logits.shape[1])], 1
            )
            return logits - others
        return logits if kind in ("binary", "multilabel") else decode(logits, kind=kind)

    def _words(self, per_token: np.ndarray[Any, Any]) -> Iterator[Word]:
        """Sum the weights (P, T) of tokens over words and windows."""
        sums: dict[tuple[int, int], float] = {}
        spans: dict[tuple[int, int], tuple[int, int]] = {}
        for (field, place), weight in zip(self.places.reshape(-1, 2).tolist(), per_token.ravel().tolist(), strict=True):
            if field < 0:
                continue
            encoding = self.tokens[field].encodings[0]
            start, end = encoding.offsets[place]
            word = encoding.word_ids[place]
            key = field, -1 - place if word is None else word
            low, high = spans.get(key, (start, end))
            spans[key] = min(low, start), max(high, end)
            sums[key] = sums.get(key, 0.0) + weight
        for key in sorted(sums, key=lambda key: (key[0], spans[key])):
            yield Word(key[0], *spans[key], sums[key])


def _tiled(batch: Batch, times: int) -> Batch:
    """Return a batch of one row as `times` rows."""

    def tile(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.repeat(times, 1)

    pieces = len(batch.input_ids)
    window_of = None
    if batch.window_of is not None:
        window_of = torch.arange(times, device=batch.input_ids.device).repeat_interleave(pieces)
    return Batch(
        rows=np.zeros(times, np.int64),
        input_ids=batch.input_ids.repeat(times, 1),
        mask=batch.mask.repeat(times, 1),
        num_tokens=batch.num_tokens * times,
        token_type_ids=tile(batch.token_type_ids),
        fields=tile(batch.fields),
        window_of=window_of,
    )


@contextmanager
def _instead(table: torch.nn.Module, ids: torch.Tensor, embeddings: torch.Tensor) -> Iterator[None]:
    """Let the word table return `embeddings` (B, T, H) instead of those of `ids` (B, T)."""

    def hook(_: Any, given: Any, __: Any) -> torch.Tensor:
        if given[0].shape == ids.shape and bool((given[0] == ids).all()):
            return embeddings
        assert given[0].T.shape == ids.shape, "the backbone looks up other ids than it was given"
        return embeddings.transpose(0, 1)  # XLNet puts the tokens first

    handle = table.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
