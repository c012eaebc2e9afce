"""Configs and command lines that are refused: status 2, one message that says what to do, nothing written.

Each row is tried through the command line; the words are those without which the message would not help.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from comp import config_file
from comp.config import Config
from comp.config_file import ConfigError

pytestmark = pytest.mark.bad_input

TRAIN = ["train", "--config", "tiny.yaml", "--run", "new"]
Row = tuple[str | list[str], *tuple[str, ...]]


def sets(given_: str | list[str]) -> list[str]:
    return [part for one in ([given_] if isinstance(given_, str) else given_) for part in ("--set", one)]


# --- unknown keys, at every depth ------------------------------------------------------------------------------------

# where -> what has to be set for that section to be there
SECTIONS: dict[str, list[str]] = {
    "": [],
    "competition": [],
    "tasks.0": [],
    "tasks.0.loss": ["tasks.0.loss.name=focal"],
    "folds": [],
    "model": [],
    "model.pooler": ["model.pooler={name: gem}"],
    "model.pooler.of": ["model.pooler={name: dense, of: {name: mean}}"],
    "model.windows": ["model.windows={stride: 8}"],
    "optimizer": [],
    "optimizer.lookahead": ["optimizer.lookahead={steps: 2}"],
    "groups": ["groups={layout: llrd}"],
    "schedule": ["schedule={name: cosine}"],
    "stability": [],
    "stability.averaging": ["stability.averaging={name: swa}"],
    "stability.adversarial": ["stability.adversarial={name: awp}"],
    "stability.supcon": [],
    "training": [],
    "evaluation": [],
    "pretrain": ["pretrain={}"],
    "pretrain.objective": ["pretrain={objective: {name: simcse}}"],
    "pretrain.schedule": ["pretrain={schedule: {name: cosine}}"],
    "pretrain.corpora.0": ["pretrain={corpora: [{tables: [train]}]}"],
    "tracking": [],
}


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key(section: str, refuses: Callable[..., str]) -> None:
    key = f"{section}.sped".strip(".")
    refuses([*TRAIN, *sets([*SECTIONS[section], f"{key}=1"])], [key, "(--set)", "unknown key", "Allowed: "])


# --- types, ranges, what does not go together ------------------------------------------------------------------------

WRONG_TYPE: dict[str, Row] = {
    "text for a count": ("training.epochs=three", "training.epochs", "valid integer", "got 'three'"),
    "a fraction for a count": ("training.epochs=1.5", "training.epochs", "integer", "got 1.5"),
    "null for a count": ("training.batch_size=null", "training.batch_size", "integer", "got None"),
    "a list for a count": ("folds.num_folds=[5]", "folds.num_folds", "integer", "got [5]"),
    "text for a rate": ("optimizer.lr=fast", "optimizer.lr", "number", "got 'fast'"),
    "text for a switch": ("model.gradient_checkpointing=perhaps", "boolean", "got 'perhaps'"),
    "text for a section": ("training=long", "training (--set)", "got 'long'"),
    "a list for a section": ("model=[bert]", "model (--set)", "got ['bert']"),
    "null for a section": ("competition=null", "competition (--set)", "got None"),
    "a mapping for the tasks": ("tasks={}", "tasks (--set)", "list", "got {}"),
    "text for a list": ("tracking.tags=one", "tracking.tags", "list", "got 'one'"),
    "text for the targets": ("tasks.0.targets=target", "tasks.0.targets", "list", "got 'target'"),
    "a number for a name": ("metric=3", "metric (--set)", "string", "got 3"),
    "a row too short": ("evaluation={every: null, schedule: [[1]]}", "evaluation.schedule", "missing"),
    "one beta": ("optimizer.betas=[0.9]", "optimizer.betas"),
    "a choice that is none": ("training.precision=int8", "got 'int8'", "Allowed: auto, bf16, fp16, fp32"),
    "a kind that is none": ("tasks.0.kind=ranking", "got 'ranking'", "regression, binary, multiclass"),
    "an optimizer that is none": ("optimizer.name=adamx", "unknown name 'adamx'; did you mean 'radam'?", "bertadam"),
    "a pooler that is none": ("model.pooler.name=men", "unknown name 'men'; did you mean 'mean'?", "weighted_layers"),
    "a schedule that is none": ("schedule.name=cos", "unknown name 'cos'", "cosine_with_restarts"),
    "a layout that is none": ("groups={layout: lrd}", "unknown layout 'lrd'; did you mean 'llrd'?"),
    "a loss that is none": ("tasks.0.loss.name=bcee", "unknown name 'bcee'; did you mean 'bce'?"),
    "a metric that is none": ("metric=auc", "unknown metric 'auc'", "did you mean 'roc_auc'?"),
    "a splitter that is none": ("folds.splitter=groups", "got 'groups'; did you mean 'group'?"),
}
OUT_OF_RANGE: dict[str, Row] = {
    "no epochs": ("training.epochs=0", "training.epochs", "greater than or equal to 1, got 0"),
    "a negative batch": ("training.batch_size=-8", "greater than or equal to 1, got -8"),
    "a negative seed": ("training.seed=-1", "greater than or equal to 0, got -1"),
    "one fold": ("folds.num_folds=1", "greater than or equal to 2, got 1"),
    "three tokens": ("model.max_length=3", "greater than or equal to 4, got 3"),
    "dropout of everything": ("model.dropout=1.0", "model.dropout", "less than 1, got 1.0"),
    "negative dropout": ("model.dropout=-0.1", "greater than or equal to 0, got -0.1"),
    "a rate of zero": ("optimizer.lr=0", "optimizer.lr", "greater than 0, got 0"),
    "a rate that is nan": ("optimizer.lr=.nan", "optimizer.lr", "finite number, got nan"),
    "an infinite rate": ("optimizer.lr=1e999", "optimizer.lr", "finite number, got inf"),
    "negative decay": ("optimizer.weight_decay=-1", "greater than or equal to 0, got -1"),
    "a clip of zero": ("optimizer.clip_norm=0", "optimizer.clip_norm", "greater than 0, got 0"),
    "beta of two": ("optimizer.betas=[2, 0.9]", "betas must lie in [0, 1)", "got [2.0, 0.9]"),
    "bins of one": ("folds={splitter: stratified, bins: 1}", "bins must be at least 2, or auto; got 1"),
    "evaluation after the end": ("evaluation.start_percent=100", "less than 100, got 100"),
    "no interval": ("evaluation.every=0%", "every is '10%' (of an epoch) or '25 steps', got '0%'"),
    "an interval without unit": ("evaluation.every='5'", "every is '10%' (of an epoch) or '25 steps', got '5'"),
    "a race that errs half the time": ("evaluation={decide: race, error_rate: 0.5}", "less than 0.5, got 0.5"),
    "no tokens for a text": ("training.batch_tokens=40", "batch_tokens 40 is less than", "model.max_length 48; raise it"),
    "no patience": ("evaluation.patience=0", "greater than or equal to 1, got 0"),
    "thresholds that rise": (
        "evaluation={every: null, schedule: [[0.4, 2], [0.5, 4]]}", "must fall from row to row, got [0.4, 0.5]",
    ),
    "steps of zero": ("evaluation={every: null, schedule: [[0.4, 0]]}", "steps must be at least 1"),
    "a warm-up of 150 percent": ("schedule={name: linear, warmup_percent: 150}", "less than or equal to 100, got 150"),
    "decay above one": ("groups={layout: llrd, decay: 1.5}", "groups.decay", "less than or equal to 1, got 1.5"),
    "mixout above one": ("stability.mixout=2", "less than or equal to 1, got 2"),
    "a temperature of zero": ("stability.supcon={weight: 1, temperature: 0}", "greater than 0, got 0"),
    "a negative weight": ("tasks.0.weight=-1", "tasks.0.weight", "greater than 0, got -1"),
    "no task": ("tasks=[]", "tasks (--set)", "at least 1 item"),
    "no target": ("tasks.0.targets=[]", "tasks.0.targets", "at least 1 item"),
    "no text": ("competition.text=[]", "name at least one text column, each once; got []"),
    "a text twice": ("competition.text=[text, text]", "each once; got ['text', 'text']"),
    "a target twice": ("tasks.0={name: a, kind: multilabel, targets: [target, target]}", "named twice"),
    "a task's name with a dot": ("tasks.0.name=a.b", "tasks.0.name", "pattern", "got 'a.b'"),
    "a micro-batch beyond the batch": ("training.micro_batch_size=99", "99 is larger than batch_size 8", "a part of"),
    "too many blocks frozen": ("model.freeze_layers=9", "freeze_layers is 9, but the backbone has 3 blocks"),
    "too many blocks drawn anew": ("stability.reinit_layers=9", "reinit_layers", "9", "3"),
    "more tokens than positions": ("model.max_length=65", "max_length", "65", "64 positions"),
    "a stride beyond the window": ("model.windows={stride: 48}", "stride is 48", "set the stride below"),
    "a layer that is not there": ("model.pooler={name: concat_layers, num_layers: 7}", "num_layers", "7", "3"),
    "lookahead beyond the end": ("optimizer.lookahead={steps: 99}", "trains for 4 steps", "lower its steps"),
    "a warm-up beyond the end": ("schedule={name: linear, warmup_steps: 99}", "warm", "99", "4"),
}  # fmt: skip
CONFLICTS: dict[str, Row] = {
    "mixout and dropout": (["stability.mixout=0.5", "model.dropout=0.1"], "model.dropout is 0.1; set it to 0"),
    "mixout and prior decay": (["stability.mixout=0.5", "stability.prior_decay=1"], "set one to 0"),
    "two averages": (
        ["stability.averaging={name: ema}", "optimizer.lookahead={steps: 2}"], "both average", "set one of them",
    ),
    "madgrad forgets the prior": (["optimizer={name: madgrad}", "stability.prior_decay=1"], "set optimizer.momentum"),
    "a cache of what changes": ("model.cache_frozen=true", "freeze_embeddings is False, not true, freeze_layers is 0"),
    "madgrad forgets lookahead": ("optimizer={name: madgrad, lookahead: {steps: 2}}", "set momentum to 0 or"),
    "a pooler that is not there": ("stability.reinit_pooler=true", "is 'mean'; set it to false, or the pooler to"),
    "masks of nothing": ("model.multi_sample_dropout=4", "head_dropout, which is 0; set it to"),
    "two passes alike": ("stability.rdrop=1", "but there is none; set model.dropout"),
    "a frozen table attacked": (["stability.adversarial={name: fgm}", "model.freeze_embeddings=true"], "use awp, or"),
    "towers for one text": ("model.pooler={name: two_tower}", "needs two text columns", "has 1: text"),
    "a metric of grades": ("metric=qwk", "does not fit the first task's kind 'binary'", "allowed: rmse, mae"),
    "a loss of numbers": ("tasks.0.loss.name=mse", "does not fit kind 'binary'; allowed: bce, focal"),
    "binary of two columns": ("tasks.0.targets=[a, b]", "exactly one target column, got 2", "kind 'multilabel'"),
    "multilabel of one column": ("tasks.0.kind=multilabel", "needs several target columns", "kind 'binary'"),
    "a loss of the whole batch": (
        ["metric=rmse", "tasks.0.kind=regression", "tasks.0.loss={name: pearson}", "training.micro_batch_size=2"],
        "compares the rows of a whole batch", "set training.micro_batch_size to null",
    ),
    "contrast in micro-batches": (
        ["stability.supcon.weight=1", "training.micro_batch_size=2"], "stability.supcon", "micro_batch_size to null",
    ),
    "a batch whose rows are compared, by tokens": (
        ["stability.supcon.weight=1", "training.batch_tokens=512"], "stability.supcon compares", "set it to null",
    ),
    "early by a metric that is no sum": ("evaluation.decide=exact", "which 'roc_auc' is not; set it to full, or use"),
    "an error rate without a race": (
        ["metric=accuracy", "evaluation={decide: exact, error_rate: 0.1}"], "set error_rate to null, or decide to race",
    ),
    "a cap without a race": (["metric=accuracy", "evaluation.race_percent=25"], "set race_percent to null, or decide"),
    "a cadence by estimates": (
        ["metric=accuracy", "evaluation={every: null, schedule: [[0.5, 2]], decide: race}"], "set decide to full, or use",
    ),
    "a soup of estimates": (
        ["metric=accuracy", "evaluation.decide=exact", "stability.averaging={name: soup}"], "to full, or use swa or ema",
    ),
    "an attack from an estimate on": (
        ["metric=accuracy", "evaluation.decide=race", "stability.adversarial={name: awp, start_score: 0.7}"],
        "to full or exact, or use start_epoch",
    ),
    "two cadences": ("evaluation={every: 10%, schedule: [[0.5, 2]]}", "both set", "set `every: null`"),
    "two warm-ups": ("schedule={name: linear, warmup_steps: 1, warmup_epochs: 1}", "one unit", "the others to null"),
    "groups without a column": ("folds.splitter=group", "needs `group`: the column whose values stay together"),
    "time without a column": ("folds.splitter=time", "needs `column`: the column to sort by"),
    "a column that is not read": ("folds.column=text", "does not read `column`; leave it out"),
    "bins that are not read": ("folds.bins=4", "does not read `bins`; only stratified"),
    "two tasks of a name": (
        "tasks=[{name: a, kind: binary, targets: [x]}, {name: a, kind: binary, targets: [y]}]", "the same name",
    ),
    "a second metric": ("tasks.0.metric=log_loss", "has a metric of its own; set `metric` of the config instead"),
    "a metric that does not fit its task": (
        "tasks=[{name: a, kind: binary, targets: [x]}, {name: b, kind: binary, targets: [y], metric: qwk}]",
        "does not fit kind 'binary'; allowed: rmse, mae",
    ),
    "no prior pooler": ("model.part=decoder", "this is bert", "set model.part to encoder"),
    "shared blocks frozen": ("optimizer={name: class, path: torch.optim.Nope}", "torch.optim", "Nope"),
    "an option of no optimizer": (
        "optimizer={name: class, path: torch.optim.NAdam, options: {speed: 2}}", "speed", "NAdam",
    ),
    "half precision on a CPU": ("training.precision=fp16", "needs a GPU, got the CPU; use precision bf16"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TYPE)
def test_wrong_type(case: str, refuses: Callable[..., str]) -> None:
    given_, *words = WRONG_TYPE[case]
    refuses([*TRAIN, *sets(given_)], words)


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_out_of_range(case: str, refuses: Callable[..., str]) -> None:
    given_, *words = OUT_OF_RANGE[case]
    refuses([*TRAIN, *sets(given_)], words)


@pytest.mark.parametrize("case", CONFLICTS)
def test_what_does_not_go_together(case: str, refuses: Callable[..., str]) -> None:
    given_, *words = CONFLICTS[case]
    refuses([*TRAIN, *sets(given_)], words)


# --- files and options -----------------------------------------------------------------------------------------------

NESTED = "&a [" + "[" * 5000 + "]" * 5000 + "]"
FILES: dict[str, tuple[bytes, *tuple[str, ...]]] = {
    "empty": (b"", "competition", "is missing", "tasks", "model"),
    "a list": (b"- competition\n", "a config file is a mapping of keys, got list"),
    "a text": (b"just words", "a config file is a mapping of keys, got str"),
    "a tab": (b"model:\n\tbackbone: x\n", "line 2: not valid YAML"),
    "an open bracket": (b"tasks: [{name: a\n", "not valid YAML"),
    "a key twice": (b"metric: rmse\nmetric: mae\n", "line 2: key 'metric' is given twice (first in line 1)"),
    "a key that is a number": (b"1: one\n", "line 1: keys are text, got 1"),
    "latin-1": ("metric: rmse # naïve".encode("latin-1"), "not UTF-8 text (byte 17); save it as UTF-8"),
    "a NUL": (b"metric: rm\x00se\n", "not valid YAML", "position 10"),
    "an object of Python": (b"metric: !!python/object/apply:os.system [touch hacked]\n", "line 1", "python/object"),
    "an unknown alias": (b"metric: *gone\n", "line 1: not valid YAML", "gone"),
    "nested without end": (NESTED.encode(), "nested too deeply"),
    "a list inside itself": (b"tracking: {tags: &a [*a]}\n", "line 1: not valid YAML: found unconstructable recursive"),
    "a parent that is gone": (b"extends: gone.yaml\n", "extends: 'gone.yaml' not found beside it"),
    "a circle": (b"extends: bad.yaml\n", "extends goes in a circle: bad.yaml -> bad.yaml"),
    "a parent that is no name": (b"extends: {a: 1}\n", "extends is a file name or a list of them, got {'a': 1}"),
}


@pytest.mark.parametrize("case", FILES)
def test_config_files(case: str, here: Path, refuses: Callable[..., str]) -> None:
    raw, *words = FILES[case]
    (here / "bad.yaml").write_bytes(raw)
    refuses(["train", "--config", "bad.yaml"], ["bad.yaml", *words])


OPTIONS: dict[str, tuple[list[str], *tuple[str, ...]]] = {
    "no such config": (["train", "--config", "tny.yaml"], "'tny.yaml' not found", "Looked for", "`comp init`"),
    "a folder for a config": (["train", "--config", "data"], "config file 'data' not found", "Looked for"),
    "no such command": (["trian"], "No such command 'trian'"),
    "no such option": (["train", "--confg", "x"], "No such option: --confg"),
    "no config": (["train"], "Missing option '--config'"),
    "--set without a value": ([*TRAIN, "--set", "training.epochs"], "wants key=value", "--set training.epochs=2"),
    "--set inside a number": ([*TRAIN, "--set", "tasks.0.targets.0.x=1"], "which has no keys inside"),
    "--set beyond a list": ([*TRAIN, "--set", "tasks.7.weight=1"], "there is no '7' to set; give the whole list"),
    "--set of half a list": ([*TRAIN, "--set", "tracking.tags=[a"], "not valid YAML"),
    "--set inside a text": ([*TRAIN, "--set", "metric.name=x"], "metric", "got {'name': 'x'}"),
    "--fold beyond": ([*TRAIN, "--fold", "2"], "allowed are all, full, or numbers 0 to 1 like 0,2"),
    "--fold twice": ([*TRAIN, "--fold", "0,0"], "allowed are all, full, or numbers 0 to 1"),
    "--fold of words": ([*TRAIN, "--fold", "first"], "allowed are all, full, or numbers 0 to 1"),
    "--fold of figures that are none": ([*TRAIN, "--fold", "²"], "allowed are all, full, or numbers 0 to 1"),
    "--seeds of words": ([*TRAIN, "--seeds", "a,b"], "allowed are different whole numbers like 0,1,2"),
    "--seeds of figures that are none": ([*TRAIN, "--seeds", "²"], "allowed are different whole numbers like 0,1,2"),
    "--save-every": ([*TRAIN, "--save-every", "now"], "allowed are auto, evaluation, never, or like '10 minutes'"),
    "a soup without validation": (
        [*TRAIN, "--fold", "full", "--set", "stability.averaging={name: soup}"], "use swa or ema",
    ),
    "an estimator that is none": (
        ["classical", "--config", "tiny.yaml", "--features", "tfidf", "--estimator", "rigde"], "did you mean 'ridge'?",
    ),
    "an estimator of numbers": (
        ["classical", "--config", "tiny.yaml", "--features", "tfidf", "--estimator", "kernel_ridge"],
        "does not fit kind 'binary'; it fits regression, ordinal",
    ),
    "a feature that is none": (["classical", "--config", "tiny.yaml", "--features", "tfdf"], "did you mean 'tfidf'?"),
    "a feature of a run that is gone": (
        ["classical", "--config", "tiny.yaml", "--features", "run:gone"], "gone is no run folder",
    ),
    "an option without a value": (
        ["classical", "--config", "tiny.yaml", "--features", "tfidf", "--option", "alpha"], "wanted key=value",
    ),
    "a catalogue that is none": (["list", "pooler"], "did you mean 'poolers'?"),
    "no folder to look at": (["init", "nowhere"], "nowhere"),
    "a folder without tables": (["init", "model"], "model", "train"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, refuses: Callable[..., str]) -> None:
    arguments, *words = OPTIONS[case]
    refuses(arguments, words)


def test_in_a_process_of_its_own(here: Path) -> None:
    command = [sys.executable, "-m", "comp", "config", "check", "tiny.yaml", "--set", "training.epochs=none"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("comp: tiny.yaml: 1 fault\n  - training.epochs (--set): ")


OUTSIDE = ["..", ".", "", "../up", "a/b", "/tmp/x", ".hidden", "a\\b", "a\nb", "-x", "x" * 300]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("what", ["train", "seeds", "classical", "blend", "competition", "folds"])
def test_names_that_lead_out_of_their_folder(what: str, name: str, refuses: Callable[..., str]) -> None:
    quoted = yaml.safe_dump(name, default_style='"').strip()
    arguments = {
        "train": ["train", "--config", "tiny.yaml", f"--run={name}"],
        "seeds": ["train", "--config", "tiny.yaml", "--seeds", "1", f"--run={name}"],
        "classical": ["classical", "--config", "tiny.yaml", "--features", "tfidf", f"--run={name}"],
        "blend": ["blend", "--run", "runs/tiny", f"--name={name}"],
        "competition": [*TRAIN, "--set", f"competition.name={quoted}"],
        "folds": [*TRAIN, "--set", f"folds.name={quoted}"],
    }[what]
    word = {"competition": "competition.name", "folds": "folds.name"}.get(what, "letters, figures")
    refuses(arguments, [word, "got"])


# --- anything at all -------------------------------------------------------------------------------------------------

KEYS = sorted({*Config.model_fields, "name", "kind", "targets", "lr", "layout", "extends", "of", "x"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(KEYS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
PLACES = ["training.epochs", "tasks.0.weight", "metric", "a[", "tasks[0].loss", ""]
FUZZ = settings(derandomize=True, deadline=None, max_examples=150)


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8))
def test_any_mapping_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigError):  # no mapping of these is whole: a competition needs a name
        config_file.load(file)


@FUZZ
@given(st.binary(max_size=60) | st.text(alphabet="ab:{}[]-&*!|>'\"\n\t #%@,?1.e\x00é", max_size=40).map(str.encode))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(raw)
    with pytest.raises(ConfigError):
        config_file.load(file)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.text(max_size=8))))
def test_any_assignment_loads_or_is_refused(finished: Path, pairs: list[tuple[str, str]]) -> None:
    with suppress(ConfigError):
        config_file.load(finished / "tiny.yaml", [f"{key}={value}" for key, value in pairs])
