"""`comp pipeline FILE`: commands of comp one after the other, each skipped when nothing that goes into it has changed.

    name: two-stage
    steps:
      - {name: first, command: train, config: first.yaml, args: {run: two-stage-first, fold: all}}
      - {name: labels, command: pseudo, args: {run: runs/two-stage-first, data: data/test.csv, name: two-stage}}
      - {name: second, command: train, config: second.yaml, args: {run: two-stage-second}}   # reads pseudo/two-stage

What goes into a step: its command and arguments, its resolved config, comp's version, and every file that arguments
and config name, by SHA-256; of what an earlier step made, that step's files. What is known of the steps stands in
runs/NAME.pipeline.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from comp import __version__, config_file
from comp.lock import hold
from comp.pipeline_file import Call, Pipeline
from comp.runs import RUNS, now, read_json, write_json

__all__ = ["StepFailed", "run_pipeline", "stop_with"]

OWN_FOLDERS = ("runs", "pseudo", "blends", "bundles", "searches")
"""Where commands make folders that they do not replace unasked: what a step left there goes when it is done anew."""
FOLDS = "folds"
TOLD_ONLY = ("manifest.json", "done.json", "metrics.jsonl", "evaluations.parquet", "groups.txt", "blend.json")
"""Files that hold times of day or of work: they must be there, but no later step depends on what is in them."""
LAUNCH = (
    "import json, sys; line, paths, *words = sys.argv[1:]; sys.path[:] = json.loads(paths); "
    "sys.argv[:] = ['comp', *words]; from comp.pipeline import stop_with; stop_with(int(line)); "
    "from comp.cli import main; main()"
)
Say: TypeAlias = Callable[[str], None]
Launch: TypeAlias = Callable[[Sequence[str]], int]
Record: TypeAlias = dict[str, Any]


class StepFailed(Exception):
    """A step ended with a status other than 0; its own message stands before."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# --- what goes into a step, and what it left -------------------------------------------------------------------------


class Files:
    """SHA-256 of files; one whose size and time have not changed is not read again."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = dict(known)

    def digest(self, path: Path) -> str:
        stat, key = path.stat(), str(path)
        mark = [stat.st_size, stat.st_mtime_ns]
        if self.known.get(key, [None])[:2] != mark:
            with open(path, "rb") as file:
                self.known[key] = [*mark, hashlib.file_digest(file, "sha256").hexdigest()]
        return str(self.known[key][2])

    def below(self, path: str) -> dict[str, str]:
        """Return file -> digest for a file, or all files of a folder; hidden ones are left out."""
        place = Path(path)
        if place.is_file():
            return {path: self.digest(place)}
        found = [file for file in sorted(place.rglob("*")) if file.is_file()]
        seen = [file for file in found if not any(part.startswith(".") for part in file.relative_to(place).parts)]
        return {str(file): "there" if file.name in TOLD_ONLY else self.digest(file) for file in seen}


@dataclass
class State:
    """runs/NAME.pipeline.json."""

    path: Path
    steps: dict[str, Record]
    files: Files

    @classmethod
    def read(cls, path: Path) -> State:
        found = read_json(path, "steps", "files") if path.exists() else {"steps": {}, "files": {}}
        return cls(path, found["steps"], Files(found["files"]))

    def note(self, name: str, record: Record) -> None:
        self.steps[name] = record
        write_json(self.path, {"steps": self.steps, "files": self.files.known})


def _within(path: str, folder: str) -> bool:
    return Path(path) == Path(folder) or Path(folder) in Path(path).parents


def _named(call: Call) -> list[str]:
    """Return the paths that a step names, some of which may be none: in its arguments, its config, its inputs."""
    config = call.load()
    found = [*call.positional, *(value for values in call.args.values() for value in values), *call.step.inputs]
    found += [
        f"runs/{value.removeprefix('run:')}" for value in call.args.get("features", []) if value.startswith("run:")
    ]
    if config is not None:
        found += [config.model.backbone, *_texts(config.model_dump(mode="json")), f"{FOLDS}/{config.fold_name}.csv"]
    outputs = call.outputs
    return [text for text in dict.fromkeys(found) if not any(_within(text, output) for output in outputs)]


def _texts(value: Any) -> Iterator[str]:
    """Yield every text of a config that may be a path."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif isinstance(value, str) and ("/" in value or Path(value).suffix):
        yield value


def look(call: Call, earlier: Sequence[Call], state: State) -> Record:
    """Return what goes into a step now: comp's version, its words, its config, its files."""
    config = call.load()
    files: dict[str, str] = {}
    made = [output for other in earlier for output in other.outputs]
    for path in _named(call):
        owners = [other.step.name for other in earlier if any(_within(path, output) for output in other.outputs)]
        if owners:  # what the step left, not what others have put beside it since
            left = state.steps.get(owners[-1], {}).get("outputs", {})
            files |= {file: mark for file, mark in left.items() if _within(file, path) and mark != "there"}
        elif "\0" not in path and len(path) < 4096 and Path(path).exists():
            files |= {k: v for k, v in state.files.below(path).items() if not any(_within(k, own) for own in made)}
        elif path in call.step.inputs:
            raise ValueError(f"step '{call.step.name}': input '{path}' is not there, and no earlier step makes it")
    plain = None if config is None else config.model_dump(mode="json", exclude={"tracking"})
    return {"comp": __version__, "words": call.words, "config": plain, "files": files}


def reasons(record: Record | None, now_: Record, state: State) -> list[str]:
    """Return why a step has to run; [] when it has not."""
    if record is None:
        return ["it has not run yet"]
    found = changes(record["inputs"], now_)
    if record["state"] == "failed":
        found.append(f"it failed with exit status {record['status']}")
    elif record["state"] == "begun":
        found.append("it was begun and not finished")
    for file, mark in record.get("outputs", {}).items():
        if not Path(file).exists():
            found.append(f"{file} is gone")
        elif mark != "there" and state.files.digest(Path(file)) != mark:
            found.append(f"{file} is not what the step left")
    return found


def changes(old: Record, new: Record) -> list[str]:
    """Return what goes into a step otherwise than before, in words.

    A fold file that was not there when the step began is no change: a step that reads one makes it on its way, and one
    that ended without has not read it.
    """
    found = []
    if old["comp"] != new["comp"]:
        found.append(f"comp is {new['comp']}, was {old['comp']}")
    if old["words"] != new["words"]:
        found.append(f"its command was comp {shlex.join(old['words'])}")
    if old["config"] != new["config"]:
        differing = config_file.differences(old["config"] or {}, new["config"] or {})
        shown = [f"{key} {before} -> {after}" for key, before, after in differing[:3]]
        found.append(f"its config changed: {', '.join(shown)}{', ...' if len(differing) > 3 else ''}")
    files = [
        f"{file} {'is new' if file not in old['files'] else 'is gone' if file not in new['files'] else 'changed'}"
        for file in sorted({*old["files"], *new["files"]})
        if old["files"].get(file) != new["files"].get(file) and (file in old["files"] or Path(file).parts[0] != FOLDS)
    ]
    return [*found, *files[:3], *([f"{len(files) - 3} more files changed"] if len(files) > 3 else [])]


# --- running ---------------------------------------------------------------------------------------------------------


def run_pipeline(
    pipeline: Pipeline, calls: Sequence[Call], *, dry_run: bool = False, launch: Launch | None = None, say: Say = print
) -> None:
    """Run the steps that have to run. `dry_run`: only say which, and why. `launch`: runs a command line, -> its status.

    Raises StepFailed for the first step that fails; a rerun goes on with it. What a step made before is removed when
    something else goes into it now, since no command goes on with that.
    """
    path = RUNS / f"{pipeline.name}.pipeline.json"
    if dry_run:
        _dry_run(calls, State.read(path), say)
        return
    with hold(path):
        state = State.read(path)
        for place, call in enumerate(calls):
            record, entering = state.steps.get(call.step.name), look(call, calls[:place], state)
            why = reasons(record, entering, state)
            head = f"[{place + 1}/{len(calls)}] {call.step.name}"
            if not why:
                say(f"{head}: skipped, nothing has changed since {record['ended'] if record else ''}")
                continue
            say(f"{head}: comp {shlex.join(call.words)}  ({_joined(why)})")
            if record is not None and (changes(record["inputs"], entering) or record["state"] == "done"):
                _remove(call, record, say)
            _run(call, calls[:place], entering, state, launch or in_process)
    say(f"pipeline {pipeline.name}: all {len(calls)} steps are done")


def _dry_run(calls: Sequence[Call], state: State, say: Say) -> None:
    running: list[Call] = []
    for place, call in enumerate(calls):
        record = state.steps.get(call.step.name)
        before = [
            other.step.name for other in running if any(_within(p, o) for p in _named(call) for o in other.outputs)
        ]
        why = reasons(record, look(call, calls[:place], state), state)
        if before:
            why = [one for one in why if not one.endswith(("is gone", "is new", "changed"))]
            why.append(f"it reads what step '{before[-1]}' makes, which runs" if record is not None else "")
        why = list(filter(None, why))
        words = f"would run: comp {shlex.join(call.words)}  ({_joined(why)})" if why else "would be skipped"
        if why:
            running.append(call)
        say(f"[{place + 1}/{len(calls)}] {call.step.name}: {words}")


def _joined(why: Sequence[str]) -> str:
    return "; ".join(why[:4]) + (f"; and {len(why) - 4} more" if len(why) > 4 else "")


def _remove(call: Call, record: Record, say: Say) -> None:
    """Remove what a step made before, in the folders where commands refuse to replace it."""
    tops = []
    for file in [*record.get("outputs", {}), *record.get("coming", [])]:
        parts = Path(file).parts
        if len(parts) > 1 and parts[0] in OWN_FOLDERS:
            tops.append(Path(*parts[:2]))
    for top in dict.fromkeys(tops):
        if not top.exists():
            continue
        with hold(top):
            say(f"  {top} is removed: step '{call.step.name}' makes it anew")
            shutil.rmtree(top) if top.is_dir() else top.unlink()


def _run(call: Call, earlier: Sequence[Call], entering: Record, state: State, launch: Launch) -> None:
    name, started = call.step.name, time.monotonic()
    record: Record = {"state": "begun", "inputs": entering, "began": now(), "coming": call.outputs}
    state.note(name, record)
    status = launch(call.words)
    if status:
        state.note(name, {**record, "state": "failed", "status": status})
        raise StepFailed(f"step '{name}' ended with exit status {status}; the same command goes on with it", status)
    after = look(call, earlier, state)  # a fold file, say, that was made on the way
    files = {**after["files"], **entering["files"]}
    outputs: dict[str, str] = {}
    for output in call.outputs:
        own = state.files.below(output) if Path(output).exists() else {}
        if not own:
            raise ValueError(f"step '{name}' ended well but made no {output}; say in `outputs` what it makes")
        outputs |= own
    record = {**record, "state": "done", "inputs": {**entering, "files": files}, "outputs": outputs}
    state.note(name, {**record, "ended": now(), "seconds": round(time.monotonic() - started, 1)})


def in_process(words: Sequence[str]) -> int:
    """Run a command line of comp in a process of its own, which gets SIGTERM and Ctrl-C; return its exit status.

    When this process is killed, so that it can pass nothing on, the other stops by itself.
    """
    line, ours = os.pipe()  # nobody writes to it; it ends with this process
    paths = json.dumps([str(path) for path in sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(line), paths, *words], start_new_session=True, pass_fds=(line,)
    )
    os.close(line)
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    before = {number: signal.signal(number, lambda number, frame: process.send_signal(number)) for number in numbers}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(ours)
    return 128 - status if status < 0 else status


def stop_with(line: int) -> None:
    """Send this process SIGTERM when the pipe `line` ends, because whoever held its other end is gone."""

    def wait() -> None:
        os.read(line, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
