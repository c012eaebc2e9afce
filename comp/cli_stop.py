"""What the command line says where work that can be gone on with was stopped, and the exit status that tells of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

__all__ = ["goes_on"]


@contextmanager
def goes_on(where: str | Path) -> Iterator[None]:
    """Turn a stop inside the block into one line and an exit status, without traceback.

    `where`: the folder that holds what was saved. SIGTERM and Ctrl-C that training heeded (`Stopped`) exit with 128 +
    the signal, as a shell counts; a Ctrl-C anywhere else with 130.
    """
    from comp.training.trainer import Stopped

    try:
        yield
    except Stopped as stopped:
        print(f"comp: {stopped}; the same command goes on from what is saved")
        raise typer.Exit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print(f"comp: stopped; the same command goes on from what {where} has saved")
        raise typer.Exit(130) from None
