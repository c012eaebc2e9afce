"""What the newest versions hand to the oldest: `python tests/handover.py FOLDER` makes a bundle and its predictions."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bundling import bundle, inside, silent, train
from conftest import write_tiny_model

from comp.blend.crossfit import read_blend
from comp.runs import versions, write_json
from comp.ship.infer import infer


def make(folder: Path) -> None:
    """Write bundles/tiny-blend, test.csv, sample_submission.csv, expected.csv and versions.json into `folder`."""
    folder.mkdir(parents=True)
    competition = train(folder, write_tiny_model(folder / "model", "bert"))
    with inside(folder):
        bundle()
        bundle(out=Path("bundles/tiny-half"), half=True)
        infer([], blend=read_blend("blends/all"), out="expected.csv", say=silent)
        write_json(Path("versions.json"), versions())
        for file in (competition.test, competition.sample_submission):
            shutil.copyfile(file, file.name)


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
