"""`comp report`: one self-contained HTML page of a run, its pictures as PNG files beside it, or text for a terminal."""

from __future__ import annotations

from pathlib import Path

from comp.progress import open_progress
from comp.runs import write_stream, write_text
from comp.ship.report_figures import draw, need_matplotlib
from comp.ship.report_page import Page, render_html, render_text
from comp.ship.report_panels import report_page
from comp.ship.report_run import read_run

__all__ = ["report_text", "write_page", "write_report"]


def report_text(run: str | Path) -> str:
    """Return the report of a run folder as text; no Matplotlib needed. Raises ValueError when it is no run."""
    return render_text(report_page(read_run(run)))


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run folder and return its path: `out`, or report.html inside the folder.

    The pictures go as PNG files into a folder beside it, named like it without the ending. Raises ValueError when it
    is no run, or Matplotlib is absent.
    """
    need_matplotlib()
    record = read_run(run)
    path = Path(out) if out is not None else record.folder.path / "report.html"
    write_page(report_page(record), path)
    return path


def write_page(page: Page, path: Path) -> None:
    """Write a page as `path`, and each picture as NAME.png in a folder named like it without the ending.

    Raises ValueError for a path without an ending, and when Matplotlib is absent.
    """
    folder, drawn = path.with_suffix(""), {}
    if folder == path:
        raise ValueError(f"--out {path}: name it with an ending, like {path}.html; pictures go to {path}/")
    progress = open_progress(len(page.pictures), "pictures", "picture")
    try:
        for picture in page.pictures:
            done = draw(picture)
            drawn[picture.name] = (done.svg, done.width, done.height)
            png = done.png
            write_stream(folder / f"{picture.name}.png", lambda file, png=png: file.write(png))  # type: ignore[misc]
            progress.advance()
    finally:
        progress.close()
    write_text(path, render_html(page, drawn))
