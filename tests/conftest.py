"""What the tests share: tiny model folders and tiny competitions, made on the spot, no network.

`from conftest import TINY_MODELS, TINY_TASKS` gives the names to parametrize over.
"""

from __future__ import annotations

import atexit
import csv
import gc
import hashlib
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before torch, transformers and wandb are imported anywhere: they read these once.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}.items():
    os.environ[_name] = _value
# What is measured of this machine stays out of the user's cache.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="comp-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
for _name in ("WANDB_MODE", "WANDB_API_KEY", "KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_IS_COMPETITION_RERUN"):
    os.environ.pop(_name, None)

# --- words: two moods, three topics, filler -----------------------------------------------------------------

GOOD = ["lovely", "bright", "warm", "clever", "gentle", "happy", "fresh", "golden"]
BAD = ["dull", "cold", "bitter", "clumsy", "grim", "broken", "stale", "hollow"]
TOPICS = {
    "sea": ["ship", "wave", "harbour", "sail", "tide"],
    "wood": ["oak", "fern", "moss", "deer", "path"],
    "town": ["street", "tram", "market", "bridge", "square"],
}
FILLER = "the a of and in to it was is on for with as by he she they we one two some very then here there"
WORDS = [*GOOD, *BAD, *(word for topic in TOPICS.values() for word in topic), *FILLER.split()]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = ".,!?'\"-:;()"

# --- tiny models --------------------------------------------------------------------------------------------

MAX_TOKENS = 64
"""Longest input of every tiny model, special tokens included."""
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_TOKENS,
}
BERT_SPECIALS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_SPECIALS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}


@dataclass(frozen=True)
class TinyModel:
    """What sets one architecture apart: its special tokens in order of id, its template, its config."""

    model_type: str
    specials: dict[str, str]
    single: str = "[CLS]:0 $A:0 [SEP]:0"
    pair: str = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    inputs: tuple[str, ...] = ("input_ids", "token_type_ids", "attention_mask")
    padding_side: str = "right"
    overrides: tuple[tuple[str, Any], ...] = ()
    """Config keys that differ from SIZES; None = the architecture has no such key."""


_NO_TYPES = ("input_ids", "attention_mask")
_ROBERTA: dict[str, Any] = {
    "specials": ROBERTA_SPECIALS,
    "single": "<s>:0 $A:0 </s>:0",
    "pair": "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0",
    "inputs": _NO_TYPES,
    # Positions are counted from pad_token_id + 1 = 2.
    "overrides": (("type_vocab_size", 1), ("max_position_embeddings", MAX_TOKENS + 2)),
}
_DEBERTA_V3 = (
    ("type_vocab_size", 0),
    ("relative_attention", True),
    ("position_buckets", 16),
    ("norm_rel_ebd", "layer_norm"),
    ("share_att_key", True),
    ("pos_att_type", ["p2c", "c2p"]),
    ("position_biased_input", False),
)
_MODELS: dict[str, TinyModel] = {
    "bert": TinyModel("bert", BERT_SPECIALS),
    "roberta": TinyModel("roberta", **_ROBERTA),
    "distilbert": TinyModel("distilbert", BERT_SPECIALS, inputs=_NO_TYPES, overrides=(("hidden_dim", 64),)),
    "electra": TinyModel("electra", BERT_SPECIALS, overrides=(("embedding_size", 16),)),
    "albert": TinyModel("albert", BERT_SPECIALS, overrides=(("embedding_size", 16), ("num_hidden_groups", 1))),
    "deberta-v2": TinyModel("deberta-v2", BERT_SPECIALS, overrides=_DEBERTA_V3),
    "mpnet": TinyModel("mpnet", **_ROBERTA),
    "xlm-roberta": TinyModel("xlm-roberta", **_ROBERTA),
    "xlnet": TinyModel(
        "xlnet",
        {
            "unk": "<unk>",
            "bos": "<s>",
            "eos": "</s>",
            "cls": "<cls>",
            "sep": "<sep>",
            "pad": "<pad>",
            "mask": "<mask>",
        },
        single="$A:0 <sep>:0 <cls>:2",
        pair="$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2",
        padding_side="left",
        # positions are relative: any length goes
        overrides=(
            *((key, None) for key in SIZES),
            # its own names: transformers 5.0 checks d_head before it knows the common ones
            ("d_model", 32),
            ("n_layer", 3),
            ("n_head", 4),
            ("d_inner", 64),
            ("d_head", 8),
        ),
    ),
    "modernbert": TinyModel(
        "modernbert",
        BERT_SPECIALS,
        inputs=_NO_TYPES,
        overrides=(("local_attention", 16), ("tie_word_embeddings", True)),
    ),
    "bart": TinyModel(
        "bart",
        **_ROBERTA
        | {
            "overrides": (
                *((key, None) for key in SIZES),
                ("max_position_embeddings", MAX_TOKENS),
                ("d_model", 32),
                *((f"{half}_layers", 3) for half in ("encoder", "decoder")),
                *((f"{half}_attention_heads", 4) for half in ("encoder", "decoder")),
                *((f"{half}_ffn_dim", 64) for half in ("encoder", "decoder")),
                ("decoder_start_token_id", 2),
            )
        },
    ),
}
TINY_MODELS = tuple(_MODELS)
"""Kinds that `tiny_model_folder` writes."""


def _tokenizer(tiny: TinyModel) -> Any:
    """Return a fast WordPiece tokenizer over WORDS; any other ASCII word is spelt in letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*tiny.specials.values(), *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *PUNCTUATION]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token=tiny.specials["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    used = [token for token in tiny.specials.values() if f"{token}:" in tiny.pair]
    backend.post_processor = processors.TemplateProcessing(
        single=tiny.single, pair=tiny.pair, special_tokens=[(token, vocab[token]) for token in used]
    )
    named = {f"{role}_token": token for role, token in tiny.specials.items()}
    if "cls" not in tiny.specials:  # RoBERTa's family uses <s> and </s> in both roles
        named |= {"cls_token": tiny.specials["bos"], "sep_token": tiny.specials["eos"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_TOKENS,
        model_input_names=list(tiny.inputs),
        padding_side=tiny.padding_side,
        **named,
    )


def write_tiny_model(folder: Path, kind: str) -> Path:
    """Write a random three-layer model of `kind` (one of TINY_MODELS), 32 wide, and its fast tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModel

    tiny = _MODELS[kind]
    tokenizer = _tokenizer(tiny)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "cls", "sep")}
    settings = ids | SIZES | dict(tiny.overrides)
    config = AutoConfig.for_model(
        tiny.model_type,
        vocab_size=len(tokenizer),
        **{key: value for key, value in settings.items() if value is not None},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `folder(kind="bert")`: that tiny model, written once per session; read-only."""
    made: dict[str, Path] = {}

    def folder(kind: str = "bert") -> Path:
        if kind not in made:
            made[kind] = write_tiny_model(tmp_path_factory.mktemp("models") / f"tiny-{kind}", kind)
        return made[kind]

    return folder


# --- tiny competitions --------------------------------------------------------------------------------------

TINY_TASKS = ("regression", "binary", "multiclass", "multilabel", "ordinal")
"""Task kinds that `tiny_competition` writes."""


@dataclass(frozen=True)
class TinyCompetition:
    """A Kaggle-shaped folder: 60 training rows, 20 test rows, texts that a small model can learn from."""

    folder: Path
    kind: str
    text: list[str]
    """Text columns: ["text"], or ["title", "body"]."""
    targets: list[str]
    metric: str

    @property
    def train(self) -> Path:
        return self.folder / "train.csv"

    @property
    def test(self) -> Path:
        return self.folder / "test.csv"

    @property
    def sample_submission(self) -> Path:
        return self.folder / "sample_submission.csv"

    @property
    def solution(self) -> Path:
        """Truth of the test rows, in the shape of the submission."""
        return self.folder / "held_back" / "solution.csv"

    def config(self, backbone: Path | str, **sections: Any) -> dict[str, Any]:
        """Return the config as a plain mapping (absolute paths); `sections` replace or add whole sections."""
        base: dict[str, Any] = {
            "competition": {
                "name": f"tiny-{self.kind}",
                "train": str(self.train),
                "test": str(self.test),
                "sample_submission": str(self.sample_submission),
                "id": "id",
                "text": self.text[0] if len(self.text) == 1 else self.text,
            },
            "tasks": [{"name": "main", "kind": self.kind, "targets": self.targets}],
            "metric": self.metric,
            "folds": {"splitter": "kfold", "num_folds": 2, "seed": 1},
            "model": {"backbone": str(backbone), "max_length": 48},
            "training": {"epochs": 1, "batch_size": 8, "precision": "fp32"},
            "tracking": {"wandb": "off"},
        }
        return base | sections


def _draw(generator: random.Random) -> tuple[str, float, dict[str, bool], str]:
    """Return a text, its mood in -1..1, which topics it mentions, and its main topic."""
    size = generator.randint(6, 30)
    num_good, num_bad = generator.randint(0, 4), generator.randint(0, 4)
    main = generator.choice(list(TOPICS))
    present = {topic: topic == main or generator.random() < 0.3 for topic in TOPICS}
    words = generator.choices(GOOD, k=num_good) + generator.choices(BAD, k=num_bad)
    for topic, names in TOPICS.items():
        words += generator.choices(names, k=3 if topic == main else int(present[topic]))
    words += generator.choices(FILLER.split(), k=size)
    generator.shuffle(words)
    return " ".join(words) + ".", (num_good - num_bad) / 4, present, main


def _truth(kind: str, mood: float, present: dict[str, bool], main: str, noise: float) -> list[Any]:
    match kind:
        case "regression":
            return [round(mood + noise, 4)]
        case "binary":
            return [int(mood + noise > 0)]
        case "multiclass":
            return [main]
        case "multilabel":
            return [int(present[topic]) for topic in TOPICS]
        case "ordinal":
            return [1 + sum(mood > border for border in (-0.5, 0.0, 0.5))]
    raise ValueError(f"unknown kind '{kind}'; allowed: {', '.join(TINY_TASKS)}")


_FIRST_GUESS = {"regression": 0.0, "binary": 0.5, "multiclass": "sea", "multilabel": 0.5, "ordinal": 1}
_METRIC = {
    "regression": "rmse",
    "binary": "roc_auc",
    "multiclass": "accuracy",
    "multilabel": "roc_auc",
    "ordinal": "qwk",
}


def write_tiny_competition(
    folder: Path,
    kind: str = "regression",
    *,
    pair: bool = False,
    train_rows: int = 60,
    test_rows: int = 20,
    seed: int = 0,
) -> TinyCompetition:
    """Write the four tables of a TinyCompetition into `folder`; `pair` = two text columns."""
    generator = random.Random(seed)
    text = ["title", "body"] if pair else ["text"]
    targets = list(TOPICS) if kind == "multilabel" else ["target"]
    rows, seen = [], set()
    while len(rows) < train_rows + test_rows:
        line, mood, present, main = _draw(generator)
        if line not in seen:
            seen.add(line)
            middle = line.index(" ", len(line) // 3)
            texts = [line[:middle], line[middle + 1 :]] if pair else [line]
            rows.append([f"t{len(rows):03d}", *texts, *_truth(kind, mood, present, main, generator.gauss(0, 0.05))])
    split = 1 + len(text)
    train, test = rows[:train_rows], rows[train_rows:]
    (folder / "held_back").mkdir(parents=True, exist_ok=True)
    competition = TinyCompetition(folder, kind, text, targets, _METRIC[kind])
    _write_csv(competition.train, ["id", *text, *targets], train)
    _write_csv(competition.test, ["id", *text], [row[:split] for row in test])
    guess = [[row[0], *[_FIRST_GUESS[kind]] * len(targets)] for row in test]
    _write_csv(competition.sample_submission, ["id", *targets], guess)
    _write_csv(competition.solution, ["id", *targets], [[row[0], *row[split:]] for row in test])
    return competition


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@pytest.fixture
def tiny_competition(tmp_path: Path) -> Callable[..., TinyCompetition]:
    """Return `write(kind="regression", pair=False, ...)`: a fresh tiny competition in tmp_path."""

    def write(kind: str = "regression", **options: Any) -> TinyCompetition:
        name = f"tiny-{kind}" + ("-pair" if options.get("pair") else "")
        return write_tiny_competition(tmp_path / name, kind, **options)

    return write


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test with an empty folder of its own as the current directory; return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the command line ---------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return `call("train", "--config", ...)`: the command line in this process -> (exit status, stdout, stderr)."""
    from comp import cli

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["comp", *arguments])
        status, before = 0, signal.getsignal(signal.SIGTERM)
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
        out = capsys.readouterr()
        return status, out.out, out.err

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it
    return command


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder after a first hour: data/, model/, tiny.yaml, folds/, runs/tiny, submissions/tiny.csv."""
    import yaml

    from comp import config_file
    from comp.ship.infer import infer
    from comp.training import crossval

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        competition = write_tiny_competition(Path("data"), "binary")
        write_tiny_model(Path("model"), "bert")
        Path("tiny.yaml").write_text(yaml.safe_dump(competition.config("model")))
        config = config_file.load("tiny.yaml")
        crossval.run(config, "tiny", say=lambda line: None)
        infer(["runs/tiny"], say=lambda line: None)
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in a copy of `finished`; return it."""
    folder = tmp_path / "here"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return path -> digest of every file and folder in it, but for the caches, which hold nothing of one's own."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if ".cache" not in path.parts
    }


KILL_TEST = Path(__file__).resolve().parents[1] / "benchmarks" / "kill_test.py"


def leavings(name: str, folds: Sequence[int]) -> dict[str, Any]:
    """Return everything that the finished folds of a run leave, but for times, as benchmarks/kill_test.py does."""
    spec = importlib.util.spec_from_file_location("kill_test", KILL_TEST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.leavings(name, folds)
    return found


@pytest.fixture
def refuses(here: Path, call: Call) -> Callable[..., str]:
    """Return `refuses(arguments, words)`: status 2, one message with all the words, nothing written."""

    def check(arguments: Sequence[str], words: Sequence[str]) -> str:
        before = contents(here)
        status, _, err = call(*arguments)
        assert status == 2, err
        assert "Traceback" not in err
        assert sum(line.startswith(("comp: ", "Error: ")) for line in err.splitlines()) == 1, err
        for word in words:
            assert word in err, err
        after = contents(here)
        assert after == before, {name for name in {*before, *after} if before.get(name) != after.get(name)}
        return err

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count the bad inputs that were tried (marker bad_input)."""
    tried = {
        outcome: sum("bad_input" in report.keywords and report.when == "call" for report in reports)
        for outcome, reports in terminalreporter.stats.items()
        if outcome in ("passed", "failed")
    }
    total = sum(tried.values())
    if total:
        terminalreporter.write_line(
            f"bad input: {total} tried, {tried.get('passed', 0)} refused or read as they should"
        )


def pytest_collection_finish() -> None:
    """Leave the tests and what they import out of garbage collections: comp collects after every fold."""
    gc.collect()
    gc.freeze()
