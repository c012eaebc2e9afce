"""Panels of tables, pictures and notes -> one HTML page that needs no network and no script, or text for a terminal.

Texts, names and labels come from users' files: everything is escaped, and control characters are taken out.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

__all__ = [
    "Block",
    "Cell",
    "Grid",
    "Lines",
    "Long",
    "Marked",
    "Note",
    "Page",
    "Panel",
    "Picture",
    "Tiles",
    "number",
    "render_html",
    "render_text",
]

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SHOWN, MOST = 320, 6000  # characters of a long text that stand open, and at all
MOST_MARKED = 15  # parts of a marked text that show their weight in a terminal without colours
LEGIBLE = 620  # CSS pixels: a wider picture loses its words on a telephone
TERMINAL, MOST_ROWS = 100, 40  # in a terminal: characters of a text cell, rows of a table that is closed in the page


@dataclass(frozen=True)
class Long:
    """A text of any length, shown shortened; the rest opens on a click."""

    text: str


Cell: TypeAlias = str | Long


@dataclass(frozen=True)
class Grid:
    """A table."""

    name: str
    """Its id in the page."""
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1
    """Columns from the left that are words; the others are numbers."""
    words: Sequence[int] = ()
    """Places of further columns that are words."""
    folded: bool = False
    """In the page, closed until clicked: the numbers of a picture."""
    strong: Sequence[int] = ()
    """Rows that stand out."""


@dataclass(frozen=True)
class Picture:
    """A picture: `kind` is a row of PICTURES in report_figures.py, `data` its arguments."""

    name: str
    """Stem of its PNG file."""
    about: str
    """What it shows: the caption, and the words of a reader who does not see it."""
    kind: str
    data: Mapping[str, Any]
    words: Sequence[str] = ()
    """Lines that stand for it in a terminal."""


@dataclass(frozen=True)
class Note:
    """A line of prose."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Lines:
    """Text as it is."""

    name: str
    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Tiles:
    """The few numbers that come first: (name, value, remark)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Marked:
    """A text whose parts pull up (blue) or down (orange)."""

    name: str
    title: str
    parts: Sequence[tuple[str, float | None]]
    """(text, weight); None = not weighed."""


Block: TypeAlias = Grid | Picture | Note | Lines | Tiles | Marked


@dataclass(frozen=True)
class Panel:
    """A section of a page: `name` is its id, `title` its heading."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page: its heading, a line about it, and its sections, the first without a heading of its own."""

    title: str
    about: str
    panels: Sequence[Panel]

    @property
    def pictures(self) -> list[Picture]:
        return [block for panel in self.panels for block in panel.blocks if isinstance(block, Picture)]


def plain(text: str) -> str:
    """Return `text` with control characters (escape codes of terminals, too) made visible."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def number(value: float | None, digits: int = 5) -> str:
    """Return a score as text; "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


# --- HTML ------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 32px 48px; max-width: 1104px; background: #fff; color: #1c2127;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 25px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 10px; padding-top: 10px; border-top: 1px solid #d5dae0; }
.about { color: #57606a; max-width: none; margin: 2px 0 10px; overflow-wrap: anywhere; }
nav { font-size: 13px; margin: 10px 0 0; }
nav a { color: #0a5c91; margin-right: 14px; text-decoration: none; display: inline-block; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px 36px; margin: 14px 0 6px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 13px; color: #57606a; }
p { margin: 8px 0; max-width: 78ch; }
p.warning { border-left: 3px solid #d55e00; padding-left: 10px; }
.grid { margin: 14px 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; caption-side: top; }
th, td { padding: 3px 14px 3px 0; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 500; color: #57606a; border-bottom: 1px solid #aeb6c0; vertical-align: bottom; }
td { border-bottom: 1px solid #edf0f3; }
th.word, td.word { text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 4em;
  max-width: 44em; }
td.word.long { min-width: 380px; max-width: none; overflow-wrap: anywhere; unicode-bidi: isolate;
  white-space: pre-line; font-size: 13.5px; }
p.marked { max-width: none; line-height: 1.9; white-space: pre-line; overflow-wrap: anywhere; unicode-bidi: isolate; }
p.marked span { padding: 2px 0; border-radius: 2px; }
tr.strong td { font-weight: 600; }
figure { margin: 14px 0; max-width: 100%; }
.row { display: flex; flex-wrap: wrap; gap: 0 28px; align-items: flex-start; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 13px; color: #57606a; max-width: 78ch; }
details { margin: 6px 0; } summary { cursor: pointer; color: #0a5c91; font-size: 13.5px; }
td details { margin: 2px 0 0; }
pre { font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; background: #f6f8fa;
  padding: 10px 12px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; }
@media (max-width: 640px) { body { padding: 16px 14px 32px; } td.word.long { min-width: 240px; }
  figure.wide { overflow-x: auto; } figure.wide img { max-width: none; } figure.wide figcaption { max-width: 90vw; } }
@page { margin: 14mm; }
@media print { body { padding: 0; max-width: none; font-size: 10.5pt; } nav { display: none; }
  figure, tr, .tile, p { break-inside: avoid; } h2 { break-after: avoid; } table { font-size: 9pt; }
  td, th { white-space: normal; } td.word.long { min-width: 0; }
  .row { display: block; } .grid, pre { overflow: visible; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a page that can fetch and run nothing


def render_html(page: Page, drawn: Mapping[str, tuple[bytes, int, int]]) -> str:
    """Return the page; `drawn`: name of each picture -> its SVG, width and height in CSS pixels."""
    links = "".join(f'<a href="#{escape(panel.name)}">{escape(panel.title)}</a>' for panel in page.panels[1:])
    body = "\n".join(_panel_html(panel, drawn, first=place == 0) for place, panel in enumerate(page.panels))
    title = _html(page.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{title}</h1><p class="about">{_html(page.about)}</p><nav>{links}</nav></header>\n'
        f"{body}\n</body>\n</html>\n"
    )


def _html(text: str) -> str:
    return escape(plain(text))


def _panel_html(panel: Panel, drawn: Mapping[str, tuple[bytes, int, int]], *, first: bool) -> str:
    parts: list[str] = []
    row: list[str] = []  # neighbours that share a line where there is room: a table and the pictures after it

    def close() -> None:
        if row:
            parts.append(f'<div class="row">{"".join(row)}</div>')
            row.clear()

    for block, after in zip(panel.blocks, [*panel.blocks[1:], None], strict=True):
        if isinstance(block, Picture):
            row.append(_picture_html(block, *drawn[block.name]))
            continue
        close()
        beside = isinstance(block, Grid) and isinstance(after, Picture) and not block.folded
        (row if beside else parts).append(_block_html(block))
    close()
    head = "" if first else f"<h2>{_html(panel.title)}</h2>\n"
    return f'<section id="{escape(panel.name)}">\n{head}{"".join(parts)}\n</section>'


def _picture_html(picture: Picture, svg: bytes, width: int, height: int) -> str:
    data = base64.b64encode(svg).decode("ascii")
    about = _html(picture.about)
    wide = ' class="wide"' if width > LEGIBLE else ""  # on a telephone, moved sideways rather than shrunk to a stamp
    return (
        f'<figure id="{escape(picture.name)}"{wide} style="width: {width}px">'
        f'<img src="data:image/svg+xml;base64,{data}" '
        f'width="{width}" height="{height}" alt="{about}"><figcaption>{about}</figcaption></figure>'
    )


def _block_html(block: Grid | Note | Lines | Tiles | Marked) -> str:
    if isinstance(block, Note):
        return f'<p class="warning">{_html(block.text)}</p>' if block.warning else f"<p>{_html(block.text)}</p>"
    if isinstance(block, Tiles):
        tiles = "".join(
            f'<div class="tile"><span>{_html(name)}</span><b>{_html(value)}</b><span>{_html(remark)}</span></div>'
            for name, value, remark in block.items
        )
        return f'<div class="tiles">{tiles}</div>'
    if isinstance(block, Marked):
        return _marked_html(block)
    if isinstance(block, Lines):
        inner, title = f'<pre id="{escape(block.name)}">{_html(block.text)}</pre>', block.title
    else:
        inner, title = _grid_html(block), block.title
    return f"<details><summary>{_html(title)}</summary>{inner}</details>" if block.folded else inner


def _marked_html(block: Marked) -> str:
    most = _largest(block)
    words = ""
    for text, weight in block.parts:
        shown = _html(text)
        if weight is not None and text.strip():
            colour = "0, 114, 178" if weight > 0 else "213, 94, 0"
            style = f"background: rgba({colour}, {0.7 * abs(weight) / most:.3f})"
            shown = f'<span style="{style}" title="{weight:+.4f}">{shown}</span>'
        words += shown
    return f'<div id="{escape(block.name)}"><b>{_html(block.title)}</b><p class="marked" dir="auto">{words}</p></div>'


def _largest(block: Marked) -> float:
    return max((abs(weight) for _, weight in block.parts if weight is not None), default=0.0) or 1.0


def _grid_html(grid: Grid) -> str:
    words = _word_columns(grid)

    def cell(tag: str, place: int, value: Cell) -> str:
        if isinstance(value, Long):
            return f'<td class="word long" dir="auto">{_long_html(value.text)}</td>'
        kind = ' class="word"' if words[place] else ""
        return f"<{tag}{kind}>{_html(value)}</{tag}>"

    heads = "".join(cell("th", place, value) for place, value in enumerate(grid.heads))
    rows = ""
    for line, row in enumerate(grid.rows):
        strong = ' class="strong"' if line in grid.strong else ""
        rows += f"<tr{strong}>{''.join(cell('td', place, value) for place, value in enumerate(row))}</tr>\n"
    caption = "" if grid.folded or not grid.title else f"<caption>{_html(grid.title)}</caption>"
    head = f"<thead><tr>{heads}</tr></thead>" if any(grid.heads) else ""
    return f'<div class="grid"><table id="{escape(grid.name)}">{caption}{head}\n<tbody>{rows}</tbody></table></div>'


def _long_html(text: str) -> str:
    text = plain(text)
    if len(text) <= SHOWN:
        return escape(text)
    cut = text.rfind(" ", SHOWN // 2, SHOWN) + 1 or SHOWN
    left = len(text) - MOST
    rest = text[cut:MOST] + (f" ... ({left:,} characters more)" if left > 0 else "")
    return f"{escape(text[:cut])}<details><summary>the rest</summary>{escape(rest)}</details>"


def _word_columns(grid: Grid) -> list[bool]:
    """Return which columns hold words, and stand to the left."""
    return [
        place < grid.left or place in grid.words or any(isinstance(row[place], Long) for row in grid.rows)
        for place in range(len(grid.heads))
    ]


# --- text ------------------------------------------------------------------------------------------------------------


def render_text(page: Page, *, colour: bool = False) -> str:
    """Return the page for a terminal or a notebook: tables and notes, and a few lines for each picture.

    `colour`: marked texts in the terminal's colours; without, the parts with the largest weights have them behind.
    """
    lines = [plain(page.title), plain(page.about)]
    for place, panel in enumerate(page.panels):
        if place:
            lines += ["", f"== {panel.title} =="]
        for block in panel.blocks:
            if isinstance(block, Note):
                lines.append(("warning: " if block.warning else "") + plain(block.text))
            elif isinstance(block, Tiles):
                lines += [
                    f"{plain(name)}: {plain(value)}  {plain(remark)}".rstrip() for name, value, remark in block.items
                ]
            elif isinstance(block, Lines):
                lines += ["", block.title, plain(block.text)] * (not block.folded)
            elif isinstance(block, Marked):
                lines += ["", plain(block.title), _marked_text(block, colour=colour)]
            elif isinstance(block, Picture):
                lines += [plain(line) for line in block.words]
            else:
                lines += ["", *_grid_text(block)]
    return "\n".join(lines) + "\n"


def _marked_text(block: Marked, *, colour: bool) -> str:
    most = _largest(block)
    weights = sorted((abs(weight) for _, weight in block.parts if weight is not None), reverse=True)
    least = weights[min(MOST_MARKED, len(weights)) - 1] if weights else 0.0
    shown = ""
    for text, weight in block.parts:
        word = plain(text)
        if weight is not None and text.strip() and weight:
            depth = min(4, int(5 * abs(weight) / most))
            if colour and depth:
                word = f"\x1b[{44 if weight > 0 else 43};{97 if weight > 0 else 30}m{word}\x1b[0m" if depth > 1 else (
                    f"\x1b[{34 if weight > 0 else 33}m{word}\x1b[0m"
                )  # fmt: skip
            elif not colour and abs(weight) >= least:
                word = f"{word}({weight:+.3f})"
        shown += word
    return shown


def _grid_text(grid: Grid) -> list[str]:
    table = [[_cell_text(cell) for cell in row] for row in [grid.heads, *grid.rows] if any(row)]
    widths = [max((len(row[place]) for row in table), default=0) for place in range(len(grid.heads))]
    words = _word_columns(grid)
    more = len(table) - MOST_ROWS if grid.folded else 0
    if more > 0:
        table = table[:MOST_ROWS]
    lines = [plain(grid.title)] * bool(grid.title)
    for row in table:
        cells = [
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return [*lines, f"... {more:,} rows more"] if more > 0 else lines


def _cell_text(cell: Cell) -> str:
    text = " ".join(plain(cell.text if isinstance(cell, Long) else cell).split())
    return text if len(text) <= TERMINAL else f"{text[: TERMINAL - 3]}..."
