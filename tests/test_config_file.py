"""Loading configs: merging, --set, and every fault said with its place and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from comp import config_file
from comp.config import Config
from comp.config_file import ConfigError, load, parse_yaml

MINIMAL = """
competition: {name: toy, train: train.csv}
tasks: [{name: main, kind: regression, targets: [target]}]
metric: rmse
model: {backbone: some/model}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_defaults_fill_in(tmp_path: Path) -> None:
    config = load(write(tmp_path, "a.yaml", MINIMAL))
    assert config.tasks[0].loss.name == "mse"
    assert config.folds.num_folds == 5
    assert config.fold_name == "toy"


def test_later_wins_file_by_file_then_set(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", MINIMAL + "optimizer: {lr: 1e-5, head_lr: 1e-4}\ntraining: {epochs: 7}\n")
    write(tmp_path, "two.yaml", "optimizer: {lr: 2e-5}\n")
    child = write(tmp_path, "child.yaml", "extends: [one.yaml, two.yaml]\ntraining: {batch_size: 4}\n")
    config = load(child, ["training.batch_size=8", "training.batch_size=9"])
    assert (config.optimizer.lr, config.optimizer.head_lr) == (2e-5, 1e-4)
    assert (config.training.epochs, config.training.batch_size) == (7, 9)


def test_a_new_variant_drops_what_it_does_not_know_and_keeps_what_it_does(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL + "schedule: {name: cosine, num_cycles: 1.5, warmup_percent: 3}\n")
    child = write(tmp_path, "child.yaml", "extends: base.yaml\nschedule: {name: linear}\n")
    schedule = load(child).schedule
    assert schedule.name == "linear"
    assert schedule.warmup_percent == 3
    smooth = load(child, ["tasks.0.loss.name=smooth_l1", "tasks.0.loss.beta=0.5"]).tasks[0].loss
    assert (smooth.name, smooth.beta) == ("smooth_l1", 0.5)
    assert (
        load(child, ["tasks.0.loss.name=smooth_l1", "tasks.0.loss.beta=2", "tasks.0.loss.name=mae"]).tasks[0].loss.name
        == "mae"
    )


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml")
    write(tmp_path, "b.yaml", "extends: a.yaml")
    assert "extends goes in a circle: a.yaml -> b.yaml -> a.yaml" in faults_of(tmp_path / "a.yaml")


def test_missing_parent_and_missing_file(tmp_path: Path, isolated: Path) -> None:
    assert "'nope.yaml' not found beside it" in faults_of(write(tmp_path, "a.yaml", "extends: nope.yaml"))
    (isolated / "configs").mkdir()
    write(isolated / "configs", "large.yaml", MINIMAL)
    assert load("large.yaml") == load("large") == load("configs/large.yaml")
    with pytest.raises(ValueError, match=r"'larg.yaml' not found; did you mean 'large.yaml'\?.*comp init"):
        load("larg.yaml")


def test_every_fault_in_one_message_with_place_source_and_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL + "optimizer: {lrr: 1e-5}\n")
    child = write(tmp_path, "child.yaml", "extends: base.yaml\nmodel: {pooler: {name: maen}}\nfoldz: {}\n")
    text = faults_of(child, "training.epochs=zero", "metric=rsme", "stability.mixout=1.1")
    assert "6 faults" in text
    assert f"optimizer.lrr ({tmp_path / 'base.yaml'}): unknown key; did you mean 'lr'? Allowed: lr, head_lr" in text
    assert f"model.pooler ({child}): unknown name 'maen'; did you mean 'mean'? Allowed: mean, max" in text
    assert f"foldz ({child}): unknown key; did you mean 'folds'?" in text
    assert "training.epochs (--set): input should be a valid integer" in text
    assert "got 'zero'" in text
    assert "metric (--set): unknown metric 'rsme'; did you mean 'rmse'?" in text
    assert "stability.mixout (--set): input should be less than or equal to 1, got 1.1" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.micro_batch_size=64", "micro_batch_size 64 is larger than batch_size 16"),
        ("tasks.0.loss.name=bce", "loss 'bce' does not fit kind 'regression'; allowed: mse, smooth_l1, mae"),
        ("metric=roc_auc", "metric 'roc_auc' does not fit the first task's kind 'regression'"),
        ("folds.splitter=group", "splitter 'group' needs `group`"),
        ("folds.splitter=time", "needs `column`: the column to sort by"),
        ("folds.splitter=strat", "did you mean 'stratified'?"),
        ("evaluation.every=10 per cent", "every is '10%' (of an epoch) or '25 steps', got '10 per cent'"),
        ("evaluation.schedule=[[0.5, 4]]", "with a schedule, set `every: null`"),
        ("schedule={name: linear, warmup_steps: 3, warmup_percent: 5}", "give the warm-up in one unit"),
        ("optimizer.betas=[0.9, 1.0]", "betas must lie in [0, 1)"),
        ("tasks=[{name: a, kind: multilabel, targets: [x]}]", "needs several target columns"),
        ("tasks=[{name: a, kind: binary, targets: [x, y]}]", "kind 'binary' has exactly one target column, got 2"),
        ("competition.name=a b", "competition.name"),
        ("competition.text=[a, a]", "each once"),
        ("training", "--set wants key=value, got 'training'"),
        ("tasks.3.weight=2", "there is no '3' to set"),
        ("model.backbone=", "model.backbone"),
        ("folds.bins=1", "bins must be at least 2"),
        ("folds={splitter: kfold, bins: 7}", "splitter 'kfold' does not read `bins`"),
    ],
)
def test_faults(tmp_path: Path, override: str, words: str) -> None:
    assert words in faults_of(write(tmp_path, "a.yaml", MINIMAL), override)


def test_what_is_missing_is_explained(tmp_path: Path) -> None:
    text = faults_of(write(tmp_path, "a.yaml", "competition: {name: toy}\nmetric: rmse\n"))
    assert "competition.train" in text
    assert "is missing: Training table, CSV or parquet" in text
    assert "tasks: is missing" in text
    assert "model: is missing" in text


def test_yaml_reads_numbers_and_switches_as_people_write_them() -> None:
    assert parse_yaml("lr: 2e-5") == {"lr": 2e-5}
    assert parse_yaml("wandb: off") == {"wandb": "off"}
    assert parse_yaml("[true, no, 1, 1.5, .5, 1e3, -2, 2024-01-01, '7']") == [
        True, "no", 1, 1.5, 0.5, 1000.0, -2, "2024-01-01", "7",
    ]  # fmt: skip


def test_yaml_faults_name_the_line(tmp_path: Path) -> None:
    assert "line 3: key 'a' is given twice (first in line 1)" in faults_of(
        write(tmp_path, "a.yaml", "a: 1\nb: 2\na: 3")
    )
    assert "line 2: not valid YAML" in faults_of(write(tmp_path, "b.yaml", "a: 1\n  b: [2"))
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    assert "not UTF-8" in faults_of(tmp_path / "c.yaml")
    assert "a config file is a mapping of keys, got list" in faults_of(write(tmp_path, "d.yaml", "- a"))


def test_dump_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = load(write(tmp_path, "a.yaml", MINIMAL), ["evaluation.every=null", "evaluation.schedule=[[0.5,4],[-1,1]]"])
    assert load(write(tmp_path, "b.yaml", config_file.dump(config))) == config


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load(write(tmp_path, "a.yaml", MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.training.epochs = 9


def test_schema_documents_every_field() -> None:
    document = config_file.schema()
    assert "extends" in document["properties"]
    for name, section in document["$defs"].items():
        for field, about in section.get("properties", {}).items():
            if field not in ("name", "layout", "averaging", "adversarial") and name not in ("Config",):
                assert about.get("description"), f"{name}.{field} is not documented"


def test_the_contract_of_keys_loads(tmp_path: Path) -> None:
    """../shared/config-example.yaml lists every section once; each of its keys must be one of ours."""
    example = Path(__file__).parent.parent.parent / "shared" / "config-example.yaml"
    if not example.exists():
        pytest.skip(f"{example} is not here")
    write(tmp_path, "base.yaml", "")
    config = load(write(tmp_path, "example.yaml", example.read_text(encoding="utf-8")))
    assert isinstance(config, Config)
    assert config.groups.layout == "llrd"
