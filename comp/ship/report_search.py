"""The picture of a search: how much each key matters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from comp.runs import write_stream
from comp.ship.report_figures import draw
from comp.ship.report_page import Picture

__all__ = ["write_importance"]


def write_importance(path: Path, importances: Mapping[str, float], metric: str) -> None:
    """Draw the share of the scores' spread that each key explains. Raises ValueError when Matplotlib is absent."""
    data = {
        "names": list(importances),
        "values": list(importances.values()),
        "label": f"share of the spread of {metric} that it explains",
        "title": "which keys mattered",
    }
    drawn = draw(Picture("importance", "which keys mattered", "bars", data))

    def write(file: BinaryIO) -> None:
        file.write(drawn.png)

    write_stream(path, write)
