"""The README's table of techniques is what the catalogues say; `make readme` (this file, run) writes it."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from comp.catalog import CATALOGUES, catalogue, markdown
from comp.cli import app

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- techniques: [^\n]*-->\n)(.*?)(<!-- /techniques -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """Return the README with the block between the markers made anew."""
    assert BLOCK.search(text), "the README has lost its <!-- techniques --> markers"
    return BLOCK.sub(lambda found: f"{found[1]}\n{markdown()}\n{found[3]}", text)


def test_the_readme_shows_the_catalogues() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_tables(text), "the catalogues have changed: run `make readme` and commit the README"


def test_every_row_says_what_it_is_and_where_it_comes_from() -> None:
    for name in CATALOGUES:
        for key, row in catalogue(name).items():
            assert row.about and row.source, f"{name}: {key}"
            assert "|" not in row.about + row.source, f"{name}: {key} would break the table"


def test_the_lists_that_the_readme_names_are_there() -> None:
    named = re.search(r"`comp list ([a-z |\n]+)`", README.read_text(encoding="utf-8"))
    assert named is not None
    assert set(re.split(r"\s*\|\s*", named[1])) == set(CATALOGUES)


def test_the_command_prints_the_tables() -> None:
    run = CliRunner()
    assert run.invoke(app, ["list", "--markdown"]).output == markdown()
    assert run.invoke(app, ["list", "poolers", "--markdown"]).output == markdown(["poolers"])
    plain = run.invoke(app, ["list", "poolers"]).output
    assert "sbert_wk" in plain and "[Wang & Kuo 2020, arXiv:2002.06652]" in plain


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
