"""Texts packed and masked: how many tokens, which, and the same ones whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FILLER, GOOD, TINY_MODELS, WORDS

from comp.data.masking import FIXED, IGNORE, LABELS, Masker, encode_texts
from comp.data.tokens import encode, template_of
from comp.model.sources import load_tokenizer

generator = np.random.default_rng(0)
TEXTS = [" ".join(generator.choice(WORDS, size)) + " zebra" for size in generator.integers(3, 40, 60)]
MASKED = [kind for kind in TINY_MODELS if kind not in ("xlnet", "bart")]


def masker(
    folder: Path, *, packing: bool = True, words: bool = False, share: float = 0.15, seed: int = 1, **own: Any
) -> tuple[Masker, Any]:
    tokenizer = load_tokenizer(str(folder))
    texts = own.pop("texts", (TEXTS,))
    how = {"packing": packing, "words": words, "max_length": 32} | own
    encoded, numbers = encode_texts(tokenizer, texts, **how)
    built = Masker.build(encoded, numbers, tokenizer, vocab_size=len(tokenizer), share=share, seed=seed)
    return built, tokenizer


@pytest.fixture
def bert(tiny_model_folder: Callable[..., Path], isolated: Path) -> Path:
    return tiny_model_folder("bert")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", MASKED)
def test_special_and_padding_tokens_are_never_masked(
    kind: str, packing: bool, tiny_model_folder: Callable[..., Path], isolated: Path
) -> None:
    built, tokenizer = masker(tiny_model_folder(kind), packing=packing, share=0.6)
    rows = np.arange(len(built.encoded))
    batch = built.collate(rows, 0)
    labels, ids = batch.targets[LABELS].numpy(), batch.input_ids.numpy()
    plain = built.encoded.take(rows)
    chosen = labels != IGNORE
    assert chosen.any(axis=1).all(), "at least one token a row"
    assert not chosen[batch.mask.numpy() == 0].any()
    assert not np.isin(labels[chosen], tokenizer.all_special_ids).any()
    # what is not chosen is as it was; what was is in the labels
    restored = np.where(chosen, labels, ids)
    lengths = plain.lengths
    assert np.concatenate([row[:n] for row, n in zip(restored, lengths, strict=True)]).tolist() == plain.ids.tolist()


def test_as_many_as_the_share_says_and_80_10_10(bert: Path) -> None:
    built, tokenizer = masker(bert, texts=(TEXTS * 20,), share=0.15)
    draws = [built.draw(row, epoch) for epoch in range(8) for row in range(len(built.encoded))]
    able = [
        int((~np.isin(ids, tokenizer.all_special_ids)).sum())
        for ids in built.encoded.documents(np.arange(len(built.encoded)))
    ]
    assert [len(chosen) for chosen, _ in draws] == 8 * [max(1, round(0.15 * count)) for count in able]
    places, put = (np.concatenate(part) for part in zip(*draws, strict=True))
    old = built.encoded.ids[places]
    masked = put == tokenizer.mask_token_id
    kept = put == old
    count = len(places)
    spread = 4 * np.sqrt(0.8 * 0.2 / count)
    assert count > 5000
    assert masked.mean() == pytest.approx(0.8, abs=spread)
    # a token that is drawn may be the one that stood there
    assert kept.mean() == pytest.approx(0.1 + 0.1 / len(built.ordinary), abs=spread)
    others = put[~masked & ~kept]
    assert not np.isin(others, tokenizer.all_special_ids).any()
    assert len(np.unique(others)) > 0.9 * len(built.ordinary), "drawn from the whole vocabulary"


def test_masks_depend_on_seed_epoch_and_row_alone(bert: Path) -> None:
    built, _ = masker(bert)
    rows = np.arange(8)
    together = built.collate(rows, 3).input_ids
    for row in rows:
        alone = built.collate(np.array([row]), 3).input_ids[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
    np.random.seed(5)  # noqa: NPY002 - no other generator has a part in it
    assert (built.collate(rows[::-1].copy(), 3).input_ids.flip(0) == together).all()
    other_epoch, other_seed = built.collate(rows, 4).input_ids, masker(bert, seed=2)[0].collate(rows, 3).input_ids
    assert (other_epoch != together).any() and (other_seed != together).any()
    assert (built.collate(rows, FIXED).input_ids == built.collate(rows, FIXED).input_ids).all()
    assert built.count(rows, 3) == int((built.collate(rows, 3).targets[LABELS] != IGNORE).sum())


@pytest.mark.parametrize("packing", [True, False])
def test_whole_words_are_chosen_whole(packing: bool, bert: Path) -> None:
    """`zebra` is spelt in five pieces; `lovely` is one."""
    built, tokenizer = masker(bert, packing=packing, words=True, share=0.3)
    pieces = tokenizer.convert_ids_to_tokens(built.encoded.ids.tolist())
    assert "##e" in pieces
    found = {"whole": 0, "left": 0}
    for row in range(len(built.encoded)):
        chosen = set(built.draw(row, 0)[0].tolist())
        start, stop = built.encoded.offsets[row], built.encoded.offsets[row + 1]
        place = start
        while place < stop:
            end = place + 1
            while end < stop and pieces[end].startswith("##"):
                end += 1
            taken = {own in chosen for own in range(place, end)}
            assert len(taken) == 1, pieces[place:end]
            if end - place > 1:
                found["whole" if taken == {True} else "left"] += 1
            place = end
    assert found["whole"] and found["left"]
    counts = [len(built.draw(row, 0)[0]) for row in range(len(built.encoded))]
    assert built.words is not None
    able = [int((own >= 0).sum()) for own in np.split(built.words, built.encoded.offsets[1:-1])]
    assert sum(counts) == pytest.approx(0.3 * sum(able), rel=0.1)


def test_single_tokens_split_words(bert: Path) -> None:
    built, _ = masker(bert, words=False, share=0.3)
    whole, _ = masker(bert, words=True, share=0.3)
    assert whole.words is not None

    def torn(mask: Masker) -> int:
        number = 0
        for row in range(len(mask.encoded)):
            chosen, _ = mask.draw(row, 0)
            start, stop = mask.encoded.offsets[row], mask.encoded.offsets[row + 1]
            assert whole.words is not None
            words, taken = whole.words[start:stop], np.zeros(stop - start, bool)
            taken[chosen - start] = True
            number += sum(0 < taken[words == word].mean() < 1 for word in np.unique(words[words >= 0]))
        return number

    assert torn(built) > 0
    # numbers begin anew with every text, so that a block may hold two words of one number
    unpacked, _ = masker(bert, words=True, packing=False, share=0.3)
    whole = unpacked
    assert torn(unpacked) == 0


@pytest.mark.parametrize("kind", MASKED)
def test_packing_loses_no_token_and_keeps_separators(
    kind: str, tiny_model_folder: Callable[..., Path], isolated: Path
) -> None:
    built, tokenizer = masker(tiny_model_folder(kind))
    template = template_of(tokenizer, 1)
    blocks = built.encoded.documents(np.arange(len(built.encoded)))
    assert [len(block) for block in blocks[:-1]] == [32] * (len(blocks) - 1) and 3 <= len(blocks[-1]) <= 32
    before, after = (list(gap) for gap in template.gaps)
    assert all(block[: len(before)].tolist() == before and block[-len(after) :].tolist() == after for block in blocks)
    stream = np.concatenate([block[len(before) : len(block) - len(after)] for block in blocks])
    texts = encode(tokenizer, (TEXTS,), max_length=1000).documents(np.arange(len(TEXTS)))
    wanted: list[int] = []
    for text in texts:
        wanted += [*text[len(before) : len(text) - len(after)].tolist(), tokenizer.sep_token_id]
    assert stream.tolist() == wanted[:-1]


def test_two_columns_and_windows(bert: Path) -> None:
    titles = [" ".join(GOOD[:3])] * len(TEXTS)
    packed, tokenizer = masker(bert, texts=(titles, TEXTS), words=True)
    assert packed.encoded.fields is None and packed.words is not None
    first = tokenizer.convert_ids_to_tokens(packed.encoded.ids[:6].tolist())
    assert first == ["[CLS]", *GOOD[:3], "[SEP]", first[-1]]
    long = (titles, [" ".join(FILLER.split() * 4)] * len(TEXTS))
    windowed, _ = masker(bert, texts=long, packing=False, words=True, windows={"stride": 4, "max_windows": 3})
    assert len(windowed.encoded.offsets) - 1 == 3 * len(TEXTS)
    batch = windowed.collate(np.array([1, 5]), 0)
    assert batch.input_ids.shape == batch.targets[LABELS].shape and len(batch.input_ids) == 6
    assert int((batch.targets[LABELS] != IGNORE).sum()) == windowed.count(np.array([1, 5]), 0)


def test_what_cannot_be_masked_is_refused(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    encoded, _ = encode_texts(tokenizer, (TEXTS,), packing=True, words=False, max_length=16)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match=r"no mask token.*simcse"):
        Masker.build(encoded, None, tokenizer, vocab_size=10, share=0.1, seed=1)
    with pytest.raises(ValueError, match="special tokens"):
        encode_texts(tokenizer, (TEXTS,), packing=True, words=False, max_length=2)
    tokenizer.sep_token = None
    with pytest.raises(ValueError, match=r"neither a separator.*packing to false"):
        encode_texts(tokenizer, (TEXTS,), packing=True, words=False, max_length=16)


def test_a_tokenizer_without_words_is_refused(bert: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = load_tokenizer(str(bert))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.backend_tokenizer.model.max_input_chars_per_word = 10_000
    with pytest.raises(ValueError, match=r"does not say where words begin.*whole_word to false"):
        encode_texts(tokenizer, (["abcdefg" * 9, "a"],), packing=True, words=True, max_length=16)
