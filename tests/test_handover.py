"""A bundle that other versions wrote is read here: `make test-oldest` sets COMP_HANDOVER to what handover.py made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import transformers

from comp import load, load_bundle
from comp.ship.rerun import rerun

FOLDER = Path(os.environ.get("COMP_HANDOVER", "nothing"))
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="COMP_HANDOVER names no folder; see `make test-oldest`")


def test_the_versions_differ() -> None:
    """Otherwise the tests below show nothing."""
    made = json.loads((FOLDER / "versions.json").read_text())
    assert made["transformers"] != transformers.__version__ and made["pandas"] != pd.__version__


@pytest.mark.parametrize(("name", "tolerance"), [("tiny-blend", 1e-4), ("tiny-half", 5e-2)])
def test_a_bundle_of_other_versions_predicts_the_same(name: str, tolerance: float, isolated: Path) -> None:
    inputs = isolated / "input"
    shutil.copytree(FOLDER / "bundles" / name, inputs / name)
    (inputs / "tiny-comp").mkdir()
    for file in ("test.csv", "sample_submission.csv"):
        shutil.copyfile(FOLDER / file, inputs / "tiny-comp" / file)
    found = rerun(inputs / name, inputs, say=lambda line: None)
    expected = pd.read_csv(FOLDER / "expected.csv", dtype={"id": str})
    assert list(found["id"]) == list(expected["id"])
    assert found["target"].astype(float).to_numpy() == pytest.approx(expected["target"].to_numpy(), abs=tolerance)
    test = pd.read_csv(FOLDER / "test.csv", dtype=str)
    again = load_bundle(inputs / name).predict(test)["target"].to_numpy()
    assert again == pytest.approx(found["target"].astype(float).to_numpy(), abs=1e-5)
    assert len(load(inputs / name / "runs" / "b").predict(test)) == len(test)
