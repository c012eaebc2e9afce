"""A planted leak for every rule, and clean tables in which none finds anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TinyCompetition
from typer.testing import CliRunner

from comp import config_file
from comp.blend.classical import run_classical
from comp.cli import app
from comp.config import Competition, Task
from comp.data.leaks import LEAKS, NEAR, WORDS, Evidence, Leak, OutOfFold, alike, better_than_can_be, leak_table, lint
from comp.data.lineage import Lineage, text_marks
from comp.data.tables import Table, read_test, read_train, table_of
from comp.training import crossval

CLEAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "clear"
TASK = Task.model_validate({"name": "score", "kind": "regression", "targets": ["target"]})
LONG = "the old keeper climbed the tower every evening and lit the lamp before the ships came in from the west"
NEARLY = LONG.replace("the west", "the east")


def table(texts: Sequence[str] | Sequence[Sequence[str]], *, test: bool = False, **columns: Sequence[Any]) -> Table:
    fields = [texts] if isinstance(texts[0], str) else list(texts)
    names = ["text", "other"][: len(fields)]
    own: dict[str, Any] = {"id": [f"{'t' if test else 'r'}{n}" for n in range(len(fields[0]))]}
    own |= dict(zip(names, fields, strict=True))
    if not test:
        own["target"] = [str(n * 0.37) for n in range(len(fields[0]))]
    frame = pd.DataFrame({**own, **columns}, dtype=object)
    there = Competition.model_validate({"name": "c", "train": "train.csv", "text": names if len(names) > 1 else "text"})
    return table_of(frame, there, [] if test else [TASK])


CLEAN = ["one text", "two texts here", LONG, "four and another text that is long enough to be compared with others"]
FOLD = np.array([0, 1, 0, 1])


def lineage(texts: Sequence[str], fold: int | None = None) -> Lineage:
    return Lineage("runs/p/backbone", {"fold": fold}, np.sort(text_marks((list(texts),))))


def planted(rule: str) -> Evidence:
    if rule == "copies":
        return Evidence(table([*CLEAN[:3], " ONE  text"]), fold=FOLD)
    if rule == "near_copies":
        return Evidence(table([*CLEAN[:3], NEARLY]), fold=FOLD)
    if rule == "test_copies":
        return Evidence(table(CLEAN), table(["new", "Two texts  HERE"], test=True), FOLD)
    if rule == "near_test_copies":
        return Evidence(table(CLEAN), table(["new", NEARLY], test=True), FOLD)
    if rule == "same_ids":
        return Evidence(table(CLEAN), table(["new", "newer"], test=True, id=["x", "r2"]), FOLD)
    if rule == "split_groups":
        return Evidence(table(CLEAN, author=["a", "a", "b", "c"]), fold=FOLD, group="author")
    if rule == "too_good":
        truth = np.arange(4.0)[:, None]
        runs = OutOfFold("good", "regression", truth, truth[::-1]), OutOfFold("leaky", "regression", truth, 2 * truth)
        return Evidence(table(CLEAN), fold=FOLD, runs=runs)
    if rule == "seen_test":
        return Evidence(table(CLEAN), table(["new", "newer"], test=True), FOLD, lineage=lineage(["Newer ", "x"]))
    if rule == "seen_held_out":
        return Evidence(table(CLEAN), fold=FOLD, lineage=lineage([CLEAN[1], "x"]))
    assert rule == "target_in_text"
    return Evidence(table([CLEAN, ["low", "high", "low", "high"]], target=["0", "1", "0", "1"]), fold=FOLD)


COUNTS = {"copies": 2, "near_copies": 2, "target_in_text": 4}


@pytest.mark.parametrize("rule", LEAKS)
def test_a_planted_leak_is_found_by_its_rule_alone(rule: str, tmp_path: Path) -> None:
    (leak,) = lint(planted(rule), cache=tmp_path)
    assert (leak.rule, leak.count) == (rule, COUNTS.get(rule, 1))
    kind = "note: " if rule.startswith("seen_") else "leak: "
    assert str(leak).startswith(kind) and leak.fix in str(leak)
    assert leak.line == (str(leak) if leak.note else f"warning: {leak}")
    assert lint(planted(rule), cache=tmp_path) == [leak], "the same from the cache"
    shown = leak_table([leak], planted(rule))
    assert leak.what in shown and f"-> {leak.fix}" in shown


def test_clean_tables_have_none() -> None:
    evidence = Evidence(table(CLEAN, author=["a", "b", "a", "b"]), table(["new", "newer"], test=True), FOLD, "author")
    assert lint(evidence, cache=None) == []
    shown = leak_table([], evidence)
    without = "seen_test", "seen_held_out", "too_good"
    assert shown.count("      0  ") == len(LEAKS) - len(without), shown
    assert [line.split()[0] for line in shown.split("\n") if "      -  " in line] == list(without)
    assert shown.endswith("better than they can be: no --run")
    alone = leak_table([], Evidence(evidence.train))
    assert alone.count("      -  ") == 7 and "no test table" in alone and "a group in two folds: no folds yet" in alone
    assert lint(Evidence(table(["same", "same"], target=["1", "1"]), fold=np.array([0, 0])), cache=None) == []


def test_words_of_the_findings() -> None:
    copies = lint(planted("copies"), cache=None)[0]
    assert "2 training rows share their text with another (1 texts, e.g. ids 'r0', 'r3')" in copies.what
    assert "folds.group" in copies.fix
    there = lint(planted("test_copies"), cache=None)[0]
    assert "1 test rows have the text of a training row (test 't1' = train 'r1')" in there.what
    assert "1 ids are in both train and test (e.g. 'r2')" in lint(planted("same_ids"), cache=None)[0].what


def test_folds_whose_held_out_texts_the_backbone_has_read() -> None:
    def found(texts: Sequence[str], fold: int | None = None) -> list[Leak]:
        return lint(Evidence(table(CLEAN), fold=FOLD, lineage=lineage(texts, fold)), cache=None)

    (every,) = found(CLEAN)
    assert (every.count, every.note) == (4, True) and "but for" not in every.what
    (one,) = found([CLEAN[1], CLEAN[3]], fold=0)
    assert one.count == 2 and "but for those of fold 0" in one.what
    # made for fold 0; a copy of one of its rows among the others does not count against it
    (copied,) = found([CLEAN[0], CLEAN[1], CLEAN[3]], fold=0)
    assert copied.count == 2 and "but for those of fold 0" in copied.what
    assert found(["none of them"]) == []


def test_copies_in_one_fold_leak_nothing_and_unsplit_ones_may() -> None:
    texts = table(["same", "a", "same", NEARLY, "b", LONG])
    assert lint(Evidence(texts, fold=np.array([0, 1, 0, 1, 0, 1])), cache=None) == []
    found = {leak.rule for leak in lint(Evidence(texts), cache=None)}
    assert found == {"copies", "near_copies"}
    # rows that are never validated (-1) are trained on
    assert lint(Evidence(texts, fold=np.array([0, 1, -1, 1, 0, 1])), cache=None)[0].rule == "copies"


def test_pairs_are_compared_whole() -> None:
    assert lint(Evidence(table([["x", "x", "y"], ["p", "q", "p"]])), cache=None) == []


def test_nearly_the_same_is_the_jaccard_index_of_runs_of_words() -> None:
    """Against sets, over texts with more and more words changed, across the border of several blocks of rows."""
    draw = np.random.default_rng(0)
    words = [f"w{n}" for n in range(4000)]
    base = [list(draw.choice(words, size=60)) for _ in range(300)]
    changed = [list(text) for text in base]
    for number, text in enumerate(changed):
        for place in draw.integers(0, 60, size=1 + number % 3):
            text[place] = "new"
    texts = [" ".join(text) for text in [*base, *changed]]

    def runs(text: str) -> set[tuple[str, ...]]:
        own = text.split()
        return {tuple(own[start : start + WORDS]) for start in range(len(own) - WORDS + 1)}

    alike = [len(runs(a) & runs(b)) / len(runs(a) | runs(b)) for a, b in zip(texts[:300], texts[300:], strict=True)]
    expected = sum(2 for value in alike if value >= NEAR)
    assert 0 < expected < 600
    (leak,) = lint(Evidence(table(texts)), cache=None)
    assert (leak.rule, leak.count) == ("near_copies", expected)


def test_rows_alike_those_of_another_table_or_earlier_ones() -> None:
    others = table(["new", " two TEXTS here", NEARLY, "short text"], test=True)
    equal, near = alike(others, table(CLEAN))
    assert equal.tolist() == [False, True, False, False] and near.tolist() == [False, False, True, False]
    own = table(["one", LONG, "One", NEARLY, LONG])
    equal, near = alike(own, own)
    assert equal.tolist() == [False, False, True, False, True] and near.tolist() == [False, False, False, True, False]


def test_a_text_that_is_the_target_itself() -> None:
    numbers = [f"{n * 0.37:g}" for n in range(60)]
    found = lint(Evidence(table([[f"text {n} of many words" for n in range(60)], numbers], target=numbers)), cache=None)
    assert [leak.rule for leak in found] == ["target_in_text"]
    same = table([CLEAN, ["low", "high", "low", "high"]], target=["1", "1", "1", "1"])
    assert lint(Evidence(same, fold=FOLD), cache=None) == [], "one target for all tells nothing"


def test_too_good_to_be_true() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=(200, 1))

    def found(kind: str, targets: np.ndarray, preds: np.ndarray) -> str:
        return str(better_than_can_be([OutOfFold("a", kind, targets, preds)]))

    assert found("regression", truth, truth + 0.5 * draw.normal(size=(200, 1))) == "None"
    assert "than they can be: a (pearson 0.99" in found("regression", truth, truth + 0.01 * draw.normal(size=(200, 1)))
    labels = (truth > 0).astype(float)
    assert "a (roc_auc 1.00000, above 0.9999); look for the target" in found("binary", labels, 0.5 + labels / 4)
    assert found("binary", labels * 0, labels) == "None"
    shares = 1 / (1 + np.exp(-truth))
    assert "a (pearson 0.99" in found("binary", shares, np.clip(shares + 0.001 * draw.normal(size=(200, 1)), 0, 1))
    assert found("binary", shares, np.clip(shares + 0.1 * draw.normal(size=(200, 1)), 0, 1)) == "None"


def test_a_blend_and_lint_doubt_a_run_that_is_too_good(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> None:
    data = tiny_competition().config(tiny_model_folder("bert"))
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    config = config_file.load("tiny.yaml")
    for name in ("honest", "leaky"):
        run_classical(config, name, features=["tfidf"], estimator="ridge", options={"alpha": 1}, say=str)
    rows = pd.read_parquet("runs/leaky/oof.parquet")
    rows["pred_main_target"] = rows["target_main_target"] * 2 + 1
    rows.to_parquet("runs/leaky/oof.parquet")
    runs = ["--run", "runs/honest", "--run", "runs/leaky"]
    said = CliRunner().invoke(app, ["blend", *runs]).output
    assert "warning: leak: out-of-fold predictions are better than they can be: leaky (pearson 1.00000" in said
    assert "honest (" not in said
    table = CliRunner().invoke(app, ["lint", "--config", "tiny.yaml", *runs]).output
    assert "too_good               1  out-of-fold rows better than they can be" in table
    Path("tiny-regression/train.csv").unlink()
    said = CliRunner().invoke(app, ["blend", *runs]).output
    assert "warning: leaks are not looked for in the tables: " in said and "be: leaky (pearson" in said


def test_the_commands_and_a_run_say_it(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> None:
    competition = tiny_competition()
    frame = pd.read_csv(competition.train, dtype=str)
    frame.loc[[3, 7, 11, 15], "text"] = frame.loc[0, "text"]
    frame.to_csv(competition.train, index=False)
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(competition.config(tiny_model_folder("bert"))))
    before = CliRunner().invoke(app, ["lint", "--config", "tiny.yaml"]).output
    assert "60 training rows, 20 test rows, folds: none yet (comp folds)" in before
    assert "-> drop them, or give them one value of a folds.group" in before
    assert not Path("folds").exists(), "looking writes no folds"
    folds = CliRunner().invoke(app, ["folds", "--config", "tiny.yaml"]).output
    assert "warning: leak: 5 training rows share their text with another" in folds
    assert folds.endswith("\nnext: comp train --config tiny.yaml --debug\n")
    said: list[str] = []
    crossval.run(config_file.load("tiny.yaml"), "tiny", say=said.append)
    assert any(line.startswith("warning: leak: 5 training rows share") for line in said)
    blended = CliRunner().invoke(app, ["blend", "--run", "runs/tiny"]).output
    assert "warning: leak: 5 training rows share" in blended


def test_real_tables() -> None:
    if not (CLEAR / "train.csv").exists():
        pytest.skip("the CLEAR tables are not beside this checkout")
    there = Competition.model_validate({"name": "c", "train": str(CLEAR / "train.csv"), "text": "excerpt"})
    found = lint(Evidence(read_train(there, [TASK]), read_test(CLEAR / "test.csv", there)), cache=None)
    assert all(isinstance(leak, Leak) for leak in found)
    assert "same_ids" not in {leak.rule for leak in found}
