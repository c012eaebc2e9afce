"""What the pictures of reports share: colours, sizes, the looks of lines, Matplotlib's settings.

Colours are those of Okabe and Ito, told apart by colour-blind readers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

__all__ = [
    "AMBER",
    "BLUE",
    "DASHES",
    "FOLD_COLOURS",
    "GREEN",
    "GREY",
    "INK",
    "ORANGE",
    "PALE",
    "PURPLE",
    "SKY",
    "SMALL",
    "STYLE",
    "WIDE",
    "Axes",
    "Figure",
    "line_look",
    "shortened",
]

Figure: TypeAlias = Any  # of Matplotlib, which is imported inside functions only
Axes: TypeAlias = Any

BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, INK = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1c2127"
)  # fmt: skip
GREY, PALE = "#57606a", "#d5dae0"
FOLD_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, INK)
DASHES = ("solid", "dashed", "dotted", "dashdot")
SMALL, WIDE = (4.9, 3.5), (10.4, 3.6)  # inches; 96 CSS pixels each
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#aeb6c0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf0f3",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "text.parse_math": False,  # names may hold dollar signs
    "svg.hashsalt": "comp",  # the same run, the same bytes
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def line_look(place: int) -> dict[str, Any]:
    """Return the colour and dashes of one of several lines: of a fold, an optimizer."""
    return {
        "color": FOLD_COLOURS[place % len(FOLD_COLOURS)],
        "linestyle": DASHES[place // len(FOLD_COLOURS) % len(DASHES)],
    }


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Return names of at most `most` characters, cut at the end, or in the middle where else two would look alike.

    Names that stay alike even so, and all of `most` below 8, get their number in front.
    """
    dots = "\N{HORIZONTAL ELLIPSIS}"
    head = (most - 1) // 2
    short = [name if len(name) <= most else f"{name[: most - 1]}{dots}" for name in names]
    for place, name in enumerate(names):
        if len(name) > most and short.count(short[place]) > 1:
            short[place] = f"{name[:head]}{dots}{name[head + 1 - most :]}"
    alike = {name for name in short if short.count(name) > 1}
    return [f"{place + 1} {name}"[:most] if name in alike else name for place, name in enumerate(short)]
