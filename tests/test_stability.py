"""Re-initialisation, mixout, decay towards the pretrained weights: right, off when off, and together with the rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_MODELS, TinyCompetition
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from comp import config_file
from comp.data.batches import collate
from comp.data.tokens import encode
from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.optim import build_optimizer
from comp.optim.groups import build_groups, group_table
from comp.ship.infer import load
from comp.stability.mixout import MixedLinear, mix_, mixed_weight
from comp.stability.prior_decay import PriorDecay
from comp.stability.reinit import reinit_blocks_
from comp.training import crossval

TEXTS = ["the ship was golden", "a dull tram", "deer", "on the bridge she was happy and the market was bright"]


def made(folder: Path, **options: Any) -> tuple[TextModel, Any]:
    tokenizer = load_tokenizer(str(folder))
    torch.manual_seed(3)
    options = {"pretrained": True, "heads": {"main": 1}, "max_length": 32, "pooler": {"name": "mean"}, **options}
    return build_model(folder, tokenizer, **options), tokenizer


def batch_of(tokenizer: Any) -> Any:
    return collate(encode(tokenizer, (TEXTS,), max_length=32, cache=None), np.arange(4))


# --- re-initialisation -----------------------------------------------------------------------------------------------

ARCHITECTURES = [kind for kind in TINY_MODELS if kind != "albert"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_top_blocks_are_drawn_anew_and_all_else_is_left_alone(
    kind: str, tiny_model_folder: Callable[..., Path]
) -> None:
    model, _ = made(tiny_model_folder(kind))
    with torch.no_grad():  # as after training: norms and biases are not what they start from
        for parameter in model.parameters():
            parameter.add_(0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fresh = {id(parameter) for parameter in reinit_blocks_(model.backbone, 2)}
    for name, parameter in model.named_parameters():
        top = model.depth_of(name) in (2, 3) and any(
            p is parameter for b in model.backbone.blocks for p in b.parameters()
        )
        assert (id(parameter) in fresh) == top, name
        assert torch.equal(parameter, before[name]) != top, name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_re_initialised_blocks_look_like_those_of_a_new_model(
    kind: str, tiny_model_folder: Callable[..., Path]
) -> None:
    """Mean and deviation of each parameter against a model built from the config alone (ModernBERT: Wo / sqrt(2L))."""
    model, _ = made(tiny_model_folder(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.5)
    reinit_blocks_(model.backbone, 3)
    new = AutoModel.from_config(model.backbone.config)
    new = new.get_encoder() if kind == "bart" else new
    expected = dict(new.named_parameters())
    for name, parameter in model.backbone.model.named_parameters():
        if 1 <= model.backbone.depth_of(name) <= 3 and any(
            p is parameter for b in model.backbone.blocks for p in b.parameters()
        ):
            theirs = expected[name]
            assert parameter.mean().item() == pytest.approx(theirs.mean().item(), abs=0.02), name
            loose = 0.25 if parameter.numel() > 200 else 0.6
            assert parameter.std().item() == pytest.approx(theirs.std().item(), rel=loose, abs=1e-6), name


def test_children_come_before_parents(tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("modernbert"))
    reinit_blocks_(model.backbone, 1)
    block = model.backbone.blocks[-1]
    config = model.backbone.config
    assert block.attn.Wo.weight.std().item() == pytest.approx(config.initializer_range / math.sqrt(2 * 3), rel=0.15)
    assert block.attn.Wqkv.weight.std().item() == pytest.approx(config.initializer_range, rel=0.15)


def test_zero_blocks_is_no_block_and_draws_nothing(tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("bert"))
    state = torch.get_rng_state()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert reinit_blocks_(model.backbone, 0) == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_re_initialisation_that_cannot_be_is_refused(tiny_model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="reinit_layers: this model's blocks share one set of weights"):
        reinit_blocks_(made(tiny_model_folder("albert"))[0].backbone, 1)
    with pytest.raises(ValueError, match="reinit_layers is 4, but the backbone has 3 blocks"):
        reinit_blocks_(made(tiny_model_folder("bert"))[0].backbone, 4)
    frozen, _ = made(tiny_model_folder("bert"), freeze_layers=2)
    reinit_blocks_(frozen.backbone, 1)
    with pytest.raises(ValueError, match="re-initialises blocks that model.freeze_layers keeps fixed"):
        reinit_blocks_(frozen.backbone, 2)


def test_barts_decoder_is_re_initialised_from_its_top(tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("bart"), part="decoder")
    fresh = {id(parameter) for parameter in reinit_blocks_(model.backbone, 1)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in fresh}
    assert names and all(name.startswith("backbone.model.decoder.layers.2.") for name in names)


# --- mixout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mixout_is_the_papers_formula_with_its_gradient(p: float) -> None:
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    u = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    found = mixed_weight(w, u, p)
    torch.manual_seed(5)
    keep = (torch.rand(1, 6) >= p).double()
    expected = ((1 - keep) * u + keep * w.detach() - p * u) / (1 - p)
    assert torch.allclose(found, expected, atol=1e-12)
    found.sum().backward()
    assert torch.allclose(w.grad, (keep / (1 - p)).expand(4, 6)), "the authors' code lacks 1 / (1 - p)"


def test_mixouts_expected_loss_over_all_masks() -> None:
    """E |mix(W) x - t|^2 = |W x - t|^2 + p / (1 - p) sum_j x_j^2 |W_j - U_j|^2, by enumeration."""
    generator = np.random.default_rng(0)
    w, u, x, t, p = (
        generator.normal(size=(3, 4)),
        generator.normal(size=(3, 4)),
        generator.normal(size=4),
        generator.normal(size=3),
        0.3,
    )
    expected = 0.0
    for keep in itertools.product((0, 1), repeat=4):
        mixed = u + np.array(keep) * (w - u) / (1 - p)
        expected += np.prod([1 - p if k else p for k in keep]) * np.sum((mixed @ x - t) ** 2)
    closed = np.sum((w @ x - t) ** 2) + p / (1 - p) * np.sum(x**2 * np.sum((w - u) ** 2, 0))
    assert expected == pytest.approx(closed)
    torch.manual_seed(0)
    tw, tu, tx, tt = (torch.from_numpy(a) for a in (w, u, x, t))
    draws = [((mixed_weight(tw, tu, p) @ tx - tt) ** 2).sum().item() for _ in range(4000)]
    assert np.mean(draws) == pytest.approx(closed, rel=4 * np.std(draws) / math.sqrt(4000) / closed)


def test_mixout_at_the_pretrained_weights_and_in_evaluation_is_the_plain_model(
    tiny_model_folder: Callable[..., Path],
) -> None:
    for kind in TINY_MODELS:
        plain, tokenizer = made(tiny_model_folder(kind))
        mixed, _ = made(tiny_model_folder(kind))
        count = mix_(mixed.backbone, 0.7)
        assert count >= 3, kind
        batch = batch_of(tokenizer)
        assert torch.allclose(mixed.train()(batch)["main"], plain.train()(batch)["main"], atol=1e-6), kind
        with torch.no_grad():
            for name, parameter in mixed.named_parameters():
                dict(plain.named_parameters())[name].add_(0.02)
                parameter.add_(0.02)
        assert torch.equal(mixed.eval()(batch)["main"], plain.eval()(batch)["main"]), kind
        assert not torch.equal(mixed.train()(batch)["main"], plain.train()(batch)["main"]), kind
        assert list(mixed.state_dict()) == list(plain.state_dict()), kind


def test_mixout_leaves_heads_tied_frozen_and_new_layers_alone(tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("bert"), freeze_layers=1)
    fresh = reinit_blocks_(model.backbone, 1)
    mix_(model.backbone, 0.5, fresh=fresh)
    mixed = {name for name, module in model.named_modules() if isinstance(module, MixedLinear)}
    assert mixed and all(".layer.1." in name for name in mixed)
    assert type(model.heads["main"]) is not MixedLinear

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 3)
            self.out, self.other = nn.Linear(3, 5), nn.Linear(3, 3)
            self.out.weight = self.words.weight

    tied = Tied()
    assert mix_(tied, 0.5) == 1
    assert type(tied.out) is nn.Linear
    with pytest.raises(ValueError, match="no linear layer is left to mix"):
        mix_(model.backbone, 0.5, fresh=list(model.parameters()))
    assert mix_(tied, 0.0) == 0


def test_mixout_one_mask_a_column_new_at_every_call_and_p_1_is_the_anchor() -> None:
    w, u = torch.ones(5, 40), torch.zeros(5, 40)
    first, second = mixed_weight(w, u, 0.5), mixed_weight(w, u, 0.5)
    assert (first == first[:1]).all()
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert mixed_weight(w, u, 1.0) is u


def test_mixout_with_gradient_checkpointing_sees_the_same_masks(tiny_model_folder: Callable[..., Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, tokenizer = made(tiny_model_folder("bert"), gradient_checkpointing=checkpointing)
        mix_(model.backbone, 0.5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05)
        torch.manual_seed(11)
        model.train()(batch_of(tokenizer))["main"].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_mixout_moves_and_runs_under_autocast(tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder("bert"))
    mix_(model.backbone, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(batch_of(tokenizer))["main"]
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    anchors = [module.anchor for module in model.to(torch.float64).modules() if isinstance(module, MixedLinear)]
    assert {anchor.dtype for anchor in anchors} == {torch.float64}


# --- decay towards the pretrained weights ----------------------------------------------------------------------------


def optimizer_of(model: TextModel, prior: float, name: str = "adamw", **options: Any) -> tuple[Any, list[Any]]:
    groups = build_groups(
        model,
        depth_of=model.depth_of,
        num_layers=3,
        lr=0.1,
        head_lr=0.1,
        weight_decay=0.5,
        prior_decay=prior,
        **options,
    )
    return build_optimizer(name, groups, betas=(0.9, 0.999), eps=1e-6), groups


def test_prior_decay_alone_shrinks_the_distance_by_the_closed_form(tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("bert"))
    optimizer, _ = optimizer_of(model, 2.0)
    PriorDecay(optimizer)
    prior = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    rates = [0.1, 0.05, 0.01]
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    left = math.prod(1 - rate * 2.0 for rate in rates)
    for name, parameter in model.named_parameters():
        moved = (parameter - prior[name]).detach()
        if name.startswith("heads.") and name.endswith("weight"):
            plain = math.prod(1 - rate * 0.5 for rate in rates)
            assert torch.allclose(parameter, (prior[name] + 1) * plain, atol=1e-6), "heads keep plain decay"
        elif name.endswith("bias") or "LayerNorm" in name:
            assert torch.equal(moved, torch.ones_like(moved)) or torch.allclose(moved, torch.ones_like(moved)), name
        else:
            assert torch.allclose(moved, torch.full_like(moved, left), atol=1e-5), name


def test_with_a_prior_of_zero_it_is_adamws_own_decay() -> None:
    start = torch.randn(6, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(torch.zeros(6)), nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([{"params": [ours], "lr": 0.01, "weight_decay": 0.0, "prior_decay": 3.0}])
    PriorDecay(optimizer)
    with torch.no_grad():
        ours.copy_(start)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=3.0)
    for step in range(20):
        ours.grad, theirs.grad = torch.sin(ours.detach() + step), torch.sin(theirs.detach() + step)
        optimizer.step()
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_what_is_at_its_prior_stays_there_and_a_skipped_step_pulls_nothing() -> None:
    weight = nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.1, "weight_decay": 0.0, "prior_decay": 7.3}])
    PriorDecay(optimizer)
    start = weight.detach().clone()
    weight.grad = torch.zeros(5)
    optimizer.step()
    assert torch.equal(weight, start)
    with torch.no_grad():
        weight.add_(1)
    moved = weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(weight, moved)


def test_re_initialised_blocks_and_heads_have_no_prior(tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("bert"))
    fresh = reinit_blocks_(model.backbone, 1)
    optimizer, groups = optimizer_of(model, 2.0, fresh=fresh, layout="llrd", decay=0.9)
    prior = PriorDecay(optimizer).prior
    names = {name for name, parameter in model.named_parameters() if parameter in prior}
    assert any(".layer.1." in name for name in names)
    assert not any(".layer.2." in name or name.startswith("heads") for name in names)
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in names)
    decays = {group.name: (group.weight_decay, group.prior_decay) for group in groups}
    assert decays["block 3"] == (0.5, 0.0)
    assert decays["block 2, prior"] == (0.0, 2.0)
    assert decays["block 2, no decay"] == (0.0, 0.0)
    assert "block 2, prior" in group_table(groups)


def test_without_it_groups_and_steps_are_those_of_before(tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("bert"))
    optimizer, groups = optimizer_of(model, 0.0)
    assert not PriorDecay(optimizer).prior
    assert [group.name for group in groups] == ["head", "head, no decay", "backbone", "backbone, no decay"]
    assert all("prior_decay" not in group for group in optimizer.param_groups)


# --- freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_the_word_table_alone_can_be_frozen(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder(kind), freeze_embeddings="words")
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert frozen == [model.backbone.model.get_input_embeddings().weight]


# --- in a run --------------------------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    "reinit": {"stability": {"reinit_layers": 1}},
    "reinit_pooler": {"stability": {"reinit_pooler": True}, "pooler": {"name": "pooler_output"}},
    "mixout": {"stability": {"mixout": 0.5}},
    "prior_decay": {"stability": {"prior_decay": 5.0}},
    "reinit and mixout": {"stability": {"reinit_layers": 1, "mixout": 0.5}},
    "fgm": {"stability": {"adversarial": {"name": "fgm", "eps": 2.0}}},
    "awp": {"stability": {"adversarial": {"name": "awp", "start_epoch": 0.5}}},
    "rdrop": {"stability": {"rdrop": 1.0}, "model": {"dropout": 0.2}},
    "supcon": {"stability": {"supcon": {"weight": 0.5}}},
    "multi_sample_dropout": {"stability": {}, "model": {"head_dropout": 0.4}, "on": {"multi_sample_dropout": 3}},
    "all at once on psum": {
        "stability": {
            "rdrop": 1.0,
            "supcon": {"weight": 0.1},
            "mixout": 0.3,
            "reinit_layers": 1,
            "adversarial": {"name": "awp", "start_epoch": 0},
        },
        "pooler": {"name": "psum", "num_layers": 2},
        "on": {"multi_sample_dropout": 2, "head_dropout": 0.2},
    },
    "prior_decay and lookahead": {
        "stability": {"prior_decay": 5.0},
        "optimizer": {"name": "adamw", "lookahead": {"steps": 2}},
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_with_it_differs_repeats_and_infers(
    recipe: str,
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Callable[..., Path],
) -> None:
    competition, own = tiny_competition(), RECIPES[recipe]
    data = competition.config(
        tiny_model_folder("bert"), optimizer=own.get("optimizer", {"name": "adamw"}) | {"lr": 1e-3}
    )
    data["model"] |= {"pooler": own.get("pooler", {"name": "mean"}), **own.get("model", {})}
    (isolated / "off.yaml").write_text(yaml.safe_dump(data))
    (isolated / "on.yaml").write_text(
        yaml.safe_dump(data | {"stability": own["stability"], "model": data["model"] | own.get("on", {})})
    )
    weights = {}
    for name, file in (("off", "off"), ("on", "on"), ("again", "on")):
        crossval.run(config_file.load(f"{file}.yaml"), name, "0", say=lambda line: None)
        weights[name] = load_file(f"runs/{name}/fold0/last.safetensors")
    assert weights["off"].keys() == weights["on"].keys()
    assert any(not torch.equal(weights["off"][key], weights["on"][key]) for key in weights["on"])
    assert all(torch.equal(weights["on"][key], weights["again"][key]) for key in weights["on"])
    import pandas as pd

    rows = pd.read_parquet("runs/on/fold0/oof.parquet")
    frame = pd.read_csv(competition.train, dtype=str).set_index("id").loc[rows["id"]].reset_index()
    found = load("runs/on").predict(frame)["target"].to_numpy()
    assert np.abs(found - rows["pred_main_target"].to_numpy()).max() < 1e-6


def test_the_catalogue_names_what_the_config_knows() -> None:
    from comp.config import Model
    from comp.config_stability import Stability
    from comp.stability.techniques import TECHNIQUES

    names = set(Stability.model_fields) - {"averaging", "adversarial"} | {"multi_sample_dropout"}
    names |= {name for name in Model.model_fields if name.startswith("freeze_")}
    properties = Stability.model_json_schema()["properties"]
    for key in ("averaging", "adversarial"):
        names |= set(properties[key]["discriminator"]["mapping"]) - {"none"}
    assert names == set(TECHNIQUES)
    plain = Stability()
    off = {plain.averaging.name, plain.adversarial.name}
    assert off == {"none"} and plain.supcon.weight == 0
    assert not any(getattr(plain, name, 0) for name in TECHNIQUES if name != "supcon"), "everything is off by default"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stability.mixout=0.1", "model.dropout=0.1"],
            "stability.mixout takes the place of dropout, but model.dropout is 0.1",
        ),
        (["stability.mixout=0.1", "model.dropout=null"], "but model.dropout is None; set it to 0"),
        (["stability.mixout=0.1", "stability.prior_decay=1"], "both pull to the pretrained weights"),
        (["stability.prior_decay=1", "optimizer.name=madgrad"], "forgets what stability.prior_decay does"),
        (["stability.reinit_pooler=true"], "is for the checkpoint's own pooler, but model.pooler is 'mean'"),
        (["stability.rdrop=1"], "stability.rdrop compares two passes with different noise, but there is none"),
        (["model.multi_sample_dropout=4"], "draws masks of model.head_dropout, which is 0; set it to 0.1 or so"),
        (
            ["stability.adversarial.name=fgm", "model.freeze_embeddings=words"],
            "'fgm' moves the word table, which model.freeze_embeddings",
        ),
        (["stability.mixout=1.5"], "less than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    base = Path(__file__).parents[1] / "configs" / "clear-minilm.yaml"
    with pytest.raises(ValueError, match=message):
        config_file.load(base, overrides)
