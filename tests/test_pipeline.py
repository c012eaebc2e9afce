"""comp pipeline: what runs, what is skipped, and why; failures, kills and stops; files that are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import typer

from comp import pipeline as running
from comp.cli import app
from comp.cli_search import _commands
from comp.pipeline import StepFailed, run_pipeline
from comp.pipeline_file import read_pipeline
from comp.runs import read_json

COMMANDS = dict(_commands(typer.main.get_command(app)))
STEPS = """
name: two
steps:
  - {name: first, command: train, config: tiny.yaml, args: {run: first, set: [training.epochs=1]}}
  - {name: labels, command: pseudo, args: {run: runs/first, data: data/test.csv, name: labels}}
  - {name: second, command: train, config: second.yaml, args: {fold: "0"}}
  - {name: both, command: blend, args: {run: [runs/first, runs/second], name: both}}
  - {name: predict, command: infer, args: {blend: blends/both, out: out.csv}}
"""
SECOND = "extends: tiny.yaml\npseudo: {folder: pseudo/labels}\n"
MAKES = {"pretrain": "runs/{run}/backbone/model.safetensors", "train": "runs/{run}/fold0/best.safetensors", "pseudo": "pseudo/{name}/labels.parquet", "blend": "blends/{name}/weights.json", "infer": "{out}"}  # fmt: skip


class Hands:
    """In place of processes: notes each command and writes what it would make; `fail`: command -> exit status."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.fail: dict[str, int] = {}
        self.content: dict[str, str] = {}

    def __call__(self, words: Sequence[str]) -> int:
        told = {words[i][2:]: words[i + 1] for i in range(1, len(words) - 1) if words[i].startswith("--")}
        if words[0] == "train":
            told.setdefault("run", Path(told["config"]).stem)
        self.called.append(f"{words[0]} {told.get('run', '')}".strip() if words[0] == "train" else words[0])
        if status := self.fail.get(self.called[-1], 0):
            return status
        made = Path(MAKES[words[0]].format(**told))
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(self.content.get(self.called[-1], "made"))
        if words[0] == "train":
            Path("folds/tiny-binary.csv").touch()
        return 0


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def go(here: Path, hands: Hands) -> Callable[..., tuple[list[str], list[str]]]:
    """Return `go()`: the commands that a run of two.yaml called, and the lines it said."""
    Path("two.yaml").write_text(STEPS)
    Path("second.yaml").write_text(SECOND)

    def run(**options: bool) -> tuple[list[str], list[str]]:
        hands.called.clear()
        said: list[str] = []
        run_pipeline(*read_pipeline("two.yaml", COMMANDS), launch=hands, say=said.append, **options)
        return list(hands.called), said

    return run


ALL = ["train first", "pseudo", "train second", "blend", "infer"]


def test_nothing_runs_twice(go: Callable[..., tuple[list[str], list[str]]]) -> None:
    called, said = go()
    assert called == ALL
    assert said[0] == "[1/5] first: comp train --config ./tiny.yaml --run first --set training.epochs=1  (it has not run yet)" or said[0].startswith("[1/5] first: comp train --config tiny.yaml --run first --set training.epochs=1  (it has not run yet)")  # fmt: skip
    called, said = go()
    assert called == [] and said[0].startswith("[1/5] first: skipped, nothing has changed since 20")
    state = read_json(Path("runs/two.pipeline.json"))
    assert state["steps"]["second"]["inputs"]["files"].keys() >= {"data/train.csv", "pseudo/labels/labels.parquet"}


def test_a_fold_file_that_a_later_step_makes_is_no_change(
    go: Callable[..., tuple[list[str], list[str]]], hands: Hands
) -> None:
    """Of the step that makes it, killed in the middle, what was saved is kept; a step before it does not run again."""
    for file in Path("folds").glob("tiny-binary.*"):
        file.unlink()
    Path("tests.yaml").write_text(
        "name: fresh\nsteps:\n"
        "  - {name: further, command: pretrain, config: tiny.yaml, args: {run: further}}\n"
        "  - {name: first, command: train, config: tiny.yaml, args: {run: first}}\n"
    )
    saved = Path("runs/first/fold0/state.pt")

    def killed(words: Sequence[str]) -> int:
        if words[0] == "train":
            Path("folds/tiny-binary.csv").touch()
            saved.parent.mkdir(parents=True)
            saved.touch()
            return 137
        return hands(words)

    with pytest.raises(StepFailed):
        run_pipeline(*read_pipeline("tests.yaml", COMMANDS), launch=killed, say=lambda line: None)
    for called in (["train first"], []):
        hands.called.clear()
        run_pipeline(*read_pipeline("tests.yaml", COMMANDS), launch=hands, say=lambda line: None)
        assert hands.called == called and saved.exists()
    Path("folds/tiny-binary.csv").write_text("id,fold\n")
    hands.called.clear()
    run_pipeline(*read_pipeline("tests.yaml", COMMANDS), launch=hands, say=lambda line: None)
    assert hands.called == ["train first"], "the one that has read it"


CHANGES: dict[str, tuple[Callable[[Hands], object], list[str], str]] = {
    "a table": (
        lambda hands: Path("data/train.csv").write_text(Path("data/train.csv").read_text() + "\n"),
        ["train first", "train second"], "data/train.csv changed",
    ),
    "the table to label": (
        lambda hands: Path("data/test.csv").write_text(Path("data/test.csv").read_text() + "\n"),
        ["train first", "pseudo", "train second"], "data/test.csv changed",
    ),
    "a config": (
        lambda hands: Path("second.yaml").write_text(SECOND + "training: {epochs: 4}\n"),
        ["train second"], "its config changed: training.epochs 1 -> 4",
    ),
    "a parent of configs": (
        lambda hands: Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace("max_length: 48", "max_length: 40")),
        ["train first", "train second"], "its config changed: model.max_length 48 -> 40",
    ),
    "tracking alone": (
        lambda hands: Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace("tracking:\n", "tracking:\n  tags: [a]\n")), [], "",
    ),
    "an argument": (
        lambda hands: Path("two.yaml").write_text(STEPS.replace('fold: "0"', "fold: all")),
        ["train second"], "its command was comp train --config",
    ),
    "a backbone": (
        lambda hands: Path("model/config.json").write_text(Path("model/config.json").read_text() + " "),
        ["train first", "train second"], "model/config.json changed",
    ),
    "a fold file": (
        lambda hands: Path("folds/tiny-binary.csv").write_text("id,fold\n"),
        ["train first", "train second"], "folds/tiny-binary.csv changed",
    ),
    "an output that is gone": (
        lambda hands: Path("runs/first/fold0/best.safetensors").unlink(),
        ["train first"], "runs/first/fold0/best.safetensors is gone",
    ),
    "an output that was changed": (
        lambda hands: Path("pseudo/labels/labels.parquet").write_text("by hand"),
        ["pseudo"], "pseudo/labels/labels.parquet is not what the step left",
    ),
    "what others put beside an output": (lambda hands: Path("runs/first/report.html").write_text("page"), [], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_has_changed_runs_again(case: str, go: Callable[..., tuple[list[str], list[str]]], hands: Hands) -> None:
    """Every step makes the same again here, so that steps after it are skipped."""
    change, expected, why = CHANGES[case]
    go()
    change(hands)
    called, said = go()
    assert called == expected and any(why in line for line in said), said
    assert go()[0] == []


def test_steps_after_one_that_makes_something_else_run(
    go: Callable[..., tuple[list[str], list[str]]], hands: Hands
) -> None:
    go()
    hands.content["train first"] = "other weights"
    Path("runs/first/fold0/best.safetensors").unlink()
    called, said = go()
    assert called == ["train first", "pseudo", "blend"], "the labels and the blend came out the same"
    assert any("runs/first/fold0/best.safetensors changed" in line for line in said)
    hands.content |= {"pseudo": "other labels", "blend": "other weights"}
    Path("pseudo/labels/labels.parquet").unlink()
    Path("blends/both/weights.json").unlink()
    assert go()[0] == ["pseudo", "train second", "blend", "infer"]


def test_another_version_of_comp_runs_all(
    go: Callable[..., tuple[list[str], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go()
    monkeypatch.setattr(running, "__version__", "9.9.9")
    called, said = go()
    assert called == ALL and "(comp is 9.9.9, was 0.1.0)" in said[0]


def test_what_a_step_made_goes_before_it_is_made_anew(
    go: Callable[..., tuple[list[str], list[str]]],
) -> None:
    """Otherwise `comp train` would take the folds that another config trained for finished, or refuse them."""
    Path("runs/second").mkdir()
    Path("runs/second/by-hand").touch()
    go()
    assert Path("runs/second/by-hand").exists(), "not made by this pipeline, which knows nothing of it"
    Path("second.yaml").write_text(SECOND + "training: {epochs: 4}\n")
    said = go()[1]
    assert "  runs/second is removed: step 'second' makes it anew" in said
    assert not Path("runs/second/by-hand").exists()
    assert Path("runs/first").exists() and Path("data/train.csv").exists()


def test_a_failed_step_stops_and_is_gone_on_with(go: Callable[..., tuple[list[str], list[str]]], hands: Hands) -> None:
    hands.fail["train second"] = 3
    with pytest.raises(StepFailed, match="step 'second' ended with exit status 3; the same command goes on") as failed:
        go()
    assert failed.value.status == 3 and hands.called == ALL[:3]
    Path("runs/second").mkdir()
    Path("runs/second/state.pt").touch()
    hands.fail.clear()
    called, said = go()
    assert called == ALL[2:] and "it failed with exit status 3" in said[2]
    assert Path("runs/second/state.pt").exists(), "nothing was changed: it goes on from what is there"


def test_a_step_that_was_killed_is_gone_on_with(
    go: Callable[..., tuple[list[str], list[str]]], hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(words: Sequence[str]) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(*read_pipeline("two.yaml", COMMANDS), launch=die, say=lambda line: None)
    Path("runs/first").mkdir()
    Path("runs/first/state.pt").touch()
    called, said = go()
    assert called == ALL and "it was begun and not finished" in said[0] and Path("runs/first/state.pt").exists()
    go()
    Path("second.yaml").write_text(SECOND + "training: {epochs: 4}\n")
    hands.fail["train second"] = 9
    with pytest.raises(StepFailed):
        go()
    Path("runs/second").mkdir()
    Path("runs/second/state.pt").touch()
    Path("second.yaml").write_text(SECOND)
    hands.fail.clear()
    go()
    assert not Path("runs/second/state.pt").exists(), "begun with another config"


def test_a_dry_run_says_what_would_run_and_why(go: Callable[..., tuple[list[str], list[str]]]) -> None:
    called, said = go(dry_run=True)
    assert called == [] and not Path("runs/two.pipeline.json").exists()
    assert all("would run: comp " in line and "it has not run yet" in line for line in said)
    go()
    assert all(line.endswith("would be skipped") for line in go(dry_run=True)[1])
    Path("second.yaml").write_text(SECOND + "training: {epochs: 4}\n")
    said = go(dry_run=True)[1]
    assert [("would run" in line) for line in said] == [False, False, True, True, True]
    assert said[2].endswith("(its config changed: training.epochs 1 -> 4)")
    assert said[3].endswith("(it reads what step 'second' makes, which runs)")
    assert Path("runs/second").exists()


def test_a_step_that_makes_nothing_is_not_done(here: Path) -> None:
    Path("two.yaml").write_text("name: two\nsteps:\n  - {name: a, command: doctor, outputs: [report.txt]}\n")
    with pytest.raises(ValueError, match="step 'a' ended well but made no report.txt; say in `outputs` what it makes"):
        run_pipeline(*read_pipeline("two.yaml", COMMANDS), launch=lambda words: 0, say=lambda line: None)


def test_two_at_a_time_are_refused(go: Callable[..., tuple[list[str], list[str]]]) -> None:
    from comp.lock import hold

    with hold(Path("runs/two.pipeline.json")), pytest.raises(ValueError, match="has been writing into it"):
        go()


# --- for real --------------------------------------------------------------------------------------------------------


def test_a_pipeline_by_the_command_line(here: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    """Every step is a process of its own; one that fails says why itself."""
    Path("two.yaml").write_text(
        "name: two\nsteps:\n"
        "  - {name: alone, command: blend, args: {run: runs/tiny, name: alone}}\n"
        "  - {name: predict, command: infer, args: {blend: blends/alone, fold: '7'}}\n"
    )
    status, out, err = call("pipeline", "two.yaml")
    assert status == 2 and "comp: step 'predict' ended with exit status 2" in err
    Path("two.yaml").write_text(Path("two.yaml").read_text().replace(", fold: '7'", ""))
    status, out, err = call("pipeline", "two.yaml")
    assert status == 0, err
    assert out.count("skipped, nothing has changed") == 1 and "pipeline two: all 2 steps are done" in out
    assert Path("submissions/alone.csv").exists()
    assert call("pipeline", "two.yaml", "--dry-run")[1].count("would be skipped") == 2


@pytest.mark.slow
def test_two_stages_from_training_to_submission(here: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    """Train, label, train on the labels, a classical model on the second run's vectors, blend, infer: then nothing."""
    Path("second.yaml").write_text(SECOND)
    Path("all.yaml").write_text(
        STEPS.replace('fold: "0"', "fold: all").replace("[runs/first, runs/second]", "[runs/first, runs/second, runs/third]")
        .replace("  - {name: both", "  - {name: third, command: classical, config: tiny.yaml, "
                 "args: {features: 'run:second', run: third}}\n  - {name: both")
    )  # fmt: skip
    status, out, err = call("pipeline", "all.yaml")
    assert status == 0, err
    assert "pipeline two: all 6 steps are done" in out and Path("out.csv").exists()
    status, out, err = call("pipeline", "all.yaml")
    assert status == 0 and out.count("skipped, nothing has changed") == 6, out
    Path("second.yaml").write_text(SECOND + "optimizer: {lr: 1.0e-3}\n")
    status, out, err = call("pipeline", "all.yaml")
    assert status == 0, err
    assert out.count("skipped, nothing has changed") == 2 and "runs/second is removed" in out
    assert "optimizer.lr 2e-05 -> 0.001" in out


def step_of_a_pipeline(folder: Path, code: str) -> subprocess.Popen[bytes]:
    """Start a process that supervises a step, which runs `code` and says "up"; return it when it is."""
    launch = f"{code}; print('up', flush=True); time.sleep(60)"
    command = (
        f"import sys; from comp import pipeline; pipeline.LAUNCH = {launch!r}; sys.exit(pipeline.in_process(['x']))"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, cwd=folder)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    return process


def test_a_stop_reaches_the_step(tmp_path: Path) -> None:
    """The step is a process that leaves of SIGTERM with a status of its own."""
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))"
    with step_of_a_pipeline(tmp_path, code) as process:
        time.sleep(0.2)  # the handler is set right after the step has started
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 9


def test_a_step_stops_when_its_pipeline_is_killed(tmp_path: Path) -> None:
    """Nothing can be passed on at SIGKILL: the step itself sees that nobody is left, and stops as at SIGTERM."""
    code = (
        "import os, signal, sys, time; from comp.pipeline import stop_with; stop_with(int(sys.argv[1])); "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(os.write(1, b'stopped\\n') - 8))"  # print may be at work
    )
    with step_of_a_pipeline(tmp_path, code) as process:
        process.kill()
        started = time.monotonic()
        assert process.stdout is not None and process.stdout.readline() == b"stopped\n"
        assert time.monotonic() - started < 30


# --- bad input -------------------------------------------------------------------------------------------------------

ONE = "name: two\nsteps:\n  - {{name: a, command: {0}}}\n"
BAD: dict[str, tuple[str, *tuple[str, ...]]] = {
    "no mapping": ("- a\n", "a pipeline is a mapping with name and steps, got list"),
    "no YAML": ("name: [\n", "not valid YAML"),
    "no name and no steps": ("{}", "2 faults", "name: is missing", "steps: is missing"),
    "an unknown key": ("name: a\nstep: []\n", "step: unknown key; did you mean 'steps'? Allowed: name, steps."),
    "an unknown key of a step": (ONE.format("doctor, arg: {}"), "step 'a'.arg: unknown key; did you mean 'args'?"),
    "a name that leads elsewhere": ("name: ../x\nsteps: [{name: a, command: doctor}]\n", "name: string should match"),
    "a step twice": (
        "name: a\nsteps: [{name: a, command: doctor}, {name: a, command: doctor}]\n", "two are named 'a'",
    ),
    "an unknown command": (ONE.format("trian"), "unknown command 'trian'; did you mean 'train'?", "Allowed: "),
    "itself": (ONE.format("pipeline two.yaml"), "unknown command 'pipeline two.yaml'"),
    "options in the command": (ONE.format("train --fold all, config: tiny.yaml"), "options stand in `args`"),
    "an argument too many": (ONE.format("doctor now"), "`comp doctor` takes 0 arguments, got 1"),
    "an argument too few": (ONE.format("report"), "`comp report` takes 1 arguments, got 0"),
    "an unknown option": (
        ONE.format("train, config: tiny.yaml, args: {folds: all}"), "args.folds: no option of `comp train`; did you mean 'fold'?",
    ),
    "the config among the options": (ONE.format("train, args: {config: tiny.yaml}"), "it is a key of the step"),
    "a switch with a word": (
        ONE.format("train, config: tiny.yaml, args: {debug: 'on'}"), "args.debug: is a switch, true or false; got 'on'",
    ),
    "a list for one value": (
        ONE.format("train, config: tiny.yaml, args: {fold: [0, 1]}"), "args.fold: wanted one value, text or a number; got [0, 1]",
    ),
    "a mapping for a value": (ONE.format("blend, args: {run: {a: b}}"), "args.run: wanted one value or a list of them"),
    "an option that is needed": (ONE.format("pseudo, args: {run: runs/tiny}"), "`comp pseudo` needs data"),
    "a config that is needed": (ONE.format("train"), "`comp train` needs config"),
    "a config that nobody reads": (ONE.format("doctor, config: tiny.yaml"), "`comp doctor` takes no config"),
    "no such config": (ONE.format("train, config: tny.yaml"), "config file 'tny.yaml' not found"),
    "a config with faults": (
        ONE.format("train, config: tiny.yaml, args: {set: [training.epoch=1, metric=auc]}"),
        "2 faults", "step 'a': tiny.yaml: training.epoch (--set): unknown key", "step 'a': tiny.yaml: metric (--set)",
    ),
    "the newest run": (ONE.format("infer"), "needs run or blend: the newest run may be any"),
    "an input that is not there": (ONE.format("doctor, inputs: [gone.csv]"), "input 'gone.csv' is not there"),
    "two steps with faults": (
        "name: a\nsteps: [{name: a, command: doctr}, {name: b, command: report}]\n", "2 faults", "step 'a'", "step 'b'",
    ),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("case", BAD)
def test_bad_pipelines(case: str, refuses: Callable[..., str]) -> None:
    text, *words = BAD[case]
    Path("two.yaml").write_text(text)
    refuses(["pipeline", "two.yaml"], words)


@pytest.mark.bad_input
def test_no_such_pipeline(refuses: Callable[..., str]) -> None:
    refuses(["pipeline", "gone.yaml"], ["pipeline file 'gone.yaml' not found"])


@pytest.mark.bad_input
def test_a_damaged_state(go: Callable[..., object], refuses: Callable[..., str]) -> None:
    Path("runs/two.pipeline.json").write_text(json.dumps({"steps": {}}))
    refuses(["pipeline", "two.yaml"], ["runs/two.pipeline.json must hold an object with steps, files"])
