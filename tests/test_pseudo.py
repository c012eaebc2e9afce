"""Pseudo-labels by fold: who labels what, what is refused, what a student trains on, and that nothing leaks."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_TASKS, write_tiny_competition
from test_resume import Killed, kill_at, leavings
from typer.testing import CliRunner

from comp import config_file, load
from comp.blend.classical import run_classical
from comp.blend.crossfit import Recipe, examine
from comp.blend.members import gather
from comp.cli import app
from comp.config import Config
from comp.config_pseudo import Pseudo
from comp.data.folds import Folding, valid_rows
from comp.data.pseudo import KEY, answers_of, extended, read_set, table_of_rows, write_set
from comp.data.tables import Table, read_train
from comp.optim.schedules import build_schedule
from comp.runs import digest
from comp.ship.teachers import make_labels
from comp.stability.adversarial import FGM
from comp.stability.averaging import EMA
from comp.training import crossval, dispatch, plan
from comp.training.crossval import open_tables
from comp.training.lessons import Lesson, NoPseudo, PseudoRows, Stages, choose, open_pseudo
from comp.training.objective import Objective
from comp.training.resume import Saver

SAID: list[str] = []
OWN: dict[str, dict[str, Any]] = {
    "regression": {"stability": {"supcon": {"weight": 0.3}}, "model": {"pooler": {"name": "word_weights"}}},
    "multiclass": {"tasks": {"loss": {"name": "cross_entropy", "class_weights": "balanced"}}},
}
"""What is counted on training rows, so that it would show if held-out rows were among them."""
ON = "pseudo.folder=pseudo/one"
Enter = Callable[..., Callable[..., Config]]


def train(config: Config, name: str, folds: str = "all", save_every: str = "never", **own: Any) -> None:
    SAID.clear()
    crossval.run(config, name, folds, save_every=save_every, say=SAID.append, **own)


def label(*runs: str, data: str = "test.csv", **own: Any) -> Path:
    SAID.clear()
    return make_labels([f"runs/{run}" for run in runs or ("one",)], data, say=SAID.append, **own)


@pytest.fixture(autouse=True, scope="module")
def no_collection() -> Iterator[None]:
    """Between folds memory is given back; with a test session's objects around, that takes longer than a fold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "release_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """Return `home(kind)`: a competition's folder with paths relative to it and a finished teacher, runs/one."""
    made: dict[str, Path] = {}

    def home(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            data = write_tiny_competition(made[kind], kind).config(
                tiny_model_folder("bert"), evaluation={"every": None}, optimizer={"lr": 1e-3}
            )
            for section, more in OWN.get(kind, {}).items():
                own = data["tasks"][0] if section == "tasks" else data.setdefault(section, {})
                own |= more
            data["competition"] |= {"train": "train.csv", "test": "test.csv", "sample_submission": None}
            data["training"]["epochs"] = 2
            (made[kind] / "tiny.yaml").write_text(yaml.safe_dump(data))
            with contextlib.chdir(made[kind]):
                train(config_file.load("tiny.yaml"), "one")
        return made[kind]

    return home


@pytest.fixture
def enter(homes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Return `enter(kind)`: go into a copy of a home; it returns `config(*overrides)`."""

    def enter(kind: str = "regression") -> Callable[..., Config]:
        shutil.copytree(homes(kind), tmp_path / kind)
        monkeypatch.chdir(tmp_path / kind)
        return lambda *overrides: config_file.load("tiny.yaml", overrides)

    return enter


def opened(config: Config, folds: Sequence[int | str] = (0, 1)) -> tuple[PseudoRows, Table, Folding]:
    table, folding = open_tables(config, [0, 1], SAID.append)
    found = open_pseudo(config, table, folding, folds, SAID.append)
    assert isinstance(found, PseudoRows) and folding is not None
    return found, table, folding


def preds_of(fold: int | str, name: str = "one") -> np.ndarray:
    frame = pd.read_parquet(f"pseudo/{name}/{'full' if fold == 'full' else f'fold{fold}'}.parquet")
    return frame[[column for column in frame.columns if column.startswith("pred_")]].to_numpy()


# --- making a set, learning from it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY_TASKS)
def test_every_fold_is_labelled_by_its_own_model(kind: str, enter: Enter) -> None:
    config, test = enter(kind), pd.read_csv("test.csv", dtype=str)
    folder = label()
    assert folder == Path("pseudo/one") and "test.csv: 20 of 20 rows to label" in SAID
    alone = [load("runs/one", folds=[fold], weights="last") for fold in (0, 1)]
    said = [own.predict(test)[own.output_names].to_numpy() for own in alone]
    assert not np.allclose(said[0], said[1], atol=1e-3)
    for fold in (0, 1):
        assert preds_of(fold) == pytest.approx(said[fold], abs=1e-6)
    assert preds_of("full") == pytest.approx((said[0] + said[1]) / 2, abs=1e-6)
    assert list(pd.read_parquet(folder / "fold0.parquet")[KEY]) == [f"pseudo:{name}" for name in test["id"]]
    # a student learns from them, and its scores are of true rows
    train(config(ON, "pseudo.weight=0.5"), "student", "0")
    assert "fold 0: 50 rows to train on, 30 held out, 14 steps" in SAID
    one, student = (pd.read_parquet(f"runs/{run}/oof.parquet") for run in ("one", "student"))
    targets = [name for name in one.columns if name.startswith("target_")]
    one = one[one["fold"] == 0]
    assert one[["id", "fold", *targets]].equals(student[["id", "fold", *targets]])
    assert not one.equals(student)
    marks = json.loads(Path("runs/student/manifest.json").read_text())["fingerprints"]
    assert marks["pseudo"] == read_set(folder).fingerprint
    # it blends with its teacher, and infers without the set
    members = gather(["runs/one", "runs/student"])
    assert "student" in examine(members, Recipe("mean", {}, "none"))[1].table()
    shutil.rmtree("pseudo")
    assert load("runs/student").predict(test)["id"].tolist() == test["id"].tolist()


@pytest.mark.parametrize("kind", OWN)
def test_labels_for_a_fold_do_not_depend_on_its_targets(kind: str, enter: Enter) -> None:
    """Fold 0's targets are changed and all is trained anew: the labels for fold 0 have the same bits."""
    config = enter(kind)()
    label()
    frame = pd.read_csv("train.csv", dtype=str)
    fold = pd.read_csv("folds/tiny-" + kind + ".csv", dtype=str).set_index("id")["fold"]
    rows = np.flatnonzero(fold.loc[frame["id"]].to_numpy() == "0")
    moved = frame["target"].to_numpy(copy=True)
    moved[rows] = np.roll(moved[rows], 1) if kind == "multiclass" else [str(n * 3.7 - 20) for n in range(len(rows))]
    frame.assign(target=moved).to_csv("train.csv", index=False)
    Path(f"folds/tiny-{kind}.json").unlink()  # it says that the targets have changed
    with pytest.raises(ValueError, match=r"runs/one was trained on data \w+, but train.csv is now"):
        label(name="late")
    train(config, "after")
    label("after", name="after")
    assert np.array_equal(preds_of(0), preds_of(0, "after"))
    assert not np.allclose(preds_of(1), preds_of(1, "after"), atol=1e-4)
    assert not np.allclose(preds_of("full"), preds_of("full", "after"), atol=1e-4)


def test_several_teachers_and_a_full_model(enter: Enter) -> None:
    config = enter("multiclass")
    run_classical(config(), "words", features=["tfidf"], estimator="ridge", say=SAID.append)
    train(config("training.epochs=1"), "whole", "0")
    train(config("training.epochs=1"), "whole", "full")
    label("one", "words", name="two")
    assert any(line.startswith("fold 0: 20 rows, probability of the chosen class") for line in SAID)
    test = pd.read_csv("test.csv", dtype=str)

    def said(run: str, fold: int | str) -> np.ndarray:
        own = load(f"runs/{run}", folds=[fold], weights="last")
        return own.predict(test)[own.output_names].to_numpy()

    both = np.stack([said("one", 1), said("words", 1)])
    frame = pd.read_parquet("pseudo/two/fold1.parquet")
    assert preds_of(1, "two") == pytest.approx(both.mean(0), abs=1e-6)
    assert frame["spread"].to_numpy() == pytest.approx(np.ptp(both, axis=0).max(1), abs=1e-6)
    assert frame["agree"].tolist() == (both[0].argmax(1) == both[1].argmax(1)).tolist()
    assert read_set("pseudo/two").num_teachers == 2
    agreed = opened(config("pseudo.folder=pseudo/two", "pseudo.agreement=true"))[0].chosen(1)[1]
    assert agreed.tolist() == np.flatnonzero(frame["agree"]).tolist()
    # of two runs the folds that both have; the full-data model where there is one, the mean of folds elsewhere
    label("one", "whole", name="three")
    assert "fold 1: not finished in every run, left out" in SAID
    assert sorted(path.stem for path in Path("pseudo/three").glob("f*")) == ["fold0", "full"]
    assert preds_of("full", "three") == pytest.approx((said("one", 0) + said("whole", "full")) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("own", "weights", "reason"),
    [
        ([], "best", "best weights are those of the best held-out score"),
        (["evaluation.patience=50"], "last", "evaluation.patience ends training by held-out scores"),
        (["stability.averaging.name=soup"], "averaged", "a soup is chosen by held-out scores"),
        (["stability.averaging.name=ema"], "averaged", None),
    ],
)
def test_what_held_out_rows_have_chosen_is_said(own: list[str], weights: str, reason: str | None, enter: Enter) -> None:
    train(enter()("training.epochs=1", *own), "chosen", "0")
    folder = label("chosen", weights=weights)
    warned = [line for line in SAID if line.startswith("warning: ")]
    assert warned == (
        [f"warning: runs/chosen: {reason}: a mild leak from the held-out rows into their labels"] if reason else []
    )
    assert read_set(folder).about["teachers"][0]["chosen_by_held_out_rows"] == ([reason] if reason else [])


# --- planted leaks ---------------------------------------------------------------------------------------------------


def forge(folder: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its fingerprint and the files' digests right again."""
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["set"]["files"])
    for name, about in manifest["set"]["files"].items():
        about["digest"] = digest([(path.parent / name).read_bytes()])
    manifest["fingerprint"] = digest([json.dumps(manifest["set"], sort_keys=True)])
    path.write_text(json.dumps(manifest))


def swap(one: str, other: str) -> None:
    Path(one).rename("aside")
    Path(other).rename(one)
    Path("aside").rename(other)


def refused(config: Config, message: str, folds: str = "all") -> None:
    """The student is refused before anything is written."""
    with pytest.raises(ValueError, match=message):
        train(config, "student", folds)
    assert not Path("runs/student").exists()


def test_labels_of_a_full_model_are_for_a_full_model(enter: Enter) -> None:
    config = enter()
    train(config("training.epochs=1"), "whole", "full")
    label("whole", name="one")
    refused(
        config(ON),
        r"no labels for fold 0 by models that never saw its held-out rows; it has full.parquet \(kind full\)",
    )
    train(config(ON), "student", "full")
    assert "fold full: 20 of 20 pseudo rows of pseudo/one, mixed" in SAID
    # nor under another name, nor with the manifest to match
    shutil.rmtree("runs/student")
    label(overwrite=True)
    shutil.copy("pseudo/one/full.parquet", "pseudo/one/fold0.parquet")
    refused(config(ON), "pseudo/one/fold0.parquet was changed after it was made")
    forge("pseudo/one", lambda files: None)
    refused(config(ON), "fold0.parquet holds labels of kind full for other rows than manifest.json says")
    label(overwrite=True)
    forge(
        "pseudo/one", lambda files: files["full.parquet"].update(files["fold0.parquet"]) or files.pop("fold0.parquet")
    )
    refused(config(ON), "full.parquet holds labels of kind full for other rows")


def test_labels_of_another_fold(enter: Enter) -> None:
    config = enter()
    label()
    swap("pseudo/one/fold0.parquet", "pseudo/one/fold1.parquet")
    refused(config(ON), "pseudo/one/fold0.parquet was changed after it was made")
    forge("pseudo/one", lambda files: None)
    refused(config(ON), "fold0.parquet holds labels of kind fold for other rows")
    # names mean nothing: with the entries swapped too, each fold finds its own again
    forge(
        "pseudo/one",
        lambda files: files.update({"fold0.parquet": files["fold1.parquet"], "fold1.parquet": files["fold0.parquet"]}),
    )
    swapped = opened(config(ON))[0].chosen(0)[0].preds
    label(overwrite=True)
    assert np.array_equal(swapped, opened(config(ON))[0].chosen(0)[0].preds)
    # nor do the names of a run's folders
    swap("runs/one/fold0", "runs/one/fold1")
    with pytest.raises(ValueError, match="runs/one/fold0 was validated on other rows than fold 0 of the fold file"):
        label(overwrite=True)


def test_labels_from_other_folds(enter: Enter) -> None:
    config = enter()
    train(config("folds.seed=5", "folds.name=other", "training.epochs=1"), "apart", "0")
    label("apart")
    refused(config("pseudo.folder=pseudo/apart"), r"pseudo/apart was made on other folds: \w+, here \w+; its teachers")
    with pytest.raises(ValueError, match=r"runs/one and runs/apart were trained on different folds \(\w+ and \w+\)"):
        label("one", "apart")
    # features of a run on other folds
    fit: dict[str, Any] = {"estimator": "ridge", "options": {"alpha": 1.0}, "folds": "0", "say": SAID.append}
    run_classical(config(), "through", features=["run:one"], **fit)
    label("through")
    assert any("run:one are of best weights" in line for line in SAID)
    crooked = Path("runs/through/classical.json")
    crooked.write_text(crooked.read_text().replace("run:one", "run:apart"))
    with pytest.raises(ValueError, match=r"features 'run:apart' were trained on different folds \(\w+\) than these"):
        label("through", overwrite=True)
    # a fold file that was changed under a run
    frame = pd.read_csv("folds/other.csv")
    frame.assign(fold=1 - frame["fold"]).to_csv("folds/other.csv", index=False)
    Path("folds/other.json").unlink()
    with pytest.raises(ValueError, match=r"was trained on folds \w+, but folds/other.csv is now"):
        label("apart", overwrite=True)


@pytest.mark.parametrize("column", ["target", "text"])
def test_labels_from_other_data(column: str, enter: Enter) -> None:
    config = enter()
    label()
    frame = pd.read_csv("train.csv", dtype=str)
    frame.loc[7, column] = "0.125" if column == "target" else "something else entirely"
    frame.to_csv("train.csv", index=False)
    Path("folds/tiny-regression.json").unlink()
    what = {"target": "targets", "text": "text column 'text'"}[column]
    refused(config(ON), rf"pseudo/one was made from other training data: {what} \w+, here \w+")


def test_an_edited_set(enter: Enter) -> None:
    config = enter()
    label()
    frame = pd.read_parquet("pseudo/one/fold1.parquet")
    frame.loc[3, "pred_target"] += 1
    frame.to_parquet("pseudo/one/fold1.parquet")
    refused(config(ON), r"pseudo/one/fold1.parquet was changed after it was made \(digest \w+, now \w+\)")
    train(config(ON), "other", "0")
    Path("pseudo/one/rows.parquet").unlink()
    refused(config(ON), r"pseudo/one/rows.parquet was changed after it was made \(digest \w+, now missing\)")
    manifest = Path("pseudo/one/manifest.json")
    manifest.write_text(manifest.read_text().replace('"kind": "full"', '"kind": "fold"'))
    refused(config(ON), r"pseudo/one/manifest.json was changed after it was made \(fingerprint \w+, now \w+\)")
    refused(config("pseudo.folder=pseudo/none"), r"pseudo/none is no label set.*\(there are: 'pseudo/one'\)")


def test_labels_of_another_task(enter: Enter) -> None:
    config = enter()()
    label()
    table, _ = open_tables(config, [0], SAID.append)
    for change, message in (
        ({"kind": "ordinal"}, "pseudo/one labels kind regression, but the first task here has ordinal"),
        ({"targets": ["other"]}, r"labels targets \['target'\], but the first task here has \['other'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_set("pseudo/one").must_fit(table, config.competition, config.tasks[0].model_copy(update=change), None)


def test_texts_that_are_known_are_not_labelled(enter: Enter) -> None:
    config = enter()
    known = pd.read_csv("train.csv", dtype=str)["text"]
    long = max(known, key=len)
    test = pd.read_csv("test.csv", dtype=str)
    own = max(test["text"], key=len)
    texts = [
        *test["text"],
        f"  {known[4].upper()} ",
        long.rsplit(" ", 1)[0] + " otherwise",
        own + " ",
        own + " then",
        " ",
    ]
    pd.DataFrame({"id": [f"t{n:03d}" for n in range(len(texts))], "text": texts, "target": "9"}).to_csv(
        "more.csv", index=False
    )
    label(data="more.csv")
    assert SAID[0] == (
        "more.csv: 20 of 25 rows to label; left out: 1 without text, 1 with the text of a training row, 1 with nearly "
        "the text of a training row, 1 with the text of an earlier row, 1 with nearly the text of an earlier row"
    )
    rows = read_set("pseudo/one").rows()
    assert rows["text"].tolist() == test["text"].tolist() and "target" not in rows.columns
    # ids may be those of training rows: keys are not
    pseudo, table, _ = opened(config(ON))
    assert not set(pseudo.rows.ids) & set(table.ids) and set(rows["id"]) & set(table.ids)
    with pytest.raises(ValueError, match="train.csv: no row is left to label"):
        label(data="train.csv", name="itself")


def test_a_held_out_text_in_a_set_is_left_out_of_training(enter: Enter) -> None:
    """As from a set that was made by other means, or whose student reads fewer columns."""
    config = enter()
    label()
    true = read_set("pseudo/one")
    table, folding = open_tables(config(), [0, 1], SAID.append)
    assert folding is not None
    rows = true.rows()
    rows.loc[2, "text"] = table.texts[0][valid_rows(folding.fold, 0)[0]].upper()
    rows.loc[5, "text"] = max(table.texts[0], key=len).rsplit(" ", 1)[0] + " otherwise"
    held_out = {k: true.about["files"][f"fold{k}.parquet"]["held_out"] for k in (0, 1)}
    answers = {k: true.answers(k, held_out[k]) for k in (0, 1)}
    about = {key: value for key, value in true.about.items() if key != "files"}
    write_set(Path("pseudo/one"), rows, answers, held_out, about, source="elsewhere")
    SAID.clear()
    _, chosen = opened(config(ON))[0].chosen(0)
    assert set(range(20)) - set(chosen.tolist()) == {2, 5}
    assert any(
        "1 pseudo rows with the text of a training row, as this config reads it, are left out" in s for s in SAID
    )
    train(config(ON), "student", "0")
    assert "fold 0: 48 rows to train on, 30 held out, 12 steps" in SAID


def test_a_run_keeps_to_its_set(enter: Enter) -> None:
    config = enter()
    label()
    train(config(ON), "student", "0")
    with pytest.raises(ValueError, match="pseudo/one is there already; name another set with --name, or replace it"):
        label()
    pd.read_csv("test.csv", dtype=str).iloc[:15].to_csv("fewer.csv", index=False)
    label(data="fewer.csv", overwrite=True)
    with pytest.raises(ValueError, match="runs/student was made from another pseudo;"):
        train(config(ON), "student")
    with pytest.raises(ValueError, match="fitted to true rows alone"):
        run_classical(config(ON), "words", features=["tfidf"], estimator="ridge")


# --- what a fold trains on -------------------------------------------------------------------------------------------


def test_everything_counted_is_counted_on_true_rows(enter: Enter) -> None:
    config = enter("multiclass")(ON)
    label()
    pseudo, table, folding = opened(config)
    training, _ = plan.rows_of(0, config, table, folding)
    lesson = pseudo.lesson(0, table, training)
    assert lesson.rows.tolist() == [*training, *range(60, 80)] and not len(lesson.lead)
    soft = lesson.table.targets["main"]
    assert soft.shape == (80, 3) and np.array_equal(soft[60:], preds_of(0).astype(np.float32))
    assert np.array_equal(soft[:60].argmax(1), table.targets["main"][:, 0])
    with_rows, without = (Objective(config.tasks, own, training).losses["main"] for own in (lesson.table, table))
    assert torch.equal(with_rows.class_weights, without.class_weights)  # type: ignore[arg-type]
    assert lesson.table.weights is None


def extended_of(kind: str, labels: str, preds: list[list[float]], enter: Enter, *overrides: str) -> Table:
    config = enter(kind)(*overrides)
    table = read_train(config.competition, config.tasks)
    frame = pd.DataFrame({KEY: ["a", "b"][: len(preds)], "text": ["new", "newer"][: len(preds)]})
    rows = table_of_rows(frame, config.competition, "here")
    answers = answers_of(rows.ids, [np.array(preds)], kind)
    return extended(table, config.tasks, rows, answers, labels=labels, weight=0.25, training=np.arange(40))


@pytest.mark.parametrize(
    ("kind", "labels", "preds", "expected"),
    [
        ("regression", "soft", [[0.3], [-7.5]], [[0.3], [-7.5]]),
        ("binary", "soft", [[0.3], [0.5]], [[0.3], [0.5]]),
        ("binary", "hard", [[0.3], [0.5]], [[0], [1]]),
        ("multilabel", "soft", [[0.3, 0.9, 0.5], [0, 1, 0]], [[0.3, 0.9, 0.5], [0, 1, 0]]),
        ("multilabel", "hard", [[0.3, 0.9, 0.5], [0, 1, 0]], [[0, 1, 1], [0, 1, 0]]),
        ("multiclass", "soft", [[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]], [[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]]),
        ("multiclass", "hard", [[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]], [[1], [0]]),
        ("ordinal", "soft", [[2.4], [9.0]], [[2.4], [9.0]]),
        ("ordinal", "hard", [[2.5], [9.0]], [[3], [4]]),
    ],
)
def test_labels_by_kind(kind: str, labels: str, preds: Any, expected: Any, enter: Enter) -> None:
    found = extended_of(kind, labels, preds, enter)
    assert found.targets["main"].dtype == np.float32 and len(found) == 62
    assert found.targets["main"][60:] == pytest.approx(np.array(expected), abs=1e-6)
    assert found.weights is not None and found.weights.tolist() == [1.0] * 60 + [0.25] * 2
    assert found.texts[0][60:] == ["new", "newer"] and list(found.ids[60:]) == ["a", "b"]


def test_other_tasks_weights_and_standard_errors(enter: Enter) -> None:
    config, frame = enter(), None
    frame = pd.read_csv("train.csv", dtype=str)
    frame["w"], frame["error"] = [str(n % 3 + 1) for n in range(60)], [str(0.1 * (n % 5)) for n in range(60)]
    frame["more"] = [str(n % 2) for n in range(60)]
    frame.to_csv("train.csv", index=False)
    own = [
        "tasks=[{name: main, kind: regression, targets: [target], loss: {name: gaussian_nll, standard_error: error}},"
        " {name: more, kind: binary, targets: [more]}]",
        "competition.weight=w",
    ]
    table = extended_of_here(config(*own))
    assert np.isnan(table.targets["more"][60:]).all() and not np.isnan(table.targets["more"][:60]).any()
    assert table.weights is not None and table.weights[58:].tolist() == [2.0, 3.0, 0.25]
    assert table.errors["main"][60] == pytest.approx(0.2)
    # a set of a one-task teacher serves: rows, folds and first targets are the same
    train(config("training.epochs=1"), "plain", "0")
    label("plain", name="one")
    train(config(*own, ON, "pseudo.weight=0.25", "training.epochs=1"), "student", "0")
    assert {"pred_more_more", "pred_main_target"} <= set(pd.read_parquet("runs/student/oof.parquet").columns)


def extended_of_here(config: Config) -> Table:
    table = read_train(config.competition, config.tasks)
    rows = table_of_rows(pd.DataFrame({KEY: ["a"], "text": ["new"]}), config.competition, "here")
    answers = answers_of(rows.ids, [np.array([[0.5]])], "regression")
    return extended(table, config.tasks, rows, answers, labels="soft", weight=0.25, training=np.arange(40))


def test_weights_are_exact_whatever_the_micro_batches(enter: Enter) -> None:
    config = enter()(ON, "pseudo.weight=0.3")
    label()
    pseudo, table, folding = opened(config)
    training, _ = plan.rows_of(1, config, table, folding)
    lesson = pseudo.lesson(1, table, training)
    objective = Objective(config.tasks, lesson.table, training)
    window = np.array([*training[:5], 61, 70, 79])
    preds = torch.linspace(-1, 1, 8)[:, None]
    total = 0.0
    for part in (slice(0, 3), slice(3, 6), slice(6, 8)):
        batch = type("Batch", (), {})()
        batch.input_ids, batch.errors = torch.zeros(1), {}
        batch.targets = {"main": torch.from_numpy(lesson.table.targets["main"][window[part]])}
        batch.weights = torch.from_numpy(lesson.table.weights[window[part]])  # type: ignore[index]
        total += float(objective.share({"main": preds[part]}, batch, objective.count(window)))
    weights = np.array([1] * 5 + [0.3] * 3)
    truth = np.concatenate([table.targets["main"][training[:5], 0], preds_of(1)[[1, 10, 19], 0]])
    assert total == pytest.approx((weights * (preds[:, 0].numpy() - truth) ** 2).sum() / weights.sum(), rel=1e-5)


FOUR = answers_of(
    np.array(["a", "b", "c", "d"], object),
    [np.array([[0.9], [0.6], [0.2], [0.05]]), np.array([[0.9], [0.3], [0.4], [0.05]])],
    "binary",
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"min_confidence": 0.9}, [0, 3]),
        ({"agreement": True}, [0, 2, 3]),
        ({"keep_percent": 25}, [3]),
        ({"keep_percent": 75}, [0, 2, 3]),
        ({"agreement": True, "keep_percent": 50}, [0, 3]),
        ({"min_confidence": 0.99}, []),
    ],
)
def test_filters(options: dict[str, Any], expected: list[int]) -> None:
    chosen = Pseudo(folder="x", **options)
    everything = np.ones(4, bool)
    assert choose(FOUR, everything, kind="binary", options=chosen, seed=0).tolist() == expected
    without = choose(FOUR, np.array([True, True, True, False]), kind="binary", options=Pseudo(folder="x"), seed=0)
    assert without.tolist() == [0, 1, 2]


def test_filters_of_numbers_and_draws() -> None:
    everything = np.ones(4, bool)
    close = choose(FOUR, everything, kind="regression", options=Pseudo(folder="x", max_spread=0.25), seed=0)
    assert close.tolist() == [0, 2, 3]
    surest = choose(FOUR, everything, kind="regression", options=Pseudo(folder="x", keep_percent=75), seed=0)
    assert surest.tolist() == [0, 2, 3]
    drawn = [
        choose(FOUR, everything, kind="binary", options=Pseudo(folder="x", max_rows=2), seed=s).tolist()
        for s in range(9)
    ]
    assert all(len(rows) == 2 and rows == sorted(rows) for rows in drawn) and len({tuple(rows) for rows in drawn}) > 2
    assert len(choose(FOUR, everything, kind="binary", options=Pseudo(folder="x"), seed=0, most=3)) == 3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("binary", ["pseudo.weight=0"], "greater than 0"),
        ("binary", ["pseudo.mode=two_stage", "pseudo.weight=0.5"], "in mode 'two_stage' there are none beside"),
        ("binary", ["pseudo.epochs=2"], "epochs are those of the first stage, which mode 'mixed' has not"),
        ("regression", ["pseudo.min_confidence=0.9"], "are for classes; kind 'regression' is a number"),
        ("ordinal", ["pseudo.agreement=true"], "are for classes; kind 'ordinal' is a number"),
        ("regression", ["pseudo.labels=hard"], "kind 'regression' has none: use soft"),
        ("binary", ["pseudo.max_spread=1"], "is for numbers; kind 'binary' has classes"),
        ("ordinal", ["tasks.0.loss.name=ordinal"], "loss 'ordinal' reads whole grades"),
        ("binary", ["pseudo.confidence=1"], "unknown key"),
    ],
)
def test_options_that_do_not_fit(kind: str, options: list[str], message: str, enter: Enter) -> None:
    config = enter(kind)
    with pytest.raises(ValueError, match=message):
        config(ON, *options)


def test_options_that_ask_too_much_of_a_set(enter: Enter) -> None:
    config = enter()
    label()
    refused(config(ON, "pseudo.max_spread=0.1"), "pseudo.max_spread compares teachers, and pseudo/one has one")
    refused(config(ON, "pseudo.keep_percent=50"), "pseudo.keep_percent compares teachers")
    run_classical(config(), "words", features=["tfidf"], estimator="ridge", say=SAID.append)
    label("one", "words", overwrite=True)
    refused(config(ON, "pseudo.max_spread=1e-9"), "of the 20 rows of pseudo/one none is left for fold 0; loosen")


# --- stages ----------------------------------------------------------------------------------------------------------


def test_off_is_the_fold_as_it_was(enter: Enter) -> None:
    config = enter()()
    assert config.pseudo is None
    table, folding = open_tables(config, [0], SAID.append)
    off = open_pseudo(config, table, folding, [0], SAID.append)
    training = np.arange(7, 40)
    lesson = off.lesson(0, table, training)
    assert type(off) is NoPseudo and off.marks == {} and off.texts(table) is table.texts
    assert lesson.table is table and lesson.rows is training and not len(lesson.lead)
    stages = Stages(lesson, config, np.arange(60))
    assert (stages.lead_steps, stages.num_steps, stages.epochs) == (0, 10, 2)


def test_batches_by_tokens_have_their_steps_counted_beforehand(enter: Enter) -> None:
    config = enter()(
        "training.epochs=3",
        "training.batch_tokens=64",
        "evaluation.every=null",
        "stability.supcon.weight=0",
        "training.length_bucketing=false",
    )
    lesson = Lesson(read_train(config.competition, config.tasks), np.arange(30), np.arange(60, 80), 2)
    lengths = np.random.default_rng(0).integers(8, 40, 80)
    stages = Stages(lesson, config, lengths)
    steps = [len(stages.windows(epoch)) for epoch in range(5)]
    assert len(set(steps[2:])) > 1, "the epochs differ"
    assert (stages.lead_steps, stages.last_steps, stages.num_steps) == (sum(steps[:2]), sum(steps[2:]), sum(steps))
    assert stages.steps_per_epoch == round(sum(steps[2:]) / 3)
    assert stages.cadence().due(stages.num_steps, 0, None) and not stages.cadence().due(stages.num_steps - 1, 0, None)
    assert stages.schedule()(stages.num_steps - 1) > 0


def test_two_stages(enter: Enter) -> None:
    config = enter()("training.epochs=3", "schedule={name: linear, warmup_percent: 20}", "evaluation.every=2 steps")
    lesson = Lesson(read_train(config.competition, config.tasks), np.arange(30), np.arange(60, 80), 2)
    stages, alone = (
        Stages(own, config, np.arange(80)) for own in (lesson, replace(lesson, lead=lesson.lead[:0], lead_epochs=0))
    )
    assert (stages.lead_steps, stages.last_steps, stages.num_steps, stages.epochs) == (6, 12, 18, 5)
    for epoch in range(5):
        rows = np.concatenate([part for window in stages.windows(epoch) for part in window])
        assert sorted(rows.tolist()) == (list(range(60, 80)) if epoch < 2 else list(range(30)))
    assert str(stages.windows(0)) != str(stages.windows(1))
    assert str([stages.windows(epoch) for epoch in (2, 3, 4)]) == str([alone.windows(epoch) for epoch in range(3)])
    first = build_schedule(config.schedule, num_steps=6, steps_per_epoch=3)
    rates = [stages.schedule()(step) for step in range(18)]
    assert rates == [first(step) for step in range(6)] + [alone.schedule()(step) for step in range(12)]
    assert [step for step in range(1, 19) if stages.cadence().due(step, 0, None)] == [8, 10, 12, 14, 16, 18]
    long = config.model_copy(
        update={"schedule": config.schedule.model_copy(update={"warmup_percent": None, "warmup_steps": 8})}
    )
    with pytest.raises(ValueError, match="in the stage of the pseudo rows, schedule.warmup_steps: 8 is a warm-up"):
        Stages(lesson, long, np.arange(80)).schedule()


def test_the_first_stage_is_no_business_of_averages_and_attacks(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    config = enter()
    label()
    asked: list[float] = []
    monkeypatch.setattr(FGM, "due", lambda self, epochs, best: asked.append(epochs) or epochs >= self.start_epoch)
    train(config(ON, "pseudo.mode=two_stage", "stability.adversarial.name=fgm"), "student", "0")
    assert asked == [(step - 3) / 4 for step in range(11)]
    layer = torch.nn.Linear(2, 2)
    late, fresh = EMA(layer, decay=0.9, start=3), None
    for step in range(1, 8):
        with torch.no_grad():
            layer.weight.add_(step)
        late.update(step)
        if step == 3:
            fresh = EMA(layer, decay=0.9)
        elif fresh is not None:
            fresh.update(step - 3)
            assert torch.equal(late.average[0], fresh.average[0])


CUT = {
    "mixed": (["pseudo.weight=0.5", "training.micro_batch_size=5"], [4]),
    "two_stage": (
        ["pseudo.mode=two_stage", "stability={averaging: {name: ema}, adversarial: {name: fgm}}"],
        [2, 5],
    ),
}
"""Options, and the steps after which it is killed: in two stages once in each."""


@pytest.mark.parametrize("case", CUT)
def test_a_killed_student_ends_with_the_same_bits(case: str, enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    own, kills = CUT[case]
    config = enter("binary")(ON, "model.dropout=0.1", "evaluation.every=3 steps", *own)
    label()
    train(config, "whole", "0")
    for call in kills:
        kill_at(monkeypatch, Saver, "due", call)
        with pytest.raises(Killed):
            train(config, "cut", "0", "2 steps")
    train(config, "cut", "0", "2 steps")
    assert any("goes on after step" in line for line in SAID)
    assert leavings("cut") == leavings("whole")


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands(enter: Enter) -> None:
    enter("binary")
    run = CliRunner().invoke
    made = run(app, ["pseudo", "--run", "runs/one", "--data", "test.csv", "--name", "set"])
    assert "wrote pseudo/set, fingerprint " in made.output and made.exit_code == 0, made.output
    assert "chosen on held-out rows" in run(app, ["pseudo", "--help"]).output
    debug = [
        "train",
        "--config",
        "tiny.yaml",
        "--debug",
        "--set",
        "pseudo.folder=pseudo/set",
        "--set",
        "pseudo.mode=two_stage",
    ]
    found = run(app, debug)
    assert "fold 0: 20 of 20 pseudo rows of pseudo/set, two_stage" in found.output, found.output
    assert Path("runs/tiny-debug/fold0/done.json").exists()
    with pytest.raises(ValueError, match="a name is a folder inside pseudo/"):
        run(app, ["pseudo", "--run", "runs/one", "--data", "test.csv", "--name", "../x"], catch_exceptions=False)
    with pytest.raises(ValueError, match="a run is named twice"):
        label("one", "one")
