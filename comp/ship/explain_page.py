"""Explanations as a page or as text: the words of a row in colour, or which words push the score over many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comp import config_file
from comp.data.frames import read_frame
from comp.runs import RunFolder, write_text
from comp.ship.explain import STEPS, Explanation, explain_rows, sample_rows
from comp.ship.report_page import Block, Grid, Marked, Note, Page, Panel, Tiles, render_html, render_text

__all__ = ["WordSum", "explain", "sum_words"]

NUM_WORDS = 25
LEAST_ROWS = 3  # a word of fewer rows says more about them than about the model
WRONG = 0.05  # an error of the integral above this share of all pushes is warned of


@dataclass(frozen=True)
class WordSum:
    """A word over many rows, letters folded to lower case."""

    word: str
    rows: int
    """Rows that hold it."""
    mean: float
    """Mean over those rows of what it adds, all its occurrences in a row together."""
    error: float
    """Standard error of that mean."""


def sum_words(found: Sequence[Explanation], least_rows: int = LEAST_ROWS) -> list[WordSum]:
    """Sum explanations over words that are in at least `least_rows` rows, the strongest upward push first."""
    pushes: dict[str, list[float]] = {}
    for one in found:
        own: dict[str, float] = {}
        for word in one.words:
            text = one.texts[word.field][word.start : word.end].casefold().strip()
            if text:
                own[text] = own.get(text, 0.0) + word.weight
        for text, weight in own.items():
            pushes.setdefault(text, []).append(weight)
    sums = [
        WordSum(
            text,
            len(own),
            float(np.mean(own)),
            float(np.std(own, ddof=1) / len(own) ** 0.5) if len(own) > 1 else 0.0,
        )
        for text, own in pushes.items()
        if len(own) >= least_rows
    ]
    return sorted(sums, key=lambda one: (-one.mean, one.word))


def explain(
    run: str | Path,
    rows: Sequence[str] = (),
    *,
    sample: int | None = None,
    output: str | None = None,
    weights: str = "best",
    steps: int = STEPS,
    html: str | Path | None = None,
    colour: bool = False,
) -> str:
    """Return the explanation of out-of-fold rows as text; `html`: also write it there as a page.

    `rows`: ids, each shown word by word. `sample`: that many rows drawn at random instead, summed over words; its
    classes need an `output`. Raises ValueError as `explain_rows`, and unless one of the two is given.
    """
    if bool(rows) == (sample is not None):
        raise ValueError("name rows with --row ID, or ask for words over many rows with --sample 200")
    if sample is not None and sample < LEAST_ROWS:
        raise ValueError(f"--sample {sample}: words are summed over at least {LEAST_ROWS} rows")
    folder = RunFolder(run)
    if sample is not None:
        rows = sample_rows(run, sample)
        config = config_file.load(folder.config)
        if output is None and config.tasks[0].kind == "multiclass":
            raise ValueError("--sample of classes needs --output CLASS: what pushes one class pulls at the others")
    elif len(set(rows)) != len(rows):
        raise ValueError("a row is named twice; each is explained once")
    found = explain_rows(run, rows, output=output, weights=weights, steps=steps)
    page = _words_page(folder, found) if sample is not None else _rows_page(folder, found)
    if html is not None:
        write_text(Path(html), render_html(page, {}))
    return render_text(page, colour=colour)


def _explained(folder: RunFolder) -> str:
    kind = config_file.load(folder.config).tasks[0].kind
    return "prediction" if kind in ("regression", "ordinal") else "log-odds"


def _doubts(found: Sequence[Explanation]) -> list[Block]:
    wrong = [one for one in found if one.error > WRONG]
    if not wrong:
        return []
    worst = max(wrong, key=lambda one: one.error)
    text = (
        f"In {len(wrong):,} of {len(found):,} rows the weights are off by more than {WRONG:.0%} of all pushes (row "
        f"{worst.id}: {worst.error:.1%}); raise --steps."
    )
    return [Note(text, warning=True)]


METHOD = (
    "Integrated gradients (Captum) on the word embeddings, from a baseline whose words are all masked; by the fold "
    "model that did not see the row, in float32. Blue words push up, orange ones down."
)


def _rows_page(folder: RunFolder, found: Sequence[Explanation]) -> Page:
    what = _explained(folder)
    panels = [Panel("method", "Method", [Note(METHOD), *_doubts(found)])]
    for place, one in enumerate(found):
        rows = read_frame(folder.fold(one.fold).oof, "id").set_index("id")
        shown = rows.loc[one.id, [name for name in rows.columns if name.startswith(("target_", "pred_"))]]
        blocks: list[Block] = [
            Tiles(
                [
                    (f"{what} of {one.output}", f"{one.value:.4f}", f"fold {one.fold}"),
                    ("baseline", f"{one.base:.4f}", "all words masked"),
                    ("sum of the words", f"{sum(word.weight for word in one.words):+.4f}", ""),
                    ("convergence delta", f"{one.delta:+.2e}", f"{one.error:.2%} of all pushes"),
                ]
            )
        ]
        for field, text in enumerate(one.texts):
            title = "text" if len(one.texts) == 1 else f"text {field + 1}"
            blocks.append(Marked(f"row-{place}-{field}", title, _parts(one, field, text)))
        strongest = sorted(one.words, key=lambda word: -abs(word.weight))[:NUM_WORDS]
        cells = [[one.texts[word.field][word.start : word.end], f"{word.weight:+.4f}"] for word in strongest]
        blocks.append(Grid(f"words-{place}", "strongest words", ["word", "push"], cells, folded=True))
        saved = [[str(name), f"{value:.5f}"] for name, value in shown.items()]
        blocks.append(Grid(f"saved-{place}", "out-of-fold row", ["column", "value"], saved, folded=True))
        panels.append(Panel(f"row-{place}", f"Row {one.id}", blocks))
    return Page(f"run {folder.name}: why", f"{len(found)} out-of-fold rows explained", panels)


def _parts(one: Explanation, field: int, text: str) -> list[tuple[str, float | None]]:
    """Cut a text into its words and what is between them; words that were not read have no weight."""
    parts: list[tuple[str, float | None]] = []
    at = 0
    for word in one.words:
        if word.field == field and word.start >= at:
            parts += [(text[at : word.start], None), (text[word.start : word.end], word.weight)]
            at = word.end
    return [part for part in [*parts, (text[at:], None)] if part[0]]


def _words_page(folder: RunFolder, found: Sequence[Explanation]) -> Page:
    what, output = _explained(folder), found[0].output
    sums = sum_words(found)
    up = [one for one in sums if one.mean > 0][:NUM_WORDS]
    down = [one for one in reversed(sums) if one.mean < 0][:NUM_WORDS]

    def grid(name: str, title: str, words: Sequence[WordSum]) -> Grid:
        cells = [[one.word, f"{one.rows:,}", f"{one.mean:+.4f}", f"{one.error:.4f}"] for one in words]
        return Grid(name, title, ["word", "rows", "mean push", "± s.e."], cells)

    median = float(np.median([one.error for one in found]))
    notes: list[Block] = [
        Note(METHOD),
        Note(
            f"What a word adds to the {what} of {output} in a row, mean over the rows that hold it; words of "
            f"{LEAST_ROWS} rows or more. Convergence delta: median {median:.2%} of all pushes in a row."
        ),
        *_doubts(found),
    ]
    blocks = [*notes, grid("up", "push up", up), grid("down", "push down", down)]
    about = f"words over {len(found):,} out-of-fold rows"
    return Page(f"run {folder.name}: which words push", about, [Panel("words", "Words", blocks)])
