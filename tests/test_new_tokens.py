"""model.new_tokens: found in texts by every kind of tokenizer, embedded, learned, carried by the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_MODELS, TinyCompetition
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

from comp import config_file, load
from comp.cli import app
from comp.data.batches import collate
from comp.data.tokens import encode
from comp.model.backbone import save_recipe
from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.ship.infer import infer
from comp.training import crossval
from comp.training.checkpoint import load_weights, save_weights

NEW = ["\n", "[NAME]"]
PLAIN, MARKED = "the ship was golden", "the ship\nwas [NAME]golden"


def built(folder: Path, tokenizer: Any, new_tokens: list[str], **options: Any) -> TextModel:
    model = build_model(
        folder,
        tokenizer,
        pretrained=True,
        pooler={"name": "mean"},
        heads={"main": 1},
        max_length=32,
        new_tokens=new_tokens,
        **options,
    )
    return model.eval()


def vectors(model: TextModel, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    encoded = encode(tokenizer, [texts], max_length=32, cache=None)
    with torch.inference_mode():
        return model(collate(encoded, np.arange(len(texts))))["main"]


@pytest.mark.parametrize(("kind", "part"), [*((kind, "encoder") for kind in TINY_MODELS), ("bart", "decoder")])
def test_new_tokens_are_found_and_begin_as_the_mean_of_all(
    kind: str, part: str, tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model_folder(kind)
    plain, tokenizer = load_tokenizer(str(folder)), load_tokenizer(str(folder), NEW)
    ids = tokenizer.convert_tokens_to_ids(NEW)
    assert ids == [len(plain), len(plain) + 1]
    found = encode(tokenizer, [[MARKED, PLAIN]], max_length=32, cache=None)
    first = found.ids[: found.offsets[1]].tolist()
    assert [token for token in first if token in ids] == ids
    assert [token for token in first if token not in ids] == found.ids[found.offsets[1] :].tolist(), "else the same"

    torch.manual_seed(0)
    model = built(folder, tokenizer, NEW, part=part)
    torch.manual_seed(0)
    before = built(folder, plain, [], part=part)
    table, old = (one.backbone.model.get_input_embeddings().weight for one in (model, before))
    assert model.backbone.vocab_size == len(old) + 2 == len(table)
    assert torch.equal(table[: len(old)], old)
    assert torch.allclose(table[ids], old.mean(0).expand(2, -1), atol=1e-6)
    model.heads.load_state_dict(before.heads.state_dict())
    assert torch.allclose(vectors(model, tokenizer, [PLAIN]), vectors(before, plain, [PLAIN]), atol=1e-6)

    save_recipe(model.backbone, tokenizer, tmp_path)
    save_weights(tmp_path / "w.safetensors", model)
    carried = load_tokenizer(str(tmp_path))
    again = build_model(
        tmp_path, carried, pretrained=False, pooler={"name": "mean"}, heads={"main": 1}, max_length=32, part=part
    ).eval()
    load_weights(tmp_path / "w.safetensors", again)
    assert torch.equal(vectors(again, carried, [MARKED, PLAIN]), vectors(model, tokenizer, [MARKED, PLAIN]))


def test_a_table_with_room_stays_as_large(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """DeBERTa-v3's has 128,100 rows for 128,001 tokens; those that were never trained say nothing."""
    folder = tiny_model_folder("deberta-v2")
    tokenizer = load_tokenizer(str(folder))
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = len(tokenizer) + 9
    torch.manual_seed(0)
    roomy = AutoModel.from_config(config)
    with torch.no_grad():
        roomy.get_input_embeddings().weight[len(tokenizer) :] = 1000.0
    roomy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    marked = load_tokenizer(str(tmp_path), NEW)
    table = built(tmp_path, marked, NEW).backbone.model.get_input_embeddings().weight
    assert len(table) == config.vocab_size
    ids = marked.convert_tokens_to_ids(NEW)
    assert torch.allclose(table[ids], table[: len(tokenizer)].mean(0).expand(2, -1), atol=1e-6)


@pytest.fixture
def setup(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> TinyCompetition:
    """A competition whose target is whether a text has line ends, and tiny.yaml."""
    competition = tiny_competition()
    for path in (competition.train, competition.test):
        frame = pd.read_csv(path, dtype=str)
        ends = [row % 2 for row in range(len(frame))]
        words = [text.split()[:6] for text in frame["text"]]
        frame["text"] = [" ".join([*own[:3], "\n" * 4 * end, *own[3:]]) for own, end in zip(words, ends, strict=True)]
        if "target" in frame:
            frame["target"] = [str(end) for end in ends]
        frame.to_csv(path, index=False)
    data = competition.config(tiny_model_folder("deberta-v2"), optimizer={"lr": 5e-3, "head_lr": 2e-2})
    data |= {"training": {"epochs": 15, "batch_size": 8, "precision": "fp32"}, "evaluation": {"every": "100%"}}
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    return competition


def test_a_run_learns_its_new_tokens_and_carries_them(setup: TinyCompetition) -> None:
    lines: list[str] = []
    config = config_file.load("tiny.yaml", ['model.new_tokens=["\\n"]'])
    assert config.model.new_tokens == ["\n"]
    scores = {
        name: crossval.run(own, name, save_every="never", say=lines.append)
        for name, own in (("with", config), ("without", config_file.load("tiny.yaml")))
    }
    assert scores["with"] is not None and scores["without"] is not None
    assert scores["with"].pooled < 0.7 * scores["without"].pooled, "without it no text tells its line ends"
    rows = pd.read_parquet("runs/with/fold0/oof.parquet")
    train = pd.read_csv(setup.train, dtype=str).set_index("id").loc[rows["id"]].reset_index()
    again = load("runs/with", folds=[0]).predict(train)
    assert np.abs(again["target"].to_numpy() - rows["pred_main_target"].to_numpy()).max() < 1e-5
    found = pd.read_csv(infer(["runs/with"], say=lines.append))["target"]
    assert found.corr(pd.Series([float(row % 2) for row in range(len(found))])) > 0.8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (['model.new_tokens=["\\n", "\\n"]'], "each once, and none empty or of spaces alone"),
        (['model.new_tokens=[" "]'], "each once, and none empty or of spaces alone"),
        (['model.new_tokens=["[X]"]', "model.freeze_embeddings=words"], "keeps the word table as it is; leave one out"),
        (['model.new_tokens=["ship"]'], "has ['ship'] among its tokens; leave them out"),
    ],
)
def test_what_is_refused(setup: TinyCompetition, values: list[str], message: str) -> None:
    words = [word for value in values for word in ("--set", value)]
    found = CliRunner().invoke(app, ["train", "--config", "tiny.yaml", "--fold", "0", *words])
    assert isinstance(found.exception, ValueError) and message in str(found.exception)
    assert not Path("runs/tiny").exists()


def test_pre_training_adds_none(setup: TinyCompetition) -> None:
    found = CliRunner().invoke(app, ["pretrain", "--config", "tiny.yaml", "--set", 'model.new_tokens=["[X]"]'])
    assert isinstance(found.exception, ValueError)
    assert "comp pretrain keeps the tokenizer as it is: give model.new_tokens to the training" in str(found.exception)
