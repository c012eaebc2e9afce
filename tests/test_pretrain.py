"""`comp pretrain`: parity with transformers, the backbone it leaves, stages, resume, folds, SimCSE."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_MODELS, Call, TinyCompetition, write_tiny_model
from safetensors.torch import load_file

from comp import config_file
from comp.data.batches import collate
from comp.data.lineage import read_lineage, text_marks
from comp.data.masking import FIXED, LABELS, Masker, encode_texts
from comp.model.backbone import load_backbone
from comp.model.pretraining import LOGITS, MaskedLM, load_masked_lm, load_sentence_encoder, write_backbone
from comp.model.sources import load_tokenizer
from comp.model.text_model import VECTOR
from comp.runs import RunFolder
from comp.runtime import open_runtime, random_state, set_random_state
from comp.stability.consistency import twice
from comp.training import crossval
from comp.training import pretrain as stages
from comp.training.mlm import MaskedWords, summed
from comp.training.pretrain import HeldOutTexts, pretrain
from comp.training.resume import Saver
from comp.training.simcse import ITEMS, TwinPasses, alignment, contrast, uniformity

MASKED = [kind for kind in TINY_MODELS if kind not in ("xlnet", "bart", "electra")]
SAID: list[str] = []


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture
def config_of(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Callable[..., Any]:
    """Write a config whose section `pretrain` is given."""
    competition = tiny_competition(test_rows=20)

    def make(kind: str | Path = "bert", *, model: dict[str, Any] | None = None, **own: Any) -> Any:
        folder = tiny_model_folder(kind) if isinstance(kind, str) else kind
        data = competition.config(folder)
        data["model"] |= model or {}
        data["pretrain"] = {"lr": 2e-3, "batch_size": 8, "held_out_percent": 10, "max_length": 32, **own}
        Path("tiny.yaml").write_text(yaml.safe_dump(data))
        return config_file.load("tiny.yaml")

    return make


def run(config: Any, name: str, fold: str | None = None, save_every: str = "2 steps", **how: Any) -> Path:
    SAID.clear()
    return pretrain(config, name, fold, save_every=save_every, say=SAID.append, **how)


def weights(folder: Path) -> dict[str, Any]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


# --- the model -------------------------------------------------------------------------------------------------------


def masked_batch(folder: Path) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(str(folder))
    texts = ["the lovely ship and the grim tide", "a deer on the path", "oak fern moss zebra in the town"] * 3
    encoded, words = encode_texts(tokenizer, (texts,), packing=False, words=False, max_length=32)
    vocab = len(tokenizer)
    masker = Masker.build(encoded, words, tokenizer, vocab_size=vocab, share=0.3, seed=1)
    return masker.collate(np.arange(len(texts)), 0), tokenizer


@pytest.mark.parametrize("kind", MASKED)
def test_loss_and_gradient_are_those_of_transformers(
    kind: str, tiny_model_folder: Callable[..., Path], isolated: Path
) -> None:
    """Ours sees the chosen tokens alone; theirs computes logits for all of them, and leaves out the others."""
    batch, _ = masked_batch(tiny_model_folder(kind))
    torch.manual_seed(0)
    ours, about = load_masked_lm(str(tiny_model_folder(kind)), dropout=0.0)
    assert "new" in about
    torch.manual_seed(0)
    theirs = load_masked_lm(str(tiny_model_folder(kind)), dropout=0.0)[0].model
    theirs.base_model._forward_hooks.clear()
    labels = batch.targets[LABELS]
    loss = summed(ours(batch), batch) / (labels != -100).sum()
    loss.backward()
    types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    found = theirs(input_ids=batch.input_ids, attention_mask=batch.mask, labels=labels, **types)
    found.loss.backward()
    assert float(loss.detach()) == pytest.approx(float(found.loss.detach()), rel=1e-5)
    grads = dict(ours.model.named_parameters())
    for name, parameter in theirs.named_parameters():
        mine = grads[name].grad
        assert (parameter.grad is None) == (mine is None), name
        if parameter.grad is not None:
            assert torch.allclose(mine, parameter.grad, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("kind", MASKED)
def test_the_head_is_tied_and_comes_back(kind: str, tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = str(tiny_model_folder(kind))
    batch, tokenizer = masked_batch(Path(source))
    torch.manual_seed(3)
    learner, _ = load_masked_lm(source, dropout=None)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    words, decoder = learner.model.get_input_embeddings(), learner.model.get_output_embeddings()
    assert decoder.weight is words.weight
    write_backbone(tmp_path / "new", learner, tokenizer, source)
    again, about = load_masked_lm(str(tmp_path / "new"), dropout=0.0)
    assert about == "from the checkpoint"
    learner.eval(), again.eval()
    assert torch.equal(learner(batch)[LOGITS], again(batch)[LOGITS])
    # the encoder as model.backbone, its pooler that of the source
    backbone = load_backbone(str(tmp_path / "new"), tokenizer, dropout=0.0, with_pooler=False)
    state, own = backbone.model.state_dict(), learner.model.base_model.state_dict()
    assert all(torch.equal(state[name], own[name]) for name in own)
    pooler = {name.split(".", 1)[1]: tensor for name, tensor in learner.pooler.items()}
    assert bool(pooler) == (kind in ("bert", "roberta", "albert", "mpnet", "xlm-roberta"))
    if pooler:
        kept = load_backbone(str(tmp_path / "new"), tokenizer, dropout=0.0, with_pooler=True).model.state_dict()
        before = load_file(Path(source) / "model.safetensors")
        assert all(torch.equal(kept[name], before[name]) for name in kept if name.startswith("pooler."))
    config, old = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "new", Path(source)))
    assert {key: value for key, value in config.items() if "dropout" in key} == {
        key: value for key, value in old.items() if "dropout" in key
    }


def test_debertas_own_head_is_read(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Its authors' checkpoints hold lm_predictions; transformers' class expects another head unless told."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    source = tiny_model_folder("deberta-v2")
    config = AutoConfig.from_pretrained(source)
    config.legacy = False
    torch.manual_seed(1)
    model = AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(tmp_path / "released")
    load_tokenizer(str(source)).save_pretrained(tmp_path / "released")
    told = json.loads((tmp_path / "released" / "config.json").read_text())
    told.pop("legacy")
    (tmp_path / "released" / "config.json").write_text(json.dumps(told))
    learner, about = load_masked_lm(str(tmp_path / "released"), dropout=0.0)
    assert about == "from the checkpoint"
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in learner.model.state_dict().items())
    write_backbone(tmp_path / "new", learner, load_tokenizer(str(source)), str(tmp_path / "released"))
    assert load_masked_lm(str(tmp_path / "new"), dropout=0.0)[1] == "from the checkpoint"


REFUSED = {"electra": "replaced tokens", "xlnet": "permuted order", "bart": "encoder-decoder"}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_without_a_head_are_refused(kind: str, config_of: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=REFUSED[kind]) as told:
        run(config_of(kind), "no")
    assert "use" in str(told.value) and not Path("runs").exists()


def test_nothing_but_chosen_tokens_is_counted(tiny_model_folder: Callable[..., Path], isolated: Path) -> None:
    """The shares of micro-batches add up to the loss of the window."""
    tokenizer = load_tokenizer(str(tiny_model_folder("bert")))
    texts = ["the ship", "a deer on the path and the oak", "fern moss tide wave sail harbour"] * 2
    encoded, _ = encode_texts(tokenizer, (texts,), packing=False, words=False, max_length=32)
    masker = Masker.build(encoded, None, tokenizer, vocab_size=len(tokenizer), share=0.4, seed=1)
    lesson = MaskedWords(masker, masker)
    learner, _ = load_masked_lm(str(tiny_model_folder("bert")), dropout=0.0)
    learner.eval()
    rows = np.arange(6)
    items = lesson.count(rows)

    def share(own: np.ndarray) -> float:
        batch = lesson.collate(own)
        return float(lesson.share(learner(batch), batch, items).detach())

    whole = share(rows)
    assert whole == pytest.approx(share(rows[:1]) + share(rows[1:4]) + share(rows[4:]), rel=1e-5)
    held = lesson.held_out.collate(rows, FIXED)
    mean = float(summed(learner(held), held).detach()) / int((held.targets[LABELS] != -100).sum())
    state = random_state()["torch"]
    learner.train()
    score = lesson.score(learner, open_runtime("fp32", "cpu"))
    assert score == pytest.approx(math.exp(mean), rel=1e-4)
    assert learner.training and torch.equal(random_state()["torch"], state)


# --- the run ---------------------------------------------------------------------------------------------------------

TASK = {"corpora": [{"tables": ["train", "test"], "epochs": 2}]}


def test_a_run_leaves_a_backbone_that_trains(config_of: Callable[..., Any], call: Call) -> None:
    config_of(corpora=[{"tables": ["train", "test"], "epochs": 8}], objective={"whole_word": True})
    status, out, err = call("pretrain", "--config", "tiny.yaml")
    assert status == 0, err
    folder = Path("runs/tiny-pretrain")
    assert "wrote runs/tiny-pretrain/backbone" in out
    names = {path.name for path in folder.iterdir()}
    assert names == {"backbone", "config.yaml", "done.json", "manifest.json", "stage1"}
    assert {path.name for path in (folder / "stage1").iterdir()} == {"done.json", "metrics.jsonl"}
    (done,) = json.loads((folder / "done.json").read_text())["stages"]
    assert done["score"] == "perplexity" and done["best"] < 0.9 * done["before"]
    lineage = json.loads((folder / "manifest.json").read_text())["lineage"]
    assert lineage == json.loads((folder / "backbone" / "lineage.json").read_text())
    (stage,) = lineage["stages"]
    assert [part["rows"] for part in stage["corpora"]] == [60, 20]
    assert all(len(part["sha256"]) == 64 for part in stage["corpora"])
    assert (stage["before"], stage["best"]) == (done["before"], done["best"])
    assert (lineage["fold"], lineage["before"]) == (None, None)
    # once more is nothing to do
    before = weights(folder / "backbone")
    status, out, _ = call("pretrain", "--config", "tiny.yaml")
    assert status == 0 and "finished before" in out and weights(folder / "backbone") == before
    # fine-tuning from it, with the pooler of the checkpoint, says what it has read
    backbone = ["--set", f"model.backbone={folder}/backbone", "--set", "model.pooler.name=pooler_output"]
    status, out, err = call("train", "--config", "tiny.yaml", "--run", "tuned", *backbone)
    assert status == 0, err
    assert "has read 20 of the 20 test texts" in out and "read the texts of 60 training rows" in out
    status, out, _ = call("oof")
    assert status == 0 and "tuned" in out and "pretrain" not in out
    assert call("infer")[0] == 0, "the newest finished run is the trained one"
    status, _, err = call("infer", "--run", "runs/tiny-pretrain")
    assert status == 2 and "Traceback" not in err


def test_runs_of_two_kinds_share_no_folder(config_of: Callable[..., Any]) -> None:
    config = config_of(**TASK)
    run(config, "one")
    with pytest.raises(ValueError, match=r"runs/one was made from another .*kind of model"):
        crossval.run(config, "one", "0", say=SAID.append)
    crossval.run(config, "two", "0", say=SAID.append)
    with pytest.raises(ValueError, match=r"runs/two was made from another .*kind of model"):
        run(config, "two")
    with pytest.raises(ValueError, match=r"another config: pretrain.lr 0.002 -> 0.001"):
        run(config_of(**TASK, lr=1e-3), "one")
    # training does not look at the section
    crossval.run(config_of(**TASK, lr=1e-3), "two", "0", say=SAID.append)
    run(config_of(**TASK, lr=1e-3), "one", restart=True)


def test_stages_follow_each_other(config_of: Callable[..., Any]) -> None:
    frame = pd.DataFrame({"body": ["the deer and the oak", "", "moss fern path in the wood"] * 15})
    frame.to_csv("domain.csv", index=False)
    domain = {"files": ["domain.csv"], "text": "body", "steps": 7}
    both = config_of(corpora=[domain, {"tables": ["train"], "epochs": 1, "max_rows": 40}])
    run(both, "both")
    assert any(line.startswith("stage 2: 36 texts in") for line in SAID), SAID
    done = json.loads(Path("runs/both/done.json").read_text())["stages"]
    assert done[0]["steps"] == 7
    lineage = read_lineage("runs/both/backbone")
    assert lineage is not None
    assert [stage["texts"] for stage in lineage.about["stages"]] == [30, 40]
    assert lineage.about["stages"][0]["corpora"][0]["without_text"] == 15
    # the second alone, from what the first has left
    run(config_of(corpora=[domain]), "first")
    second = config_of(Path("runs/first/backbone"), corpora=[{"tables": ["train"], "epochs": 1, "max_rows": 40}])
    run(second, "second")
    assert weights(Path("runs/second/backbone")) == weights(Path("runs/both/backbone"))
    chained = read_lineage("runs/second/backbone")
    assert chained is not None and chained.about["before"]["source"] != "runs/first/backbone"
    assert chained.seen.tolist() == lineage.seen.tolist()


RECIPES: dict[str, dict[str, Any]] = {
    "mlm": {"corpora": [{"tables": ["train", "test"], "epochs": 2}]},
    "two stages, micro-batches": {
        "corpora": [{"tables": ["test"], "steps": 3}, {"tables": ["train"], "epochs": 2}],
        "micro_batch_size": 3,
        "objective": {"packing": False, "whole_word": True},
        "kill": 7,
    },
    "simcse": {"objective": {"name": "simcse"}, "corpora": [{"tables": ["train"], "epochs": 2}], "dropout": 0.1},
    "nothing held out": {"held_out_percent": 0, "corpora": [{"tables": ["train", "test"], "epochs": 2}]},
}


SLOW = ("simcse", "nothing held out")


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RECIPES]
)
def test_a_killed_run_ends_with_the_same_bits(
    recipe: str, config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dict(RECIPES[recipe])
    kill = own.pop("kill", 5)
    config = config_of(**own)
    run(config, "whole")
    real, calls = Saver.due, []

    def killing(self: Any, step: int, evaluated: bool) -> bool:
        calls.append(step)
        if len(calls) == kill:
            raise Killed
        return real(self, step, evaluated)

    monkeypatch.setattr(Saver, "due", killing)
    with pytest.raises(Killed):
        run(config, "cut")
    run(config, "cut")
    assert any("goes on after step" in line for line in SAID)
    assert weights(Path("runs/cut/backbone")) == weights(Path("runs/whole/backbone"))
    kept = ("best", "before", "best_step", "last", "steps", "tokens", "evaluations")
    told = [
        [
            {key: stage[key] for key in kept}
            for stage in json.loads(Path(f"runs/{name}/done.json").read_text())["stages"]
        ]
        for name in ("cut", "whole")
    ]
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name"), [(HeldOutTexts, "keep_best"), (stages, "write_backbone")])
def test_killed_between_writing_and_saying_so(
    owner: Any, name: str, config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**TASK)
    run(config, "whole")
    real, calls = getattr(owner, name), []

    def killing(*arguments: Any) -> None:
        real(*arguments)
        calls.append(1)
        if len(calls) == 1:
            raise Killed

    monkeypatch.setattr(owner, name, killing)
    with pytest.raises(Killed):
        run(config, "cut")
    run(config, "cut")
    assert weights(Path("runs/cut/backbone")) == weights(Path("runs/whole/backbone"))


def test_patience_and_the_best_weights(config_of: Callable[..., Any]) -> None:
    config = config_of(corpora=[{"tables": ["train"], "epochs": 20}], lr=0.3, every="1 steps", patience=2)
    run(config, "wild")
    (done,) = json.loads(Path("runs/wild/done.json").read_text())["stages"]
    assert done["stopped_early"] and done["steps"] == done["best_step"] + 2
    learner, _ = load_masked_lm("runs/wild/backbone", dropout=0.0)
    assert isinstance(learner, MaskedLM) and done["best"] < done["last"]


def test_what_is_not_finite_is_blamed_on_the_rates_of_pretrain(config_of: Callable[..., Any], call: Call) -> None:
    config_of(lr=1e30)
    status, _, told = call("pretrain", "--config", "tiny.yaml", "--set", "optimizer.clip_norm=null")
    assert status == 1 and "training stopped at step" in told
    assert "Try a lower pretrain.lr or pretrain.head_lr, a longer warm-up (pretrain.schedule.warmup_percent)" in told
    assert "optimizer.lr" not in told and "targets" not in told


# --- folds and lineage -----------------------------------------------------------------------------------------------


def test_a_fold_reads_its_training_rows_alone(config_of: Callable[..., Any], tmp_path: Path) -> None:
    config = config_of(**TASK)
    folder = run(config, "one", "0")
    frame, folds = pd.read_csv(config.competition.train), pd.read_csv("folds/tiny-regression.csv")
    kept = frame[folds["fold"].to_numpy() != 0]["text"].tolist()
    lineage = read_lineage(str(folder))
    assert lineage is not None and lineage.fold == 0
    assert lineage.seen.tolist() == sorted(text_marks((kept,)).tolist())
    # fold 0 trains with it, fold 1 does not, nor do all folds
    tuned = config_of(folder, **TASK)
    crossval.run(tuned, "clean", "0", say=SAID.append)
    assert any("but for those of fold 0" in line for line in SAID) and not any("test texts" in line for line in SAID)
    for asked in ("1", "all"):
        with pytest.raises(ValueError, match=r"pre-trained for fold 0 alone.*30 of the 30 held-out texts of fold 1"):
            crossval.run(tuned, "dirty", asked, say=SAID.append)
    crossval.run(tuned, "whole", "full", say=SAID.append)
    with pytest.raises(ValueError, match=r"pre-trained for fold 0 alone.*held-out texts of fold 1"):
        run(tuned, "other", "1")
    # going on with all rows, it has read everything
    run(tuned, "more")
    more = read_lineage("runs/more/backbone")
    assert more is not None and more.fold is None
    run(config_of(Path("runs/more/backbone"), **TASK), "late", "1")
    late = read_lineage("runs/late/backbone")
    assert late is not None and late.fold is None
    assert any("has read held-out texts of fold 1 before" in line for line in SAID)


def test_another_fold_file_is_compared_by_texts(config_of: Callable[..., Any]) -> None:
    folder = run(config_of(**TASK), "one", "0")
    data = yaml.safe_load(Path("tiny.yaml").read_text())
    data["model"]["backbone"] = str(folder)
    data["folds"] |= {"seed": 5, "name": "other"}
    Path("tiny.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=r"made from another fold file.*held-out texts of fold 0"):
        crossval.run(config_file.load("tiny.yaml"), "dirty", "0", say=SAID.append)


# --- SimCSE ----------------------------------------------------------------------------------------------------------


def test_the_loss_of_simcse_is_the_published_one() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 7, dtype=torch.float64)
    losses = contrast(first, second, 0.05)
    for row in range(5):
        similar = [float(torch.cosine_similarity(first[row], second[other], dim=0)) / 0.05 for other in range(5)]
        wanted = -similar[row] + math.log(sum(math.exp(value) for value in similar))
        assert float(losses[row]) == pytest.approx(wanted, rel=1e-4)
    unit = torch.nn.functional.normalize(torch.randn(4, 3, dtype=torch.float64), dim=-1)
    distances = [float((unit[a] - unit[b]).square().sum()) for a in range(4) for b in range(a)]
    assert uniformity(3 * unit) == pytest.approx(math.log(np.mean([math.exp(-2 * d) for d in distances])))
    assert alignment(unit, 2 * unit) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("vector", ["cls", "mean"])
@pytest.mark.parametrize("kind", ["bert", "electra", "xlnet", "deberta-v2"])
def test_two_passes_differ_by_dropout(
    kind: str, vector: str, tiny_model_folder: Callable[..., Path], isolated: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_folder(kind)))
    encoded, _ = encode_texts(
        tokenizer, (["the ship", "a deer on the path", "oak"],), packing=False, words=False, max_length=16
    )
    learner = load_sentence_encoder(str(tiny_model_folder(kind)), tokenizer, vector=vector, dropout=0.1)
    lesson = TwinPasses(encoded, encoded, 0.05, 2, 1)
    batch = collate(encoded, np.arange(3))
    pair = twice(learner.train())(batch)[VECTOR]
    assert pair.shape == (2, 3, 32) and not torch.allclose(pair[0], pair[1])
    assert float(lesson.share({VECTOR: pair}, batch, {ITEMS: 3.0}).detach()) > 0
    state = random_state()
    runtime = open_runtime("fp32", "cpu")
    one = lesson.score(learner, runtime)
    assert torch.equal(random_state()["torch"], state["torch"]), "scoring leaves the generators where they were"
    torch.rand(3)
    assert lesson.score(learner, runtime) == one
    set_random_state(state)
    assert set(lesson.others()) == {"valid/alignment", "valid/uniformity"}
    # padding has no part in it
    alone = learner.eval()(collate(encoded, np.array([0])))[VECTOR][0]
    assert torch.allclose(learner(batch)[VECTOR][0], alone, atol=1e-5)


def test_simcse_leaves_a_backbone(config_of: Callable[..., Any]) -> None:
    own = {"objective": {"name": "simcse"}, "corpora": [{"tables": ["train", "test"], "epochs": 6}], "dropout": 0.1}
    folder = run(config_of(**own), "twins")
    (done,) = json.loads(Path("runs/twins/done.json").read_text())["stages"]
    assert done["best"] < done["before"] and done["score"] == "contrastive loss" and "valid/uniformity" in done
    crossval.run(config_of(folder, model={"pooler": {"name": "pooler_output"}}), "tuned", "0", say=SAID.append)
    assert RunFolder("runs/tuned").finished_folds() == [0]
    tiny = load_file(folder / "model.safetensors")
    assert not any(name.startswith("dense") for name in tiny)


def test_simcse_without_dropout_is_refused(config_of: Callable[..., Any], isolated: Path) -> None:
    own = {"objective": {"name": "simcse"}, "corpora": [{"tables": ["train"]}]}
    still = write_tiny_model(isolated / "still", "bert")
    told = json.loads((still / "config.json").read_text())
    told |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"by dropout alone.*set pretrain.dropout to 0.1"):
        run(config_of(still, **own), "no")
    with pytest.raises(ValueError, match="encoder-decoder"):
        run(config_of("bart", **own), "no")
    assert not Path("runs").exists()
