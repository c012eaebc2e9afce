"""From texts to token ids: each column tokenized once and cached, then cut or windowed and put together per row.

Special tokens are left out of the cache and added afterwards, in the tokenizer's own template, so that the cache serves
every length, truncation and window. Shapes: N rows, P pieces (a row has one, or several windows), F text columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.progress import DELAY, open_progress
from comp.runs import digest, write_atomic, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CACHE",
    "Encoded",
    "Memory",
    "Template",
    "encode",
    "places",
    "share_out",
    "template_of",
    "window_starts",
    "within",
]

CACHE = Path("runs/.cache/tokens")
TOKENIZED = 1000  # texts handed to the tokenizer at once, between two looks at the progress
SPECIAL = -1  # text column of a special token
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """Token ids of N rows, flat: piece p is `ids[offsets[p]:offsets[p + 1]]`, row i has pieces first[i]..first[i + 1].

    A row has one piece, or several overlapping windows of a long text.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    """(P + 1,)"""
    first: NDArray[np.int64]
    """(N + 1,)"""
    type_ids: NDArray[np.int8] | None
    """Segment of each token, where the tokenizer gives segments."""
    fields: NDArray[np.int8] | None
    """Text column of each token, -1 for special tokens; None for one column."""
    pad_id: int
    pad_type_id: int
    pad_left: bool
    num_cut: int
    """Rows that lost tokens."""

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def num_windowed(self) -> int:
        """Rows of more than one piece."""
        return int((np.diff(self.first) > 1).sum())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens per row over all its pieces, special tokens included."""
        return np.diff(self.offsets[self.first])

    def take(self, rows: NDArray[np.int64]) -> Encoded:
        """Return some rows, in their order, as tokens of their own."""
        counts = self.first[rows + 1] - self.first[rows]
        pieces = np.repeat(self.first[rows], counts) + within(counts)
        lengths = self.offsets[pieces + 1] - self.offsets[pieces]
        tokens = np.repeat(self.offsets[pieces], lengths) + within(lengths)
        return replace(
            self,
            ids=self.ids[tokens],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            type_ids=None if self.type_ids is None else self.type_ids[tokens],
            fields=None if self.fields is None else self.fields[tokens],
        )

    def head(self, num_rows: int) -> Encoded:
        """Return the first rows alone."""
        return replace(self, first=self.first[: num_rows + 1])

    def documents(self, rows: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """Return the token ids of each of `rows`, all its pieces in a row."""
        starts = self.offsets[self.first]
        return [self.ids[starts[row] : starts[row + 1]] for row in rows]


@dataclass(frozen=True)
class Template:
    """What a tokenizer puts around its texts: `gaps[f]` special ids before text f, `gaps[F]` after the last."""

    gaps: tuple[tuple[int, ...], ...]
    gap_types: tuple[tuple[int, ...], ...]
    field_types: tuple[int, ...]
    """Segment of each text's tokens."""

    @property
    def num_special(self) -> int:
        return sum(map(len, self.gaps))


@dataclass(frozen=True)
class _Column:
    """The ids of one text column, flat, without special tokens."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]


Memory: TypeAlias = dict[str, _Column]
"""Tokenized columns by tokenizer and texts: handed to several calls of `encode`, it spares all but the first the work,
whatever their lengths and whether or not the disk can be written."""


def within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0..counts[0]-1, 0..counts[1]-1, ... in a row."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[str]],
    *,
    max_length: int,
    truncation: str = "head",
    windows: Mapping[str, int] | None = None,
    cache: Path | None = CACHE,
    memory: Memory | None = None,
) -> Encoded:
    """Tokenize N rows and cut them to `max_length` tokens, special ones included.

    `texts` holds one list of N per text column. Two columns become a pair where the tokenizer has pairs; more (or two
    where it has none) are joined by the separator token. Space is shared out longest first: the longest column is cut
    until it is as short as the next, as tokenizers do for pairs. `truncation` is what is kept of a column: head | tail
    | head_tail, a quarter of the space from the head and the rest from the tail (Sun et al. 2019, arXiv:1905.05583:
    128 and 382 of 510).

    `windows` {stride, max_windows}: a row that is too long becomes windows of `max_length` that share `stride` tokens
    with their neighbour, the last one more, so that it is full too. Of several columns the last slides and the others
    are repeated, cut to half of the space. Beyond `max_windows` those are kept that `truncation` says.

    Token ids are kept under `cache` by content; None = not on disk. `memory` keeps them for further calls. Raises
    ValueError when nothing fits.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; save the model with a tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no padding token; set one in its config")
    template = template_of(tokenizer, len(texts))
    room = max_length - template.num_special
    _check_room(room, max_length, template, len(texts), windows)
    state = _tokenizer_state(tokenizer)
    columns = [_column(tokenizer, column, state, cache, memory) for column in texts]
    builder = _Builder(template, columns)
    first, num_cut = [0], 0
    for row, lengths in enumerate(zip(*(np.diff(column.offsets).tolist() for column in columns), strict=True)):
        pieces, whole = _cut_row(list(lengths), room, truncation, windows)
        for piece in pieces:
            builder.add(row, piece)
        first.append(first[-1] + len(pieces))
        num_cut += not whole
    has_types = "token_type_ids" in tokenizer.model_input_names
    return Encoded(
        ids=builder.ids(),
        offsets=builder.offsets(),
        first=np.array(first, np.int64),
        type_ids=builder.types() if has_types else None,
        fields=builder.fields() if len(columns) > 1 else None,
        pad_id=int(tokenizer.pad_token_id),
        pad_type_id=int(tokenizer.pad_token_type_id),
        pad_left=tokenizer.padding_side == "left",
        num_cut=num_cut,
    )


def _check_room(
    room: int, max_length: int, template: Template, num_fields: int, windows: Mapping[str, int] | None
) -> None:
    if room < num_fields:
        raise ValueError(
            f"model.max_length is {max_length}, of which {template.num_special} are special tokens: too little for "
            f"{num_fields} texts; set it to at least {template.num_special + num_fields}"
        )
    if windows is not None:
        sliding = room if num_fields == 1 else room - room // 2
        if windows["stride"] >= sliding:
            raise ValueError(
                f"model.windows.stride is {windows['stride']}, but a window of model.max_length {max_length} has room "
                f"for {sliding} tokens of the text that slides; set the stride below {sliding}"
            )


# --- cutting ---------------------------------------------------------------------------------------------------------


def share_out(lengths: Sequence[int], room: int) -> list[int]:
    """Share `room` tokens out among texts of `lengths`: the longest is cut first, ties leave the last the longer."""
    kept, left = [0] * len(lengths), room
    for place, field in enumerate(sorted(range(len(lengths)), key=lambda f: lengths[f])):
        kept[field] = min(lengths[field], left // (len(lengths) - place))
        left -= kept[field]
    return kept


def _kept(length: int, keep: int, truncation: str) -> list[Span]:
    """Return which tokens of a text are kept."""
    if keep >= length:
        return [(0, length)]
    head = {"head": keep, "tail": 0, "head_tail": (keep + 2) // 4}[truncation]
    return [span for span in ((0, head), (length - keep + head, length)) if span[0] < span[1]]


def window_starts(length: int, size: int, stride: int, max_windows: int, truncation: str) -> tuple[list[int], bool]:
    """Return where the windows of `size` over a text of `length` > `size` start, and whether they cover it."""
    count = -(-(length - size) // (size - stride)) + 1
    starts = [min(number * (size - stride), length - size) for number in range(count)]
    if count <= max_windows:
        return starts, True
    head = {"head": max_windows, "tail": 0, "head_tail": (max_windows + 1) // 2}[truncation]
    return starts[:head] + starts[count - max_windows + head :], False


def _cut_row(
    lengths: list[int], room: int, truncation: str, windows: Mapping[str, int] | None
) -> tuple[list[list[list[Span]]], bool]:
    """Return the pieces of a row, each a list of spans per text, and whether no token was lost."""
    if sum(lengths) <= room:
        return [[[(0, length)] for length in lengths]], True
    if windows is None:
        keep = share_out(lengths, room)
        return [[_kept(length, k, truncation) for length, k in zip(lengths, keep, strict=True)]], False
    *leading, last = lengths
    keep = share_out(leading, min(sum(leading), max(room // 2, room - last)))
    before = [_kept(length, k, truncation) for length, k in zip(leading, keep, strict=True)]
    whole = keep == leading
    size = room - sum(keep)
    if last <= size:
        return [[*before, [(0, last)]]], whole
    starts, covered = window_starts(last, size, windows["stride"], windows["max_windows"], truncation)
    return [[*before, [(start, start + size)]] for start in starts], whole and covered


def places(
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    max_length: int,
    truncation: str = "head",
    windows: Mapping[str, int] | None = None,
) -> list[list[Span]]:
    """Return where each token of a row's pieces, as `encode` makes them, comes from.

    `lengths`: tokens of each of the row's texts, without special ones. A token is (text column, place among its
    tokens); (-1, -1) = special.
    """
    template = template_of(tokenizer, len(lengths))
    pieces, _ = _cut_row(list(lengths), max_length - template.num_special, truncation, windows)
    found = []
    for piece in pieces:
        own: list[Span] = []
        for field, gap in enumerate(template.gaps):
            own += [(SPECIAL, -1)] * len(gap)
            own += [(field, place) for a, b in (piece[field] if field < len(piece) else []) for place in range(a, b)]
        found.append(own)
    return found


class _Builder:
    """Gathers runs of tokens; types and fields are kept per run and written out once at the end."""

    def __init__(self, template: Template, columns: Sequence[_Column]) -> None:
        self.template, self.columns = template, columns
        self.gaps = [np.array(gap, np.int32) for gap in template.gaps]
        self.runs: list[NDArray[np.int32]] = []
        self.run_types: list[NDArray[np.int8] | int] = []
        self.run_fields: list[int] = []
        self.sizes: list[int] = []

    def add(self, row: int, piece: list[list[Span]]) -> None:
        size = 0
        for field, spans in enumerate(piece):
            self._run(self.gaps[field], SPECIAL, field)
            column = self.columns[field]
            start = int(column.offsets[row])
            for a, b in spans:
                self._run(column.ids[start + a : start + b], field, field)
                size += b - a
        self._run(self.gaps[-1], SPECIAL, len(piece))
        self.sizes.append(size + self.template.num_special)

    def _run(self, ids: NDArray[np.int32], field: int, place: int) -> None:
        self.runs.append(ids)
        self.run_fields.append(field)
        special = field == SPECIAL
        self.run_types.append(
            np.array(self.template.gap_types[place], np.int8) if special else self.template.field_types[field]
        )

    def ids(self) -> NDArray[np.int32]:
        return np.concatenate(self.runs).astype(np.int32, copy=False)

    def offsets(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    def types(self) -> NDArray[np.int8]:
        runs = zip(self.runs, self.run_types, strict=True)
        return np.concatenate([t if isinstance(t, np.ndarray) else np.full(len(run), t, np.int8) for run, t in runs])

    def fields(self) -> NDArray[np.int8]:
        return np.repeat(np.array(self.run_fields, np.int8), [len(run) for run in self.runs])


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def template_of(tokenizer: PreTrainedTokenizerBase, num_fields: int) -> Template:
    """Learn from probes what the tokenizer puts around `num_fields` texts.

    Raises ValueError when more than two texts, or two without pairs, have no separator to be joined by.
    """
    pairs = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add()
    if num_fields == 2 and pairs:
        return _probe(tokenizer, 2)
    single = _probe(tokenizer, 1)
    joint = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if num_fields == 1:
        return single
    if joint is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has neither a separator nor an end token to join "
            f"{num_fields} text columns with; set sep_token in its config, or join them in the table"
        )
    between = num_fields - 1
    return Template(
        gaps=(single.gaps[0], *[(int(joint),)] * between, single.gaps[1]),
        gap_types=(single.gap_types[0], *[single.field_types] * between, single.gap_types[1]),
        field_types=single.field_types * num_fields,
    )


def _probe(tokenizer: PreTrainedTokenizerBase, num_fields: int) -> Template:
    with _plain_backend(tokenizer):
        found = tokenizer(*[["a"]] * num_fields, padding=False, truncation=False)
    encoding = found.encodings[0]
    gaps: list[list[int]] = [[] for _ in range(num_fields + 1)]
    types: list[list[int]] = [[] for _ in range(num_fields + 1)]
    field_types = [0] * num_fields
    place = 0
    for token, type_id, field in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
        if field is None:
            gaps[place].append(token)
            types[place].append(type_id)
        else:
            place = field + 1
            field_types[field] = type_id
    return Template(tuple(map(tuple, gaps)), tuple(map(tuple, types)), tuple(field_types))


class _plain_backend:
    """Take truncation and padding, which an earlier call may have left switched on, out of the backend for a while."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend: Any = tokenizer.backend_tokenizer

    def __enter__(self) -> Any:
        self.kept = self.backend.truncation, self.backend.padding
        self.backend.no_truncation()
        self.backend.no_padding()
        return self.backend

    def __exit__(self, *_: object) -> None:
        if self.kept[0]:
            self.backend.enable_truncation(**self.kept[0])
        if self.kept[1]:
            self.backend.enable_padding(**self.kept[1])


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    import tokenizers
    import transformers

    with _plain_backend(tokenizer) as backend:
        return digest([backend.to_str(), transformers.__version__, tokenizers.__version__])


def _column(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], state: str, cache: Path | None, memory: Memory | None
) -> _Column:
    """Return the ids of one column, from memory or the cache where they are there."""
    key = digest([state, digest(texts)])
    if memory is not None and key in memory:
        return memory[key]
    column = _read_or_tokenize(tokenizer, texts, None if cache is None else cache / key)
    if memory is not None:
        memory[key] = column
    return column


def _read_or_tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], folder: Path | None) -> _Column:
    if folder is None:
        return _Column(**_tokenize(tokenizer, texts))
    if (folder / "meta.json").exists():
        with suppress(ValueError, EOFError, OSError):  # damaged, or half removed: made anew
            return _stored(folder)
    arrays = _tokenize(tokenizer, texts)
    try:
        _save(folder, arrays)
        return _stored(folder)
    except OSError:  # a read-only or full disk costs the cache, not the run
        return _Column(**arrays)


def _stored(folder: Path) -> _Column:
    found = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("ids", "offsets")}
    if int(found["offsets"][-1]) != len(found["ids"]):
        raise ValueError(f"{folder} is damaged")
    return _Column(**found)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, NDArray[Any]]:
    rows: list[list[int]] = []
    progress = open_progress(len(texts), "tokenizing", "text", delay=DELAY)
    try:
        with _plain_backend(tokenizer):
            for start in range(0, len(texts), TOKENIZED):
                found = tokenizer(
                    texts[start : start + TOKENIZED],
                    add_special_tokens=False,
                    truncation=False,
                    padding=False,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )
                rows += found["input_ids"]
                progress.advance(len(texts[start : start + TOKENIZED]))
    finally:
        progress.close()
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids = np.fromiter((token for row in rows for token in row), np.int32, count=int(offsets[-1]))
    return {"ids": ids, "offsets": offsets}


def _save(folder: Path, arrays: dict[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():

        def write(temporary: Path, array: NDArray[Any] = array) -> None:
            with open(temporary, "wb") as handle:
                np.save(handle, array)

        write_atomic(folder / f"{name}.npy", write)
    write_json(folder / "meta.json", {"rows": len(arrays["offsets"]) - 1, "tokens": int(arrays["offsets"][-1])})
