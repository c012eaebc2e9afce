"""The report of a run: its numbers are those of the run's files, its page is self-contained and safe, whatever is missing."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TINY_TASKS, TinyCompetition, write_tiny_competition

from comp import config_file
from comp.blend.classical import run_classical
from comp.cli import app
from comp.config import Config
from comp.data.batches import collate, training_windows
from comp.data.folds import read_folds
from comp.data.tables import read_train
from comp.data.tokens import encode
from comp.metrics import evaluate
from comp.model.sources import load_tokenizer
from comp.runs import RunFolder, claim, write_json
from comp.ship.report import report_text, write_report
from comp.ship.report_figures import draw
from comp.ship.report_page import Page, render_html, render_text
from comp.ship.report_panels import report_page
from comp.ship.report_run import read_run
from comp.ship.row_errors import row_errors
from comp.training import crossval, oof
from comp.training.predict import Predictions

pytest.importorskip("matplotlib", reason="matplotlib, of the extra `report`, is not installed")


class Html(HTMLParser):
    """Tables by id (rows of cell texts), pictures, notes and every tag of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._table, self._cell = "", "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = str(dict(attrs)["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self._cell = True
            self.tables[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[self._table][-1][-1] += data

    def column(self, table: str, head: str) -> list[str]:
        heads, *rows = self.tables[table]
        return [row[heads.index(head)] for row in rows]


def html_of(page: Page) -> Html:
    return Html(render_html(page, {picture.name: (b"<svg/>", 1, 1) for picture in page.pictures}))


def five(values: Any) -> list[str]:
    return [f"{value:.5f}" for value in values]


# --- a real run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Iterator[Path]:
    """A folder with a trained run, runs/tiny: regression, averaged weights, an auxiliary task with gaps."""
    folder, before = tmp_path_factory.mktemp("report"), Path.cwd()
    os.chdir(folder)
    competition = write_tiny_competition(folder / "data", "regression")
    frame = pd.read_csv(competition.train)
    frame["side"] = np.where(frame.index % 3 == 0, np.nan, (frame["target"] > 0).astype(float))
    frame.to_csv(competition.train, index=False)
    tasks = [
        {"name": "main", "kind": "regression", "targets": ["target"]},
        {"name": "side", "kind": "binary", "targets": ["side"], "metric": "roc_auc"},
    ]
    config = competition.config(
        tiny_model_folder("bert"),
        tasks=tasks,
        training={"epochs": 3, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32"},
        groups={"layout": "llrd", "decay": 0.9},
        schedule={"name": "cosine", "warmup_percent": 10},
        stability={"averaging": {"name": "ema"}},
        evaluation={"every": "50%"},
    )
    (folder / "configs").mkdir()
    (folder / "configs" / "base.yaml").write_text("training: {batch_size: 8}\nevaluation: {every: 10%}\n")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    crossval.run(config_file.load("tiny.yaml"), "tiny", say=lambda line: None)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def page(home: Path) -> tuple[Html, str, Path]:
    """The written page of the real run: parsed, as text, and its path."""
    path = write_report("runs/tiny")
    text = path.read_text(encoding="utf-8")
    return Html(text), text, path


def test_scores_are_those_of_scores_json(page: Any) -> None:
    html, _, _ = page
    scores = json.loads(Path("runs/tiny/scores.json").read_text())
    for task in ("main", "side"):
        own, name = scores["tasks"][task], f"scores-{task}"
        for weights in ("best", "last", "averaged"):
            wanted = [*own[weights]["folds"].values(), own[weights]["mean"]]
            shown = html.column(name, weights)
            assert shown[:3] == five(wanted), (task, weights)
            assert shown[4] == f"{own[weights]['pooled']:.5f}"
            assert shown[3] == f"{np.std(list(own[weights]['folds'].values()), ddof=1):.5f}"
        assert html.column(name, "best")[3] == f"{own['best']['std']:.5f}"
    assert f"flatters the score of the best weights by about {scores['keep_best_flatters']:.5f}" in html.text
    assert f"Ahead by the mean of the folds: {scores['ahead']} weights." in html.text


def test_every_evaluation_is_there_and_the_chosen_one_marked(page: Any) -> None:
    html, _, _ = page
    wanted = []
    for fold in (0, 1):
        done = json.loads(Path(f"runs/tiny/fold{fold}/done.json").read_text())
        for line in map(json.loads, Path(f"runs/tiny/fold{fold}/metrics.jsonl").read_text().splitlines()):
            if "valid/score" in line:
                chosen = "chosen" if line["step"] == done["best_step"] else ""
                wanted.append([f"fold {fold}", str(line["step"]), f"{line['valid/score']:.5f}", chosen])
    assert html.tables["evaluations"][1:] == wanted
    assert [row[3] for row in wanted].count("chosen") == 2
    assert len(wanted) == 12


def test_learning_rates_are_peak_times_schedule(home: Path) -> None:
    (picture,) = [one for one in report_page(read_run("runs/tiny")).pictures if one.name == "rates"]
    rates = dict(picture.data["groups"])
    assert list(rates) == ["head", "block 3", "block 2", "block 1", "embeddings"]
    config = config_file.load("runs/tiny/config.yaml")
    assert rates["block 2"] == pytest.approx(config.optimizer.lr * 0.9**2, rel=5e-3)
    steps, shares = picture.data["steps"], picture.data["shares"]
    warm, last = round(0.1 * steps[-1]), steps[-1]
    for step, share in zip(steps, shares, strict=True):
        at = step - 1  # the rate of the step that was just done
        want = at / warm if at < warm else 0.5 * (1 + np.cos(np.pi * (at - warm) / (last - warm)))
        assert share == pytest.approx(want, abs=1e-9)


def test_worst_rows_are_the_rows_with_the_largest_errors(page: Any) -> None:
    html, _, _ = page
    rows = pd.read_parquet("runs/tiny/oof.parquet")
    rows["error"] = (rows["target_main_target"].astype(float) - rows["pred_main_target"].astype(float)).abs()
    worst = rows.sort_values("error", ascending=False, kind="stable").head(20)
    assert html.column("worst-rows", "id") == list(worst["id"])
    assert html.column("worst-rows", "error") == [f"{value:.4f}" for value in worst["error"]]
    texts = pd.read_csv("data/train.csv").set_index("id")["text"]
    assert html.column("worst-rows", "text") == list(texts[worst["id"]])


def test_errors_by_part_add_up(page: Any) -> None:
    html, _, _ = page
    rows = pd.read_parquet("runs/tiny/oof.parquet")
    errors = (rows["target_main_target"].astype(float) - rows["pred_main_target"].astype(float)).abs()
    by_fold = errors.groupby(rows["fold"])
    assert html.column("table-by-fold", "mean absolute error") == [f"{value:.4f}" for value in by_fold.mean()]
    scores = json.loads(Path("runs/tiny/scores.json").read_text())
    assert html.column("table-by-fold", "rmse") == five(scores["best"]["folds"].values())
    tokenizer = load_tokenizer("runs/tiny/backbone")
    texts = pd.read_csv("data/train.csv").set_index("id")["text"]
    lengths = [len(tokenizer(texts[name])["input_ids"]) for name in rows["id"]]
    shown = html.tables["table-by-length"][1:]
    assert sum(int(row[1]) for row in shown) == len(rows)
    for name, count, mean, *_ in shown:
        low, high = map(int, name.split("-"))
        own = [error for error, length in zip(errors, lengths, strict=True) if low <= length <= high]
        assert (int(count), mean) == (len(own), f"{np.mean(own):.4f}")


def test_padding_is_that_of_the_batches_that_were_seen(page: Any) -> None:
    html, _, _ = page
    config = config_file.load("runs/tiny/config.yaml")
    table = read_train(config.competition, config.tasks)
    folding = read_folds("folds/tiny-regression.csv", table, config.folds)
    encoded = encode(load_tokenizer("runs/tiny/backbone"), table.texts, **config.model.cutting, cache=None)
    run = read_run("runs/tiny")
    for fold in (0, 1):
        real = padded = 0
        for epoch in range(3):
            windows = training_windows(
                np.flatnonzero(folding.fold != fold), encoded.lengths, batch_size=8, micro_batch_size=4,
                seed=config.training.seed, epoch=epoch,
            )  # fmt: skip
            for rows in (rows for window in windows for rows in window):
                batch = collate(encoded, rows)
                real, padded = real + batch.num_tokens, padded + batch.input_ids.numel()
        done = json.loads(Path(f"runs/tiny/fold{fold}/done.json").read_text())
        assert real == done["tokens"], "the batches are those of the training"
        (log,) = [log for log in run.logs if log.fold == fold]
        found = run.padding(log)
        assert found is not None and found.real == real
        assert html.column("time-table", "padding")[fold] == f"{1 - real / padded:.1%}"
        assert found.plain_share > found.share > 0
        assert html.column("time-table", "training")[fold] == f"{done['train_seconds']:,.1f}"
        assert html.column("time-table", "evaluating")[fold] == f"{done['eval_seconds']:,.1f}"
        assert done["train_seconds"] + done["eval_seconds"] <= done["seconds"] + 0.2


def test_the_config_is_shown_against_base(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    html, _, _ = page
    keys = html.column("config-diff", "key")
    assert "training.batch_size" not in keys, "base.yaml says 8, too"
    shown = {row[0]: row[1:] for row in html.tables["config-diff"][1:]}
    assert shown["evaluation.every"] == ["10%", "50%"]
    assert "training.epochs" not in shown, "3 is the default"
    assert shown["stability.averaging.name"] == ["none", "ema"]
    assert "configs/base.yaml as it is now" in html.text
    assert not any(key.startswith(("competition", "tasks", "metric", "model.backbone", "tracking")) for key in keys)
    monkeypatch.setattr(config_file, "FOLDER", Path("nowhere"))
    base, where = config_file.load_base(config_file.load("runs/tiny/config.yaml"))
    assert (where, base.training.batch_size, base.evaluation.every) == ("the defaults", 16, "20%")


def test_a_base_that_does_not_fit_gives_way_to_the_defaults(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(config_file, "FOLDER", tmp_path)
    (tmp_path / "base.yaml").write_text("training: {epochs: many}\n")
    assert config_file.load_base(config_file.load("runs/tiny/config.yaml"))[1] == "the defaults"


def test_the_page_needs_no_network_and_no_script(page: Any) -> None:
    html, text, path = page
    tags = [tag for tag, _ in html.tags]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
    assert all(attrs["src"].startswith("data:image/svg+xml;base64,") for tag, attrs in html.tags if tag == "img")
    assert not [name for _, attrs in html.tags for name in attrs if name.startswith("on")]
    assert all(attrs["href"].startswith("#") for tag, attrs in html.tags if tag == "a")
    assert "url(" not in text and "@import" not in text
    policies = [
        a["content"] for tag, a in html.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    ids = [attrs["id"] for _, attrs in html.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for tag, a in html.tags if tag == "a"} <= set(ids)


def test_each_picture_is_in_the_page_and_a_png_file(page: Any) -> None:
    html, text, path = page
    names = [attrs["id"] for tag, attrs in html.tags if tag == "figure"]
    assert names == [
        "fold-scores-main", "fold-scores-side", "curves", "auxiliary", "rates", "scatter-main", "reliability-side",
        "confusion-side", "errors-by-fold", "errors-by-length", "balance-picture", "time-picture",
    ]  # fmt: skip
    assert {file.stem for file in path.with_suffix("").glob("*")} == set(names)
    for file in path.with_suffix("").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 3000
    pictures = re.findall(r"base64,([^\"]+)\"", text)
    assert len(pictures) == len(names)
    for picture in pictures:
        assert ElementTree.fromstring(base64.b64decode(picture)).tag.endswith("svg")


def test_the_same_run_gives_the_same_bytes(page: Any) -> None:
    _, _, path = page
    picture = next(one for one in report_page(read_run("runs/tiny")).pictures if one.name == "curves")
    first, again = draw(picture), draw(picture)
    assert first == again
    assert first.png == (path.with_suffix("") / "curves.png").read_bytes()


def test_text_says_the_same_without_matplotlib(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    html, _, _ = page
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report_text("runs/tiny")
    for table in ("scores-main", "scores-side", "table-by-fold", "time-table", "columns-side"):
        for row in html.tables[table]:
            assert re.search(r" +".join(map(re.escape, filter(None, row))), text), row
    assert "fold 0  rmse  " in text and "block 3                  peak lr" in text
    with pytest.raises(ValueError, match=r"Matplotlib, which is not installed: .*comp\[report\].*--text"):
        write_report("runs/tiny")


def test_command_line(page: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    app(["report", "runs/tiny", "--text"], standalone_mode=False)
    assert capsys.readouterr().out == report_text("runs/tiny")
    with pytest.raises(ValueError, match="--text prints the report and writes no page"):
        app(["report", "runs/tiny", "--text", "--out", "x.html"], standalone_mode=False)
    with pytest.raises(ValueError, match=r"--out page: name it with an ending, like page\.html"):
        write_report("runs/tiny", "page")
    with pytest.raises(ValueError, match=r"runs/none is no run folder: .*comp oof"):
        app(["report", "runs/none"], standalone_mode=False)


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> RunFolder:
    """A copy of the real run to break."""
    shutil.copytree("runs/tiny", tmp_path / "cut")
    return RunFolder(tmp_path / "cut")


def test_a_run_that_was_killed_before_it_was_scored(copy: RunFolder) -> None:
    copy.fold(1).done.unlink()
    copy.oof.unlink()
    copy.scores.unlink()
    with copy.fold(1).metrics.open("a") as file:
        file.write('{"time": "2026", "step": 99, "valid/sc')  # being written just now
    html = html_of(report_page(read_run(copy.path)))
    rows = pd.read_parquet(copy.fold(0).oof)
    truth, preds = (rows[[f"{kind}_main_target"]].to_numpy(float) for kind in ("target", "pred"))
    (score,) = five([evaluate("rmse", truth, preds)])
    assert html.column("scores-main", "best") == [score, score, "-", score], "one fold has no spread"
    assert "fold 1: begun and not finished" in html.text
    assert "fold 1 (not finished)" in html.column("evaluations", "fold")
    assert html.column("time-table", "fold") == ["fold 0"]
    scores = [float(row[2]) for row in html.tables["evaluations"][1:] if row[0].startswith("fold 1")]
    chosen = [row[3] for row in html.tables["evaluations"][1:] if row[0].startswith("fold 1")]
    assert chosen.index("chosen") == int(np.argmin(scores)), "the best so far"
    copy.fold(0).done.unlink()
    text = report_text(copy.path)
    assert "no fold is finished. So there are no scores and errors here." in text and "fold 0 (not finished)" in text


def test_only_the_full_data_model(copy: RunFolder) -> None:
    for fold in (0, 1):
        shutil.copytree(copy.fold(fold).path, copy.fold("full").path, dirs_exist_ok=True)
        shutil.rmtree(copy.fold(fold).path)
    full = copy.fold("full")
    lines = [line for line in full.metrics.read_text().splitlines(keepends=True) if "valid/" not in line]
    full.metrics.write_text("".join(lines))
    write_json(full.done, {**json.loads(full.done.read_text()), "best": None, "best_step": 0, "last": None})
    page = report_page(read_run(copy.path))
    text = render_text(page)
    assert "only the full-data model is trained, which holds no rows out" in text
    assert [picture.name for picture in page.pictures] == ["curves", "rates", "time-picture"]
    assert "full  loss" in text and re.search(r"\nfull +[\d.]+ .*%", text), "padding is counted"


def test_without_the_training_table(copy: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = html_of(report_page(read_run(copy.path)))
    kept = Path("data/train.csv").read_text()
    try:
        Path("data/train.csv").write_text(kept.replace("lovely", "changed", 1))
        html = html_of(report_page(read_run(copy.path)))
        assert "train.csv has changed since the run was made, so there are no texts, lengths, groups" in html.text
        Path("data/train.csv").unlink()
        html = html_of(report_page(read_run(copy.path)))
    finally:
        Path("data/train.csv").write_text(kept)
    assert re.search(r"The training table cannot be read \(.*no such file.*\), so there are no texts", html.text)
    assert html.tables["worst-rows"][0] == ["id", "fold", "error", "target", "prediction"]
    assert "table-by-length" not in html.tables and "table-by-fold" in html.tables
    assert html.tables["scores-main"] == whole.tables["scores-main"]
    assert set(html.column("time-table", "padding")) == {"-"}


def test_without_the_fold_file(copy: RunFolder) -> None:
    path = Path("folds/tiny-regression.csv")
    kept = path.read_text()
    try:
        path.unlink()
        text = report_text(copy.path)
        assert "The fold file cannot be read" in text and "padding is not counted" in text
        lines = kept.splitlines(keepends=True)
        path.write_text(
            lines[0] + "".join(line.replace(",0", ",9").replace(",1", ",0").replace(",9", ",1") for line in lines[1:])
        )
        sidecar = path.with_suffix(".json")
        aside = sidecar.read_text()
        sidecar.unlink()
        assert f"{path} has changed since the run was made" in report_text(copy.path).replace("Folds/", "folds/")
        sidecar.write_text(aside)
    finally:
        path.write_text(kept)


def test_without_the_pseudo_rows(copy: RunFolder) -> None:
    config = yaml.safe_load(copy.config.read_text())
    copy.config.write_text(yaml.safe_dump({**config, "pseudo": {"folder": "gone"}}))
    text = report_text(copy.path)
    assert re.search(r"warning: Padding is not counted: .*gone", text)
    assert re.search(r"\nfold 0 .* -  +-  +-\n", text)


def test_a_damaged_log_is_named(copy: RunFolder) -> None:
    copy.fold(1).metrics.write_text('{"step": 1}\n{"step":\n')
    with pytest.raises(ValueError, match=r"fold1/metrics\.jsonl line 2 is no JSON object; take the line out"):
        read_run(copy.path)


def test_nothing_begun(copy: RunFolder) -> None:
    for fold in (0, 1):
        shutil.rmtree(copy.fold(fold).path)
    with pytest.raises(ValueError, match="no fold was begun yet; train them with `comp train`"):
        read_run(copy.path)


def test_an_older_done_json_has_no_times(copy: RunFolder) -> None:
    for fold in (0, 1):
        done = json.loads(copy.fold(fold).done.read_text())
        write_json(copy.fold(fold).done, {k: v for k, v in done.items() if k not in ("train_seconds", "eval_seconds")})
    page = report_page(read_run(copy.path))
    assert html_of(page).column("time-table", "training") == ["-", "-"]
    assert "time-picture" not in [picture.name for picture in page.pictures]


# --- other kinds of task, without training ---------------------------------------------------------------------------

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def fake_run(competition: TinyCompetition, **sections: Any) -> tuple[RunFolder, Config]:
    """Write runs/fake with two finished folds whose predictions are drawn; `sections` of the config as they are."""
    data = competition.config("nowhere", **sections)
    data["competition"] |= {"test": None, "sample_submission": None}
    Path("fake.yaml").write_text(yaml.safe_dump(data))
    config = config_file.load("fake.yaml")
    table, folding = crossval.open_tables(config, [0, 1], lambda line: None)
    assert folding is not None
    run, task = RunFolder("runs/fake"), config.tasks[0]
    marks = {"data": table.fingerprint(), "folds": folding.fingerprint}
    claim(run, config, marks, {"runtime": "CPU", "backbone": "nowhere", "classes": table.classes})
    draw = np.random.default_rng(0)
    for fold in (0, 1):
        held = np.flatnonzero(folding.fold == fold)
        targets = table.targets[task.name][held].astype(float)
        if task.kind == "multiclass":
            labels = table.classes[task.name]
            truth = targets if targets.shape[1] > 1 else np.eye(len(labels))[targets[:, 0].astype(int)]
            preds = draw.dirichlet(np.ones(len(labels)), len(held)) * 0.6 + 0.4 * truth
        elif task.kind in ("binary", "multilabel"):
            preds = np.clip(0.5 * targets + 0.5 * draw.random(targets.shape), 0.01, 0.99)
        else:
            preds = targets + draw.normal(size=targets.shape)
        found = Predictions(table.ids[held], {task.name: preds})
        oof.write(
            run.fold(fold).oof,
            fold=fold,
            tasks=[task],
            classes=table.classes,
            targets={task.name: table.targets[task.name][held]},
            best=found,
            last=found,
        )
        write_json(run.fold(fold).done, {"seconds": 1.0, "best": None, "last": None})
    crossval.score_run(run, config, table, lambda line: None)
    return run, config


@pytest.mark.parametrize("kind", TINY_TASKS)
def test_every_kind_of_task(kind: str, isolated: Path) -> None:
    run, config = fake_run(write_tiny_competition(isolated / "data", kind))
    html = Html(write_report(run.path).read_text(encoding="utf-8"))
    scores = json.loads(run.scores.read_text())
    assert html.column("scores-main", "best")[:3] == five([*scores["best"]["folds"].values(), scores["best"]["mean"]])
    rows, task = pd.read_parquet(run.oof), config.tasks[0]
    targets = rows.filter(like="target_main_").to_numpy(float)
    preds = rows.filter(like="pred_main_").to_numpy(float)
    shown = [float(value) for value in html.column("worst-rows", "error")]
    assert shown == pytest.approx(sorted(row_errors(kind, targets, preds), reverse=True)[:20], abs=6e-5)
    if kind in ("multiclass", "ordinal"):
        guess = preds.argmax(axis=1) if kind == "multiclass" else np.clip(np.floor(preds[:, 0] + 0.5), 1, 4)
        recall = html.column("classes-main", "recall")
        codes = range(3) if kind == "multiclass" else range(1, 5)
        assert recall == [f"{(guess[targets[:, 0] == code] == code).mean():.3f}" for code in codes]
        assert sum(map(int, html.column("classes-main", "rows"))) == len(rows)
    elif kind in ("binary", "multilabel"):
        wanted = [evaluate("roc_auc", targets[:, [k]], preds[:, [k]]) for k in range(len(task.targets))]
        assert html.column("columns-main", "ROC AUC") == five(wanted)
        assert sum(map(int, html.column("bins-main", "rows"))) == targets.size
    else:
        assert html.column("columns-main", "RMSE") == five([scores["best"]["pooled"]])
    assert "length in words" in html.text, "this run has no tokenizer"


def test_many_columns_and_soft_classes(isolated: Path) -> None:
    competition = write_tiny_competition(isolated / "data", "regression")
    frame = pd.read_csv(competition.train)
    for place in range(11):
        frame[f"t{place}"] = frame["target"] * place + 1
    frame["a"], frame["b"] = 0.25, 0.75
    frame.to_csv(competition.train, index=False)
    columns = [f"t{place}" for place in range(11)]
    run, _ = fake_run(competition, tasks=[{"name": "main", "kind": "regression", "targets": columns}], metric="mcrmse")
    page = report_page(read_run(run.path))
    (picture,) = [one for one in page.pictures if one.kind == "scatter"]
    assert draw(picture).png.startswith(b"\x89PNG")
    assert "Drawn are the first 9 of 11 columns" in html_of(page).text
    assert html_of(page).column("columns-main", "target") == columns
    shutil.rmtree("runs/fake")
    shutil.rmtree("folds")
    soft = [{"name": "main", "kind": "multiclass", "targets": ["a", "b"]}]
    run, _ = fake_run(competition, tasks=soft, metric="log_loss")
    html = html_of(report_page(read_run(run.path)))
    assert "likeliest class as the truth" in html.text
    assert html.column("classes-main", "rows") == ["0", "60"]
    assert set(html.column("worst-rows", "target")) == {"b 0.75"}


def test_groups(isolated: Path) -> None:
    competition = write_tiny_competition(isolated / "data", "regression")
    frame = pd.read_csv(competition.train)
    frame["site"] = [f"site {min(place // 3, 18)}" for place in range(60)]
    frame.loc[0, "site"] = "lonely"
    frame.to_csv(competition.train, index=False)
    run, _ = fake_run(competition, folds={"splitter": "group", "group": "site", "num_folds": 2})
    html = html_of(report_page(read_run(run.path)))
    rows = pd.read_parquet(run.oof).merge(frame[["id", "site"]], on="id")
    errors = (rows["target_main_target"].astype(float) - rows["pred_main_target"].astype(float)).abs()
    found = errors.groupby(rows["site"]).agg(["mean", "size"]).query("size >= 3").sort_values("mean", ascending=False)
    assert html.column("table-by-group", "group") == list(found.index[:15])
    assert html.column("table-by-group", "mean absolute error") == [f"{mean:.4f}" for mean in found["mean"][:15]]
    assert "by group (site): the 15 worst of 20 groups, of 3 rows or more" in html.text


def test_texts_names_and_ids_cannot_do_harm(isolated: Path) -> None:
    competition = write_tiny_competition(isolated / "data", "multiclass")
    frame = pd.read_csv(competition.train)
    frame["target"] = frame["target"].map({"sea": EVIL, "wood": "costs $1 or $2_x", "town": "\u6d77\u6d0b"})
    frame["text"] = [f"{EVIL} \x1b[31mred\x07 {'long ' * 2000}{text}" for text in frame["text"]]
    frame["id"] = [f"<b>{name}</b>" for name in frame["id"]]
    frame.to_csv(competition.train, index=False)
    run, _ = fake_run(competition, metric="accuracy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(run.path)
    html = Html(path.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in html.tags}
    assert not [name for _, attrs in html.tags for name in attrs if name.startswith("on")]
    assert {attrs["src"][:5] for tag, attrs in html.tags if tag == "img"} == {"data:"}
    assert html.column("worst-rows", "id")[0].startswith("<b>t")
    assert html.column("worst-rows", "text")[0].startswith(EVIL)
    assert "characters more)" in html.column("worst-rows", "text")[0]
    assert set(html.column("classes-main", "class")) == {EVIL, "costs $1 or $2_x", "\u6d77\u6d0b"}
    text = report_text(run.path)
    assert "\x1b" not in text and "\x07" not in text and "\N{REPLACEMENT CHARACTER}[31mred" in text
    assert max(map(len, text.splitlines())) < 400


def test_a_classical_run(isolated: Path) -> None:
    competition = write_tiny_competition(isolated / "data", "regression")
    Path("tiny.yaml").write_text(yaml.safe_dump(competition.config("nowhere")))
    run_classical(config_file.load("tiny.yaml"), "ridge", features=["tfidf"], estimator="ridge", say=lambda line: None)
    page = report_page(read_run("runs/ridge"))
    html, scores = html_of(page), json.loads(Path("runs/ridge/scores.json").read_text())
    assert html.column("scores-main", "best")[2] == f"{scores['best']['mean']:.5f}"
    assert ["estimator", "ridge"] in html.tables["classical"]
    assert not {"curves", "rates", "time-picture"} & {picture.name for picture in page.pictures}
