"""comp search: trials that repeat, are pruned, killed and gone on with; what is kept of them, and what comes out.

Most tests make the training up: a score that follows from the learning rate, told at every quarter of the steps.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from comp import config_file
from comp.config import Config
from comp.runs import read_json
from comp.training import search as searching
from comp.training.oof import Scores
from comp.training.search import Order, open_search, search
from comp.training.search_result import chosen, optimism, study_table, write_best
from comp.training.search_workers import run_workers
from comp.training.study import Pruned, Reporter, Tried, hours_of
from comp.training.trainer import NonFiniteError, Stopped

pytest.importorskip("optuna", reason="optuna, of the extra `hpo`, is not installed")

SPACE = """
optimizer.lr: {kind: float, low: 1.0e-5, high: 1.0e-2, log: true}
training.batch_size: [8, 16]
groups.layout: [unified, llrd]
groups.decay: {kind: float, low: 0.8, high: 1.0, when: {groups.layout: llrd}}
"""
ORDER = Order("tiny.yaml", "space.yaml", "lr", trials=8, finalists=0)


def quiet(line: str) -> None: ...


def loss_of(config: Config) -> float:
    """0.5 at a rate of 3e-4, and worse by its distance in powers of ten; a little by the seed."""
    return 0.5 + abs(math.log10(config.optimizer.lr / 3e-4)) / 10 + config.training.seed % 42 / 1e4


class MadeUp:
    """In place of crossval.run: scores without training. `before(call)` may raise, `seen` are the configs."""

    def __init__(self, before: Callable[[int], None] = lambda call: None) -> None:
        self.before, self.seen = before, list[Config]()

    def __call__(
        self, config: Config, name: str, folds: str, *, root: Path, say: Any, watch: Any = None, **_: Any
    ) -> Scores:
        self.seen.append(config)
        fold = int(folds.split(",")[0])
        own = root / name / f"fold{fold}"
        own.mkdir(parents=True, exist_ok=True)
        (own / "best.safetensors").write_bytes(b"weights")
        for quarter in range(1, 5):
            if watch is not None:
                watch(fold, quarter / 4, loss_of(config) + (4 - quarter) / 100)
            self.before(len(self.seen))
        (own / "done.json").write_text("{}")
        score = loss_of(config)
        return Scores("rmse", {0: score}, score, {0: score}, score, num_rows=30)


@pytest.fixture
def place(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Path("space.yaml").write_text(SPACE)
    monkeypatch.setattr(searching, "release_memory", lambda: None)  # nothing is trained, and it takes long
    tiny = yaml.safe_load(Path("tiny.yaml").read_text())
    tiny |= {"metric": "log_loss"}  # of kind binary; the lower, the better
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny))
    return here


def run(order: Order, monkeypatch: pytest.MonkeyPatch, made_up: MadeUp | None = None, **options: Any) -> list[Tried]:
    monkeypatch.setattr(searching.crossval, "run", made_up or MadeUp())
    return search(open_search(order), say=quiet, **options)[0]


def told(tried: Sequence[Tried]) -> list[Any]:
    return [(one.state, one.score, one.values, one.share) for one in tried if one.state != "killed"]


# --- the trials ------------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_trials(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (run(replace(ORDER, name=name, trials=14), monkeypatch) for name in ("one", "two"))
    other = run(replace(ORDER, name="other", trials=14, seed=1), monkeypatch)
    assert told(one) == told(two) != told(other)
    assert {one.state for one in one} == {"complete", "pruned"}
    assert all(("groups.decay" in trial.values) == (trial.values["groups.layout"] == "llrd") for trial in one)
    assert len({str(trial.values) for trial in one}) == 14


def test_a_trial_that_is_behind_is_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = MadeUp()
    tried = run(replace(ORDER, trials=14), monkeypatch, made_up)
    pruned = [one for one in tried if one.state == "pruned"]
    complete = [one.score for one in tried if one.state == "complete"]
    assert all(25 <= one.share < 100 and one.note.startswith("behind at") for one in pruned)
    assert all(one.score is not None and one.score > sorted(complete)[len(complete) // 2] for one in pruned)
    assert len(run(replace(ORDER, name="none", trials=14, pruner="none"), monkeypatch)) == 14
    halving = run(replace(ORDER, name="halving", trials=14, pruner="halving"), monkeypatch)
    assert {one.state for one in halving} == {"complete", "pruned"}


def test_weights_are_kept_of_the_best_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = run(replace(ORDER, trials=10, keep=2), monkeypatch)
    best = sorted((one for one in tried if one.state == "complete"), key=lambda one: one.score or 0)[:2]
    kept = {path.parent.parent.name for path in Path("searches/lr/trials").glob("*/fold0/*.safetensors")}
    assert kept == {f"trial-{one.number:04d}" for one in best}
    assert len(list(Path("searches/lr/trials").iterdir())) == 10


def test_values_that_were_tried_are_not_trained_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("space.yaml").write_text("training.batch_size: [8, 16]\n")
    made_up = MadeUp()
    tried = run(ORDER, monkeypatch, made_up)
    assert len(tried) == 8 and len(made_up.seen) == 2
    assert sum(one.note.startswith("the values of trial") for one in tried) == 6


def test_a_budget_that_grows_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(replace(ORDER, name="whole", trials=12), monkeypatch)
    run(replace(ORDER, trials=5), monkeypatch)
    made_up = MadeUp()
    grown = run(replace(ORDER, trials=12), monkeypatch, made_up)
    assert told(grown) == told(whole) and len(made_up.seen) == 7
    assert run(replace(ORDER, trials=3), monkeypatch) == grown, "there is nothing left to do"


def test_hours_are_those_in_which_a_trial_ran() -> None:
    start = datetime(2026, 1, 1)

    def trial(state: str, began: int, ended: int | None) -> Tried:
        times = [None if minutes is None else start + timedelta(minutes=minutes) for minutes in (began, ended)]
        return Tried(0, state, 0.5, {}, 100, "", times[0], times[1])

    spans = [trial("complete", 0, 30), trial("pruned", 20, 45), trial("killed", 45, 500), trial("complete", 600, 615)]
    assert hours_of(spans) == pytest.approx(1.0)
    assert hours_of([trial("complete", 0, 60), trial("complete", 10, 20)]) == pytest.approx(1.0)
    assert hours_of([trial("running", 0, None)]) == 0


def test_hours_end_a_search(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comp.training.study.hours_of", lambda tried: 0.7 * sum(one.finished for one in tried))
    assert len(run(replace(ORDER, trials=None, hours=2.0), monkeypatch)) == 3


# --- going on --------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from test_search import ORDER, MadeUp, quiet, searching, open_search, search
def kill(call):
    if call == 4:
        os.kill(os.getpid(), signal.SIGKILL)
searching.crossval.run = MadeUp(kill)
search(open_search(ORDER), say=quiet)
"""


def test_a_search_that_was_killed_ends_like_one_that_was_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(replace(ORDER, name="whole"), monkeypatch)
    code = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = Path("searches/lr")
    assert (folder / "trials/trial-0003/fold0/best.safetensors").exists()
    with open(folder / "journal.log", "ab") as journal:
        journal.write(b'{"op_code": 4, "wor')  # half a line
    (folder / "journal.log.lock").write_text("")
    made_up = MadeUp()
    tried = run(ORDER, monkeypatch, made_up)
    assert [one.state for one in tried].count("killed") == 1 and tried[3].state == "killed"
    assert told(tried) == told(whole) and len(made_up.seen) == 5
    assert not (folder / "trials/trial-0003").exists()


@pytest.mark.parametrize(
    "fault", [Stopped("after step 3", signal.SIGTERM), KeyboardInterrupt(), RuntimeError("memory")]
)
def test_a_search_that_was_stopped_ends_like_one_that_was_not(
    fault: BaseException, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(call: int) -> None:
        if call == 4:
            raise fault

    with pytest.raises(type(fault)):
        run(ORDER, monkeypatch, MadeUp(stop))
    tried = run(ORDER, monkeypatch)
    assert told(tried) == told(run(replace(ORDER, name="whole"), monkeypatch))
    assert tried[3].state == "killed"


def test_another_search_of_that_name_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(replace(ORDER, trials=1), monkeypatch)
    Path("space.yaml").write_text(f"{SPACE}training.epochs: [1, 2]\n")
    with pytest.raises(ValueError, match="made from another space and another --fold, whose scores .* --restart"):
        run(replace(ORDER, fold="1"), monkeypatch)
    tried = run(replace(ORDER, fold="1", trials=2), monkeypatch, restart=True)
    assert len(tried) == 2 and "training.epochs" in tried[0].values


# --- trials that cannot be trained -----------------------------------------------------------------------------------


def refuse(text: str) -> None:
    from comp.catalog import pick

    pick({}, text, "warm-up")


def test_a_trial_that_diverges_is_no_good_and_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(call: int) -> None:
        if call == 2:
            raise NonFiniteError("training stopped at step 3: loss nan; learning rate 1.0e-02")

    tried = run(replace(ORDER, trials=4), monkeypatch, MadeUp(diverge))
    assert (tried[1].state, tried[1].note) == ("pruned", "diverged: training stopped at step 3: loss nan")
    assert len(tried) == 4


def test_a_trial_that_is_refused_does_not_count(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = run(replace(ORDER, trials=4), monkeypatch, MadeUp(lambda call: refuse("long") if call == 2 else None))
    assert [one.state for one in tried].count("refused") == 1 and len(tried) == 5
    assert tried[1].note.startswith("unknown warm-up 'long'")
    assert tried[1].values != tried[2].values


def test_a_search_ends_where_nothing_can_be_trained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"trial 0 \(optimizer.lr=.*\) was refused: unknown warm-up 'long'"):
        run(ORDER, monkeypatch, MadeUp(lambda call: refuse("long")))
    assert not Path("searches").exists()
    with pytest.raises(ValueError, match=r"trial 4 .* was refused: unknown warm-up 'later'"):
        run(ORDER, monkeypatch, MadeUp(lambda call: refuse("later") if call > 2 else None))
    assert Path("searches/lr/trials/trial-0001").exists()


def test_a_fault_of_a_library_is_not_taken_for_a_refusal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        run(ORDER, monkeypatch, MadeUp(lambda call: print(int("x"))))


# --- comparing trials of different lengths ---------------------------------------------------------------------------


class Noted:
    metric = "rmse"

    def __init__(self, prune_at: float = 1000) -> None:
        self.reports, self.prune_at = list[tuple[int, float]](), prune_at

    def report(self, number: int, percent: int, score: float) -> None:
        self.reports.append((percent, score))

    def should_prune(self, number: int) -> bool:
        return self.reports[-1][0] >= self.prune_at


def test_trials_are_compared_at_shares_of_their_steps() -> None:
    study = Noted()
    reporter = Reporter(study, 0, [0])  # type: ignore[arg-type]
    for share, score in ((0.09, 0.9), (0.19, 0.7), (0.205, 0.6), (0.35, 0.8), (1.0, 0.5)):
        reporter(0, share, score)
    expected = [(10, 0.9), (15, 0.9), (20, 0.7), (25, 0.6), (30, 0.6), (35, 0.6)]
    assert study.reports == [*expected, *((percent, 0.6) for percent in range(40, 100, 5)), (100, 0.5)]


def test_several_folds_are_one_trial() -> None:
    study = Noted(prune_at=75)
    reporter = Reporter(study, 0, [1, 3])  # type: ignore[arg-type]
    reporter(1, 0.5, 0.8)
    reporter(1, 1.0, 0.6)
    with pytest.raises(Pruned, match=r"behind at 75% of its steps: rmse 0\.70000"):
        reporter(3, 0.5, 0.8)
    assert study.reports[-1] == (75, pytest.approx(0.7))
    assert (50, 0.6) in study.reports and (70, 0.6) in study.reports
    finished = Reporter(Noted(prune_at=0), 0, [0])  # type: ignore[arg-type]
    with pytest.raises(Pruned):
        finished(0, 0.5, 0.8)
    finished(0, 1.0, 0.8)  # its training is over: there is nothing to save


# --- what comes out --------------------------------------------------------------------------------------------------


def test_finalists_are_trained_again_and_the_best_mean_wins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = replace(ORDER, finalists=3, seeds=(0, 7))
    made_up = MadeUp()
    monkeypatch.setattr(searching.crossval, "run", made_up)
    opened = open_search(order)
    tried, finalists = search(opened, say=quiet)
    best = sorted((one for one in tried if one.state == "complete"), key=lambda one: one.score or 0)[:3]
    assert {own.tried.number for own in finalists} == {one.number for one in best}
    assert [own.mean for own in finalists] == sorted(own.mean for own in finalists)
    assert finalists[0].deviation == pytest.approx(7e-4 / 2**0.5)
    assert [config.training.seed for config in made_up.seen[-6:]] == [0, 7] * 3
    kept = {path.parent.parent.name for path in Path("searches/lr/finalists").glob("*/fold0/*.safetensors")}
    assert kept == {f"trial-{finalists[0].tried.number:04d}-seed{seed}" for seed in (0, 7)}
    winner = chosen(opened, tried, finalists)
    assert winner is finalists[0].tried
    table = study_table(opened, tried, finalists, most=3).splitlines()
    assert table[0].split()[:3] == ["trial", "state", "log_loss"] and table[1].split()[0] == str(best[0].number)
    assert table[4].startswith("... and 5 more, in searches/lr/trials.csv")
    assert table[-3].split()[:2] == ["trial", str(finalists[0].tried.number)]
    assert f"trial {best[0].number}'s {best[0].score:.5f} is flattered: the best of" in optimism(
        opened, tried, finalists
    )


def test_the_best_config_is_ready_to_train(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("space.yaml").write_text(
        "optimizer.name: [adamw, madgrad]\n"
        "optimizer.momentum: {kind: float, low: 0.5, high: 0.9, when: {optimizer.name: madgrad}}\n"
        "tasks.0.loss: [{name: bce}, {name: focal, gamma: 1.0}]\n"
        "model.pooler: [{name: mean}, {name: gem}]\n"
        "stability.reinit_layers: {kind: int, low: 0, high: 2}\n"
    )
    Path("sub").mkdir()
    Path("sub/own.yaml").write_text("extends: ../tiny.yaml\ngroups: {layout: llrd}\noptimizer: {weight_decay: 0.0}\n")
    monkeypatch.setattr(searching.crossval, "run", MadeUp())
    opened = open_search(
        replace(ORDER, config="sub/own.yaml", overrides=["groups.decay=0.7", "training.epochs=2"], trials=12)
    )
    tried, _ = search(opened, say=quiet)
    for one in tried:
        if one.state != "complete":
            continue
        path = write_best(opened, one, tried, [])
        wanted = opened.source.config(
            [*opened.order.overrides, *(f"{k}={json.dumps(v)}" for k, v in one.values.items())]
        )
        assert config_file.load(path) == wanted
        head = path.read_text().splitlines()[:4]
        assert [line.split()[1] for line in head[1:]] == ["Command:", "Cost:", "Result:"]
        assert yaml.safe_load(path.read_text())["extends"] == "../../sub/own.yaml"


# --- for real --------------------------------------------------------------------------------------------------------


def test_a_search_by_the_command_line(here: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: Any) -> None:
    """Two trials in full, one stopped after its first evaluation, and one finalist."""
    Path("space.yaml").write_text("optimizer.lr: {kind: float, low: 1.0e-4, high: 1.0e-2, log: true}\n")
    calls = []
    monkeypatch.setattr(
        "comp.training.study.Study.should_prune", lambda self, number: calls.append(number) or number == 1
    )
    command = ["search", "--config", "tiny.yaml", "--space", "space.yaml", "--trials", "3", "--finalists", "1"]
    command += ["--seeds", "5", "--set", "evaluation.every=50%"]
    status, out, err = call(*command)
    assert status == 0, err
    assert "3 trials (2 complete, 1 pruned)" in out and "finalist" in out
    folder = Path("searches/tiny")
    with open(folder / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete", "pruned", "complete"]
    assert rows[1]["percent_trained"] == "50" and calls.count(1) == 1
    steps = [
        {json.loads(line)["step"] for line in path.read_text().splitlines() if "valid/score" in line}
        for path in (folder / f"trials/trial-000{number}/fold0/metrics.jsonl" for number in (0, 1))
    ]
    assert steps == [{2, 4}, {2}]
    assert not list((folder / "trials/trial-0001").rglob("*.safetensors"))
    assert not (folder / "trials/trial-0001/fold0/done.json").exists()
    scores = read_json(folder / f"trials/trial-000{2 if rows[2]['roc_auc'] > rows[0]['roc_auc'] else 0}/scores.json")
    assert f"{scores['best']['pooled']:.5f}" in out
    listed = call("oof")[1]
    assert "trial" not in listed and "tiny" in listed
    assert call("infer", "--out", "again.csv")[0] == 0, "the newest run is still runs/tiny"
    for number in (0, 1):
        status, out, err = call("report", "--text", str(folder / f"trials/trial-000{number}"))
        assert status == 0, err
    best = config_file.load(folder / "best.yaml")
    assert best.evaluation.every == "50%" and best.training.seed == 42
    status, out, err = call(*command)
    assert status == 0 and "[3/3]" not in out and "3 trials" in out, "there is nothing left to train"


def test_two_processes_on_one_study(here: Path) -> None:
    Path("space.yaml").write_text("optimizer.lr: {kind: float, low: 1.0e-4, high: 1.0e-2, log: true}\n")
    said: list[str] = []
    order = replace(ORDER, trials=4, jobs=2, overrides=["training.max_rows=16"])
    tried, _ = search(open_search(order), side_by_side=run_workers, say=said.append)
    assert [one.number for one in tried] == [0, 1, 2, 3] and all(one.finished for one in tried)
    assert len({str(one.values) for one in tried}) == 4
    assert sum(": complete" in line or ": pruned" in line for line in said) == 4
    first = sorted((one.began, one.ended) for one in tried if one.began and one.ended)
    assert first[1][0] < first[0][1], "the second trial began while the first was under way"


def test_workers_that_die_end_the_search_with_a_reason(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comp import worker

    Path("space.yaml").write_text("training.batch_size: [8, 16]\n")
    monkeypatch.setattr(worker, "COMMAND", "import os, sys; print('no memory', file=sys.stderr); os.abort()")
    reason = (
        r"4 workers of the search died; try fewer --jobs. The last: worker \d ended by SIGABRT; read .*worker\d.log"
    )
    with pytest.raises(RuntimeError, match=reason):
        search(open_search(replace(ORDER, jobs=2)), side_by_side=run_workers, say=quiet)
    assert "no memory" in Path("searches/lr/worker0.log").read_text()


def test_a_worker_says_what_it_was_refused(here: Path) -> None:
    space = Path("space.yaml")
    space.write_text("training.batch_size: [8, 16]\n")
    found = open_search(replace(ORDER, jobs=2))
    space.unlink()  # so that the workers are refused what this process was not
    with pytest.raises(ValueError, match="space.yaml"):
        search(found, side_by_side=run_workers, say=quiet)
    assert not Path("searches").exists()


def test_workers_stop_when_asked_to(here: Path) -> None:
    """Ctrl-C in the middle: every worker ends after its step, what was under way is forgotten, and done later."""
    Path("space.yaml").write_text("optimizer.lr: {kind: float, low: 1.0e-4, high: 1.0e-2, log: true}\n")
    order = replace(ORDER, trials=4, jobs=2, overrides=["training.max_rows=16"])
    said: list[str] = []

    def stop_once(line: str) -> None:
        if "trial" in line and not said:
            os.kill(os.getpid(), signal.SIGTERM)
        said.append(line)

    with pytest.raises(Stopped, match="the search was stopped"):
        search(open_search(order), side_by_side=run_workers, say=stop_once)
    assert any(line.startswith("stopping: every job finishes its step") for line in said)
    tried, _ = search(open_search(replace(order, finalists=0)), side_by_side=run_workers, say=quiet)
    assert sum(one.finished for one in tried) == 4 and not any(one.state == "running" for one in tried)
