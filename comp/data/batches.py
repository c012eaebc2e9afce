"""From texts to padded batches: tokenize once, cache on disk, bucket by length, restore the order of predictions.

Shapes: N rows, B rows of a batch, T tokens of its longest text, K targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from comp.runs import digest, write_atomic, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "Encoded", "Labels", "collate", "encode", "sorted_batches", "training_windows"]

CACHE = Path("runs/.cache/tokens")
MEGA_BATCHES = 50  # windows sorted together: long enough to pad little, short enough to stay shuffled


@dataclass(frozen=True)
class Encoded:
    """Token ids of N texts, flat; text i is `ids[offsets[i]:offsets[i + 1]]`. Arrays may be memory-mapped."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    type_ids: NDArray[np.int8] | None
    """Segment of each token, where the tokenizer gives segments."""
    pad_id: int
    pad_type_id: int
    pad_left: bool
    num_cut: int
    """Texts that were longer than max_length."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens per text, special tokens included."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Labels:
    """What the loss needs of N rows."""

    targets: dict[str, NDArray[np.float32]]
    """Task name -> (N, K)."""
    weights: NDArray[np.float32] | None = None
    """(N,) or None."""
    errors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Task name -> (N,) standard errors of its target, for the loss that reads them."""


@dataclass
class Batch:
    """One padded batch. `mask`: nonzero = real token."""

    rows: NDArray[np.int64]
    """(B,) row numbers in the table the batch was cut from."""
    input_ids: torch.Tensor
    mask: torch.Tensor
    num_tokens: int
    """Real tokens of the batch."""
    token_type_ids: torch.Tensor | None = None
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: torch.Tensor | None = None
    errors: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device` (itself when it is there already)."""
        if self.input_ids.device == device:
            return self

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            token_type_ids=move(self.token_type_ids),
            targets={name: target.to(device, non_blocking=True) for name, target in self.targets.items()},
            weights=move(self.weights),
            errors={name: error.to(device, non_blocking=True) for name, error in self.errors.items()},
        )


# --- tokenizing ------------------------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[list[str], ...],
    *,
    max_length: int,
    truncation: str = "head",
    cache: Path | None = CACHE,
) -> Encoded:
    """Tokenize N rows in one call and keep the result under `cache` by content hash; None = memory only.

    `texts` holds one list of N per text column. Two columns become a pair where the tokenizer has pairs; more (or two
    where it has none) are joined by the separator token. `truncation` is what is kept: head | tail.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; save the model with a tokenizer.json")
    settings = f"{max_length}|{truncation}|{len(texts)}|{_tokenizer_state(tokenizer)}"
    if cache is None:
        return _open(_tokenize(tokenizer, texts, max_length, truncation), tokenizer)
    folder = cache / digest([settings, *(digest(column) for column in texts)])
    if not (folder / "meta.json").exists():
        arrays = _tokenize(tokenizer, texts, max_length, truncation)
        try:
            _save(folder, arrays)
        except OSError:  # a read-only or full disk costs the cache, not the run
            return _open(arrays, tokenizer)
    arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
    return _open(arrays, tokenizer)


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    import tokenizers
    import transformers

    backend: Any = tokenizer.backend_tokenizer
    # An earlier call may have left truncation or padding switched on in the backend; they are set anew at each call.
    kept = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    state = digest([backend.to_str(), transformers.__version__, tokenizers.__version__])
    if kept[0]:
        backend.enable_truncation(**kept[0])
    if kept[1]:
        backend.enable_padding(**kept[1])
    return state


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: tuple[list[str], ...], max_length: int, truncation: str
) -> dict[str, NDArray[Any]]:
    pair = len(texts) == 2 and tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add()
    if not pair and len(texts) > 1:
        separator = f" {tokenizer.sep_token or tokenizer.eos_token or chr(10)} "
        texts = ([separator.join(row) for row in zip(*texts, strict=True)],)
    # Of several texts `longest_first` shortens the longer; one text is simply cut.
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "right" if truncation == "head" else "left"
    try:
        found = tokenizer(
            *texts,
            truncation="longest_first" if pair else True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_length=False,
            verbose=False,
        )
    finally:
        tokenizer.truncation_side = side
    rows: list[list[int]] = found["input_ids"]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    arrays: dict[str, NDArray[Any]] = {
        "ids": _flat(rows, np.int32),
        "offsets": offsets,
        "cut": np.array([sum(bool(encoding.overflowing) for encoding in found.encodings)], np.int64),
    }
    if "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in found:
        arrays["type_ids"] = _flat(found["token_type_ids"], np.int8)
    return arrays


def _flat(rows: list[list[int]], dtype: type[np.generic]) -> NDArray[Any]:
    total = sum(len(row) for row in rows)
    return np.fromiter((token for row in rows for token in row), dtype, count=total)


def _save(folder: Path, arrays: dict[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():

        def write(temporary: Path, array: NDArray[Any] = array) -> None:
            with open(temporary, "wb") as handle:
                np.save(handle, array)

        write_atomic(folder / f"{name}.npy", write)
    write_json(folder / "meta.json", {"rows": len(arrays["offsets"]) - 1, "tokens": int(arrays["offsets"][-1])})


def _open(arrays: dict[str, NDArray[Any]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no padding token; set one in its config")
    return Encoded(
        ids=arrays["ids"],
        offsets=arrays["offsets"],
        type_ids=arrays.get("type_ids"),
        pad_id=int(tokenizer.pad_token_id),
        pad_type_id=int(tokenizer.pad_token_type_id),
        pad_left=tokenizer.padding_side == "left",
        num_cut=int(arrays["cut"][0]),
    )


# --- batches ---------------------------------------------------------------------------------------------------------


def collate(encoded: Encoded, rows: NDArray[np.int64], labels: Labels | None = None) -> Batch:
    """Pad `rows` (B,) to the longest of them."""
    lengths = encoded.lengths[rows]
    width = int(lengths.max())
    ids = np.full((len(rows), width), encoded.pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    types = None if encoded.type_ids is None else np.full((len(rows), width), encoded.pad_type_id, np.int64)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = encoded.offsets[row]
        where = slice(width - length, width) if encoded.pad_left else slice(0, length)
        ids[place, where] = encoded.ids[start : start + length]
        mask[place, where] = 1
        if types is not None and encoded.type_ids is not None:
            types[place, where] = encoded.type_ids[start : start + length]
    batch = Batch(rows, torch.from_numpy(ids), torch.from_numpy(mask), int(lengths.sum()))
    if types is not None:
        batch.token_type_ids = torch.from_numpy(types)
    if labels is not None:
        batch.targets = {name: torch.from_numpy(target[rows]) for name, target in labels.targets.items()}
        batch.weights = None if labels.weights is None else torch.from_numpy(labels.weights[rows])
        batch.errors = {name: torch.from_numpy(error[rows]) for name, error in labels.errors.items()}
    return batch


def training_windows(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    bucketing: bool = True,
    seed: int,
    epoch: int,
) -> list[list[NDArray[np.int64]]]:
    """Cut one epoch into windows (one optimizer step each) of micro-batches of row numbers.

    Every row stands in exactly one micro-batch; the order depends on `seed` and `epoch` alone. With `bucketing`, rows
    are shuffled, sorted by length within mega-batches of 50 windows, cut, and the windows shuffled: so neither the
    longest nor the ragged window has a fixed place. `lengths` (N,) is indexed by row number.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(rows)
    if bucketing:
        mega = batch_size * MEGA_BATCHES
        parts = [order[start : start + mega] for start in range(0, len(order), mega)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    windows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if bucketing:
        windows = [windows[place] for place in generator.permutation(len(windows))]
    micro = micro_batch_size or batch_size
    return [[window[start : start + micro] for start in range(0, len(window), micro)] for window in windows]


def sorted_batches(
    lengths: NDArray[np.int64], *, max_rows: int = 64, max_tokens: int = 8192
) -> list[NDArray[np.int64]]:
    """Cut all N rows into batches for prediction: at most `max_rows` rows and `max_tokens` padded tokens each.

    Longest first, so that memory runs out at once or never. A batch has at least one row.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, min(max_rows, max_tokens // longest))
        batches.append(order[start:stop])
        start = stop
    return batches
