"""Tables, fold files and submissions that are refused, and odd ones that are read right.

Refused: status 2, one message that says what to do, nothing written. Each row is tried through the command line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comp.config import Competition, Task
from comp.data.frames import read_frame
from comp.data.tables import read_train

pytestmark = pytest.mark.bad_input

TRAIN = ["train", "--config", "tiny.yaml", "--run", "new"]
Change = Callable[[str], str | bytes]
Row = tuple[Change, *tuple[str, ...]]


def column(name: str, value: object, row: int = 3) -> Change:
    """Return what puts `value` into a cell."""

    def change(text: str) -> str:
        frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        frame.loc[row, name] = str(value)
        return frame.to_csv(index=False, quoting=csv.QUOTE_ALL)

    return change


def head(rows: int) -> Change:
    return lambda text: "".join(text.splitlines(keepends=True)[: rows + 1])


def whole_column(name: str, value: object) -> Change:
    def change(text: str) -> str:
        return pd.read_csv(io.StringIO(text), dtype=str).assign(**{name: str(value)}).to_csv(index=False)

    return change


def renamed(old: str, new: str) -> Change:
    return lambda text: text.replace(old, new, 1)


def repeated(text: str) -> str:
    return text + text.splitlines(keepends=True)[1]


TABLES: dict[str, Row] = {
    "latin-1": (lambda text: text.replace(" ", " é ", 1).encode("latin-1"), "not UTF-8: byte 0xe9", "encoding='cp1252'"),
    "UTF-16": (lambda text: text.encode("utf-16"), "not UTF-8", "encoding='utf-16'"),
    "UTF-16 without its mark": (lambda text: text.encode("utf-16-le"), "NUL character at offset 1 (line 1)", "UTF-16"),
    "a NUL inside": (renamed("t003", "t0\x003"), "NUL character", "(line 5)", "damaged"),
    "empty": (lambda text: "", "the file is empty; its first line must name the columns"),
    "white space": (lambda text: "\n\n", "the file is empty"),
    "no rows": (head(0), "the table has no rows, only columns 'id', 'text', 'target'"),
    "one row": (head(1), "data/train.csv: roc_auc is not defined", "1 targets hold a single class"),
    "one class": (whole_column("target", 1), "data/train.csv: roc_auc is not defined", "60 targets hold a single class"),
    "a header twice": (renamed("id,text,target", "id,text,text"), "'text' occurs more than once; rename one"),
    "no header": (lambda text: text.partition("\n")[2], "no column 'id' (competition.id)", "the columns are"),
    "a header with spaces": (renamed("id,text,target", "id, text, target"), "no column 'text'", "did you mean ' text'?"),
    "another id column": (renamed("id,", "ID,"), "no column 'id' (competition.id); did you mean 'ID'?"),
    "another target": (renamed("target", "label"), "no column 'target' (target of task 'main')", "'label'"),
    "semicolons": (lambda text: text.replace(",", ";"), "data/train.csv: its columns are separated by semicolons", "sep=';'"),
    "tabs": (lambda text: text.replace(",", "\t"), "separated by tabs, not by commas; make it one: pandas.read_csv("),
    "a row too long": (lambda text: text + "t999,one,two,0\n", "1 of 61 rows do not have the header's 3 fields"),
    "a row too short": (lambda text: text + "t999\n", "the first ends in line 62 and has 1", "comma or line break"),
    "an open quote": (lambda text: text + 't999,"never closed,0\n', "broken CSV, line", "unclosed quote"),
    "a quote amid a cell": (lambda text: text + 't999,"a"b,0\n', "broken CSV, line 62"),
    "an empty id": (column("id", ""), "id column 'id' is empty in 1 row (data row 4)", "every row needs an id"),
    "an id twice": (column("id", "t001"), "repeats an earlier id in 1 row (data row 4)", "ids must be unique"),
    "a row twice": (repeated, "repeats an earlier id", "drop the copies"),
    "an empty text": (column("text", " "), "has no text (empty or missing) in 1 row (id 't003')", "fill it in or drop"),
    "no text at all": (whole_column("text", ""), "has no text", "in any row; name another column"),
    "an empty target": (column("target", ""), "column 'target' is empty (NaN) in 1 row (id 't003')"),
    "a target that is NaN": (column("target", "nan"), "column 'target' is", "id 't003'"),
    "a target of words": (column("target", "yes"), "'target' is not a number in 1 row (id 't003'): 'yes'; map it to 0"),
    "a target with a comma": (column("target", "0,5"), "is not a number in 1 row (id 't003'): '0,5'"),
    "an infinite target": (column("target", "inf"), "is infinite or beyond float32 in 1 row"),
    "a target beyond float32": (column("target", "1e300"), "is infinite or beyond float32 in 1 row"),
    "a target outside": (column("target", "2"), "is outside 0..1 in 1 row", "soft labels between", "another kind"),
    "a soft target": (column("target", "0.5"), "roc_auc needs targets of 0 and 1, got 0.5; for soft labels"),
    "a target of 10 MB": (column("target", "x" * 10**7), "is not a number", "(10,000,000 letters)", "map it"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_training_tables(case: str, here: Path, refuses: Callable[..., str]) -> None:
    change, *words = TABLES[case]
    change_file(here / "data" / "train.csv", change)
    for file in (here / "folds").iterdir():
        file.unlink()
    err = refuses(TRAIN, words)
    assert len(err) < 1200, "a message, not a dump of the table"


def change_file(path: Path, change: Change) -> None:
    changed = change(path.read_text(encoding="utf-8"))
    path.write_bytes(changed.encode() if isinstance(changed, str) else changed)


OTHER_TABLES: dict[str, tuple[list[str], *tuple[str, ...]]] = {
    "no such table": ([*TRAIN, "--set", "competition.train=data/trian.csv"], "did you mean 'train.csv'?", "tables there"),
    "no such folder": ([*TRAIN, "--set", "competition.train=dta/train.csv"], "nor is there a folder dta"),
    "a folder": ([*TRAIN, "--set", "competition.train=data"], "this is a folder; name the .csv or .parquet file in it"),
    "another format": ([*TRAIN, "--set", "competition.train=tiny.yaml"], "not a .csv or .parquet file; unpack or"),
    "a name beyond the disk": ([*TRAIN, "--set", f"competition.train={'x' * 300}.csv"], "File name too long; look at the path"),
    "a text that is the id": ([*TRAIN, "--set", "competition.text=id"], "is both competition.id and competition.text"),
    "a target that is the text": ([*TRAIN, "--set", "tasks.0.targets=[text]"], "is both competition.text and"),
    "weights that are not there": ([*TRAIN, "--set", "competition.weight=w"], "no column 'w' (competition.weight)"),
    "weights of words": ([*TRAIN, "--set", "competition.weight=text"], "is both competition.text and competition.weight"),
    "groups that are not there": ([*TRAIN, "--set", "folds={splitter: group, group: g, name: g}"], "no column 'g'"),
    "times of words": ([*TRAIN, "--set", "folds={splitter: time, column: text, name: t}"], "column 'text'", "id 't000'"),
    "folds of words": ([*TRAIN, "--set", "folds={splitter: column, column: text, name: c}"], "column 'text'", "id 't000'"),
    "more folds than rows": ([*TRAIN, "--set", "folds={num_folds: 70, name: many}"], "60 rows cannot fill", "lower num_folds"),
    "a test table that is gone": ([*TRAIN, "--set", "competition.test=data/tst.csv"], "did you mean 'test.csv'?"),
    "a test table without text": ([*TRAIN, "--set", "competition.test=data/sample_submission.csv"], "no column 'text'"),
    "a test table to infer without text": (
        ["infer", "--run", "runs/tiny", "--test", "data/sample_submission.csv"], "no column 'text' (competition.text)",
    ),
    "a test table that is gone, to infer": (["infer", "--run", "runs/tiny", "--test", "x.csv"], "x.csv: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_TABLES)
def test_other_tables(case: str, refuses: Callable[..., str]) -> None:
    arguments, *words = OTHER_TABLES[case]
    refuses(arguments, words)


def test_damaged_parquet(here: Path, refuses: Callable[..., str]) -> None:
    pd.read_csv("data/train.csv").to_parquet("data/train.parquet")
    raw = Path("data/train.parquet").read_bytes()
    for damaged in (raw[:-20], b"PAR1", b"", raw[:40] + bytes(60) + raw[100:]):
        Path("data/train.parquet").write_bytes(damaged)
        refuses(
            [*TRAIN, "--set", "competition.train=data/train.parquet"], ["not a readable parquet file", "write it anew"]
        )


# --- odd, and read right ---------------------------------------------------------------------------------------------

ODD: dict[str, Change] = {
    "a byte-order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "CR alone": lambda text: text.replace("\n", "\r"),
    "no end of line at the end": lambda text: text.rstrip("\n"),
    "empty lines": lambda text: text.replace("\n", "\n\n"),
    "every cell in quotes": lambda text: column("target", text.splitlines()[4][-1])(text),
    "more columns": lambda text: "\n".join(f"{line},more" for line in text.splitlines()),
    "ids like floats": lambda text: text.replace("\nt", "\n1.0"),
    "ids like numbers": lambda text: text.replace("\nt", "\n00"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_tables_are_read_right(case: str, here: Path) -> None:
    competition = Competition(name="tiny", train="data/train.csv")
    tasks = [Task(name="main", kind="binary", targets=["target"])]
    before = read_train(competition, tasks)
    change_file(here / "data" / "train.csv", ODD[case])
    after = read_train(competition, tasks)
    assert after.texts == before.texts
    assert (after.targets["main"] == before.targets["main"]).all()
    prefix = {"ids like floats": "1.0", "ids like numbers": "00"}.get(case, "t")
    assert list(after.ids) == [f"{prefix}{name[1:]}" for name in before.ids]


@pytest.mark.parametrize(
    "cell", ["line one\nline two", 'say ""x""', "a,b", "x" * 10**7, " é \u2028 \U0001f600", "NA", "\\n"]
)
def test_odd_cells_are_read_right(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    pd.DataFrame({"id": ["1", "2"], "text": [cell, "plain"]}).to_csv(path, index=False)
    assert read_frame(path)["text"].tolist() == [cell, "plain"]


# --- fold files ------------------------------------------------------------------------------------------------------


def of_class(text: str) -> str:
    """Return folds with every 1 in fold 0: fold 1 has a single class."""
    truth = pd.read_csv("data/train.csv", dtype=str).set_index("id")["target"]
    frame = pd.read_csv(io.StringIO(text), dtype=str)
    frame["fold"] = [0 if truth[name] == "1" or place < 10 else 1 for place, name in enumerate(frame["id"])]
    return frame.to_csv(index=False)


FOLDS: dict[str, Row] = {
    "rows that are missing": (head(50), "ids of the training table are missing in 10 rows", "--overwrite"),
    "rows of another table": (lambda text: text + "x1,0\n", "not in the training table in 1 row (id 'x1')"),
    "a row twice": (repeated, "an id stands there again in 1 row", "each id has one fold"),
    "a fold that is not there": (column("fold", 7), "fold numbers do not fit in 1 row", "allowed are 0 to 1"),
    "a negative fold": (column("fold", -1), "fold numbers do not fit in 1 row", "allowed are 0 to 1"),
    "half a fold": (column("fold", 0.5), "is not a whole number in 1 row", "number folds from 0"),
    "a fold of words": (column("fold", "one"), "is not a whole number in 1 row", "'one'"),
    "no fold": (column("fold", ""), "is not a whole number in 1 row"),
    "an empty fold": (whole_column("fold", 0), "fold '1' has no rows; lower folds.num_folds"),
    "no fold column": (renamed("fold", "part"), "no column 'fold'", "a fold file has columns id and fold"),
    "no id column": (renamed("id", "key"), "no column 'id'", "a fold file has columns id and fold"),
    "a fold of one class": (of_class, "fold 1", "single class", "stratified"),
    "no rows": (head(0), "the table has no rows"),
    "empty": (lambda text: "", "the file is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS)
@pytest.mark.parametrize("command", ["train", "classical"])
def test_fold_files(command: str, case: str, here: Path, refuses: Callable[..., str]) -> None:
    change, *words = FOLDS[case]
    change_file(here / "folds" / "tiny-binary.csv", change)
    (here / "folds" / "tiny-binary.json").unlink()
    arguments = TRAIN if command == "train" else ["classical", "--config", "tiny.yaml", "--features", "tfidf"]
    refuses(arguments, words)


def sidecar(**changes: object) -> Callable[[], None]:
    def change() -> None:
        path = Path("folds/tiny-binary.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


SIDECARS: dict[str, tuple[Callable[[], object], *tuple[str, ...]]] = {
    "of other settings": (sidecar(num_folds=5), "folds.num_folds: the file was made with 5, the config says 2"),
    "of another seed": (sidecar(seed=9), "folds.seed: the file was made with 9, the config says 1"),
    "of other folds": (sidecar(folds="x"), "the CSV was changed after it was made; delete the .json"),
    "of other data": (sidecar(data="x"), "ids or targets of the first task are not those the file was made for"),
    "broken": (lambda: Path("folds/tiny-binary.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda: Path("folds/tiny-binary.json").write_text("[]"), "tiny-binary.json", "delete it"),
    "not text": (lambda: Path("folds/tiny-binary.json").write_bytes(b"\xff\xfe"), "tiny-binary.json", "delete it"),
}


@pytest.mark.parametrize("case", SIDECARS)
def test_sidecars_of_fold_files(case: str, refuses: Callable[..., str]) -> None:
    change, *words = SIDECARS[case]
    change()
    refuses(TRAIN, words)


# --- submissions -----------------------------------------------------------------------------------------------------

SCORE = ["score", "--submission", "submissions/tiny.csv", "--truth", "data/held_back/solution.csv", "--metric"]


def cut_ids(text: str) -> str:
    return text.replace("\nt0", "\n")


SUBMISSIONS: dict[str, Row] = {
    "rows that are missing": (head(15), "lacks 5 of the 20 ids", "'t075'"),
    "rows that are foreign": (lambda text: text + "x1,0.5\n", "has 1 ids that", "'x1'"),
    "a row twice": (repeated, "has 1 ids more than once: 't060'"),
    "an empty id": (column("id", ""), "1 rows have an empty 'id'"),
    "other ids": (cut_ids, "lacks 20 of the 20 ids"),
    "no number": (column("target", "high"), "values that are not finite numbers: 'high'"),
    "NaN": (column("target", "nan"), "values that are not finite numbers: 'nan'"),
    "an infinity": (column("target", "inf"), "values that are not finite numbers: 'inf'"),
    "no probability": (column("target", "1.5"), "needs probabilities between 0 and 1", "1.5"),
    "another column": (renamed("target", "label"), "'label' are not in the truth, which has 'target'"),
    "no column": (lambda text: "\n".join(line.split(",")[0] for line in text.splitlines()), "no column besides its ids"),
    "a row too short": (lambda text: text + "x1\n", "do not have the header's 2 fields"),
    "empty": (lambda text: "", "the file is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", SUBMISSIONS)
def test_submissions_to_score(case: str, here: Path, refuses: Callable[..., str]) -> None:
    change, *words = SUBMISSIONS[case]
    change_file(here / "submissions" / "tiny.csv", change)
    refuses([*SCORE, "log_loss"], words)


def test_metrics_that_do_not_fit_a_submission(refuses: Callable[..., str]) -> None:
    refuses([*SCORE, "rsme"], ["unknown metric 'rsme'; did you mean 'rmse'?", "Allowed: "])
    refuses(["score", "--submission", "gone.csv", "--truth", "x.csv", "--metric", "rmse"], ["gone.csv: no such file"])
    refuses([*SCORE, "rmse", "--id", "key"], ["no column 'key'"])


SAMPLES: dict[str, Row] = {
    "without some rows": (head(15), "has 5 ids that", "'t075'"),
    "with more rows": (lambda text: text + "x1,0.5\n", "lacks 1 of the 21 ids", "'x1'"),
    "with a row twice": (repeated, "1 ids more than once: 't060'"),
    "of another id column": (renamed("id,", "key,"), "no column 'id'"),
    "of other columns": (lambda text: text.replace("target", "a,b").replace("0.5", "0,0"), "are not the targets of task"),
    "with ids like floats": (lambda text: text.replace("\nt", "\n1.0"), "lacks 20 of the 20 ids", "'1.0060'"),
    "empty": (lambda text: "", "the file is empty"),
    "latin-1": (lambda text: text.replace("t060", "é").encode("latin-1"), "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLES)
def test_sample_submissions(case: str, here: Path, refuses: Callable[..., str]) -> None:
    change, *words = SAMPLES[case]
    change_file(here / "data" / "sample_submission.csv", change)
    refuses(["infer", "--run", "runs/tiny"], words)


# --- anything at all -------------------------------------------------------------------------------------------------

FUZZ = settings(derandomize=True, deadline=None, max_examples=200)
CELLS = st.text(alphabet='ab1.,"\n\r\t;\x00é', max_size=6) | st.sampled_from(
    ["id", "text", "target", "nan", "1e999", "0"]
)


@FUZZ
@given(
    st.binary(max_size=80)
    | st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=6).map("\n".join).map(str.encode)
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, suffix: str, raw: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    file.write_bytes((b"PAR1" + raw + b"PAR1") if suffix == ".parquet" else raw)
    with suppress(ValueError):
        frame = read_frame(file)
        assert len(frame) and frame.columns.is_unique


KINDS = st.sampled_from(["regression", "binary", "multiclass", "ordinal"])


@FUZZ
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=5), KINDS)
def test_any_table_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], kind: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz-train.csv"
    with open(file, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([("id", "text", "target"), *rows])
    with suppress(ValueError):
        table = read_train(
            Competition(name="fuzz", train=str(file)), [Task(name="main", kind=kind, targets=["target"])]
        )
        assert len(table) == len(rows) == len(set(table.ids))
        assert abs(table.targets["main"]).max() < float("inf")
