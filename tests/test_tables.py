"""Every check on a user's file, by the words of its message; what a Table holds."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comp.config import Competition, Task
from comp.data.frames import cell_strings, parse_numbers, read_frame
from comp.data.tables import encode_targets, read_competition, read_test, read_train, table_of

REGRESSION = Task.model_validate({"name": "score", "kind": "regression", "targets": ["target"]})
CLEAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "clear"


def task(kind: str, *targets: str) -> Task:
    return Task.model_validate({"name": "t", "kind": kind, "targets": list(targets or ("target",))})


def competition(path: Path | str = "train.csv", **changes: Any) -> Competition:
    return Competition.model_validate({"name": "c", "train": str(path), **changes})


def frame(**columns: Sequence[Any]) -> pd.DataFrame:
    """A table of three good rows, columns replaced by `columns`."""
    good = {"id": ["a", "b", "c"], "text": ["one", "two", "three"], "target": ["0", "1", "0.5"]}
    return pd.DataFrame({**good, **columns}, dtype=object)


def fault_of(kind_or_task: str | Task, table: pd.DataFrame, **changes: Any) -> str:
    chosen = task(kind_or_task) if isinstance(kind_or_task, str) else kind_or_task
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
        table_of(table, competition(**changes), [chosen], source="train.csv")
    return str(caught.value)


def read_fault(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_frame(path)
    return str(caught.value)


def wrote(folder: Path, content: str | bytes, name: str = "train.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- what a Table holds ----------------------------------------------------------------------------------------------


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    path = wrote(tmp_path, '\ufeffid,text,target\r\n007,NA,1e-3\r\n8,"null, ""x""\nline",2\r\n')
    table = read_train(competition(path), [REGRESSION])
    assert table.ids.tolist() == ["007", "8"]
    assert table.texts == (["NA", 'null, "x"\nline'],)
    assert table.targets["score"].tolist() == [[np.float32(0.001)], [2.0]]
    assert table.targets["score"].dtype == np.float32
    assert table.classes == {}
    assert table.weights is None
    assert len(table) == 2


def test_parquet_and_frames_keep_their_types(tmp_path: Path) -> None:
    native = pd.DataFrame({"text": ["x", "y"], "target": [1, 0]}, index=pd.Index([30, 7], name="id"))
    path = tmp_path / "train.parquet"
    native.to_parquet(path)
    read = read_train(competition(path), [REGRESSION])
    given_frame = table_of(native, competition(), [REGRESSION])
    for table in (read, given_frame):
        assert table.ids.tolist() == ["30", "7"]
        assert table.targets["score"].tolist() == [[1.0], [0.0]]
    assert read.fingerprint() == given_frame.fingerprint()
    assert read_frame(path, "id")["id"].tolist() == [30, 7]


def test_float_ids_beside_a_null_are_whole_numbers() -> None:
    assert cell_strings(pd.Series([1.0, np.nan, 2.5])) == ["1", "", "2.5"]
    assert cell_strings(pd.Series([True, None], dtype=object)) == ["True", ""]


def test_test_table_ignores_targets_and_weights(tmp_path: Path) -> None:
    path = wrote(tmp_path, "id,text,target,w\na,x,,\nb,y,oops,-1\n", "test.csv")
    table = read_test(path, competition(weight="w"))
    assert table.targets == {}
    assert table.weights is None


def test_weights() -> None:
    table = table_of(frame(w=["0", "1", "2.5"]), competition(weight="w"), [REGRESSION])
    assert table.weights is not None
    assert table.weights.tolist() == [0.0, 1.0, 2.5]


def test_texts_of_several_columns_may_lack_one() -> None:
    both = table_of(frame(title=["", None, "t"]), competition(text=["title", "text"]), [REGRESSION])
    assert both.texts == (["", "", "t"], ["one", "two", "three"])


def test_multiclass_labels_are_sorted_by_number_or_text() -> None:
    table = table_of(frame(target=["10", "9", "2"]), competition(), [task("multiclass")])
    assert table.classes == {"t": ["2", "9", "10"]}
    assert table.targets["t"].tolist() == [[2.0], [1.0], [0.0]]
    assert table_of(frame(target=["b", "10", "a"]), competition(), [task("multiclass")]).classes["t"] == [
        "10",
        "a",
        "b",
    ]


def test_classes_of_the_training_table_are_kept() -> None:
    values, labels = encode_targets(frame(target=["b", "b", "b"]), task("multiclass"), ["a", "b"], "oof")
    assert labels == ["a", "b"]
    assert values.tolist() == [[1.0]] * 3


def test_ordinal_classes_are_all_grades() -> None:
    table = table_of(frame(target=["1", "4", "2.0"]), competition(), [task("ordinal")])
    assert table.classes == {"t": ["1", "2", "3", "4"]}
    assert table.targets["t"].tolist() == [[1.0], [4.0], [2.0]]


def test_two_tasks_and_soft_labels() -> None:
    tasks = [task("binary"), Task.model_validate({"name": "aux", "kind": "multilabel", "targets": ["p", "q"]})]
    table = table_of(frame(p=[1, 0, 1], q=[0.0, 0.25, 1.0]), competition(), tasks)
    assert list(table.targets) == ["t", "aux"]
    assert table.targets["t"][:, 0].tolist() == [0.0, 1.0, 0.5]
    assert table.targets["aux"].tolist() == [[1.0, 0.0], [0.0, 0.25], [1.0, 1.0]]


def test_fingerprints_see_what_they_should() -> None:
    def table(**columns: Sequence[Any]) -> Any:
        return table_of(frame(**columns), competition(), [REGRESSION])

    plain, text, target = table(), table(text=["one", "two", "3"]), table(target=["0", "1", "0.6"])
    turned = table(id=["c", "b", "a"], text=["three", "two", "one"], target=["0.5", "1", "0"])
    assert plain.fingerprint() == table().fingerprint()
    assert len({plain.fingerprint(), text.fingerprint(), target.fingerprint(), turned.fingerprint()}) == 4
    assert plain.label_fingerprint() == text.label_fingerprint() == turned.label_fingerprint()
    assert plain.label_fingerprint() != target.label_fingerprint()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=20).filter(str.strip),
        min_size=1,
        max_size=6,
    )
)
def test_any_text_survives_a_csv(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "text", "target"])
        writer.writerows([f"r{row}", text, row / 7] for row, text in enumerate(texts))
    table = read_train(competition(path), [REGRESSION])
    assert table.texts == (texts,)
    assert table.targets["score"][:, 0].tolist() == np.float32(np.arange(len(texts)) / 7).tolist()


def test_long_cells_do_not_change_the_process_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    read = read_frame(wrote(tmp_path, f"id,text\na,{'x' * 200_000}\n"))
    assert len(read["text"][0]) == 200_000
    assert csv.field_size_limit() == before


# --- files -----------------------------------------------------------------------------------------------------------


def test_missing_file_names_near_ones(tmp_path: Path) -> None:
    wrote(tmp_path, "id\n", "train.csv")
    message = read_fault(tmp_path / "trian.csv")
    assert "no such file; did you mean 'train.csv'?" in message
    assert "current directory" in message
    assert "nor is there a folder" in read_fault(tmp_path / "nowhere" / "train.csv")
    assert "this is a folder" in read_fault(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no table" in read_fault(empty / "train.csv")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    assert "not a .csv or .parquet file; unpack or convert" in read_fault(wrote(tmp_path, "x", "train.zip"))
    told = read_fault(wrote(tmp_path, "id\ttext\n1\tone\n", "train.tsv"))
    path = tmp_path / "train.tsv"
    assert f"make it one: pandas.read_csv('{path}', sep='\\t', dtype=str).to_csv('{path.with_suffix('.csv')}'" in told
    assert "not a readable parquet file" in read_fault(wrote(tmp_path, "x", "train.parquet"))


def test_wrong_encoding_names_the_byte(tmp_path: Path) -> None:
    message = read_fault(wrote(tmp_path, b"id,text\na,ok\nb,caf\xe9\n"))
    assert "not UTF-8: byte 0xe9 at offset 18 (line 3)" in message
    assert "encoding='cp1252'" in message
    assert "encoding='utf-16'" in read_fault(wrote(tmp_path, "id,text\na,b\n".encode("utf-16")))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file is empty; its first line must name the columns"),
        ("id,text\n", "the table has no rows, only columns 'id', 'text'"),
        ("id,text,id\na,b,c\n", "column name 'id' occurs more than once"),
        ('id,text\na,"open\nb,c\n', "look for an unclosed quote"),
        ("id,text\na,b\nc\nd\n", "2 of 3 rows do not have the header's 2 fields; the first ends in line 3 and has 1"),
        ("id,text\na,b,c\n", "1 of 1 rows do not have the header's 2 fields; the first ends in line 2 and has 3"),
    ],
)
def test_broken_csv(tmp_path: Path, content: str, words: str) -> None:
    path = wrote(tmp_path, content)
    message = read_fault(path)
    assert message.startswith(f"{path}: ")
    assert words in message


def test_read_frame_wants_its_id_column(tmp_path: Path) -> None:
    path = wrote(tmp_path, "rowid,text\na,b\n")
    words = r"no column 'row_id' \(the id\); did you mean 'rowid'\?; the columns are 'rowid', 'text'"
    with pytest.raises(ValueError, match=words):
        read_frame(path, "row_id")


# --- columns and cells -----------------------------------------------------------------------------------------------


def test_missing_columns_are_named_together() -> None:
    message = fault_of(REGRESSION, frame().rename(columns={"target": "traget", "text": "words"}), weight="w")
    assert message.startswith("train.csv: 3 faults\n")
    assert "no column 'target' (target of task 'score'); did you mean 'traget'?" in message
    assert "no column 'text' (competition.text)" in message
    assert "no column 'w' (competition.weight)" in message
    with pytest.raises(ValueError, match=r"oof: no column 'target' \(target of task 't'\)"):
        encode_targets(frame().drop(columns="target"), task("binary"), None, "oof")


def test_one_column_has_one_role() -> None:
    assert "column 'id' is both competition.id and competition.text" in fault_of(
        REGRESSION, frame(), text=["id", "text"]
    )
    assert "column 'text' is both competition.text and target" in fault_of(task("regression", "text"), frame())
    assert "column 'id' is both competition.id and target" in fault_of(task("regression", "id"), frame())
    twice = pd.concat([frame(), frame()[["text"]]], axis=1)
    assert "column name 'text' occurs more than once" in fault_of(REGRESSION, twice)


def test_empty_frame() -> None:
    assert "the table has no rows" in fault_of(REGRESSION, frame().iloc[:0])


def test_ids_are_there_and_unique() -> None:
    message = fault_of(REGRESSION, frame(id=["a", " ", "a"]))
    assert "id column 'id' is empty in 1 row (data row 2); every row needs an id" in message
    assert "id column 'id' repeats an earlier id in 1 row (data row 3): 'a'; ids must be unique" in message


def test_texts_are_there() -> None:
    message = fault_of(REGRESSION, frame(text=["one", " \n", None]))
    assert "column 'text' has no text (empty or missing) in 2 rows (id 'b', 'c'); fill it in or drop" in message
    assert "in any row; name another column" in fault_of(REGRESSION, frame(text=["", "", ""]))
    assert "text column 'text' holds int values (3, ...)" in fault_of(REGRESSION, frame(text=["a", 3, "b"]))


def test_a_test_row_without_text_only_warns() -> None:
    with pytest.warns(UserWarning, match=r"test.csv: column 'text' has no text .* in 1 row \(id 'b'\).*empty text"):
        table = table_of(frame(text=["one", "", "three"]), competition(), source="test.csv")
    assert table.texts == (["one", "", "three"],)
    with pytest.warns(UserWarning, match="in any row: all are predicted from an empty text; is it the right column?"):
        table_of(frame(text=["", "", ""]), competition())
    with pytest.raises(ValueError, match="in any row; name another column"):
        table_of(frame(text=["", "", ""]), competition(), [REGRESSION])


def test_a_test_table_without_rows_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    assert len(table_of(frame().iloc[:0], competition())) == 0
    (tmp_path / "test.csv").write_text("id,text\n")
    assert len(read_test(tmp_path / "test.csv", competition(), empty=True)) == 0
    with pytest.raises(ValueError, match="the table has no rows"):
        read_test(tmp_path / "test.csv", competition())


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("regression", ["1", "", None], "column 'target' is empty (NaN) in 2 rows (id 'b', 'c'); fill it in or drop"),
        ("regression", ["1", "x", "nan"], "is not a number in 2 rows (id 'b', 'c'): 'x', 'nan'; make it numeric"),
        ("regression", ["1", "inf", "1e39"], "is infinite or beyond float32 in 2 rows (id 'b', 'c')"),
        (
            "binary",
            ["0", "1", "2"],
            "is outside 0..1 in 1 row (id 'c'): '2.0'; kind binary allows 0, 1 and soft labels",
        ),
        ("binary", ["yes", "no", "no"], "'yes', 'no'; map it to 0 and 1, or use kind multiclass for labels"),
        ("ordinal", ["1", "2", "2.5"], "is not a whole number in 1 row (id 'c'): '2.5'; kind ordinal allows whole"),
        ("ordinal", ["1", "2", "good"], "'good'; use whole grades, or kind multiclass"),
        ("ordinal", ["3", "3", "3"], "has a single grade, 3; kind ordinal needs two"),
        ("ordinal", ["1", "2", "200000"], "has grades 1 to 200000, over 1000; use kind regression"),
        ("multiclass", ["a", "", "b"], "has no label in 1 row (id 'b'); fill it in or drop the row"),
        ("multiclass", ["a", "a", "a"], "has a single class, 'a'; kind multiclass needs two"),
    ],
)
def test_targets(kind: str, values: list[Any], words: str) -> None:
    assert words in fault_of(kind, frame(target=values))


def test_multilabel_columns_are_checked_one_by_one() -> None:
    message = fault_of(task("multilabel", "p", "q"), frame(p=["0", "-1", "1"], q=["1", "x", "0"]))
    assert "column 'p' is outside 0..1 in 1 row (id 'b'): '-1.0'; kind multilabel" in message
    assert "column 'q' is not a number in 1 row (id 'b'): 'x'" in message


def test_unknown_labels_are_counted() -> None:
    words = r"oof: column 'target' has 2 unknown labels: 'z' \(2 rows\), 'y' \(1 rows\); known are 'a', 'b': correct"
    with pytest.raises(ValueError, match=words):
        encode_targets(frame(target=["z", "y", "z"]), task("multiclass"), ["a", "b"], "oof")
    with pytest.raises(ValueError, match=r"1 unknown labels: '9' \(1 rows\); known are '1', '2'"):
        table_of(frame(target=["1", "2", "9"]), competition(), [task("ordinal")], classes={"t": ["1", "2"]})


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (["1", "-1", "1"], "column 'w' is negative in 1 row (id 'b'): '-1.0'; weights are >= 0"),
        (["1", "", "x"], "column 'w' is empty (NaN) in 1 row (id 'b')"),
        (["1", "", "x"], "column 'w' is not a number in 1 row (id 'c'): 'x'; weights are numbers >= 0"),
        (["0", "0", "0"], "column 'w' is 0 in every row"),
    ],
)
def test_weight_faults(weights: list[str], words: str) -> None:
    assert words in fault_of(REGRESSION, frame(w=weights), weight="w")


def test_all_faults_of_a_table_come_in_one_message() -> None:
    message = fault_of("binary", frame(id=["a", "a", "c"], text=["", "x", "y"], target=["3", "", "1"]))
    assert message.startswith("train.csv: 4 faults\n")
    assert message.count("\n  - ") == 4


def test_parse_numbers_tells_empty_from_wrong() -> None:
    values, missing, bad = parse_numbers(pd.Series([" 1.5 ", "", "x", "1e3", None], dtype=object))
    assert np.array_equal(values, [1.5, np.nan, np.nan, 1000.0, np.nan], equal_nan=True)
    assert missing.tolist() == [False, True, False, False, True]
    assert bad.tolist() == [False, False, True, False, False]
    nullable = parse_numbers(pd.Series([1, None], dtype="Int64"))
    assert nullable[1].tolist() == [False, True]
    assert parse_numbers(pd.Series([True, False]))[0].tolist() == [1.0, 0.0]


def test_a_class_that_only_test_has_is_refused(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("id,text,target\na,one,x\nb,two,y\n")
    test.write_text("id,text,target\nc,three,z\nd,two,\n")
    there = competition(train, test=str(test))
    with pytest.raises(ValueError, match=r"test.csv: column 'target' has 1 unknown labels: 'z' \(1 rows\)"):
        read_competition(there, [task("multiclass")])
    test.write_text("id,text,target\nc,three,x\nd,two,\n")
    table, other = read_competition(there, [task("multiclass")])
    assert (len(table), len(other or [])) == (2, 2)
    assert read_competition(competition(train), [task("multiclass")])[1] is None


def test_real_table() -> None:
    if not (CLEAR / "train.csv").exists():
        pytest.skip("the CLEAR tables are not beside this checkout")
    there = competition(CLEAR / "train.csv", text="excerpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = read_train(there, [REGRESSION]), read_test(CLEAR / "test.csv", there)
    assert (len(train), len(test)) == (2834, 1890)
    assert np.isfinite(train.targets["score"]).all()
