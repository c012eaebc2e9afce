"""PICTURES: the figures of reports, drawn by Matplotlib (extra `report`) as SVG for the page and as PNG files.

Each function draws its data into an empty figure; where order matters, in one hue from light to dark. Those with a line
for each fold, class or part of the rows are in report_parts.py.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.catalog import pick
from comp.ship.report_page import Picture
from comp.ship.report_parts import bars, fold_scores, intervals, shares, spreads, times
from comp.ship.report_style import BLUE, GREY, INK, ORANGE, SKY, SMALL, STYLE, WIDE, Axes, Figure, line_look, shortened

__all__ = ["PICTURES", "Drawn", "draw", "need_matplotlib"]

MOST_NUMBERED = 14  # classes of a confusion matrix whose counts are written into it
DPI = 160
CROSS: dict[str, Any] = {"marker": "x", "markersize": 6, "markeredgewidth": 1.3, "linestyle": "none"}
RING: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.4}


@dataclass(frozen=True)
class Drawn:
    """A picture in both forms, and its size in the page."""

    svg: bytes
    png: bytes
    width: int
    """CSS pixels."""
    height: int


def need_matplotlib() -> None:
    """Raise ValueError unless Matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "the pictures of a report need Matplotlib, which is not installed: `pip install matplotlib` (or the extra "
            "comp[report]), or use --text, which draws none"
        ) from None


def draw(picture: Picture) -> Drawn:
    """Draw one picture. Raises ValueError when Matplotlib is absent."""
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure as EmptyFigure

    # The reader's own settings out of the way, but for the backend, which a notebook needs afterwards.
    style: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"} | STYLE
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script the font has not
        figure = EmptyFigure(layout="constrained")
        pick(PICTURES, picture.kind, "picture")(figure, **picture.data)
        found = []
        for form, metadata in (("svg", {"Date": None}), ("png", {})):
            out = io.BytesIO()
            figure.savefig(out, format=form, dpi=DPI, metadata=metadata)
            found.append(out.getvalue())
        width, height = (round(96 * size) for size in figure.get_size_inches())
    return Drawn(found[0], found[1], width, height)


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(figure: Figure, *, folds: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Validation score and training loss over optimizer steps, a line a fold.

    A fold has name, valid (steps, scores), train (steps, losses), and where there are such `chosen` and `averaged`, as
    (step, score). Every evaluation is a dot, the chosen one is ringed, the average is a diamond. Where
    `estimated` has a true for an evaluation, it is a cross instead.
    """
    scored = any(fold["valid"][0] for fold in folds)
    figure.set_size_inches(*(WIDE if scored else SMALL))
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    marked = estimated = False
    for place, fold in enumerate(folds):
        look = line_look(place)
        if scored:
            guessed = np.asarray(fold.get("estimated", [False] * len(fold["valid"][0])), bool)
            dots = {"marker": "o", "markersize": 3, "markevery": np.flatnonzero(~guessed).tolist()}
            axes[0].plot(*fold["valid"], label=fold["name"], **dots, **look)
            if guessed.any():
                estimated = True
                axes[0].plot(*(np.asarray(values)[guessed] for values in fold["valid"]), color=look["color"], **CROSS)
            if fold.get("chosen"):
                axes[0].plot(*fold["chosen"], color=look["color"], **RING)
            if fold.get("averaged"):
                marked = True
                diamond = {"marker": "D", "markersize": 6, "markeredgecolor": "white", "linestyle": "none"}
                axes[0].plot(*fold["averaged"], color=look["color"], **diamond)
        axes[-1].plot(*fold["train"], label=fold["name"], **look)
    if scored:
        axes[0].set_title(f"{metric} of the held-out rows")
        axes[0].margins(0.05, 0.1)
        _fit_scores(axes[0], [score for fold in folds for score in fold["valid"][1]])
    axes[-1].set_title("training loss, means of up to 10 steps")
    for one in axes:
        _over_steps(one)
    handles, labels = axes[0].get_legend_handles_labels()
    if scored:
        ring = axes[0].plot([], [], "o", color=GREY, markersize=9, markerfacecolor="none")[0]
        handles, labels = [*handles, ring], [*labels, "chosen"]
        if estimated:
            cross = axes[0].plot([], [], color=GREY, **CROSS)[0]
            handles, labels = [*handles, cross], [*labels, "estimate"]
        if marked:
            diamond = axes[0].plot([], [], "D", color=GREY, markersize=6)[0]
            handles, labels = [*handles, diamond], [*labels, "averaged weights"]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9 if scored else 4))


def _over_steps(axes: Axes) -> None:
    """Count optimizer steps from 0 along the bottom, with room for the mark at the last one."""
    from matplotlib.ticker import MaxNLocator

    last = max((float(np.max(line.get_xdata())) for line in axes.get_lines() if len(line.get_xdata())), default=1.0)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, 1.04 * max(last, 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))


def _fit_scores(axes: Axes, scores: Sequence[float]) -> None:
    """Keep one wild early score from flattening all others: the axis then leaves it out, and says so."""
    low, high = (float(q) for q in np.quantile(scores, (0.05, 0.95)))
    span = max(high - low, 1e-12)
    below, above = min(scores) < low - 3 * span, max(scores) > high + 3 * span
    if len(scores) >= 10 and (below or above):
        bottom, top = axes.get_ylim()
        axes.set_ylim(low - 0.5 * span if below else bottom, high + 0.5 * span if above else top)
        axes.text(
            0.99, 0.98, "outliers beyond the axis", transform=axes.transAxes, ha="right", va="top", color=GREY, size=8
        )


def auxiliary(figure: Figure, *, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Validation scores of the auxiliary tasks over optimizer steps; a task has name, metric and folds.

    A fold has name, valid (steps, scores), and where there is such `chosen`, the (step, score) of what was kept.
    """
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure.set_size_inches(*(SMALL if len(tasks) == 1 else (WIDE[0], 3.2 * rows)))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, task in zip(grid, tasks, strict=False):
        for place, fold in enumerate(task["folds"]):
            look = line_look(place)
            axes.plot(*fold["valid"], marker="o", markersize=3, label=fold["name"], **look)
            if fold.get("chosen"):
                axes.plot(*fold["chosen"], color=look["color"], **RING)
        axes.set_title(f"{task['name']}: {task['metric']}")
        _over_steps(axes)
    for axes in grid[len(tasks) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9))


def rates(
    figure: Figure, *, groups: Sequence[tuple[str, float]], steps: Sequence[int], shares: Sequence[float]
) -> None:
    """Learning rate of every group over optimizer steps: its peak rate times the schedule, on a log scale."""
    figure.set_size_inches(*SMALL)
    axes = figure.subplots()
    body = [peak for name, peak in groups if name != "head"]
    ranks = {peak: rank for rank, peak in enumerate(sorted(set(body)))}
    known = np.asarray(shares) > 0
    at = np.asarray(steps)[known]
    for name, peak in groups:
        depth = 0.35 + 0.65 * ranks.get(peak, 0) / max(1, len(ranks) - 1)
        colour = ORANGE if name == "head" else _shade(depth)
        axes.plot(at, peak * np.asarray(shares)[known], color=colour, label=name, marker="o", markersize=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.set_ylim(bottom=min(peak for _, peak in groups) / 50)  # the end of a fall to 0 would take half the axis
    axes.set_title("learning rate")
    _over_steps(axes)
    few = len(groups) <= 9
    handles, labels = axes.get_legend_handles_labels()
    keep = range(len(labels)) if few else [0, 1, len(labels) // 2, len(labels) - 1]
    axes.legend(
        [handles[k] for k in keep], [labels[k] for k in keep], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8
    )


def _shade(depth: float) -> tuple[float, float, float]:
    """Return a blue from pale (0) to dark (1)."""
    pale, dark = np.array([0.80, 0.88, 0.94]), np.array([0.0, 0.25, 0.45])
    red, green, blue = pale + (dark - pale) * depth
    return float(red), float(green), float(blue)


# --- predictions -----------------------------------------------------------------------------------------------------


def scatter(figure: Figure, *, columns: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]]) -> None:
    """Prediction over target, a panel a column (name, targets (N,), predictions (N,)); beside one alone, its errors."""
    alone = len(columns) == 1
    across = 2 if alone else min(3, len(columns))
    down = 1 if alone else -(-len(columns) // across)
    figure.set_size_inches(WIDE[0] if across > 2 else 2 * SMALL[0], 4.0 if alone else 3.3 * down)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (name, targets, preds) in zip(grid, columns, strict=False):
        size, alpha = (9, 0.55) if len(targets) < 2000 else (4, 0.25)
        axes.scatter(targets, preds, s=size, alpha=alpha, color=BLUE, linewidths=0, rasterized=len(targets) > 500)
        low, high = min(targets.min(), preds.min()), max(targets.max(), preds.max())
        axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="dashed")
        room = 0.04 * max(high - low, 1e-9)
        axes.set(xlim=(low - room, high + room), ylim=(low - room, high + room), aspect="equal", title=name)
        axes.set(xlabel="target", ylabel="out-of-fold prediction")
    if alone:
        _, targets, preds = columns[0]
        axes = grid[1]
        axes.hist(preds - targets, bins=min(40, max(8, round(len(targets) ** 0.5))), color=BLUE, alpha=0.8)
        axes.axvline(0, color=GREY, linewidth=1, linestyle="dashed")
        axes.set_title("errors")
        axes.set_xlabel("prediction - target")
        axes.set_ylabel("rows")
    for axes in grid[2 if alone else len(columns) :]:
        axes.set_axis_off()


def reliability(figure: Figure, *, columns: Sequence[Mapping[str, Any]]) -> None:
    """Share of ones over predicted probability, in bins; below, how many rows have which probability.

    A column has name, predicted, actual, low, high (per bin), and ones, zeros: the predictions of either.
    """
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure.set_size_inches(SMALL[0] if len(columns) == 1 else WIDE[0], 4.3 if len(columns) == 1 else 3.6 * down)
    grid = figure.subplots(2 * down, across, squeeze=False, height_ratios=[3, 1] * down)
    for place in range(down * across):
        upper, lower = grid[2 * (place // across), place % across], grid[2 * (place // across) + 1, place % across]
        if place >= len(columns):
            upper.set_axis_off()
            lower.set_axis_off()
            continue
        column = columns[place]
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="dashed")
        bars = np.array([column["actual"] - column["low"], column["high"] - column["actual"]])
        upper.errorbar(
            column["predicted"], column["actual"], yerr=np.maximum(bars, 0), fmt="o-", color=BLUE, markersize=4,
            elinewidth=1, capsize=2,
        )  # fmt: skip
        upper.set(xlim=(0, 1), ylim=(0, 1), title=column["name"], ylabel="share of ones")
        upper.tick_params(labelbottom=False)
        bins = np.linspace(0, 1, 21)
        lower.hist(
            [column["zeros"], column["ones"]], bins=list(bins), color=[SKY, ORANGE], stacked=True, label=["0", "1"]
        )
        lower.set(xlim=(0, 1), xlabel="predicted probability", ylabel="rows")
        lower.legend(title=None, ncols=2, loc="upper center", fontsize=7.5, handlelength=1, borderpad=0.1)
        lower.margins(y=0.45)


def confusion(figure: Figure, *, counts: NDArray[np.int64], names: Sequence[str], what: str) -> None:
    """Counts (C, C), true class by predicted one; the shade is the share of the true class."""
    num = len(names)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    short = shortened(names, 28 if num <= MOST_NUMBERED else 16)
    longest = max(map(len, short))
    cells, words = min(7.5, max(1.8, 0.5 * num)), 0.075 * longest  # inches
    turned = words + 0.1 > cells / num
    figure.set_size_inches(cells + words + 1.7, cells + (words if turned else 0.2) + 0.6)
    figure.set_layout_engine("compressed")  # "constrained" cuts labels beside axes of a fixed aspect
    axes = figure.subplots()
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#b9d6ea", BLUE, "#00304f"])
    image = axes.imshow(share, cmap=shades, vmin=0, vmax=1)
    if num <= MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if share[row, column] > 0.5 else INK
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, size=8)
    axes.set_xticks(range(num), short, rotation=90 if turned else 0)
    axes.set_yticks(range(num), short)
    axes.set(xlabel=f"predicted {what}", ylabel=f"true {what}")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.75, label="share of the true class")
    bar.outline.set_visible(False)


def range_test(figure: Figure, *, lines: Sequence[Mapping[str, Any]]) -> None:
    """Training loss over a growing learning rate, a line for each optimizer.

    A line has name, lrs, losses, smoothed, and suggestion (lr, or None). The rise after the minimum is cut off.
    """
    figure.set_size_inches(7.5, 4.2)
    axes = figure.subplots()
    for place, line in enumerate(lines):
        look = line_look(place)
        axes.plot(line["lrs"], line["losses"], alpha=0.25, linewidth=0.8, color=look["color"])
        axes.plot(line["lrs"], line["smoothed"], label=line["name"], **look)
        if line["suggestion"] is not None:
            height = np.interp(np.log(line["suggestion"]), np.log(line["lrs"]), line["smoothed"])
            axes.plot(line["suggestion"], height, "o", color=look["color"], markersize=7)
            axes.annotate(f" {line['suggestion']:.1e}", (line["suggestion"], height), color=look["color"], va="bottom")
    shown = np.concatenate([line["smoothed"][: int(np.argmin(line["smoothed"])) + 1] for line in lines])
    low, high = float(shown.min()), float(shown.max())
    room = 0.2 * (high - low or 1.0)
    axes.set_ylim(low - room, high + room)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda rate, place: f"{rate:.0e}")
    axes.set_xlabel("learning rate (that of the backbone; the others keep their ratio to it)")
    axes.set_title("training loss, smoothed; a dot is the suggestion")
    axes.legend()


PICTURES: dict[str, Callable[..., None]] = {
    "curves": curves,
    "auxiliary": auxiliary,
    "rates": rates,
    "scatter": scatter,
    "reliability": reliability,
    "confusion": confusion,
    "intervals": intervals,
    "fold_scores": fold_scores,
    "spreads": spreads,
    "shares": shares,
    "times": times,
    "range_test": range_test,
    "bars": bars,
}
