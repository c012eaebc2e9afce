"""Catalogues: plain dicts of rows, looked up by the name that stands in the config.

A catalogue lives in the file that owns its things (POOLERS in model/pooling.py, LOSSES in model/losses.py, ...).
Its key is the config value, the test id and the row in the README's table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

__all__ = ["CATALOGUES", "Row", "catalogue", "markdown", "nearest", "pick"]

# What `comp list NAME` shows, and where the dict is. Text, not imports: nothing heavy is loaded until asked for.
CATALOGUES: dict[str, str] = {
    "poolers": "comp.model.pooling:POOLERS",
    "losses": "comp.model.losses:LOSSES",
    "metrics": "comp.metrics:METRICS",
    "optimizers": "comp.optim:OPTIMIZERS",
    "layouts": "comp.optim.groups:LAYOUTS",
    "techniques": "comp.stability.techniques:TECHNIQUES",
    "schedules": "comp.optim.schedules:SCHEDULES",
    "splitters": "comp.data.splitters:SPLITTERS",
    "leaks": "comp.data.leaks:LEAKS",
    "features": "comp.blend.features:FEATURES",
    "estimators": "comp.blend.classical:ESTIMATORS",
    "blenders": "comp.blend.ensemble:BLENDERS",
    "calibrators": "comp.blend.calibration:CALIBRATORS",
    "trackers": "comp.tracking_others:TRACKERS",
}

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Row:
    """One entry of a catalogue: what is built or called, one line about it, and where it comes from."""

    make: Any
    """The class or function behind the name."""
    about: str
    """One line: what it computes."""
    source: str = ""
    """Paper (arXiv number) or file it follows."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest allowed name, or "" when none is close."""
    by_lower = {option.lower(): option for option in allowed}  # people mistype case more than letters
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[close[0]]}'?" if close else ""


def pick(table: Mapping[str, RowT], name: str, kind: str) -> RowT:
    """Return `table[name]`. Raises ValueError that lists the valid names and the nearest one."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {kind} '{name}'{nearest(name, table)} Allowed: {', '.join(table)}.")


def catalogue(name: str) -> Mapping[str, Any]:
    """Import and return the catalogue called `name` (a key of CATALOGUES)."""
    module, attribute = pick(CATALOGUES, name, "catalogue").split(":")
    table: Mapping[str, Any] = getattr(import_module(module), attribute)
    return table


def markdown(names: Iterable[str] = tuple(CATALOGUES)) -> str:
    """Return catalogues as Markdown tables, a heading line each: the README's table of techniques."""
    blocks = []
    for name in names:
        rows = [f"| `{key}` | {row.about} | {row.source} |" for key, row in catalogue(name).items()]
        blocks.append("\n".join([f"**{name}**", "", "| name | what | source |", "|---|---|---|", *rows]))
    return "\n\n".join(blocks) + "\n"
