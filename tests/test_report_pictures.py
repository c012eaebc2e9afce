"""The pictures of a report as they are laid out: nothing cut off, nothing over one another, no mark outside its axes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats

from comp.ship.report_figures import PICTURES
from comp.ship.report_page import Grid, Long, Page, Panel, Picture, render_html
from comp.ship.report_style import STYLE, shortened
from comp.ship.report_tasks import most_common, prediction_blocks, share_interval

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, of the extra `report`, is not installed")

LONG = [
    "Billing and subscription renewals",
    "Account access, passwords and two-factor",
    "Shipping delays (international)",
    "Complaint about a previous answer",
    "Complaint about a previous invoice",
    "Other",
]


def laid_out(kind: str, **data: Any) -> Any:
    """Return the figure of a picture, its layout done."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        PICTURES[kind](figure, **data)
        figure.draw_without_rendering()
    return figure


def words_of(figure: Any) -> list[tuple[str, Any]]:
    """Return every text that is shown and its box in pixels."""
    from matplotlib.text import Text

    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in found]


def ticks_of(axis: Any) -> list[Any]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]


def fold(name: str, steps: list[int], **more: Any) -> dict[str, Any]:
    scores = [0.5 + 0.01 * step for step in steps]
    return {"name": name, "valid": (steps, scores), "train": (steps, scores), "chosen": (steps[-1], scores[-1]), **more}


@pytest.mark.parametrize("names", [["0", "1"], ["easy", "hard", "middling", "very easy", "very hard"], LONG, LONG * 3])
def test_a_confusion_matrix_has_room_for_its_names(names: list[str]) -> None:
    figure = laid_out("confusion", counts=np.eye(len(names), dtype=np.int64), names=names, what="class")
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in words_of(figure):
        assert box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5, f"{text} is cut"
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        labels = ticks_of(axis)
        assert len(labels) == len(names)
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in pairwise(boxes)), [label.get_text() for label in labels]


def test_names_are_shortened_to_ones_that_differ() -> None:
    assert shortened(["short", "x" * 30], 10) == ["short", "xxxxxxxxx\N{HORIZONTAL ELLIPSIS}"]
    names = ["support request: billing", "support request: refund", "support request: other"]
    short = shortened(names, 16)
    assert len(set(short)) == 3 and all(len(name) <= 16 for name in short)
    assert short[0].startswith("support") and short[0].endswith("billing")
    twins = ["a" * 20 + letter + "b" * 20 for letter in "xy"]
    assert len(set(shortened(twins, 16))) == 2


def test_steps_are_whole_numbers_and_the_last_mark_is_inside() -> None:
    figure = laid_out("curves", folds=[fold("fold 0", [20]), fold("fold 1", [21])], metric="accuracy")
    for axes in figure.axes:
        assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > 21.2, "the ring of step 21 has room"
        assert all(tick == int(tick) for tick in axes.get_xticks())
        boxes = [label.get_window_extent() for label in ticks_of(axes.xaxis)]
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    long = laid_out("curves", folds=[fold("fold 0", [100_000, 250_000])], metric="rmse")
    boxes = [label.get_window_extent() for label in ticks_of(long.axes[0].xaxis)]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_estimates_are_told_from_scores() -> None:
    folds = [fold("fold 0", [10, 20, 30], estimated=[False, True, False])]
    figure = laid_out("curves", folds=folds, metric="rmse")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fold 0", "chosen", "estimate"]
    line, crosses = figure.axes[0].get_lines()[:2]
    assert line.get_markevery() == [0, 2]
    assert crosses.get_marker() == "x" and crosses.get_xdata().tolist() == [20]
    plain = laid_out("curves", folds=[fold("fold 0", [10, 20, 30])], metric="rmse")
    assert [text.get_text() for text in plain.legends[0].get_texts()] == ["fold 0", "chosen"]


def test_auxiliary_tasks_show_what_was_kept_from_step_0_on() -> None:
    tasks = [{"name": "side", "metric": "roc_auc", "folds": [fold("fold 0", [10, 20]), fold("fold 1", [10, 20])]}]
    axes = laid_out("auxiliary", tasks=tasks).axes[0]
    assert axes.get_xlim()[0] == 0
    rings = [line for line in axes.get_lines() if line.get_markerfacecolor() == "none"]
    assert [list(ring.get_xdata()) for ring in rings] == [[20], [20]]


@pytest.mark.parametrize(
    ("longest", "unit", "shown"), [(80, "seconds", 80), (1200, "minutes", 20), (36000, "hours", 10)]
)
def test_times_have_a_unit_that_fits(longest: float, unit: str, shown: float) -> None:
    axes = laid_out("times", folds=["fold 0"], parts={"training": [longest / 2], "evaluating": [longest / 2]}).axes[0]
    assert axes.get_xlabel() == unit
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == pytest.approx(shown)


def test_bars_of_a_share_are_wilsons() -> None:
    shares, counts = np.array([0.0, 0.3, 1.0]), np.array([20, 50, 8])
    low, high = share_interval(shares, counts)
    for place in range(3):
        wanted = stats.binomtest(round(shares[place] * counts[place]), int(counts[place])).proportion_ci(0.95, "wilson")
        assert (low[place], high[place]) == pytest.approx((wanted.low, wanted.high), abs=1e-4)
    assert high[0] > 0.1 and low[2] < 0.8, "twenty zeros do not prove that there are no ones"


def test_of_many_classes_the_most_frequent_are_drawn_and_it_is_said() -> None:
    from comp.config import Task

    draw, num = np.random.default_rng(0), 60
    truth = np.concatenate([np.arange(num), np.repeat(np.arange(20, num), 3)])
    preds = draw.dirichlet(np.ones(num), len(truth))
    names = [f"c{place:02d}" for place in range(num)]
    task = Task.model_validate({"name": "topic", "kind": "multiclass", "targets": ["t"]})
    picture, table, _ = prediction_blocks(task, truth[:, None].astype(float), preds, names, names)
    assert isinstance(picture, Picture) and isinstance(table, Grid)
    assert picture.about.endswith("; the 40 most frequent of 60")
    assert list(picture.data["names"]) == names[20:], "in their own order"
    guess = preds.argmax(axis=1)
    assert picture.data["counts"][3, 5] == ((truth == 23) & (guess == 25)).sum()
    assert table.folded and table.title == "each class" and len(table.rows) == num
    assert most_common(np.array([3, 1, 3, 2]), 2).tolist() == [0, 2]
    assert most_common(np.array([3, 1]), 9).tolist() == [0, 1]


def test_what_is_never_confused_has_no_table_of_confusions() -> None:
    from comp.config import Task

    task = Task.model_validate({"name": "topic", "kind": "multiclass", "targets": ["t"]})
    truth = np.arange(9) % 3
    blocks = prediction_blocks(task, truth[:, None].astype(float), np.eye(3)[truth], LONG[:3], LONG[:3])
    assert [block.name for block in blocks if isinstance(block, Grid)] == ["classes-topic"]
    wrong = np.eye(3)[np.r_[1, truth[1:]]]
    blocks = prediction_blocks(task, truth[:, None].astype(float), wrong, LONG[:3], LONG[:3])
    (confused,) = [block for block in blocks if isinstance(block, Grid) and block.name == "confused-topic"]
    assert confused.rows == [[LONG[0], LONG[1], "1", "33.3%"]]


def test_words_are_wrapped_and_wide_pictures_marked() -> None:
    grid = Grid("worst", "", ["id", "error", "target", "text"], [["a", "1.0", LONG[0], Long("words")]], words=[2])
    pictures = [Picture("wide", "", "curves", {}), Picture("small", "", "times", {})]
    page = Page("run", "", [Panel("first", "", [grid, *pictures])])
    html = render_html(page, {"wide": (b"<svg/>", 998, 300), "small": (b"<svg/>", 470, 300)})
    assert f'<td>1.0</td><td class="word">{LONG[0]}</td><td class="word long"' in html
    assert '<figure id="wide" class="wide"' in html and '<figure id="small" style' in html
