"""Every public name says what it is, and every technique's code names its source."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import comp
from comp.catalog import CATALOGUES, catalogue
from comp.stability.techniques import TECHNIQUES

SCRIPTS = ("comp.__main__", "comp.ship.execute")  # what runs when it is imported
MODULES = [found.name for found in pkgutil.walk_packages(comp.__path__, "comp.") if found.name not in SCRIPTS]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    bare = []
    for own in getattr(module, "__all__", []):
        thing = getattr(module, own)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)) or thing.__module__ != name:
            continue
        told = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
        if not told or told.startswith(f"{own}("):  # what a dataclass makes up
            bare.append(own)
    assert bare == []


@pytest.mark.parametrize("name", CATALOGUES)
def test_every_row_of_a_catalogue_names_its_source(name: str) -> None:
    assert [key for key, row in catalogue(name).items() if not row.source.strip() or not row.about.strip()] == []


@pytest.mark.parametrize("name", TECHNIQUES)
def test_the_code_of_a_technique_cites_its_paper(name: str) -> None:
    row: Any = TECHNIQUES[name]
    code = Path(inspect.getfile(inspect.unwrap(row.make))).read_text(encoding="utf-8")
    papers = re.findall(r"\d{4}\.\d{5}", row.source)
    assert [paper for paper in papers if paper not in code] == []
