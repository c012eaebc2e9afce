"""Splitters, the fold file and its faults, the audit."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comp.config import Competition, Folds, Task
from comp.data.folds import (
    audit,
    get_or_make_folds,
    make_folds,
    read_folds,
    train_rows,
    valid_rows,
    write_folds,
)
from comp.data.splitters import SETTINGS, SPLITTERS, bin_values, merge_rare, time_blocks
from comp.data.tables import Table, read_train, table_of

CLEAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "clear"
COMPETITION = Competition(name="c", train="train.csv")
NUM_ROWS = 60


def task(kind: str = "regression", *targets: str) -> Task:
    return Task.model_validate({"name": "t", "kind": kind, "targets": list(targets or ("target",))})


def table(chosen: Task | None = None, **columns: Sequence[Any]) -> Table:
    """NUM_ROWS rows (or as many as the given columns have) with a target, a group, a time and a fold column."""
    num_rows = len(next(iter(columns.values()))) if columns else NUM_ROWS
    rows = np.arange(num_rows)
    usual: dict[str, Any] = {
        "id": [f"r{row}" for row in rows],
        "text": [f"text {row}" for row in rows],
        "target": rows % 7,
        "group": [f"g{row // 4}" for row in rows],
        "when": [f"2021-01-{1 + row % 28:02d}" for row in rows[::-1]],
        "own": rows % 3,
    }
    return table_of(pd.DataFrame({**usual, **columns}), COMPETITION, [chosen or task()])


def folds(splitter: str = "stratified", **changes: Any) -> Folds:
    needed: dict[str, Any] = {"num_folds": 3}
    if splitter in ("group", "stratified_group"):
        needed["group"] = "group"
    if splitter in ("time", "column"):
        needed["column"] = "when" if splitter == "time" else "own"
    return Folds.model_validate({"splitter": splitter, **needed, **changes})


def fault_of(rows: Table, settings: Folds, chosen: Task | None = None) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
        make_folds(rows, [chosen or task()], settings)
    return str(caught.value)


# --- every splitter --------------------------------------------------------------------------------------------------


def test_the_config_knows_the_splitters() -> None:
    assert list(SPLITTERS) == list(SETTINGS) == list(Folds.model_fields["splitter"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_each_row_is_validated_once(splitter: str) -> None:
    rows, settings = table(), folds(splitter)
    fold = make_folds(rows, [task()], settings)
    held_out = np.concatenate([valid_rows(fold, k) for k in range(3)])
    never = 0 if splitter != "time" else (fold == -1).sum()
    assert len(set(held_out.tolist())) == len(held_out) == NUM_ROWS - never
    for k in range(3):
        assert len(valid_rows(fold, k))
        assert not set(train_rows(fold, k, splitter)) & set(valid_rows(fold, k))
        if splitter != "time":
            assert len(train_rows(fold, k, splitter)) + len(valid_rows(fold, k)) == NUM_ROWS


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_the_seed_decides(splitter: str) -> None:
    rows = table()
    first = make_folds(rows, [task()], folds(splitter))
    assert np.array_equal(first, make_folds(rows, [task()], folds(splitter)))
    other = make_folds(rows, [task()], folds(splitter, seed=7))
    assert np.array_equal(first, other) == (splitter in ("time", "column"))


@pytest.mark.parametrize("kind", ["binary", "multiclass", "ordinal", "regression"])
def test_stratified_balances_classes(kind: str) -> None:
    target = np.repeat([0, 1], [15, 45])
    fold = make_folds(table(task(kind), target=target), [task(kind)], folds())
    for k in range(3):
        assert np.bincount(target[fold == k]).tolist() == [5, 15]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=12, max_size=80), st.integers(2, 6), st.sampled_from(["multiclass", "ordinal"])
)
def test_stratified_never_leaves_a_class_uneven(labels: list[int], num_folds: int, kind: str) -> None:
    labels = [*labels, 0, 1]
    fold = make_folds(table(task(kind), target=labels), [task(kind)], folds(num_folds=num_folds))
    sizes = np.bincount(fold, minlength=num_folds)
    assert sizes.max() - sizes.min() <= 1
    for label in set(labels):
        held = np.bincount(fold[np.asarray(labels) == label], minlength=num_folds)
        # a class that is not too rare to be its own stratum; a merged one may land anywhere
        if held.sum() >= num_folds and min(labels.count(other) for other in set(labels)) >= num_folds:
            assert held.max() - held.min() <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=20, max_size=80).filter(lambda names: len(set(names)) >= 4),
    st.integers(2, 4),
    st.integers(0, 3),
    st.sampled_from(["group", "stratified_group"]),
)
def test_groups_never_cross(names: list[int], num_folds: int, seed: int, splitter: str) -> None:
    rows = table(group=names)
    settings = folds(splitter, num_folds=num_folds, seed=seed)
    fold = SPLITTERS[splitter].make(rows, task(), settings)
    if len(set(fold)) < num_folds:  # stratifying few groups can leave a fold empty: refused, not returned
        assert splitter == "stratified_group"
        assert "has no rows; lower folds.num_folds" in fault_of(rows, settings)
        return
    assert np.array_equal(fold, make_folds(rows, [task()], settings))
    for name in set(names):
        assert len(set(fold[np.asarray(names) == name])) == 1


def test_group_balances_rows_not_groups() -> None:
    names = np.repeat(np.arange(9), [20, 10, 10, 4, 4, 4, 4, 2, 2])
    fold = make_folds(table(group=names), [task()], folds("group"))
    assert np.bincount(fold).tolist() == [20, 20, 20]


def test_stratified_group_is_more_even_than_group() -> None:
    generator = np.random.default_rng(0)
    names = generator.permutation(np.arange(240) // 6)
    target = (names % 2 + generator.integers(0, 2, 240) > 1).astype(int)
    rows, chosen = table(task("binary"), target=target, group=names), task("binary")

    def spread(splitter: str) -> float:
        fold = make_folds(rows, [chosen], folds(splitter, num_folds=5))
        return float(np.std([target[fold == k].mean() for k in range(5)]))

    assert spread("stratified_group") < spread("group")


def test_multilabel_stratified_balances_every_label() -> None:
    generator = np.random.default_rng(1)
    labels = {
        name: (generator.random(300) < share).astype(int) for name, share in (("p", 0.1), ("q", 0.5), ("r", 0.03))
    }
    chosen = task("multilabel", *labels)
    fold = make_folds(table(chosen, **labels), [chosen], folds("multilabel_stratified"))
    for values in labels.values():
        held = [values[fold == k].sum() for k in range(3)]
        assert max(held) - min(held) <= 1


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass", "ordinal"])
def test_multilabel_stratified_takes_one_column_of_any_kind(kind: str) -> None:
    target = np.arange(90) % 2 if kind == "binary" else np.arange(90) % 5
    fold = make_folds(table(task(kind), target=target), [task(kind)], folds("multilabel_stratified"))
    means = [target[fold == k].mean() for k in range(3)]
    assert max(means) - min(means) < 0.3


def test_several_continuous_targets_are_balanced() -> None:
    generator = np.random.default_rng(2)
    values = {"x": generator.normal(size=200), "y": generator.normal(50, 10, size=200)}
    chosen = task("regression", "x", "y")
    rows = table(chosen, **values)

    z = (rows.targets["t"] - rows.targets["t"].mean(0)) / rows.targets["t"].std(0)

    def spread(splitter: str) -> float:
        made = [make_folds(rows, [chosen], folds(splitter, seed=seed)) for seed in range(8)]
        return float(np.mean([np.std([z[fold == k].mean() for k in range(3)]) for fold in made]))

    assert spread("stratified") < spread("kfold")
    assert spread("multilabel_stratified") < spread("kfold")


def test_iterative_stratification_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("iterstrat"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install iterative-stratification" in fault_of(table(), folds("multilabel_stratified"))


# --- bins and strata -------------------------------------------------------------------------------------------------


def test_bins_are_those_of_pandas_cut() -> None:
    values = np.random.default_rng(0).normal(size=500).astype(np.float32)
    for bins, number in (("auto", 9), (4, 4)):
        expected = pd.cut(values.astype(np.float64), number, labels=False)
        assert np.array_equal(bin_values(values, bins), expected)


def test_an_outlier_does_not_undo_the_bins() -> None:
    values = np.append(np.linspace(0, 1, 99), 1e6).astype(np.float32)
    assert np.bincount(bin_values(values, 4)).tolist() == [25, 25, 25, 25]
    assert set(bin_values(np.ones(10, dtype=np.float32), "auto")) == {0}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(2, 7), st.booleans())
def test_merged_strata_are_large_enough(labels: list[int], least: int, ordered: bool) -> None:
    stratum = merge_rare(np.asarray(labels), least=least, ordered=ordered)
    counts = np.bincount(stratum)
    assert counts.min() >= least or len(counts) == 1
    for label in set(labels):
        assert len(set(stratum[np.asarray(labels) == label])) == 1
    if ordered:
        assert (np.diff(stratum[np.argsort(labels, kind="stable")]) >= 0).all()


def test_common_labels_are_left_alone() -> None:
    assert len(set(merge_rare(np.repeat([0, 1, 2], 5), least=5, ordered=True))) == 3
    merged = merge_rare(np.repeat([0, 1, 2, 3], [1, 9, 9, 1]), least=2, ordered=False)
    assert merged[0] == merged[-1]
    assert len(set(merged)) == 3


# --- time and own columns --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=8, max_size=80).filter(lambda t: len(set(t)) >= 5), st.integers(2, 4))
def test_time_trains_on_earlier_rows_only(times: list[int], num_folds: int) -> None:
    when = np.asarray(times, dtype=np.float64)
    fold = time_blocks(when, num_folds=num_folds, column="when")
    assert set(fold) == set(range(-1, num_folds))
    for k in range(num_folds):
        assert when[train_rows(fold, k, "time")].max() < when[valid_rows(fold, k)].min()


def test_time_blocks_are_even() -> None:
    fold = time_blocks(np.arange(100.0)[::-1], num_folds=4, column="when")
    assert np.bincount(fold + 1).tolist() == [20] * 5
    assert fold[0] == 3


@pytest.mark.parametrize(
    "times",
    [
        ["2020-12-31", "2021-01-01", "2021-01-01T00:00:01", "2021-01-02T10:00:00Z"],
        ["9", "10", "11", "100"],
        [1.5, 2.5, 3.5, 4.5],
        pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-04"]),
    ],
)
def test_time_columns(times: Sequence[Any]) -> None:
    assert make_folds(table(when=times), [task()], folds("time")).tolist() == [-1, 0, 1, 2]


def test_time_faults() -> None:
    dates = ["2021-01-01", "soon", "2021-01-03", "05/01/2021"]
    message = fault_of(table(when=dates), folds("time"))
    assert "column 'when' is neither a number nor an ISO date" in message
    assert "in 2 rows (id 'r1', 'r3'): 'soon', '05/01/2021'" in message
    assert "in 1 row (id 'r2')" in fault_of(table(when=["1", "2", "", "4"]), folds("time"))
    assert "column 'when' has 2 different values; 3 folds need at least 4" in fault_of(
        table(when=[1, 1, 2, 2]), folds("time")
    )
    assert "no column 'wen' (folds.column); did you mean 'when'?" in fault_of(table(), folds("time", column="wen"))


def test_own_column_faults() -> None:
    assert make_folds(table(own=[2, 0, 1, 1]), [task()], folds("column")).tolist() == [2, 0, 1, 1]
    assert make_folds(table(own=["2", "0", "1"]), [task()], folds("column")).tolist() == [2, 0, 1]
    message = fault_of(table(own=[1, 2, 3, 1]), folds("column"))
    assert "fold numbers do not fit in 1 row (id 'r2'): '3'; allowed are 0 to 2: number folds from 0, or set" in message
    assert "'own' is not a whole number in 2 rows (id 'r1', 'r2'): 'x'" in fault_of(
        table(own=["0", "x", ""]), folds("column")
    )
    assert "fold '2' has no rows; lower folds.num_folds (3)" in fault_of(table(own=[0, 1, 0]), folds("column"))


def test_group_faults() -> None:
    assert "no column 'grup' (folds.group); did you mean 'group'?" in fault_of(table(), folds("group", group="grup"))
    message = fault_of(table(group=["a", "", "b", None]), folds("group"))
    assert "column 'group' is empty in 2 rows (id 'r1', 'r3'); every row needs a group" in message
    assert "has 2 groups, fewer than folds.num_folds 3" in fault_of(table(group=["a", "b"] * 5), folds("group"))
    crossing = fault_of(table(), folds("kfold", group="group"))
    assert "groups of column 'group' cross folds ('g" in crossing
    assert "use splitter group or stratified_group" in crossing


def test_too_few_rows() -> None:
    assert "2 rows cannot fill folds.num_folds 3" in fault_of(table(target=[1, 2]), folds())


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_written_folds_are_read_back(tmp_path: Path, splitter: str) -> None:
    rows, settings, path = table(), folds(splitter), tmp_path / "folds" / "c.v1.csv"
    made = get_or_make_folds(path, rows, [task()], settings)
    before = path.read_bytes()
    again = get_or_make_folds(path, rows, [task()], settings)
    assert path.read_bytes() == before
    assert np.array_equal(made.fold, make_folds(rows, [task()], settings))
    assert np.array_equal(made.fold, again.fold)
    assert (made.fingerprint, made.num_folds, made.splitter) == (again.fingerprint, 3, splitter)
    assert path.read_text().startswith(f"id,fold\nr0,{made.fold[0]}\n")
    sidecar = json.loads((tmp_path / "folds" / "c.v1.json").read_text())
    assert sidecar["rows"] == NUM_ROWS
    assert sidecar["folds"] == made.fingerprint
    assert sidecar["data"] == rows.label_fingerprint()
    assert set(sidecar) == {"splitter", "num_folds", *SETTINGS[splitter], "rows", "data", "folds", "comp"}
    assert sorted(p.name for p in path.parent.iterdir()) == ["c.v1.csv", "c.v1.json"]


def test_folds_are_aligned_by_id(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("fold,id,note\n2,c,x\n0,a,y\n1,b,z\n")
    rows = table(id=["b", "c", "a"])
    assert read_folds(path, rows, folds("kfold")).fold.tolist() == [1, 2, 0]


def test_a_reordered_training_table_keeps_its_folds(tmp_path: Path) -> None:
    path, target = tmp_path / "c.csv", np.arange(NUM_ROWS) % 7
    made = get_or_make_folds(path, table(), [task()], folds())
    turned = table(id=[f"r{row}" for row in range(NUM_ROWS)][::-1], target=target[::-1])
    read = read_folds(path, turned, folds())
    assert np.array_equal(read.fold, made.fold[::-1])
    assert read.fingerprint == made.fingerprint


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "c.csv"
    get_or_make_folds(path, table(), [task()], folds())
    return path


def misfit(path: Path, rows: Table, settings: Folds) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_folds(path, rows, settings)
    return str(caught.value)


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    message = misfit(tmp_path / "c.csv", table(), folds())
    assert message == f"{tmp_path / 'c.csv'}: no such fold file; make it with `comp folds --config FILE`"


def test_other_settings_are_refused(written: Path) -> None:
    assert "folds.seed: the file was made with 42, the config says 1" in misfit(written, table(), folds(seed=1))
    assert "folds.bins: the file was made with auto, the config says 4" in misfit(written, table(), folds(bins=4))
    message = misfit(written, table(), folds(num_folds=4))
    assert "folds.num_folds: the file was made with 3, the config says 4" in message
    assert "`comp folds --config FILE --overwrite`, or name another file in folds.name" in message
    message = misfit(written, table(), folds("kfold"))
    assert "folds.splitter: the file was made with stratified, the config says kfold" in message


def test_settings_that_a_splitter_does_not_use_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    made = get_or_make_folds(path, table(), [task()], folds("time"))
    assert np.array_equal(read_folds(path, table(), folds("time", seed=7, name="x")).fold, made.fold)


def test_other_data_is_refused(written: Path) -> None:
    other = table(target=np.arange(NUM_ROWS) % 5)
    assert "ids or targets of the first task are not those the file was made for" in misfit(written, other, folds())
    more = table(target=np.arange(NUM_ROWS + 2) % 7)
    message = misfit(written, more, folds())
    assert "ids of the training table are missing in 2 rows (id 'r60', 'r61'); each row needs a fold" in message
    fewer = table(target=np.arange(NUM_ROWS - 1) % 7)
    assert "ids are not in the training table in 1 row (id 'r59')" in misfit(written, fewer, folds())


def test_an_edited_file_is_refused_until_its_sidecar_goes(written: Path) -> None:
    first = written.read_text().splitlines()[1]
    other = f"r0,{(int(first[-1]) + 1) % 3}"
    written.write_text(written.read_text().replace(first + "\n", other + "\n", 1))
    message = misfit(written, table(), folds())
    assert "the CSV was changed after it was made; delete the .json beside it if that was on purpose" in message
    written.with_suffix(".json").unlink()
    assert read_folds(written, table(), folds()).fold[0] == int(other[-1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,fold\na,0\na,1\nb,1\nc,2\n", "an id stands there again in 1 row (id 'a'); each id has one fold"),
        ("id,fold\na,0\nb,1\nc,x\n", "column 'fold' is not a whole number in 1 row (id 'c'): 'x'"),
        ("id,fold\na,1\nb,2\nc,3\n", "fold numbers do not fit in 1 row (id 'c'): '3'; allowed are 0 to 2"),
        ("id,fold\na,-1\nb,1\nc,2\n", "fold numbers do not fit in 1 row (id 'a'): '-1'; allowed are 0 to 2"),
        ("id,fold\na,0\nb,1\nc,1\n", "fold '2' has no rows; lower folds.num_folds (3)"),
        ("id,fold_number\na,0\nb,1\nc,1\n", "no column 'fold' (a fold file has columns id and fold)"),
    ],
)
def test_hand_made_files_are_checked(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(content)
    message = misfit(path, table(id=["a", "b", "c"]), folds("kfold"))
    assert message.startswith(str(path))
    assert words in message


def test_hand_made_files_keep_groups_times_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("id,fold\na,0\nb,1\nc,2\nd,0\n")
    rows = table(id=["a", "b", "c", "d"], group=["g", "g", "h", "i"], when=[1, 2, 3, 4], own=[0, 1, 2, 1])
    assert "1 groups of column 'group' cross folds ('g')" in misfit(path, rows, folds("group"))
    assert "folds are not in the order of column 'when'" in misfit(path, rows, folds("time"))
    assert "folds differ from column 'own' in 1 row (id 'd'); bring the two in line" in misfit(
        path, rows, folds("column")
    )
    assert read_folds(path, rows, folds("kfold")).fold.tolist() == [0, 1, 2, 0]


def test_a_file_killed_between_its_two_writes_has_no_old_sidecar(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("comp.data.folds.write_json", killed)
    settings = folds(seed=5)
    fold = make_folds(table(), [task()], settings)
    with pytest.raises(KeyboardInterrupt):
        write_folds(written, table(), fold, settings)
    assert not written.with_suffix(".json").exists()
    assert np.array_equal(read_folds(written, table(), settings).fold, fold)


# --- audit -----------------------------------------------------------------------------------------------------------


def test_audit_of_numbers() -> None:
    rows = table(target=[1, 2, 3, 4, 5, 6])
    lines = audit(np.asarray([0, 0, 1, 1, 1, -1]), rows, task(), group="group")
    assert lines == [
        "fold -1: 1 rows, 1 groups, target mean 6 std 0 (trained on, never validated)",
        "fold 0: 2 rows, 1 groups, target mean 1.5 std 0.5",
        "fold 1: 3 rows, 2 groups, target mean 4 std 0.8165",
    ]


def test_audit_of_classes_warns_of_a_class_in_one_fold() -> None:
    chosen = task("multiclass")
    lines = audit(np.asarray([0, 0, 1, 1]), table(chosen, target=["a", "b", "a", "a"]), chosen)
    assert lines[0] == "fold 0: 2 rows, target=a 50.0%, target=b 50.0%"
    assert lines[1] == "fold 1: 2 rows, target=a 100.0%, target=b 0.0%"
    assert len(lines) == 3
    assert lines[2].startswith("warning: the only row of target=b is in fold 0: the model that is validated there")


@pytest.mark.parametrize("kind", ["binary", "ordinal"])
def test_audit_of_two_grades(kind: str) -> None:
    lines = audit(np.asarray([0, 0, 1, 1]), table(task(kind), target=[0, 1, 0, 0]), task(kind))
    assert "target=1 50.0%" in lines[0]
    assert "warning: the only row of target=1 is in fold 0" in lines[-1]


def test_audit_of_labels_and_soft_labels() -> None:
    chosen = task("multilabel", "p", "q")
    lines = audit(np.asarray([0, 0, 1, 1]), table(chosen, p=[1, 0, 1, 0], q=[0, 0, 1, 1]), chosen)
    assert lines[0] == "fold 0: 2 rows, p=1 50.0%, q=1 0.0%"
    assert "warning: all 2 rows of q=1 are in fold 1" in lines[-1]
    soft = audit(np.asarray([0, 1]), table(task("binary"), target=[0.2, 0.4]), task("binary"))
    assert soft == ["fold 0: 1 rows, target mean 0.2 std 0", "fold 1: 1 rows, target mean 0.4 std 0"]


def test_audit_shortens_many_classes() -> None:
    chosen = task("multiclass")
    lines = audit(np.arange(40) % 2, table(chosen, target=[f"c{row // 2:02d}" for row in range(40)]), chosen)
    assert lines[0].endswith("target=c11 5.0%, and 8 more")
    assert not any(line.startswith("warning") for line in lines)


def test_real_folds_are_even() -> None:
    if not (CLEAR / "train.csv").exists():
        pytest.skip("the CLEAR tables are not beside this checkout")
    rows = read_train(Competition(name="c", train=str(CLEAR / "train.csv"), text="excerpt"), [task()])
    fold = make_folds(rows, [task()], Folds())
    values = rows.targets["t"][:, 0]
    means = [values[fold == k].mean() for k in range(5)]
    assert max(means) - min(means) < 0.02
