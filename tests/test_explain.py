"""Integrated gradients of a run's own fold models: they add up, and equal a plain sum over points of the way."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_MODELS, write_tiny_competition
from transformers import AutoTokenizer

from comp import config_file
from comp.blend.classical import run_classical
from comp.cli import app
from comp.config import Config
from comp.data.tables import read_train
from comp.data.tokens import encode, places
from comp.model.sources import load_tokenizer
from comp.ship import explain_page
from comp.ship.explain import Explanation, Word, explain_rows, sample_rows
from comp.ship.explain_page import explain, sum_words
from comp.ship.loaded import load
from comp.ship.report_page import Marked, Page, Panel, render_html, render_text
from comp.training import crossval

CUTS: list[dict[str, Any]] = [
    {"max_length": 64},
    {"max_length": 14, "truncation": "head"},
    {"max_length": 14, "truncation": "tail"},
    {"max_length": 14, "truncation": "head_tail"},
    {"max_length": 14, "windows": {"stride": 3, "max_windows": 3}},
]


@pytest.fixture
def captum() -> None:
    pytest.importorskip("captum", reason="captum, of the extra `explain`, is not installed")


# --- where tokens come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutting", CUTS, ids=str)
@pytest.mark.parametrize("fields", [1, 2, 3])
@pytest.mark.parametrize("model", ["bert", "xlnet"])
def test_places_are_those_of_encode(model: str, fields: int, cutting: Any, tiny_model_folder: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(model))
    texts = ["lovely ship wave harbour sail tide oak fern moss deer path street tram", "cold grim", "the market bridge"]
    texts = texts[:fields]
    raw = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    encoded = encode(tokenizer, [[text] for text in texts], cache=None, **cutting)
    found = places(tokenizer, [len(ids) for ids in raw], **cutting)
    assert len(found) == len(encoded.offsets) - 1
    for piece, own in enumerate(found):
        ids = encoded.ids[encoded.offsets[piece] : encoded.offsets[piece + 1]].tolist()
        assert len(own) == len(ids)
        for token, (field, place) in zip(ids, own, strict=True):
            assert token == raw[field][place] if field >= 0 else token in tokenizer.all_special_ids


# --- runs ------------------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("regression", "bert", {"pooler": {"name": "mean"}}),
    "windows": (
        "binary",
        "roberta",
        {"max_length": 16, "windows": {"stride": 4, "max_windows": 3}, "pooler": {"name": "word_weights"}},
    ),
    "packed": ("regression", "bert", {"attention": "packed", "max_length": 16, "windows": {"stride": 4}}),
    "classes": ("multiclass", "xlnet", {"max_length": 12, "truncation": "head_tail"}),
    "grades": ("ordinal", "bert", {"pooler": {"name": "mean_max"}}),
}
PAIR = ("classes",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Iterator[Path]:
    """A folder with one trained run a kind; grades by CORAL, windows with the pooler that reads token ids."""
    folder, before = tmp_path_factory.mktemp("explain"), Path.cwd()
    os.chdir(folder)
    for name, (kind, model, options) in RUNS.items():
        competition = write_tiny_competition(folder / name, kind, pair=name in PAIR, train_rows=24, test_rows=2)
        data = competition.config(tiny_model_folder(model))
        data["competition"] |= {"name": name, "test": None, "sample_submission": None}
        data["model"] |= options
        data["optimizer"] = {"lr": 1e-3, "head_lr": 1e-2}
        if kind == "ordinal":
            data["tasks"][0]["loss"] = {"name": "ordinal"}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(data))
        crossval.run(config_file.load(f"{name}.yaml"), name, save_every="never", say=lambda line: None)
    yield folder
    os.chdir(before)


def config_of(name: str) -> Config:
    return config_file.load(f"runs/{name}/config.yaml")


@pytest.mark.parametrize("name", RUNS)
def test_explained_is_the_out_of_fold_prediction_and_words_add_up(name: str, home: Path, captum: None) -> None:
    kind = RUNS[name][0]
    rows = pd.read_parquet(f"runs/{name}/oof.parquet").set_index("id")
    ids = [rows.index[0], rows.index[-1], rows.index[3]]
    for one in explain_rows(f"runs/{name}", ids, steps=64):
        row = rows.loc[one.id]
        assert one.fold == row["fold"]
        pred = float(row[f"pred_main_{one.output}"])
        if kind == "multiclass":
            others = [float(row[column]) for column in rows.columns if column.startswith("pred_main_")]
            assert pred == max(others), "the class that is predicted"
        wanted = pred if kind in ("regression", "ordinal") else math.log(pred / (1 - pred))
        assert one.value == pytest.approx(wanted, abs=1e-4)
        total = sum(word.weight for word in one.words)
        assert total == pytest.approx(one.value - one.base + one.delta, abs=1e-4)
        assert total == pytest.approx(
            one.value - one.base, abs=0.02 * sum(abs(word.weight) for word in one.words) + 1e-5
        )
        assert any(abs(word.weight) > 1e-6 for word in one.words)
        for word in one.words:
            text = one.texts[word.field][word.start : word.end]
            assert re.fullmatch(r"\S+", text), text
    assert [one.id for one in explain_rows(f"runs/{name}", ids[::-1], steps=4)] == ids[::-1]


def test_weights_are_those_of_a_plain_sum(home: Path, captum: None) -> None:
    """Midpoint rule over 400 points, with the model's own `inputs_embeds`, its mean pooling and head written out."""
    run = load("runs/plain", precision="fp32")
    (one,) = explain_rows("runs/plain", [name := sample_rows("runs/plain", 1)[0]])
    tokenizer = load_tokenizer("runs/plain/backbone")
    model = run.build()
    run.fill(model, one.fold)
    table = read_train(config_of("plain").competition, config_of("plain").tasks)
    text = table.texts[0][list(table.ids).index(name)]
    given = tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
    ids, special = given["input_ids"], given["special_tokens_mask"].bool()
    words = model.backbone.model.get_input_embeddings()
    real, base = words(ids).detach(), words(torch.where(special, ids, tokenizer.mask_token_id)).detach()
    total = torch.zeros_like(real)
    for point in range(400):
        way = (base + (point + 0.5) / 400 * (real - base)).requires_grad_()
        hidden = model.backbone.model(inputs_embeds=way, attention_mask=torch.ones_like(ids)).last_hidden_state
        model.heads["main"](hidden.mean(1)).sum().backward()
        total += way.grad / 400
    wanted = ((real - base) * total).sum(-1)[0]
    encoding = tokenizer(text).encodings[0]
    by_word: dict[int, float] = {}
    for word, weight in zip(encoding.word_ids, wanted.tolist(), strict=True):
        if word is not None:
            by_word[word] = by_word.get(word, 0.0) + weight
    assert [word.weight for word in one.words] == pytest.approx(list(by_word.values()), abs=2e-4)


def test_another_class_has_other_weights(home: Path, captum: None) -> None:
    name = sample_rows("runs/classes", 1)[0]
    found = [explain_rows("runs/classes", [name], output=output)[0] for output in ("sea", "wood", "town")]
    shares = [1 / (1 + math.exp(-one.value)) for one in found]
    assert sum(shares) == pytest.approx(1, abs=1e-4), "log-odds of probabilities"
    assert {word.field for word in found[0].words} == {0, 1}


def test_the_page_and_the_text(home: Path, captum: None, tmp_path: Path, capsys: Any) -> None:
    names = sample_rows("runs/plain", 2)
    text = explain("runs/plain", names, html=tmp_path / "why.html")
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    for one in explain_rows("runs/plain", names):
        assert f"prediction of target: {one.value:.4f}  fold {one.fold}" in text and f"<b>{one.value:.4f}</b>" in page
        assert f"convergence delta: {one.delta:+.2e}" in text
        strongest = max(one.words, key=lambda word: abs(word.weight))
        word = one.texts[0][strongest.start : strongest.end]
        assert f"{word}({strongest.weight:+.3f})" in text
        assert f'title="{strongest.weight:+.4f}">{word}</span>' in page
        assert re.sub(r"\([+-][\d.]+\)", "", text).count(one.texts[0]) == 1
    assert "<script" not in page
    app(["explain", "runs/plain", *(part for name in names for part in ("--row", name))], standalone_mode=False)
    assert capsys.readouterr().out == text


def test_words_over_many_rows(home: Path, captum: None) -> None:
    text = explain("runs/plain", sample=12, steps=16)
    found = explain_rows("runs/plain", sample_rows("runs/plain", 12), steps=16)
    sums = sum_words(found)
    assert sums == sorted(sums, key=lambda one: (-one.mean, one.word)) and min(one.rows for one in sums) >= 3
    shown = re.findall(r"(?m)^(\S+) +(\d+) +([+-][\d.]+) +([\d.]+)$", text)
    up, down = [one for one in sums if one.mean > 0][:25], [one for one in sums[::-1] if one.mean < 0][:25]
    assert shown == [(one.word, str(one.rows), f"{one.mean:+.4f}", f"{one.error:.4f}") for one in [*up, *down]]
    assert len(shown) > 10
    assert "push up" in text and "push down" in text and "words over 12 out-of-fold rows" in text
    assert sample_rows("runs/plain", 12) == sample_rows("runs/plain", 12) != sample_rows("runs/plain", 12, seed=1)


def test_sums_over_words() -> None:
    def row(*weights: float) -> Explanation:
        texts = ("Red fox, red",)
        words = [Word(0, start, end, w) for (start, end), w in zip([(0, 3), (4, 7), (9, 12)], weights, strict=True)]
        return Explanation("a", 0, "y", texts, words, 1.0, 0.0, 0.0)

    red, fox = sum_words([row(1, -1, 2), row(0, -3, 0)], least_rows=2)
    assert (red.word, red.rows, red.mean) == ("red", 2, 1.5) and red.error == pytest.approx(1.5)
    assert (fox.word, fox.rows, fox.mean) == ("fox", 2, -2.0)
    assert sum_words([row(1, 1, 1)], least_rows=2) == []


def test_marked_text_is_safe_and_coloured() -> None:
    parts = [("<b>up</b>", 0.5), (" ", None), ("down\x1b[0m", -1.0), (" unread", None)]
    page = Page("why", "", [Panel("p", "", [Marked("row", "text", parts)])])
    html = render_html(page, {})
    assert "&lt;b&gt;up&lt;/b&gt;</span>" in html and "rgba(0, 114, 178, 0.350)" in html
    assert "rgba(213, 94, 0, 0.700)" in html and " unread" in html
    assert "\x1b" not in render_text(page) and "<b>up</b>(+0.500)" in render_text(page)
    coloured = render_text(page, colour=True)
    assert (
        "\x1b[44;97m<b>up</b>\x1b[0m" in coloured and "\x1b[43;30mdown\N{REPLACEMENT CHARACTER}[0m\x1b[0m" in coloured
    )


def test_what_is_refused(home: Path, captum: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = sample_rows("runs/plain", 1)[0]

    def refused(message: str, run: str = "plain", *rows: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            explain(f"runs/{run}", rows, **options)

    refused("--row ID, or ask for words over many rows with --sample 200")
    refused("--row ID, or ask for words", "plain", name, sample=3)
    refused("--sample 2: words are summed over at least 3 rows", sample=2)
    refused("--row nobody: no finished fold of runs/plain held out such a row", "plain", "nobody")
    refused("a row is named twice", "plain", name, name)
    refused("--output 'hill': the outputs of task 'main' are sea, town, wood", "classes", "x", output="hill")
    refused("--sample of classes needs --output CLASS", "classes", sample=3)
    refused("--steps 1: the integral needs at least 2 points", "plain", name, steps=1)
    refused("averaged weights", "plain", name, weights="averaged")
    competition = write_tiny_competition(home / "words", "regression", train_rows=24, test_rows=2)
    data = competition.config("nowhere")
    data["competition"]["name"] = "words"
    Path("words.yaml").write_text(yaml.safe_dump(data))
    run_classical(config_file.load("words.yaml"), "ridge", features=["tfidf"], estimator="ridge", say=lambda line: None)
    refused("runs/ridge is a classical run, which has no gradients", "ridge", sample_rows("runs/ridge", 1)[0])
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    refused(r"Captum, which is not installed: .*comp\[explain\]", "plain", name)


def test_a_coarse_integral_is_warned_of(home: Path, captum: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sample_rows("runs/plain", 2)
    assert "raise --steps" not in explain("runs/plain", names)
    found = explain_rows("runs/plain", names, steps=2)
    worst = max(found, key=lambda one: one.error)
    monkeypatch.setattr(explain_page, "WRONG", worst.error / 2)
    assert f"(row {worst.id}: {worst.error:.1%}); raise --steps." in explain("runs/plain", names, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY_MODELS)
def test_every_architecture(model: str, captum: None, isolated: Path, tiny_model_folder: Callable[..., Path]) -> None:
    competition = write_tiny_competition(isolated / "data", "regression", train_rows=24, test_rows=2)
    Path("tiny.yaml").write_text(yaml.safe_dump(competition.config(tiny_model_folder(model))))
    crossval.run(config_file.load("tiny.yaml"), "tiny", "0", save_every="never", say=lambda line: None)
    rows = pd.read_parquet("runs/tiny/oof.parquet").set_index("id")
    for one in explain_rows("runs/tiny", list(rows.index[:2]), steps=64):
        assert one.value == pytest.approx(rows.loc[one.id, "pred_main_target"], abs=1e-5)
        assert one.error < 0.02 and len(one.words) > 5
