"""What the tests of bundles share: tiny runs, a classical one that reads another's vectors, a blend, a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml
from conftest import TinyCompetition, write_tiny_competition

from comp import config_file
from comp.blend.classical import run_classical
from comp.blend.crossfit import Recipe, examine, write_blend
from comp.blend.members import gather
from comp.ship.bundle import Order, make_bundle
from comp.training import crossval

RUNS = ["runs/a", "runs/b", "runs/words"]


def silent(line: str) -> None:
    pass


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def train(folder: Path, backbone: Path) -> TinyCompetition:
    """Two fine-tuned runs, ridge on TF-IDF and on the vectors of the first, a ridge blend of all three."""
    competition = write_tiny_competition(folder / "data")
    data = competition.config(backbone, optimizer={"lr": 1e-3})
    data["model"]["max_length"] = 32
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    with inside(folder):
        config = config_file.load("tiny.yaml")
        crossval.run(config, "a", save_every="never", say=silent)
        other = config_file.load("tiny.yaml", ["model.pooler.name=max"])
        crossval.run(other, "b", save_every="never", say=silent)
        run_classical(config, "words", features=["tfidf", "run:a"], estimator="ridge", say=silent)
        members, recipe = gather(RUNS), Recipe("ridge")
        parameters, report = examine(members, recipe)
        write_blend(Path("blends/all"), members, recipe, parameters, report)
    return competition


ORDER = Order(Path("bundles/tiny-blend"), "someone", "tiny-comp", blend="blends/all", time_budget=None)


def bundle(say: Callable[[str], None] = silent, **changes: object) -> Path:
    return make_bundle(replace(ORDER, **changes), say)  # type: ignore[arg-type]
