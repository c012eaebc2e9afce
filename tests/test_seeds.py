"""comp train --seeds: one run a seed on the same folds; mean, deviation and worst of what they print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TinyCompetition
from typer.testing import CliRunner

from comp.cli import app
from comp.runs import RunFolder, read_json
from comp.training.seeds import SeedScores, parse_seeds


def test_seeds_are_read_or_refused() -> None:
    assert parse_seeds("3, 1,2") == [3, 1, 2]
    for wrong in ("1,1", "a", "", "1,-2", "0.5"):
        with pytest.raises(ValueError, match="--seeds .* allowed are different whole numbers like 0,1,2"):
            parse_seeds(wrong)


def test_worst_is_by_the_metric_and_one_seed_has_no_deviation() -> None:
    lower = SeedScores("rmse", {0: 0.5, 1: 0.7}, {0: 0.6, 1: None})
    assert lower.spread(lower.pooled) == pytest.approx((0.6, np.std([0.5, 0.7], ddof=1), 0.7))
    assert lower.spread(lower.last) == (0.6, None, 0.6)
    higher = SeedScores("accuracy", {0: 0.5, 1: 0.7}, {0: None, 1: None})
    assert higher.spread(higher.pooled)[2] == 0.5
    assert higher.spread(higher.last) == (None, None, None)
    assert higher.table().splitlines()[-1].split() == ["worst", "0.50000", "-"]


def test_every_seed_is_a_run_of_its_own(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> None:
    data = tiny_competition().config(tiny_model_folder("bert"))
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    found = CliRunner().invoke(app, ["train", "--config", "tiny.yaml", "--seeds", "0,7"], catch_exceptions=False)
    assert found.exit_code == 0
    written = read_json(Path("runs/tiny.seeds.json"))
    pooled = [read_json(RunFolder(f"runs/tiny-seed{seed}").scores)["best"]["pooled"] for seed in (0, 7)]
    assert list(written["best"]["seeds"].values()) == pooled
    assert written["best"]["mean"] == pytest.approx(np.mean(pooled))
    assert written["best"]["std"] == pytest.approx(np.std(pooled, ddof=1))
    assert f"mean            {np.mean(pooled):>10.5f}" in found.output
    one, two = (pd.read_parquet(f"runs/tiny-seed{seed}/oof.parquet") for seed in (0, 7))
    assert (one["seed"] == 0).all() and (two["seed"] == 7).all()
    marks = read_json(RunFolder("runs/tiny-seed7").manifest)["fingerprints"]
    assert two.attrs["fingerprints"] == marks and set(marks) == {"config", "data", "folds"}
    assert (one["id"] == two["id"]).all() and (one["fold"] == two["fold"]).all()
    assert not np.allclose(one["pred_main_target"], two["pred_main_target"])
    again = CliRunner().invoke(app, ["train", "--config", "tiny.yaml", "--seeds", "0,7,8"], catch_exceptions=False)
    assert again.output.count("finished before, skipped") == 4
    listed = CliRunner().invoke(app, ["oof"], catch_exceptions=False).output.splitlines()
    assert [line.split()[0] for line in listed[1:]] == ["tiny-seed0", "tiny-seed7", "tiny-seed8", "tiny"]
    bag = listed[-1].split()
    three = [pd.read_parquet(f"runs/tiny-seed{seed}/oof.parquet").set_index("id") for seed in (0, 7, 8)]
    mean = np.mean([own.loc[three[0].index, "pred_main_target"] for own in three], axis=0)
    score = np.sqrt(((mean - three[0]["target_main_target"]) ** 2).mean())
    assert float(bag[2]) == pytest.approx(score, abs=6e-6) and bag[4] == "-"
    assert listed[-1].endswith("mean of 3 runs, seeds 0, 7, 8")
    assert float(listed[1].split()[5]) == pytest.approx(
        read_json(RunFolder("runs/tiny-seed0").scores)["keep_best_flatters"], abs=6e-6
    )
