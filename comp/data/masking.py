"""Texts for masked language modelling: packed into blocks, and masked.

Devlin et al. 2019, arXiv:1810.04805: of the chosen tokens 80% become the mask, 10% another token, 10% stay; the loss is
over the chosen ones. Whole words: the authors' later BERT code; packing: RoBERTa's FULL-SENTENCES (Liu et al. 2019,
arXiv:1907.11692). Shapes: N rows (texts, or blocks of packed ones), S tokens of all of them.

What is masked depends on (seed, epoch, row) alone: no other generator is touched, so that neither the cut of a batch,
nor an evaluation, nor a stop changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from comp.data.batches import Batch, collate
from comp.data.tokens import Encoded, Memory, encode, places, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FIXED", "IGNORE", "LABELS", "Masker", "encode_texts"]

IGNORE = -100
LABELS = "labels*"  # no task can be called so
FIXED = 2**32 - 1  # the epoch of masks that never change: those of held-out rows
UNCUT = 2**40
LONG = 32  # a text of so many tokens that is one word says that the tokenizer knows no words
Numbers: TypeAlias = NDArray[np.int32]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[str]],
    *,
    packing: bool,
    words: bool,
    max_length: int,
    truncation: str = "head",
    windows: Mapping[str, int] | None = None,
    memory: Memory | None = None,
) -> tuple[Encoded, Numbers | None]:
    """Return N rows of tokens, and with `words` the number (S,) of the word each token is of, -1 for special ones.

    With `packing` a row is a block: the texts in their order, a separator between, cut into blocks of `max_length`
    tokens, special ones included, of which the last may be shorter; texts of several columns are first put together as
    `encode` does. Otherwise a row is a text, cut by `truncation` or in `windows`. Raises ValueError when the tokenizer
    has no separator to pack with, or does not tell words.
    """
    cutting: dict[str, Any] = {"max_length": UNCUT} if packing else {}
    cutting = cutting or {"max_length": max_length, "truncation": truncation, "windows": windows}
    encoded = encode(tokenizer, texts, memory=memory, **cutting)
    numbers = _word_numbers(tokenizer, texts, encoded, cutting) if words else None
    return _packed(tokenizer, encoded, numbers, max_length, len(texts)) if packing else (encoded, numbers)


def _packed(
    tokenizer: PreTrainedTokenizerBase, encoded: Encoded, words: Numbers | None, max_length: int, num_fields: int
) -> tuple[Encoded, Numbers | None]:
    own, block = template_of(tokenizer, num_fields), template_of(tokenizer, 1)
    joint = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if joint is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has neither a separator nor an end token to pack texts with; set "
            "pretrain.objective.packing to false"
        )
    before, after = (np.array(gap, np.int32) for gap in block.gaps)
    room = max_length - block.num_special
    if room < 1:
        raise ValueError(f"pretrain.max_length is {max_length}, of which {block.num_special} are special tokens")

    def blocks(flat: Numbers, starts: Numbers, ends: Numbers, between: int) -> list[Numbers]:
        """Cut off each text's own special tokens, put `between` between texts, and the block's around each piece."""
        gap = np.array([between], np.int32)
        stream: list[Numbers] = []
        for a, b in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True):
            stream += [flat[a + len(own.gaps[0]) : b - len(own.gaps[-1])], gap]
        joined = np.concatenate(stream[:-1])
        return [np.concatenate([starts, joined[at : at + room], ends]) for at in range(0, len(joined), room)]

    ids = blocks(encoded.ids, before, after, int(joint))
    lengths = [len(piece) for piece in ids]
    packed = replace(
        encoded,
        ids=np.concatenate(ids),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        first=np.arange(len(ids) + 1),
        type_ids=None if encoded.type_ids is None else np.full(sum(lengths), block.field_types[0], np.int8),
        fields=None,
        num_cut=0,
    )
    if words is None:
        return packed, None
    special = np.full_like(before, -1), np.full_like(after, -1)
    return packed, np.concatenate(blocks(words, *special, -1))


def _word_numbers(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], encoded: Encoded, cutting: Mapping[str, Any]
) -> Numbers:
    """Return the word of each token of `encoded`, as the tokenizer parts words; numbered within its text column."""
    columns: list[list[list[int]]] = []
    for column in texts:
        found = tokenizer(column, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        columns.append([[-1 if word is None else word for word in one.word_ids] for one in found.encodings])
        if any(len(words) > LONG and max(words) == min(words) for words in columns[-1]):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} does not say where words begin; set "
                "pretrain.objective.whole_word to false"
            )
    numbers: list[int] = []
    for row in zip(*columns, strict=True):
        for piece in places(tokenizer, [len(words) for words in row], **cutting):
            numbers += [-1 if field < 0 else row[field][place] for field, place in piece]
    assert len(numbers) == len(encoded.ids)
    return np.array(numbers, np.int32)


@dataclass(frozen=True)
class Masker:
    """Masks rows of `encoded`."""

    encoded: Encoded
    words: Numbers | None
    """(S,) as `encode_texts` gives them; None = single tokens."""
    mask_id: int
    special: NDArray[np.int64]
    """Ids that are never masked nor put in a token's place."""
    ordinary: NDArray[np.int64]
    """Ids that may be put in a token's place."""
    share: float
    """Of a row's tokens, special ones aside, that are chosen."""
    seed: int

    @classmethod
    def build(
        cls,
        encoded: Encoded,
        words: Numbers | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        share: float,
        seed: int,
    ) -> Masker:
        """Build for a tokenizer. Raises ValueError when it has no mask token."""
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no mask token, so its model was not made to guess masked "
                "words; use pretrain.objective.name simcse, or another backbone"
            )
        special = np.array(sorted(tokenizer.all_special_ids), np.int64)
        ordinary = np.setdiff1d(np.arange(min(len(tokenizer), vocab_size)), special)
        return cls(encoded, words, int(tokenizer.mask_token_id), special, ordinary, share, seed)

    def draw(self, row: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return which tokens of a row are chosen (places among all S, rising) and the ids to put there.

        As many as the share says, rounded, at least one; of whole words as many as come nearest to that. A row of
        special tokens alone has none.
        """
        encoded = self.encoded
        start, stop = encoded.offsets[encoded.first[row]], encoded.offsets[encoded.first[row + 1]]
        ids = encoded.ids[start:stop]
        able = np.flatnonzero(~np.isin(ids, self.special))
        if not len(able):
            return np.zeros(0, np.int64), np.zeros(0, np.int32)
        generator = np.random.default_rng([self.seed, epoch, row])
        wanted = max(1, round(self.share * len(able)))
        if self.words is None:
            chosen = generator.permutation(able)[:wanted]
        else:
            own = self.words[start:stop][able]
            borders = np.flatnonzero((np.diff(own) != 0) | (np.diff(able) != 1)) + 1
            groups = np.split(able, borders)
            order = generator.permutation(len(groups))
            sizes = np.cumsum([len(groups[place]) for place in order])
            number = int(np.argmin(np.abs(sizes - wanted))) + 1
            chosen = np.concatenate([groups[place] for place in order[:number]])
        chosen = np.sort(chosen)
        fate = generator.random(len(chosen))
        others = generator.choice(self.ordinary, len(chosen))
        put = np.where(fate < 0.8, self.mask_id, np.where(fate < 0.9, others, ids[chosen]))
        return chosen + start, put.astype(np.int32)

    def count(self, rows: NDArray[np.int64], epoch: int) -> int:
        """Return how many tokens of some rows are chosen."""
        return sum(len(self.draw(int(row), epoch)[0]) for row in rows)

    def collate(self, rows: NDArray[np.int64], epoch: int) -> Batch:
        """Return the padded batch of some rows, masked, with LABELS (P, T): the ids to guess, IGNORE elsewhere."""
        taken = self.encoded.take(rows)
        ids, labels = taken.ids.copy(), np.full(len(taken.ids), IGNORE, np.int32)
        starts = self.encoded.offsets[self.encoded.first[rows]]
        moved = taken.offsets[taken.first[:-1]] - starts
        for row, shift in zip(rows, moved, strict=True):
            chosen, put = self.draw(int(row), epoch)
            ids[chosen + shift], labels[chosen + shift] = put, self.encoded.ids[chosen]
        every = np.arange(len(rows))
        batch = collate(replace(taken, ids=ids), every)
        wanted = collate(replace(taken, ids=labels, pad_id=IGNORE, type_ids=None, fields=None), every)
        return replace(batch, rows=rows, targets={LABELS: wanted.input_ids}, fields=None)


def chosen_of(batch: Batch) -> torch.Tensor:
    """Return (P, T): true where a token is to be guessed."""
    return batch.targets[LABELS] != IGNORE
