"""Pictures with a line for each fold, class or part of the rows: scores, spreads, shares, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from comp.ship.report_style import BLUE, GREEN, GREY, INK, ORANGE, PALE, SMALL, Figure, line_look, shortened

__all__ = ["bars", "fold_scores", "intervals", "shares", "spreads", "times"]


def intervals(
    figure: Figure,
    *,
    names: Sequence[str],
    values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    label: str,
    title: str,
    line: float | None = None,
) -> None:
    """A dot with its interval a name, from top to bottom; `line`: the value of all together."""
    figure.set_size_inches(SMALL[0], min(9.0, max(1.7, 0.27 * len(names) + 1.0)))
    axes = figure.subplots()
    places = np.arange(len(names))
    spans = np.array([np.subtract(values, low), np.subtract(high, values)])
    axes.errorbar(values, places, xerr=np.maximum(spans, 0), fmt="o", color=BLUE, markersize=5, elinewidth=1.2)
    if line is not None:
        axes.axvline(line, color=GREY, linewidth=1, linestyle="dashed")
    axes.set_yticks(places, shortened(names, 26))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=label, title=title)


def fold_scores(figure: Figure, *, folds: Sequence[str], series: Mapping[str, Sequence[float]], metric: str) -> None:
    """Score of each fold by each kind of weights, with the mean of the folds as a line."""
    figure.set_size_inches(SMALL[0], max(2.0, 0.34 * len(folds) + 1.3))
    axes = figure.subplots()
    looks = {"best": ("o", BLUE), "last": ("s", ORANGE), "averaged": ("D", GREEN)}
    for number, (name, values) in enumerate(series.items()):
        marker, colour = looks[name]
        places = np.arange(len(folds)) + 0.16 * (number - (len(series) - 1) / 2)
        axes.plot(values, places, marker, color=colour, label=name, markersize=5.5, alpha=0.9)
        axes.axvline(float(np.nanmean(values)), color=colour, linewidth=1, linestyle="dashed", alpha=0.7)
    axes.set_yticks(range(len(folds)), list(folds))
    axes.set_ylim(len(folds) - 0.5, -0.5)
    axes.set(xlabel=metric, title="scores of the folds; dashed: their mean")
    axes.grid(visible=False, axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def spreads(figure: Figure, *, folds: Sequence[str], values: Sequence[NDArray[np.float64]], label: str) -> None:
    """Distribution of a target in each fold: box from quartile to quartile, whiskers to 5% and 95%."""
    figure.set_size_inches(SMALL[0], max(1.9, 0.34 * len(folds) + 1.0))
    axes = figure.subplots()
    axes.boxplot(
        list(values), orientation="horizontal", whis=(5, 95), widths=0.55, showfliers=False, patch_artist=True,
        boxprops={"facecolor": "#cfe3f1", "edgecolor": BLUE}, medianprops={"color": INK},
        whiskerprops={"color": BLUE}, capprops={"color": BLUE},
    )  # fmt: skip
    axes.set_yticks(range(1, len(folds) + 1), list(folds))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=label, title="target by fold: 5, 25, 50, 75 and 95%")


def shares(figure: Figure, *, folds: Sequence[str], names: Sequence[str], values: NDArray[np.float64]) -> None:
    """Share (folds, classes) of each class in each fold, a line of dots a class."""
    figure.set_size_inches(SMALL[0], max(1.9, 0.3 * len(names) + 1.5))
    axes = figure.subplots()
    for place, fold in enumerate(folds):
        look = line_look(place)
        axes.plot(values[place], np.arange(len(names)), "o", color=look["color"], markersize=5, alpha=0.8, label=fold)
    axes.set_yticks(range(len(names)), shortened(names, 26))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set(xlabel="share of the fold's rows", title="classes by fold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def times(figure: Figure, *, folds: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Seconds of each fold, by what they went to; told in minutes or hours where they are many."""
    figure.set_size_inches(SMALL[0], max(1.9, 0.34 * len(folds) + 1.3))
    axes = figure.subplots()
    longest = float(np.sum([list(seconds) for seconds in parts.values()], axis=0).max())
    unit, length = ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60) if longest > 300 else ("seconds", 1)
    left = np.zeros(len(folds))
    for (name, seconds), colour in zip(parts.items(), (BLUE, ORANGE, PALE), strict=False):
        spans = np.asarray(seconds) / length
        axes.barh(range(len(folds)), spans, left=left, color=colour, label=name, height=0.62)
        left += spans
    axes.set_yticks(range(len(folds)), list(folds))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=unit, title="where the time went")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def bars(figure: Figure, *, names: Sequence[str], values: Sequence[float], label: str, title: str) -> None:
    """A number for each name, the first at the top."""
    figure.set_size_inches(SMALL[0], max(1.7, 0.34 * len(names) + 0.9))
    axes = figure.subplots()
    axes.barh(range(len(names)), values, color=BLUE, height=0.62)
    axes.set_yticks(range(len(names)), list(names))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    axes.set(xlabel=label, title=title)
