"""A run of MiniLM on CLEAR as training leaves it, made in seconds: what the benchmarks of inference predict with."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from comp import config_file
from comp.model.backbone import save_recipe
from comp.model.sources import load_tokenizer
from comp.model.text_model import build_model
from comp.runs import RunFolder, claim, write_json
from comp.training.checkpoint import save_weights

ROOT = Path(__file__).resolve().parents[1]
CLEAR = ROOT.parent / "shared" / "data" / "clear" / "test.csv"
CONFIG = ROOT / "configs" / "clear-minilm.yaml"
TEST = "test.csv"


def write_finished_run(path: Path, *, num_folds: int, rows: int | None = None) -> RunFolder:
    """Write runs/clear with `num_folds` models that differ in their heads, and the table they predict, into `path`.

    `rows`: so many of CLEAR's test rows, evenly picked, so that their lengths are those of all; None = all 1,890.
    """
    frame = pd.read_csv(CLEAR, dtype=str, keep_default_na=False)
    if rows is not None and rows < len(frame):
        frame = frame.iloc[[place * len(frame) // rows for place in range(rows)]]
    path.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path / TEST, index=False)
    overrides = [f"folds.num_folds={max(2, num_folds)}", f"competition.test={path / TEST}"]
    config = config_file.load(CONFIG, [*overrides, "competition.sample_submission=null"])
    folder = RunFolder(path / "runs" / "clear")
    claim(folder, config, {"data": "none"}, {"classes": {}, "backbone": config.model.backbone})
    tokenizer = load_tokenizer(config.model.backbone)
    model = build_model(
        config.model.backbone,
        tokenizer,
        pretrained=True,
        pooler=config.model.pooler.model_dump(),
        heads={config.tasks[0].name: 1},
        max_length=config.model.max_length,
    )
    save_recipe(model.backbone, tokenizer, folder.backbone)
    for fold in range(num_folds):
        torch.manual_seed(fold)
        for parameter in model.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        save_weights(folder.fold(fold).best, model)
        write_json(folder.fold(fold).done, {"best": None})
    return folder
