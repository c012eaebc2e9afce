"""FEATURES: texts as tables of numbers, for the estimators of classical.py. N rows, D features.

What is fitted (words and their IDF, mean and deviation of a column) is fitted to the training rows of a fold alone and
kept as JSON. Embeddings of a fold's fine-tuned model are that model's own for every row, so a held-out row is embedded
by the one model that did not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from comp import config_file
from comp.catalog import Row, pick
from comp.config import Config
from comp.data.folds import Folding
from comp.data.tables import Table
from comp.data.tokens import CACHE as TOKENS
from comp.data.tokens import encode
from comp.model.backbone import load_backbone, save_recipe
from comp.model.sources import check_tokenizer, load_tokenizer, quiet_transformers
from comp.model.text_model import VECTOR, build_model
from comp.progress import DELAY, open_progress
from comp.runs import RUNS, RunFolder, digest, kept, read_json, write_atomic
from comp.runtime import Runtime, open_runtime, release_memory
from comp.training.checkpoint import load_weights
from comp.training.crossval import open_tables, parse_folds
from comp.training.plan import rows_of
from comp.training.predict import predict

__all__ = [
    "FEATURES",
    "Source",
    "check_folds_of_runs",
    "check_runs",
    "keep_backbone",
    "parse_features",
    "run_path",
    "transform",
    "write_features",
]

Floats: TypeAlias = NDArray[np.float64]
State: TypeAlias = dict[str, Any]
CACHE = Path("runs/.cache/features")
MOST_WORDS = 50_000


@dataclass(frozen=True)
class Source:
    """Where features come from."""

    table: Table
    config: Config
    runtime: Runtime
    fold: int | str
    backbone: str
    """Folder or name that the tokenizer and the pretrained model are read from."""
    cache: Path | None = CACHE
    runs: Path = RUNS
    """Folder of the runs that run:NAME names."""
    files: list[Path] = field(default_factory=list)
    """Where features were kept, or found."""


# --- the makers: (source, argument, training rows or None, state or None) -> (matrix (N, D), state) -----------------


def tfidf(source: Source, argument: str, training: NDArray[np.int64] | None, state: State | None) -> Any:
    """Words and pairs of words by TF-IDF (scikit-learn, sublinear, in 2 texts or more, at most 50,000)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [" ".join(row) for row in zip(*source.table.texts, strict=True)]
    options: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True, "dtype": np.float64}
    if state is None:
        assert training is not None
        words = TfidfVectorizer(min_df=2, max_features=MOST_WORDS, **options).fit([texts[row] for row in training])
        vocabulary = {str(word): int(place) for word, place in words.vocabulary_.items()}
        state = {"vocabulary": vocabulary, "idf": words.idf_.tolist()}
    words = TfidfVectorizer(vocabulary=state["vocabulary"], **options)
    words.idf_ = np.asarray(state["idf"])
    return words.transform(texts).tocsr(), state


def statistics(source: Source, argument: str, training: NDArray[np.int64] | None, state: State | None) -> Any:
    """Lengths, variety of words, punctuation, and readability indices by textstat (extra `features`)."""
    textstat = _textstat()

    def compute() -> Floats:
        return np.concatenate([_statistics(textstat, texts) for texts in source.table.texts], axis=1)

    version = metadata.version("textstat")
    return _standardised(_cached(source, ["statistics", version], compute), training, state)


def embeddings(source: Source, argument: str, training: NDArray[np.int64] | None, state: State | None) -> Any:
    """Mean of the last layer of the config's own backbone, as it was pretrained."""
    config = source.config
    tokenizer = load_tokenizer(source.backbone)

    def compute() -> Floats:
        model = build_model(
            source.backbone, tokenizer, pretrained=True, pooler={"name": "mean"}, heads={},
            max_length=config.model.max_length, part=config.model.part, with_vectors=True,
            allow_pickle=config.model.allow_pickle,
        )  # fmt: skip
        return _embed(source, model.to(source.runtime.device), tokenizer)

    marks = [source.backbone, repr(config.model.cutting), config.model.part, source.runtime.precision]
    return _standardised(_cached(source, marks, compute), training, state)


def keep_backbone(config: Config, folder: Path) -> None:
    """Write the pretrained backbone and its tokenizer into a run, which then infers without the hub."""
    if (folder / "model.safetensors").exists():
        return
    tokenizer = load_tokenizer(config.model.backbone)
    backbone = load_backbone(
        config.model.backbone,
        tokenizer,
        dropout=None,
        with_pooler=False,
        part=config.model.part,
        allow_pickle=config.model.allow_pickle,
    )
    save_recipe(backbone, tokenizer, folder)
    with quiet_transformers():
        backbone.model.save_pretrained(folder)


def run_embeddings(source: Source, argument: str, training: NDArray[np.int64] | None, state: State | None) -> Any:
    """The vectors a run's own fold model gives its head: `run:NAME`."""
    check_runs([("run", argument)], [source.fold], source.runs)
    folder = RunFolder(run_path(source.runs, argument))
    own, config, manifest = folder.fold(source.fold), config_file.load(folder.config), read_json(folder.manifest)

    def compute() -> Floats:
        tokenizer = load_tokenizer(str(folder.backbone))
        check_tokenizer(tokenizer, folder.backbone, manifest.get("tokenizer"))
        model = build_model(
            folder.backbone, tokenizer, pretrained=False, pooler=config.model.pooler.model_dump(), heads={},
            max_length=config.model.max_length, num_fields=len(config.competition.text_columns), part=config.model.part,
            with_vectors=True, attention=config.model.attention,
        )  # fmt: skip
        load_weights(own.best if source.fold != "full" else own.last, model, without="heads.")
        return _embed(replace(source, config=config), model.to(source.runtime.device), tokenizer)

    marks = [str(folder.path.resolve()), str(source.fold), str(manifest["fingerprints"]), own.done.read_text()]
    return _standardised(_cached(source, marks, compute), training, state)


def run_path(runs: Path, argument: str) -> Path:
    """Return the folder of the run that run:NAME names: in `runs`, or a path of its own."""
    path = Path(argument)
    return path if path.exists() and not (runs / argument).exists() else runs / argument


def _embed(source: Source, model: Any, tokenizer: Any) -> Floats:
    table = source.table
    tokens = None if source.cache is None else TOKENS
    encoded = encode(tokenizer, table.texts, **source.config.model.cutting, cache=tokens)
    decoders = {VECTOR: lambda vector: vector.float()}
    progress = open_progress(len(table), f"vectors, fold {source.fold}", "row", delay=DELAY)
    try:
        found = predict(
            model, encoded, table.ids, decoders=decoders, runtime=source.runtime, on_batch=progress.advance
        ).values[VECTOR]
    finally:
        progress.close()
    del model
    release_memory()
    return found


def _cached(source: Source, marks: Sequence[str], compute: Callable[[], Floats]) -> Floats:
    path = None
    if source.cache is not None:
        path = source.cache / f"{digest([source.table.fingerprint(), *marks])}.npy"
        source.files.append(path)
    return kept(path, lambda: compute().astype(np.float32)).astype(np.float64)


def _standardised(values: Floats, training: NDArray[np.int64] | None, state: State | None) -> Any:
    """Return columns of mean 0 and deviation 1 over the training rows; a constant one becomes 0."""
    if state is None:
        assert training is not None
        mean, std = values[training].mean(axis=0), values[training].std(axis=0)
        state = {"mean": mean.tolist(), "std": np.where(std > 1e-12, std, 1.0).tolist()}
    return sparse.csr_matrix((values - np.asarray(state["mean"])) / np.asarray(state["std"])), state


def _textstat() -> Any:
    try:
        import textstat
    except ImportError:
        raise ValueError(
            "features 'statistics' need textstat; install the extra: pip install 'comp[features]'"
        ) from None
    return textstat


def _statistics(textstat: Any, texts: Sequence[str]) -> Floats:
    indices = (
        textstat.flesch_reading_ease,
        textstat.flesch_kincaid_grade,
        textstat.gunning_fog,
        textstat.automated_readability_index,
        textstat.coleman_liau_index,
        textstat.dale_chall_readability_score,
        textstat.words_per_sentence,
    )
    rows = []
    for text in texts:
        words = text.split()
        rows.append(
            [
                np.log1p(len(text)),
                np.log1p(len(words)),
                len({word.casefold() for word in words}) / max(1, len(words)),
                sum(map(len, words)) / max(1, len(words)),
                sum(not (sign.isalnum() or sign.isspace()) for sign in text) / max(1, len(text)),
                sum(sign.isupper() for sign in text) / max(1, len(text)),
                *((index(text) if words else 0.0) for index in indices),
            ]
        )
    return np.asarray(rows, np.float64)


FEATURES: dict[str, Row] = {
    "tfidf": Row(tfidf, "words and pairs of words by TF-IDF, fitted in the fold", "scikit-learn"),
    "statistics": Row(statistics, "lengths, variety, punctuation, readability indices", "textstat"),
    "embeddings": Row(embeddings, "mean of the pretrained backbone's last layer", "Reimers & Gurevych 2019"),
    "run": Row(run_embeddings, "run:NAME, the vectors of each fold's fine-tuned model", "Kaggle CommonLit 2021"),
}


def parse_features(names: Sequence[str]) -> list[tuple[str, str]]:
    """Read "tfidf", "run:large" as (name, argument). Raises ValueError that says what is allowed."""
    found = []
    for text in names:
        name, colon, argument = text.partition(":")
        pick(FEATURES, name, "features")
        if (name == "run") != bool(colon and argument):
            raise ValueError(f"--features '{text}': only run takes a name, as in run:large")
        found.append((name, argument))
    if not found or len(set(found)) != len(found):
        raise ValueError(f"--features {list(names)}: name each once, and one at least; see `comp list features`")
    return found


def check_runs(features: Sequence[tuple[str, str]], folds: Sequence[int | str], runs: Path = RUNS) -> None:
    """Raise ValueError when a run that features come from is none, or has not finished one of the folds."""
    for argument in [argument for name, argument in features if name == "run"]:
        folder = RunFolder(run_path(runs, argument))
        if not folder.config.exists() or not folder.manifest.exists():
            raise ValueError(f"{folder.path} is no run folder: config.yaml or manifest.json is missing; see `comp oof`")
        for fold in folds:
            if not folder.fold(fold).done.exists():
                raise ValueError(
                    f"{folder.fold(fold).path} is not finished, and fold {fold} needs its model; train it first"
                )


def transform(
    source: Source,
    features: Sequence[tuple[str, str]],
    *,
    training: NDArray[np.int64] | None = None,
    states: Sequence[State] | None = None,
) -> tuple[Any, list[State]]:
    """Return (N, D) as CSR and the fitted states; fitted to the `training` rows, or as `states` say."""
    made = [
        FEATURES[name].make(source, argument, training, None if states is None else states[place])
        for place, (name, argument) in enumerate(features)
    ]
    return sparse.hstack([matrix for matrix, _ in made]).tocsr(), [state for _, state in made]


def check_folds_of_runs(features: Sequence[tuple[str, str]], folding: Folding | None) -> None:
    """Raise ValueError when a run among the features has other folds: its models saw rows that are held out here."""
    for name, argument in features:
        if name == "run" and folding is not None:
            manifest = read_json(RunFolder(run_path(RUNS, argument)).manifest, "fingerprints")
            mark = manifest["fingerprints"].get("folds", "none")
            if mark != folding.fingerprint:
                raise ValueError(
                    f"features 'run:{argument}' were trained on different folds ({mark}) than these "
                    f"({folding.fingerprint}): its models saw rows that are held out here; train it anew on this fold "
                    "file"
                )


# --- a table of them -------------------------------------------------------------------------------------------------


def write_features(
    config: Config,
    names: Sequence[str],
    *,
    folds: str = "all",
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Compute and keep features for every fold; say their shapes and where they are.

    `out`: a parquet file of each fold's held-out rows, as what was fitted to the other folds, or trained on them, gives
    them: id, fold, then <feature>_0, ... in units of the training rows' deviation, 0 their mean. Raises ValueError for
    what does not fit.
    """
    wanted, chosen = parse_folds(folds, config.folds.num_folds), parse_features(names)
    if out is not None and ("tfidf", "") in chosen:
        raise ValueError("--out: tfidf has other words, and so other columns, in every fold; leave it out")
    if out is not None and (wanted == ["full"] or out.suffix != ".parquet"):
        raise ValueError(f"--out '{out}': a .parquet file of held-out rows, which --fold full has not")
    table, folding = open_tables(config, wanted, say)
    check_folds_of_runs(chosen, folding)
    runtime = open_runtime(config.training.precision)
    parts = []
    for fold in wanted:
        training, held = rows_of(fold, config, table, folding)
        columns: dict[str, Any] = {"id": table.ids[held], "fold": fold}
        for name, one in zip(names, chosen, strict=True):
            source = Source(table, config, runtime, fold, config.model.backbone)
            matrix, _ = transform(source, [one], training=training)
            where = ", ".join(map(str, source.files)) or "not kept, it is fast"
            say(f"fold {fold} {name}: {matrix.shape[0]:,} rows x {matrix.shape[1]:,} columns; {where}")
            if out is not None:
                values = matrix[held].toarray().astype(np.float32)
                columns |= {f"{name}_{place}": column for place, column in enumerate(values.T)}
        parts.append(pd.DataFrame(columns))
    if out is not None:
        frame = pd.concat(parts, ignore_index=True)
        write_atomic(out, lambda temporary: frame.to_parquet(temporary, index=False))
        say(f"wrote {out}: {len(frame):,} held-out rows x {frame.shape[1] - 2:,} columns, each by its own fold")
