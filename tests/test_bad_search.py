"""Spaces and orders of `comp search` that are refused: status 2, one message that says what to do, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from comp.config_file import ConfigError, Source
from comp.search_space import MOST_CORNERS, overrides_of, read_space

pytestmark = pytest.mark.bad_input

SEARCH = ["search", "--config", "tiny.yaml", "--space", "space.yaml"]
GOOD = "optimizer.lr: {kind: float, low: 1.0e-5, high: 1.0e-3, log: true}\n"
FLOAT, INT = "optimizer.lr: {{kind: float, {0}}}", "training.epochs: {{kind: int, {0}}}"
SPACES: dict[str, tuple[str, *tuple[str, ...]]] = {
    "nothing": ("", "a space is a mapping from config keys to what may be tried, got nothing"),
    "a list": ("- a\n", "a space is a mapping", "got list"),
    "no YAML": ("optimizer.lr: [\n", "not valid YAML"),
    "a key twice": (GOOD + GOOD, "key 'optimizer.lr' is given twice"),
    "a single value": ("training.epochs: 3", "training.epochs: wanted a list of values, or {kind: choice | int | float", "got 3"),
    "no kind": ("optimizer.lr: {low: 1, high: 2}", "optimizer.lr: `kind` is missing. Allowed: choice, int, float."),
    "a kind that is none": (
        "optimizer.lr: {kind: flaot, low: 1, high: 2}", "optimizer.lr: unknown kind 'flaot'; did you mean 'float'?",
    ),
    "an unknown key": (FLOAT.format("lo: 1, high: 2"), "optimizer.lr.lo: unknown key; did you mean 'low'?", "optimizer.lr.low: is missing"),
    "text for a bound": (FLOAT.format("low: small, high: 2"), "optimizer.lr.low", "valid number", "got 'small'"),
    "a fraction for a whole number": (INT.format("low: 1.5, high: 3"), "training.epochs.low", "integer", "got 1.5"),
    "a bound that is nan": (FLOAT.format("low: .nan, high: 2"), "optimizer.lr.low", "finite number, got nan"),
    "bounds the wrong way round": (INT.format("low: 3, high: 1"), "training.epochs: low must be below high, got 3 and 1"),
    "one value as a range": (INT.format("low: 3, high: 3"), "low must be below high", "leave out a key that has one value"),
    "log from zero": (FLOAT.format("low: 0, high: 1, log: true"), "optimizer.lr: log needs low above 0, got 0.0"),
    "log and step": (FLOAT.format("low: 1, high: 2, step: 0.5, log: true"), "log and step do not go together"),
    "a step of zero": (INT.format("low: 1, high: 3, step: 0"), "training.epochs.step", "greater than or equal to 1"),
    "a step that misses the end": (INT.format("low: 1, high: 4, step: 2"), "high must be low plus a multiple of step, got 1, 4 and step 2"),
    "one choice": ("training.epochs: [3]", "training.epochs.values", "at least 2 items"),
    "a choice twice": ("training.epochs: [3, 2, 3]", "training.epochs: a value is given twice: 3, 2, 3"),
    "the seed": ("training.seed: [1, 2]", "training.seed: cannot be searched: the luckiest seed would win"),
    "the metric": ("metric: [rmse, mae]", "metric: cannot be searched: scores by another metric are not comparable"),
    "the folds": ("folds.num_folds: [3, 5]", "folds.num_folds: cannot be searched"),
    "the cadence": ("evaluation.every: [10%, 20%]", "cannot be searched", "the more the best look flatters"),
    "a key and its section": (
        "model.pooler: [{name: mean}, {name: max}]\nmodel.pooler.name: [mean, max]\n",
        "model.pooler.name: is inside model.pooler, which the space holds too",
    ),
    "a condition of no key": (
        GOOD + "groups.layout: [unified, llrd]\ngroups.decay: {kind: float, low: 0.8, high: 0.9, when: {groups.layuot: llrd}}\n",
        "groups.decay.when: 'groups.layuot' is no key of this space; did you mean 'groups.layout'?",
    ),
    "a condition that never holds": (
        "groups.layout: [unified, llrd]\ngroups.decay: {kind: float, low: 0.8, high: 0.9, when: {groups.layout: lrd}}\n",
        'groups.decay.when: groups.layout is never "lrd" in this space',
    ),
    "conditions in a circle": (
        "training.epochs: {kind: choice, values: [1, 2], when: {training.batch_size: 8}}\n"
        "training.batch_size: {kind: choice, values: [8, 16], when: {training.epochs: 1}}\n",
        "conditions go in a circle, among training.epochs, training.batch_size",
    ),
    "a key that the config has not": ("optimizer.lrr: [1, 2]", "optimizer.lrr = 1: unknown key; did you mean 'lr'?"),
    "a section that the config has not": ("optimiser.lr: [1, 2]", "optimiser.lr = 1", "unknown key; did you mean 'optimizer'?"),
    "a row of a list that is not there": ("tasks.3.weight: [1, 2]", "tasks.3.weight = 1", "there is no '3' to set"),
    "a bound that the config refuses": (FLOAT.format("low: 0, high: 1"), "optimizer.lr = 0.0: input should be greater than 0, got 0"),
    "an end that the config refuses": (
        "model.dropout: {kind: float, low: 0.0, high: 1.0}", "model.dropout = 1.0: input should be less than 1, got 1",
    ),
    "a choice that the config refuses": (
        "model.pooler.name: [mean, men]", "model.pooler.name", "unknown name 'men'; did you mean 'mean'?",
    ),
    "values that do not go together": (
        "model.dropout: [0.0, 0.1]\nstability.mixout: [0.0, 0.5]\ntraining.epochs: [1, 2]\n", "1 fault",
        "model.dropout = 0.1, stability.mixout = 0.5: config: stability.mixout takes the place of dropout", "say `when`",
    ),
    "several at once": (
        "optimizer.lrr: [1, 2]\ntraining.epochs: 3\nmodel.dropout: {kind: float, low: 0.0, high: 1.0}\nmetric: [a, b]\n",
        "4 faults", "optimizer.lrr = 1", "training.epochs: wanted", "model.dropout = 1.0", "metric: cannot be searched",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPACES)
def test_spaces(case: str, here: Path) -> None:
    """The words stand in the message ; some are tried through the command line below."""
    text, *words = SPACES[case]
    Path("space.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_space("space.yaml", Source("tiny.yaml"))
    message = str(refused.value)
    assert message.startswith("space.yaml: ") and len(set(refused.value.faults)) == len(refused.value.faults)
    for word in words:
        assert word in message, message


ORDERS: dict[str, tuple[str | None, list[str], *tuple[str, ...]]] = {
    "a space with faults": ("training.epochs: 3\n", SEARCH, "space.yaml: 1 fault", "wanted a list of values"),
    "a value that is refused": ("training.epochs: [0, 1]\n", SEARCH, "training.epochs = 0: input should be greater"),
    "no space": (None, SEARCH, "--space space.yaml: no such file"),
    "no config": (GOOD, ["search", "--config", "tny.yaml", "--space", "space.yaml"], "config file 'tny.yaml' not found"),
    "a config with faults": (GOOD, [*SEARCH, "--set", "metric=auc"], "unknown metric 'auc'"),
    "two budgets": (GOOD, [*SEARCH, "--trials", "3", "--hours", "1"], "the budget is one of them"),
    "no trials": (GOOD, [*SEARCH, "--trials", "0"], "--trials 0: at least 1 is needed"),
    "no hours": (GOOD, [*SEARCH, "--hours", "0"], "--hours 0.0: a number above 0 is needed"),
    "no jobs": (GOOD, [*SEARCH, "--jobs", "0"], "--jobs 0: at least 1 is needed"),
    "less than no finalists": (GOOD, [*SEARCH, "--finalists", "-1"], "--finalists -1: at least 0 is needed"),
    "a pruner that is none": (GOOD, [*SEARCH, "--pruner", "hyperband"], "allowed are median, halving, none"),
    "seeds of words": (GOOD, [*SEARCH, "--seeds", "a"], "--seeds 'a': allowed are"),
    "a fold that is none": (GOOD, [*SEARCH, "--fold", "9"], "--fold '9': allowed are"),
    "no held-out rows": (GOOD, [*SEARCH, "--fold", "full"], "--fold full has no held-out rows to score a trial by"),
    "a name that leads elsewhere": (GOOD, [*SEARCH, "--name", "../x"], "--name: a name is a folder inside searches/"),
    "no data": (GOOD, [*SEARCH, "--set", "competition.train=gone.csv"], "gone.csv"),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDERS)
def test_orders(case: str, refuses: Callable[..., str]) -> None:
    pytest.importorskip("optuna", reason="optuna, of the extra `hpo`, is not installed")
    space, arguments, *words = ORDERS[case]
    if space is not None:
        Path("space.yaml").write_text(space)
    refuses(arguments, words)


def test_without_optuna(refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    Path("space.yaml").write_text(GOOD)
    monkeypatch.setitem(sys.modules, "optuna", None)
    refuses(SEARCH, ["comp search needs Optuna", "pip install optuna", "comp[hpo]"])


def test_corners_of_a_large_space_are_sampled_each_value_at_least_once(here: Path) -> None:
    keys = {f"optimizer.{key}": [0.1, 0.2, 0.3] for key in ("lr", "head_lr", "weight_decay", "clip_norm", "eps")}
    keys |= {"training.epochs": [1, 2, 3], "training.batch_size": [8, 16, 32], "model.max_length": [8, 16, 32, 48]}
    Path("space.yaml").write_text("".join(f"{key}: {values}\n" for key, values in keys.items()))
    space = read_space("space.yaml", Source("tiny.yaml"))
    corners = list(space.corners())
    assert len(corners) == MOST_CORNERS
    assert {(key, value) for corner in corners for key, value in corner.items()} == {
        (key, value) for key, values in keys.items() for value in values
    }
    Path("space.yaml").write_text(Path("space.yaml").read_text().replace("[8, 16, 32, 48]", "[8, 16, 32, 3]"))
    with pytest.raises(ConfigError, match=r"model.max_length = 3: input should be greater than or equal to 4"):
        read_space("space.yaml", Source("tiny.yaml"))


def test_a_condition_leaves_a_key_out(here: Path) -> None:
    Path("space.yaml").write_text(
        "groups.decay: {kind: float, low: 0.8, high: 0.9, when: {groups.layout: llrd}}\ngroups.layout: [unified, llrd]\n"
    )
    space = read_space("space.yaml", Source("tiny.yaml"))
    assert list(space.rows) == ["groups.layout", "groups.decay"]
    assert [overrides_of(corner) for corner in space.corners()] == [
        ['groups.layout="unified"'],
        ['groups.layout="llrd"', "groups.decay=0.8"],
        ['groups.layout="llrd"', "groups.decay=0.9"],
    ]
