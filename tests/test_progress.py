"""The progress line: in a terminal, in a log, in a notebook; of a part and of the whole job; in every long command."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comp import progress
from comp.progress import DELAY, NullProgress, Progress, ProgressLines, open_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still but for the test."""
    now = [100.0]
    monkeypatch.setattr("comp.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = open_progress(1000, "fold 1", to_come=2000)
    assert isinstance(bar, ProgressLines)
    for _ in range(29):
        clock[0] += 1
        bar.advance(1, loss="0.5")
    assert capsys.readouterr().err == ""
    clock[0] += 1
    bar.advance(1, loss="0.25", lr="1e-5")
    told = "fold 1: 30 of 1,000 steps (3%), 1.00/s, 16:10 left, 49:30 for the whole job, loss 0.25, lr 1e-5\n"
    assert capsys.readouterr().err == told
    clock[0] += 29
    bar.advance(470)
    bar.say("  step 500  score 0.4")
    assert capsys.readouterr().err == "  step 500  score 0.4\n"
    clock[0] += 1
    bar.advance(0)
    bar.close()
    assert capsys.readouterr().err.startswith("fold 1: 500 of 1,000 steps (50%), 8.33/s, 1:00 left, 5:00 for the whole")


def test_what_was_done_before_does_not_count_as_speed(clock: list[float]) -> None:
    bar = ProgressLines(100, "fold 0", "step", done=90)
    bar.done += 5
    assert bar.line(10.0) == "fold 0: 95 of 100 steps (95%), 0.50/s, 0:10 left"
    assert ProgressLines(0, "rows", "row").line(1.0) == "rows: 0 of 0 rows (0%)"
    assert ProgressLines(9000, "x", "row", 0).line(0.0) == "x: 0 of 9,000 rows (0%)"


@pytest.mark.parametrize(("seconds", "told"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (37230, "10:20:30")])
def test_clock(seconds: float, told: str) -> None:
    assert progress._clock(seconds) == told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_the_time_of_the_whole_job(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = open_progress(10, "fold 0", to_come=20)
    assert isinstance(bar, Progress)
    bar._bar.start_t -= 5.0
    bar._bar.last_print_t -= 5.0
    bar.advance(5, loss="0.5")
    bar.close()
    last = screen.getvalue().split("\r")[-1]
    assert "fold 0:  50%" in last and "5/10" in last and "loss 0.5 all 0:25" in last


def test_short_work_shows_nothing_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = open_progress(10, "evaluating", "row", delay=DELAY)
    bar.advance(10)
    bar.close()
    assert "evaluating" not in screen.getvalue()


def test_without_tqdm_it_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert isinstance(open_progress(10, "fold 0"), ProgressLines)


SCRIPT = """
import time
from comp.progress import open_progress
bar = open_progress(3, "fold 0", to_come=3)
for _ in range(3):
    time.sleep(0.4)
    bar.advance(1, loss="0.5")
bar.say("  step 3  score 0.4")
bar.close()
"""


def test_in_a_real_terminal_and_in_a_pipe() -> None:
    piped = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert (piped.stdout, piped.stderr) == ("", "  step 3  score 0.4\n")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs) as child:
        assert child.wait(timeout=60) == 0
    os.close(theirs)
    screen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        screen += piece
    os.close(ours)
    text = screen.decode()
    assert "fold 0: 100%" in text and "3/3" in text and "all 0:0" in text and "step 3  score 0.4" in text


@pytest.mark.parametrize("kaggle", [False, True], ids=["watched", "run by Kaggle"])
def test_in_a_notebook(kaggle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, no widget, no warning; on Kaggle's own runs only what is said."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat, of the extra `kaggle`, is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient, of the extra `kaggle`, is not installed")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch" if kaggle else "Interactive")
    monkeypatch.setenv("PYTHONPATH", str(Path(progress.__file__).parents[1]))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SCRIPT)])
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    script = tmp_path / "run.py"
    nbformat.write(book, tmp_path / "book.ipynb")
    script.write_text(
        "import nbformat, nbclient\n"
        f"book = nbformat.read({str(tmp_path / 'book.ipynb')!r}, 4)\n"
        "nbclient.NotebookClient(book, kernel_name='python3', timeout=60).execute()\n"
        f"nbformat.write(book, {str(tmp_path / 'done.ipynb')!r})\n"
    )
    assert nbclient
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    outputs = nbformat.read(tmp_path / "done.ipynb", 4).cells[0].outputs
    assert {output.output_type for output in outputs} == {"stream"}
    text = "".join(output.text for output in outputs)
    assert "arning" not in text and "step 3  score 0.4" in text
    if kaggle:
        assert text == "  step 3  score 0.4\n"
    else:
        assert "fold 0: 100%" in text and "3/3" in text and "all 0:0" in text


# --- where it is called ----------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, list[Any]]]:
    """Return what was opened so far: label -> [total, counted, to come] of the last with that label."""
    seen: dict[str, list[Any]] = {}

    class Counting(NullProgress):
        def __init__(self, own: list[Any]) -> None:
            self.own = own

        def advance(self, count: int = 1, **shown: str) -> None:
            self.own[1] += count

    def fake(total: int, label: str, unit: str = "step", done: int = 0, **more: Any) -> NullProgress:
        seen[label] = [total, done, more.get("to_come", 0)]
        return Counting(seen[label])

    for name, module in list(sys.modules.items()):
        if name.startswith("comp.") and hasattr(module, "open_progress"):
            monkeypatch.setattr(module, "open_progress", fake)
    return lambda: seen


def test_every_long_command_has_one(here: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    from comp import config_file
    from comp.blend import classical, crossfit, features
    from comp.ship import bundle, infer, teachers
    from comp.training import crossval

    assert classical and crossfit and features and bundle
    opened = request.getfixturevalue("opened")()
    quiet = {"say": lambda line: None}
    shutil.rmtree("runs/.cache")  # else nothing is tokenized
    config = config_file.load("tiny.yaml", ["training.epochs=2"])
    crossval.run(config, "new", "0,1", **quiet)
    steps = opened["fold 0"][0]
    assert opened["fold 0"] == [steps, steps, steps] and opened["fold 1"][2] == 0
    assert opened["evaluating"][:2] == [30, 30]
    classical.run_classical(config, "words", features=["tfidf"], estimator="ridge", folds="0,1", **quiet)
    assert opened["fold 0"] == [6, 6, 6] and opened["fold 1"] == [6, 6, 0]
    pseudo = teachers.make_labels(["runs/tiny"], str(config.competition.test), **quiet)
    assert pseudo.exists() and opened["tiny"] == [20, 20, 0]
    from comp.blend.members import gather

    crossfit.examine(gather(["runs/tiny", "runs/new"], weights="best"), crossfit.Recipe("mean", {}, "none"))
    assert opened["blending"] == [6, 6, 0]
    infer.infer(["runs/new"], **quiet)
    assert opened["rows"][:2] == [40, 40] and opened["tokenizing"][0] == opened["tokenizing"][1] > 0
    order = bundle.Order(out=Path("tiny-bundle"), owner="someone", competition="tiny", runs=["runs/tiny"], half=True)
    monkeypatch.setattr(bundle, "_put_code", lambda staged, say: [])
    monkeypatch.setattr(bundle, "_manifest", lambda *given: {})
    monkeypatch.setattr(bundle, "_seal", lambda *given: None)
    monkeypatch.setattr(bundle, "_report", lambda *given: [])
    bundle.make_bundle(order, **quiet)
    assert opened["bundle"] == [7, 7, 0]
