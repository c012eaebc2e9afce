"""What a command says when it was stopped, and its exit status: one place, whatever command."""

from __future__ import annotations

import ast
import signal
from pathlib import Path

import pytest
import typer

from comp.cli_stop import goes_on
from comp.training.trainer import Stopped

CODE = Path(__file__).resolve().parents[1] / "comp"


def test_a_stop_is_one_line_and_the_shells_status(capsys: pytest.CaptureFixture[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(typer.Exit) as left, goes_on("runs/a"):
            raise Stopped("stopped after step 2, and saved", number)
        assert left.value.exit_code == 128 + number and left.value.__suppress_context__
        told = "comp: stopped after step 2, and saved; the same command goes on from what is saved\n"
        assert capsys.readouterr().out == told
    with pytest.raises(typer.Exit) as left, goes_on(Path("runs") / "a"):
        raise KeyboardInterrupt
    assert left.value.exit_code == 130
    assert capsys.readouterr().out == "comp: stopped; the same command goes on from what runs/a has saved\n"


def test_nothing_else_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with goes_on("runs/a"):
        pass
    with pytest.raises(ValueError, match="mine"), goes_on("runs/a"):
        raise ValueError("mine")
    assert capsys.readouterr().out == ""


def test_no_command_takes_stops_by_itself() -> None:
    """Each would say it in other words in the end."""
    for file in CODE.glob("cli*.py"):
        if file.name == "cli_stop.py":
            continue
        caught = {
            name.id
            for handler in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(handler, ast.ExceptHandler) and handler.type is not None
            for name in ast.walk(handler.type)
            if isinstance(name, ast.Name)
        }
        assert not caught & {"Stopped", "KeyboardInterrupt"}, file.name
