"""The arithmetic of benchmarks/: pooled scores, paired gains, the table and the picture; ratios of times."""

from __future__ import annotations

import json
import sys
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "studies"


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module the studies share, imported as they do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield import_module("clear600")
    for name in ("clear600", "poolers", "multitask", "stability", "further_pretraining", "rows"):
        sys.modules.pop(name, None)


def row(variant: str, seed: int, fold: int, best: float, last: float) -> dict[str, Any]:
    """A fold of 4 rows with the given RMSE."""
    return {
        "variant": variant, "seed": seed, "fold": fold, "rows": 4, "seconds": 10.0,
        "squared_best": 4 * best**2, "squared_last": 4 * last**2,
    }  # fmt: skip


@pytest.fixture
def study(studies: Any) -> Any:
    return studies.Study("made_up", "A study", "thing", "plain", {"plain": [], "better": [], "worse": []})


ROWS = [
    row("plain", 1, 0, 0.5, 0.6), row("plain", 1, 1, 0.7, 0.7), row("plain", 2, 0, 0.6, 0.6),
    row("better", 1, 0, 0.4, 0.5), row("better", 1, 1, 0.5, 0.5), row("better", 2, 0, 0.5, 0.7),
    row("worse", 1, 0, 0.9, 0.9),
]  # fmt: skip


def test_scores_are_pooled_over_rows_and_gains_paired(studies: Any, study: Any) -> None:
    lines = studies.summary(study, ROWS)
    assert [line["variant"] for line in lines] == ["better", "plain", "worse"]
    better, plain, worse = lines
    first_seed = np.sqrt((4 * 0.5**2 + 4 * 0.7**2) / 8)
    assert plain["best"] == pytest.approx((first_seed + 0.6) / 2)
    assert better["gain_best"] == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert better["error_best"] == pytest.approx(np.std([0.1, 0.2, 0.1], ddof=1) / np.sqrt(3))
    assert better["gain_last"] == pytest.approx((0.1 + 0.2 - 0.1) / 3)
    assert plain["error_best"] is None and worse["error_best"] is None
    assert better["spread"] == pytest.approx(np.std([0.4, 0.5, 0.5], ddof=1))


def test_the_latest_row_wins(studies: Any, tmp_path: Path) -> None:
    rows = import_module("rows")
    file = tmp_path / "rows.jsonl"
    keys = studies.KEYS
    assert studies.read_rows(file, *keys) == []
    for made in (ROWS[0], row("plain", 1, 0, 0.9, 0.9), "plain: refused because"):
        rows.note(file, made, studies.describe)
    assert [line["squared_best"] for line in studies.read_rows(file, *keys)] == [4 * 0.9**2]
    assert len(file.read_text().splitlines()) == 2


def test_the_table_has_a_line_per_variant(studies: Any, study: Any) -> None:
    text = studies.table(study, ROWS)
    assert text.count("\n| ") == 4
    assert "| better | 3 | 0.4764 |" in text


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:1], [row for row in ROWS if row["seed"] == 1]], ids=["all", "one", "seed 1"]
)
def test_the_picture_is_written(rows: list[dict[str, Any]], studies: Any, study: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `dev`, is not installed")
    studies.picture(study, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", ["poolers", "multitask"])
def test_committed_tables_are_those_of_the_committed_rows(name: str, studies: Any) -> None:
    own = import_module(name).STUDY
    rows = studies.read_rows(own.rows, *studies.KEYS)
    if not rows:
        pytest.skip(f"no rows of {name} are committed yet")
    assert {row["variant"] for row in rows} <= set(own.variants)
    assert (studies.RESULTS / f"{name}.md").read_text(encoding="utf-8") == studies.table(own, rows)
    assert all(json.dumps(row) for row in rows)


def test_every_variant_is_a_valid_config(studies: Any) -> None:
    from comp import config_file

    base = studies.ROOT / "configs" / "clear-minilm.yaml"
    for name in ("poolers", "multitask"):
        for overrides in import_module(name).STUDY.variants.values():
            config_file.load(base, [*studies.SETTINGS, *overrides])


def test_the_cost_of_a_pooler_is_its_time_over_that_of_mean_whichever_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = util.spec_from_file_location("poolers_cost", FOLDER.parent / "poolers.py")
    assert spec is not None and spec.loader is not None
    cost = util.module_from_spec(spec)
    spec.loader.exec_module(cost)
    order: list[Any] = []
    monkeypatch.setattr(cost, "seconds", lambda step, model, *_: order.append(model) or {"mean": 2.0, "it": 3.0}[model])
    assert cost.ratios(None, "it", "mean", None, None, rounds=3) == [1.5, 1.5, 1.5]
    assert order == ["mean", "it", "it", "mean", "mean", "it", "it", "mean"]
    assert cost.ratios(None, "mean", "mean", None, None, rounds=2) == [1.0, 1.0]


def test_the_baseline_of_multitask_is_that_of_the_poolers(
    studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comp import config_file

    multitask, poolers = import_module("multitask"), import_module("poolers")
    base = studies.ROOT / "configs" / "clear-minilm.yaml"
    same = [study.variants[study.baseline] for study in (multitask.STUDY, poolers.STUDY)]
    assert len({config_file.load(base, [*studies.SETTINGS, *own]).model_dump_json() for own in same}) == 1
    monkeypatch.setattr(import_module("rows"), "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    made = [{**row("mean", seed, 0, 0.5, 0.6), "commit": "abc"} for seed in (1, 2)]
    (tmp_path / "poolers.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*made, row("max", 1, 0, 1, 1)])
    )
    for _ in range(2):
        multitask.take_over()
        found = studies.read_rows(multitask.STUDY.rows, *studies.KEYS)
        assert [(line["variant"], line["seed"], line["commit"]) for line in found] == [
            ("target alone", 1, "abc"), ("target alone", 2, "abc"),
        ]  # fmt: skip
        assert len((tmp_path / "multitask.jsonl").read_text().splitlines()) == 2


# --- stability -------------------------------------------------------------------------------------------------------


def few(stability: Any, label: str, seed: int, score: float, overrides: list[str]) -> Any:
    made = {"variant": label, "overrides": overrides, "seed": seed, "selection": score}
    return made if seed == stability.TRIAL_SEED else {**made, "rmse": score + 0.1}


@pytest.fixture
def stability(studies: Any) -> Any:
    return import_module("stability")


@pytest.fixture
def few_rows(stability: Any) -> list[dict[str, Any]]:
    """Trials that choose the second rate for plain and the third decay for llrd, two seeds of each, stale ones too."""
    rates, decays = stability.VARIANTS["plain"].candidates, stability.VARIANTS["llrd"].candidates
    plain = list(rates[1])
    trial = stability.TRIAL_SEED
    rows = [few(stability, "plain", trial, score, list(one)) for one, score in zip(rates, (0.8, 0.6, 0.7), strict=True)]
    tried = [
        few(stability, "llrd", trial, score, [*plain, *one]) for one, score in zip(decays, (0.6, 0.7, 0.5), strict=True)
    ]
    rows += [
        *tried,
        few(stability, "llrd", 1, 0.1, [*plain, *decays[0]]),
        few(stability, "plain", 1, 0.1, list(rates[0])),
    ]
    for seed, before, after in ((1, 0.5, 0.45), (2, 0.7, 0.55)):
        rows.append(few(stability, "plain", seed, before, plain))
        rows.append(few(stability, "llrd", seed, after, [*plain, *decays[2]]))
    return rows


def test_the_rows_to_choose_by_choose_and_the_others_score(stability: Any, few_rows: list[dict[str, Any]]) -> None:
    best, plain = stability.summary(few_rows)
    assert (best["variant"], plain["variant"]) == ("llrd", "plain")
    assert best["scores"] == pytest.approx([0.55, 0.65]) and plain["scores"] == pytest.approx([0.6, 0.8])
    assert best["gain"] == pytest.approx(100 * 0.1 / 0.7)
    assert best["error"] == pytest.approx(100 * np.std([0.05, 0.15], ddof=1) / 2**0.5 / 0.7)
    assert (best["steadier"], best["worst"]) == pytest.approx((0.5, 0.65))
    assert best["selection"] == pytest.approx(0.5)


def test_a_stop_loses_nothing_and_the_choice_goes_on(
    stability: Any, few_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run with trainings made up: trials of plain first, then of the rest on top of its choice, then the seeds."""
    file, called = tmp_path / "rows.jsonl", []
    monkeypatch.setattr(stability, "ROWS", file)
    monkeypatch.setattr(stability, "prepare", lambda: None)

    def train_all(call: Any, todo: Any, file: Path, **_: Any) -> None:
        for label, overrides, _weights, seed in todo:
            called.append((label, seed))
            if len(called) == 50:
                raise KeyboardInterrupt
            score = 0.5 + seed / 1000 - 0.01 * ("optimizer.lr=0.0002" in overrides)
            made = few(stability, label, seed, score, list(overrides))
            import_module("rows").note(file, made, stability.describe)

    monkeypatch.setattr(stability, "train_all", train_all)
    with pytest.raises(KeyboardInterrupt):
        stability.run(1)
    stability.run(1)
    rows = stability.known()
    counts = {label: sum(row["variant"] == label and "rmse" in row for row in rows) for label in stability.VARIANTS}
    assert set(counts.values()) == {8}
    assert len(called) == len(rows) + 1, "only the interrupted one was trained again"
    assert all(row["overrides"][0] == "optimizer.lr=0.0002" for row in rows if row["variant"] != "plain")
    assert stability.table(rows).count("\n| ") == len(stability.VARIANTS) + 1


def test_costs_are_timed_in_pairs_and_a_stop_loses_none(
    stability: Any, few_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, order = tmp_path / "costs.jsonl", []
    monkeypatch.setattr(stability, "COSTS", file)
    monkeypatch.setattr(stability, "prepare", lambda: None)
    monkeypatch.setattr(stability, "known", lambda: few_rows)
    monkeypatch.setattr(stability, "timed", lambda own: order.append(own) or 2.0 + ("decay" in " ".join(own)))
    assert stability.costs_of(few_rows) == {}
    stability.time_all(1)
    assert len(order) == 2 * len(stability.VARIANTS)
    stability.time_all(2)
    assert len(order) == 4 * len(stability.VARIANTS), "the first round was timed again"
    costs = stability.costs_of(few_rows)
    assert (costs["plain"], costs["llrd"]) == (1.0, 1.5)
    page = stability.table(few_rows)
    assert page.count("| 1.50 |\n") == 1


def test_the_pictures_of_few_samples_are_written(
    stability: Any, few_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `dev`, is not installed")
    stability.picture(few_rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000


def test_every_candidate_is_a_valid_config(stability: Any) -> None:
    from comp import config_file

    base = stability.ROOT / "configs" / "clear-minilm.yaml"
    for variant in stability.VARIANTS.values():
        for candidate in variant.candidates:
            config = config_file.load(base, [*stability.SETTINGS, "training.seed=1", *candidate])
            assert (config.stability.averaging.name == "none") == (variant.weights == "best")


def test_the_committed_table_of_few_samples_is_that_of_the_committed_rows(stability: Any) -> None:
    rows = stability.known()
    page = stability.RESULTS / "stability.md"
    if not page.exists():
        pytest.skip("the stability study has no report yet")
    assert page.read_text(encoding="utf-8") == stability.table(rows)


def test_the_table_of_further_pretraining(studies: Any) -> None:
    study = import_module("further_pretraining")
    made = {"variant": study.PRETRAINING, "seed": 1, "fold": -1, "before": 40000.0, "best": 9.5}
    rows = [
        made | {"steps": 250, "tokens": 1_000_000, "seconds": 200.0},
        *(row(study.PLAIN, 1, fold, 0.7, 0.8) for fold in range(3)),
        *(row(study.FURTHER, 1, fold, 0.6 + fold / 100, 0.8) for fold in range(3)),
    ]
    text = study.table(rows)
    assert f"| {study.FURTHER} | 3 | 0.6101 | 0.8000 | 0.0100 | +0.0900 ± 0.0058 | +0.0000 ± 0.0000 |" in text
    assert "- seed 1: 40,000 before, 9.50 after 250 steps, 1,000,000 tokens" in text
    assert "4 held-out rows a fold" in text


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    yield import_module
    for name in ("goals", "eval_cost", "finished_run"):
        sys.modules.pop(name, None)


def test_goals_of_all_benchmarks_stand_in_one_table(
    benchmark_modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals = benchmark_modules("goals")
    monkeypatch.setattr(goals, "FILE", tmp_path / "goals.json")
    one = goals.Goal("time", 2.0, "at least", 1.5)
    goals.note("b.py", "here", [goals.Goal("start", 0.5, "at most", 0.5, "seconds"), one])
    goals.note("a.py", "here", [goals.Goal("padding", 3.01, "at most", 3.0, "percent")])
    goals.note("b.py", "there", [goals.Goal("start", 0.6, "at most", 0.5, "seconds"), one])
    assert goals.table()[-3:] == [
        "| padding | 3.01% | at most 3.00% | no | `python benchmarks/a.py` | here |",
        "| start | 0.60 s | at most 0.50 s | no | `python benchmarks/b.py` | there |",
        "| time | 2.00 | at least 1.50 | yes | `python benchmarks/b.py` | there |",
    ]


def test_the_committed_goals_are_those_of_the_committed_figures(benchmark_modules: Any) -> None:
    goals = benchmark_modules("goals")
    assert goals.PAGE.read_text(encoding="utf-8").splitlines() == goals.table()


def test_what_evaluations_cost_is_compared_within_a_seed(benchmark_modules: Any) -> None:
    eval_cost = benchmark_modules("eval_cost")

    def made(way: str, seed: int, took: tuple[float, float], best: float) -> dict[str, Any]:
        times = dict(zip(("train_seconds", "eval_seconds"), took, strict=True))
        return {"way": way, "seed": seed, "best": best, "rows_scored": 1.0, **times}

    rows = [
        made("none", 0, (10, 3), 0.5), made("full", 0, (10, 10), 0.4), made("race, capped", 0, (10, 2), 0.5),
        made("none", 1, (20, 3), 0.5), made("full", 1, (20, 10), 0.4), made("race, capped", 1, (20, 8), 0.4),
        made("none", 2, (20, 3), 0.5), made("full", 2, (20, 90), 0.4), made("race", 1, (10, 5), 0.4),
    ]  # fmt: skip
    ways = eval_cost.compared(rows)
    assert ways["race, capped"][1] == pytest.approx([1.2, 1.4]) and ways["none"][1] == [1, 1]
    assert ways["race, capped"][2] == pytest.approx([0.25, 0]) and ways["full"][1] == pytest.approx([2, 1.5])
    assert ways["race"][1] == [1.5] and "exact" not in ways
    time, score = eval_cost.goals_of("data", rows)
    assert time.found == pytest.approx(1.3) and not time.met
    assert score.found == pytest.approx(12.5) and not score.met
