"""The shared fixtures are what they claim to be: otherwise every test built on them proves nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from conftest import MAX_TOKENS, TINY_MODELS, TINY_TASKS, write_tiny_model
from transformers import AutoModel, AutoTokenizer

SHORT, LONG = "the ship was lovely.", "a grim market by the cold bridge, and one zebra"


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_tiny_model_loads_and_runs(kind, tiny_model_folder):
    folder = tiny_model_folder(kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    assert model.config.model_type == kind
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == MAX_TOKENS
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.unk_token_id not in tokenizer(LONG)["input_ids"]
    batch = tokenizer([SHORT, LONG], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    assert hidden.shape == (*batch["input_ids"].shape, 32)
    assert torch.isfinite(hidden).all()
    # padding must not reach the real tokens, or nothing above could be invariant to it
    with torch.no_grad():
        alone = model(**tokenizer([SHORT], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(hidden[0][batch["attention_mask"][0].bool()], alone, atol=1e-5, rtol=1e-4)
    assert (hidden[1] - hidden[1].mean(0)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_tiny_model_takes_its_longest_input(kind, tiny_model_folder):
    folder = tiny_model_folder(kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["sea " * 200], truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, MAX_TOKENS)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    assert torch.isfinite(hidden).all()


def test_special_tokens_stand_where_each_kind_has_them(tiny_model_folder):
    def tokens(kind, *texts):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(kind))
        out = tokenizer(*texts)
        return tokenizer.convert_ids_to_tokens(out["input_ids"]), out.get("token_type_ids")

    assert tokens("bert", "the sea", "a deer") == (
        ["[CLS]", "the", "s", "##e", "##a", "[SEP]", "a", "deer", "[SEP]"],
        [0] * 6 + [1] * 3,
    )
    assert tokens("roberta", "oak", "fern") == (["<s>", "oak", "</s>", "</s>", "fern", "</s>"], None)
    assert tokens("xlnet", "oak") == (["oak", "<sep>", "<cls>"], [0, 0, 2])


def test_xlnet_pads_on_the_left(tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder("xlnet"))
    batch = tokenizer(["oak", "oak oak"], padding=True)
    assert batch["attention_mask"][0] == [0, 1, 1, 1]
    assert batch["token_type_ids"][0][-3:] == [0, 0, 2]
    assert tokenizer.convert_ids_to_tokens([row[-1] for row in batch["input_ids"]]) == ["<cls>", "<cls>"]


def test_tiny_model_is_deterministic(tmp_path, tiny_model_folder):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = write_tiny_model(tmp_path / "again", "bert")
    assert torch.equal(torch.rand(1), expected), "writing a model must not move the caller's random numbers"
    assert (again / "model.safetensors").read_bytes() == (tiny_model_folder("bert") / "model.safetensors").read_bytes()


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", TINY_TASKS)
def test_tiny_competition_has_kaggles_shape(kind, pair, tiny_competition):
    competition = tiny_competition(kind, pair=pair)

    def read(path):
        with open(path, encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle))

    train, test = read(competition.train), read(competition.test)
    sample, solution = read(competition.sample_submission), read(competition.solution)
    assert (len(train), len(test)) == (60, 20)
    assert list(train[0]) == ["id", *competition.text, *competition.targets]
    assert list(test[0]) == ["id", *competition.text]
    assert list(sample[0]) == list(solution[0]) == ["id", *competition.targets]
    assert [row["id"] for row in test] == [row["id"] for row in sample] == [row["id"] for row in solution]
    whole = [tuple(row[name] for name in competition.text) for row in train + test]
    assert len(set(whole)) == 80, "texts are unique over train and test"
    assert all(all(parts) for parts in whole)
    for target in competition.targets:
        assert len({row[target] for row in train}) > 1


def test_isolated_is_the_current_folder(isolated, tmp_path):
    assert Path.cwd() == tmp_path.resolve() == isolated.resolve()
