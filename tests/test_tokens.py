"""Tokenizing, cutting, windows, fields and the cache; and how windows reach the prediction."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_MODELS, WORDS, TinyCompetition
from hypothesis import given
from hypothesis import strategies as st

from comp import config_file
from comp.data import tokens
from comp.data.batches import collate, sorted_batches
from comp.data.tokens import Encoded, encode, share_out, template_of, window_starts
from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model, mean_of_windows
from comp.runtime import Runtime
from comp.ship.infer import infer, load
from comp.training import crossval
from comp.training.predict import predict

TEXTS = ["the ship was golden", "a dull tram", "deer", "on the bridge she was happy and the market was bright"]
OTHERS = [
    "path",
    "the street was very cold there and then",
    "here",
    "moss fern oak deer path moss fern oak deer path moss",
]
FP32 = Runtime(torch.device("cpu"), "fp32")
LONG = " ".join(WORDS[:30])


@pytest.fixture
def bert(tiny_model_folder: Callable[..., Path]) -> Any:
    return load_tokenizer(str(tiny_model_folder("bert")))


def pieces(encoded: Encoded, row: int = 0) -> list[list[int]]:
    places = range(encoded.first[row], encoded.first[row + 1])
    return [encoded.ids[encoded.offsets[p] : encoded.offsets[p + 1]].tolist() for p in places]


def texts_of(tokenizer: Any, encoded: Encoded, row: int = 0) -> list[str]:
    return [tokenizer.decode(piece) for piece in pieces(encoded, row)]


# --- the tokenizer's own encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["head", "tail"])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_tokens_equal_the_tokenizers_own(
    kind: str, pair: bool, truncation: str, tiny_model_folder: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_folder(kind)))
    columns = (TEXTS, OTHERS) if pair else (TEXTS,)
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    for max_length in range(special + len(columns), 30):
        encoded = encode(tokenizer, columns, max_length=max_length, truncation=truncation, cache=None)
        batch = collate(encoded, np.arange(4))
        side, tokenizer.truncation_side = tokenizer.truncation_side, "right" if truncation == "head" else "left"
        expected = tokenizer(
            *columns,
            truncation="longest_first" if pair else True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        tokenizer.truncation_side = side
        assert torch.equal(batch.input_ids, expected["input_ids"]), max_length
        assert torch.equal(batch.mask, expected["attention_mask"])
        assert batch.num_tokens == int(expected["attention_mask"].sum())
        if "token_type_ids" in tokenizer.model_input_names:
            assert batch.token_type_ids is not None
            assert torch.equal(batch.token_type_ids, expected["token_type_ids"])
        else:
            assert batch.token_type_ids is None
        uncut = tokenizer(*columns)["input_ids"]
        assert encoded.num_cut == sum(len(row) > max_length for row in uncut)
        assert batch.window_of is None


def test_special_tokens_written_in_a_text_stay_special(bert: Any) -> None:
    text = ["ship [SEP] oak [MASK] fern"]
    assert pieces(encode(bert, (text,), max_length=16, cache=None))[0] == bert(text)["input_ids"][0]


def test_a_template_is_learnt_from_probes(bert: Any) -> None:
    cls, sep = bert.cls_token_id, bert.sep_token_id
    assert template_of(bert, 1).gaps == ((cls,), (sep,))
    assert template_of(bert, 2).gaps == ((cls,), (sep,), (sep,))
    assert template_of(bert, 2).field_types == (0, 1)
    assert template_of(bert, 3).gaps == ((cls,), (sep,), (sep,), (sep,))
    assert template_of(bert, 3).field_types == (0, 0, 0)


def test_without_a_separator_columns_cannot_be_joined(bert: Any) -> None:
    bert.sep_token = None
    assert bert.sep_token_id is None and bert.eos_token_id is None
    with pytest.raises(ValueError, match=r"neither a separator nor an end token to join 3 text columns"):
        encode(bert, (TEXTS, OTHERS, TEXTS), max_length=16, cache=None)


def test_more_columns_are_joined_and_every_token_knows_its_column(bert: Any) -> None:
    three = encode(bert, (["deer"], ["path moss"], ["oak"]), max_length=16, cache=None)
    assert bert.decode(three.ids) == "[CLS] deer [SEP] path moss [SEP] oak [SEP]"
    assert three.fields is not None
    assert three.fields.tolist() == [-1, 0, -1, 1, 1, -1, 2, -1]
    batch = collate(encode(bert, (["deer", "a a a"], ["path", ""]), max_length=16, cache=None), np.arange(2))
    assert batch.fields is not None
    assert batch.fields.tolist() == [[-1, 0, -1, 1, -1, -1], [-1, 0, 0, 0, -1, -1]]
    assert encode(bert, (["deer"],), max_length=16, cache=None).fields is None
    left = collate(encode(bert, (["deer", "a"], ["path", "a"]), max_length=16, cache=None), np.arange(1))
    assert left.to(torch.device("cpu")) is left


# --- cutting ---------------------------------------------------------------------------------------------------------


def test_truncation_keeps_head_tail_or_both(bert: Any) -> None:
    text = (["ship wave tide sail oak fern moss deer path street"],)

    def cut(max_length: int, truncation: str) -> str:
        return bert.decode(encode(bert, text, max_length=max_length, truncation=truncation, cache=None).ids)

    assert cut(5, "head") == "[CLS] ship wave tide [SEP]"
    assert cut(5, "tail") == "[CLS] deer path street [SEP]"
    assert cut(10, "head_tail") == "[CLS] ship wave oak fern moss deer path street [SEP]"
    assert cut(6, "head_tail") == "[CLS] ship deer path street [SEP]"
    assert cut(12, "head_tail") == f"[CLS] {text[0][0]} [SEP]"
    assert bert.truncation_side == "right"
    long = encode(bert, ([" ".join(["oak"] * 600)],), max_length=512, truncation="head_tail", cache=None)
    assert tokens._kept(600, 510, "head_tail") == [(0, 128), (600 - 382, 600)], "the numbers of the paper"
    assert long.lengths.tolist() == [512]


def test_every_column_of_a_pair_is_cut_by_the_mode(bert: Any) -> None:
    pair = ([LONG], ["ship wave tide sail oak fern moss deer"])
    found = encode(bert, pair, max_length=11, truncation="head_tail", cache=None)
    words = LONG.split()
    assert bert.decode(found.ids) == f"[CLS] {words[0]} {' '.join(words[-3:])} [SEP] ship fern moss deer [SEP]"


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(5, 60))
def test_space_is_shared_out_longest_first(lengths: list[int], room: int) -> None:
    kept = share_out(lengths, room)
    assert all(0 <= k <= length for k, length in zip(kept, lengths, strict=True))
    assert sum(kept) == min(sum(lengths), room)
    cut = [k for k, length in zip(kept, lengths, strict=True) if k < length]
    if cut:
        assert max(cut) - min(cut) <= 1, "what is cut is cut to the same length"
        assert all(k <= max(cut) + 1 for k in kept), "none that is longer is left uncut"


@pytest.mark.parametrize(("columns", "least"), [((TEXTS,), 3), ((TEXTS, OTHERS), 5), ((TEXTS, OTHERS, TEXTS), 7)])
def test_too_little_space_is_refused(columns: tuple[list[str], ...], least: int, bert: Any) -> None:
    with pytest.raises(ValueError, match=f"model.max_length is {least - 1}.*set it to at least {least}"):
        encode(bert, columns, max_length=least - 1, cache=None)
    encode(bert, columns, max_length=least, cache=None)


# --- windows ---------------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.integers(2, 50), st.integers(0, 49))
def test_windows_cover_the_text_and_share_the_stride(length: int, size: int, stride: int) -> None:
    if length <= size or stride >= size:
        return
    starts, covered = window_starts(length, size, stride, 10**6, "head")
    assert covered
    assert set().union(*(range(start, start + size) for start in starts)) == set(range(length))
    steps = np.diff(starts)
    assert (steps[:-1] == size - stride).all()
    assert 0 < steps[-1] <= size - stride
    assert starts[-1] == length - size


def test_windows_by_hand(bert: Any) -> None:
    words = LONG.split()[:10]
    texts = ([" ".join(words), "deer"],)

    def windows(truncation: str = "head", **options: int) -> Encoded:
        return encode(
            bert,
            texts,
            max_length=6,
            truncation=truncation,
            windows={"stride": 1, "max_windows": 9} | options,
            cache=None,
        )

    def line(a: int, b: int) -> str:
        return f"[CLS] {' '.join(words[a:b])} [SEP]"

    found = windows()
    assert texts_of(bert, found) == [line(0, 4), line(3, 7), line(6, 10)]
    assert texts_of(bert, found, 1) == ["[CLS] deer [SEP]"]
    assert (found.num_cut, found.num_windowed, len(found)) == (0, 1, 2)
    assert found.lengths.tolist() == [18, 3]
    assert texts_of(bert, windows(stride=2)) == [line(0, 4), line(2, 6), line(4, 8), line(6, 10)]
    for truncation, kept in {"head": [0, 2], "tail": [4, 6], "head_tail": [0, 6]}.items():
        found = windows(truncation, stride=2, max_windows=2)
        assert texts_of(bert, found) == [line(start, start + 4) for start in kept]
        assert found.num_cut == 1
    batch = collate(windows(), np.array([1, 0]))
    assert batch.window_of is not None
    assert batch.window_of.tolist() == [0, 1, 1, 1]
    assert batch.input_ids.shape == (4, 6)
    assert collate(windows(), np.array([1])).window_of is None


def test_of_several_columns_the_last_slides_and_the_others_repeat(bert: Any) -> None:
    pair = (["deer moss"], ["ship wave tide sail oak"])
    found = encode(bert, pair, max_length=8, windows={"stride": 1, "max_windows": 4}, cache=None)
    assert texts_of(bert, found) == [
        "[CLS] deer moss [SEP] ship wave tide [SEP]",
        "[CLS] deer moss [SEP] tide sail oak [SEP]",
    ]
    assert found.type_ids is not None and found.fields is not None
    assert found.type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    assert found.fields.tolist() == [-1, 0, 0, -1, 1, 1, 1, -1] * 2
    assert found.num_cut == 0
    longer = encode(bert, ([LONG], pair[1]), max_length=9, windows={"stride": 1, "max_windows": 4}, cache=None)
    words = LONG.split()
    assert texts_of(bert, longer)[0] == f"[CLS] {' '.join(words[:3])} [SEP] ship wave tide [SEP]"
    assert longer.num_cut == 1
    short = encode(bert, ([LONG], ["deer"]), max_length=9, windows={"stride": 1, "max_windows": 4}, cache=None)
    assert texts_of(bert, short) == [f"[CLS] {' '.join(words[:5])} [SEP] deer [SEP]"]


def test_texts_that_fit_are_as_without_windows(bert: Any) -> None:
    plain = encode(bert, (TEXTS, OTHERS), max_length=64, cache=None)
    windowed = encode(bert, (TEXTS, OTHERS), max_length=64, windows={"stride": 8, "max_windows": 2}, cache=None)
    for name in ("ids", "offsets", "first", "type_ids", "fields"):
        assert np.array_equal(getattr(plain, name), getattr(windowed, name)), name


def test_a_stride_without_room_is_refused(bert: Any) -> None:
    with pytest.raises(
        ValueError, match=r"model.windows.stride is 4, but a window of model.max_length 6 has room for 4"
    ):
        encode(bert, (TEXTS,), max_length=6, windows={"stride": 4, "max_windows": 2}, cache=None)
    with pytest.raises(ValueError, match=r"stride is 4.*room for 4 tokens.*below 4"):
        encode(bert, (TEXTS, OTHERS), max_length=10, windows={"stride": 4, "max_windows": 2}, cache=None)


def test_documents_are_whole_rows(bert: Any) -> None:
    found = encode(bert, ([LONG, "deer"],), max_length=12, windows={"stride": 2, "max_windows": 9}, cache=None)
    assert found.documents(np.array([1, 0]))[1].tolist() == [*chain(*pieces(found))]


# --- windows in the model --------------------------------------------------------------------------------------------


def made(folder: Path, pooler: dict[str, Any]) -> tuple[TextModel, Any]:
    tokenizer = load_tokenizer(str(folder))
    torch.manual_seed(1)
    model = build_model(folder, tokenizer, pretrained=True, pooler=pooler, heads={"main": 2}, max_length=16)
    torch.nn.init.normal_(next(iter(model.heads.values())).weight)
    return model.double(), tokenizer


@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize("pooler", [{"name": "mean"}, {"name": "psum", "num_layers": 2}], ids=lambda p: p["name"])
def test_a_long_text_is_the_mean_of_its_windows(
    kind: str, pooler: dict[str, Any], tiny_model_folder: Callable[..., Path]
) -> None:
    model, tokenizer = made(tiny_model_folder(kind), pooler)
    rows = [LONG, "deer", " ".join(WORDS[5:30]), "a dull tram"]
    options: dict[str, Any] = {"max_length": 16, "windows": {"stride": 3, "max_windows": 8}, "cache": None}

    def predicted(texts: list[str]) -> np.ndarray:
        encoded = encode(tokenizer, (texts,), **options)
        ids = np.array([str(place) for place in range(len(texts))], object)
        return predict(model, encoded, ids, decoders={"main": torch.Tensor.double}, runtime=FP32).values["main"]

    found = predicted(rows)
    special = tokenizer.num_special_tokens_to_add()
    for place, text in enumerate(rows):
        words, size = text.split(), 16 - special
        starts = window_starts(len(words), size, 3, 8, "head")[0] if len(words) > size else [0]
        assert (len(starts) > 1) == (len(words) > size)
        windows = [" ".join(words[start : start + size]) for start in starts]
        assert np.abs(predicted(windows).mean(0) - found[place]).max() < 1e-6
    assert np.abs(predicted(rows[::-1])[::-1] - found).max() < 1e-6


def test_mean_of_windows_keeps_leading_axes() -> None:
    vector = torch.arange(12.0).view(2, 3, 2)
    found = mean_of_windows(vector, torch.tensor([0, 1, 1]), 2)
    assert found.tolist() == [[[0, 1], [3, 4]], [[6, 7], [9, 10]]]


def test_prediction_batches_count_all_windows(bert: Any) -> None:
    texts = [LONG] * 20 + ["deer"] * 20
    found = encode(bert, (texts,), max_length=16, windows={"stride": 2, "max_windows": 9}, cache=None)
    for part in sorted_batches(found.lengths, max_rows=64, max_tokens=200):
        assert collate(found, part).input_ids.numel() <= 200


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(
    "cutting",
    [{"truncation": "head_tail"}, {"windows": {"stride": 2, "max_windows": 3}, "truncation": "head_tail"}],
    ids=["head_tail", "windows"],
)
def test_from_train_to_submission(
    cutting: dict[str, Any],
    pair: bool,
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Callable[..., Path],
) -> None:
    competition = tiny_competition("regression", pair=pair)
    pooler = {"name": "two_tower"} if pair else {"name": "word_weights"}
    model = {"backbone": str(tiny_model_folder("bert")), "max_length": 14, "pooler": pooler, **cutting}
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(competition.config("", model=model)))
    said: list[str] = []
    crossval.run(config_file.load("tiny.yaml"), "tiny", "0", say=said.append)
    text = "\n".join(said)
    assert "are cut at model.max_length 14 tokens" in text
    assert ("texts are read as" in text) == ("windows" in cutting)
    rows = pd.read_parquet("runs/tiny/fold0/oof.parquet")
    train = pd.read_csv(competition.train, dtype=str).set_index("id").loc[rows["id"]].reset_index()
    again = load("runs/tiny").predict(train)["target"].to_numpy()
    assert np.abs(again - rows["pred_main_target"].to_numpy()).max() < 1e-6
    infer(["runs/tiny"], say=said.append)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"pooler": {"name": "two_tower"}},
            "pooler 'two_tower' needs two text columns or more; competition.text has 1",
        ),
        ({"pooler": {"name": "dense", "of": {"name": "two_tower"}}}, "pooler 'two_tower' needs two text columns"),
        ({"pooler": {"name": "concat_layers"}}, "num_layers is 4, but the backbone has 3 blocks"),
        ({"windows": {"stride": 46}}, "model.windows.stride is 46"),
        ({"max_length": 65}, "has 64 positions"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    section: dict[str, Any],
    message: str,
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Callable[..., Path],
) -> None:
    data = tiny_competition().config(tiny_model_folder("bert"))
    data["model"] |= section
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=message):
        crossval.run(config_file.load("tiny.yaml"), "tiny", "0", say=lambda line: None)
    assert not Path("runs/tiny").exists()


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_serves_every_length_and_is_keyed_by_content(
    bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(bert, (TEXTS, OTHERS), max_length=16, cache=tmp_path)
    calls = []
    original = tokens._tokenize
    monkeypatch.setattr(tokens, "_tokenize", lambda *args: calls.append(args) or original(*args))
    again = encode(bert, (TEXTS, OTHERS), max_length=16, cache=tmp_path)
    assert np.array_equal(first.ids, again.ids)
    short = encode(bert, (TEXTS,), max_length=6, truncation="tail", cache=tmp_path)
    assert np.array_equal(short.ids, encode(bert, (TEXTS,), max_length=6, truncation="tail", cache=None).ids)
    assert len(calls) == 1, "only the call without a cache"
    encode(bert, ([*TEXTS[:-1], "moss"],), max_length=16, cache=tmp_path)
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_costs_nothing(bert: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    encoded = encode(bert, (TEXTS,), max_length=16, cache=tmp_path / "file")
    assert len(encoded) == 4


def test_earlier_calls_leave_no_trace(bert: Any) -> None:
    plain = encode(bert, (TEXTS,), max_length=16, cache=None)
    bert(TEXTS, padding="max_length", truncation=True, max_length=6)
    assert np.array_equal(encode(bert, (TEXTS,), max_length=16, cache=None).ids, plain.ids)
    bert.backend_tokenizer.enable_truncation(4)
    encode(bert, (TEXTS,), max_length=16, cache=None)
    assert bert.backend_tokenizer.truncation["max_length"] == 4
