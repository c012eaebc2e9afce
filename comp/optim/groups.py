"""The only builder of parameter groups: learning rate by depth, weight decay by module type.

Every trainable parameter stands in exactly one group; frozen ones stand in none and cost no optimizer memory. The decay
rule looks at the module a parameter belongs to, not at its name: "LayerNorm.weight" as a pattern would decay the norms
of DistilBERT, XLNet and ModernBERT.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from comp.catalog import Row, pick

__all__ = ["LAYOUTS", "ParameterGroup", "build_groups", "group_table"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    lr: float
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: float
    names: list[str]
    params: list[nn.Parameter]
    prior_decay: float = 0.0
    """Decay towards the pretrained weights."""

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.params)


def unified(depth: int, num_layers: int) -> float:
    """Return the share of the backbone's learning rate at `depth`: the same everywhere."""
    return 1.0


def module_wise(depth: int, num_layers: int, *, embeddings_factor: float = 0.5) -> float:
    """Return 1 for the blocks, `embeddings_factor` for the embeddings (depth 0)."""
    return embeddings_factor if depth == 0 else 1.0


def layer_wise(depth: int, num_layers: int, *, factor: float = 2.6) -> float:
    """Return 1 / factor, 1 or factor for the lowest, middle and highest third of the blocks; embeddings 1 / factor.

    The published code names blocks 0-3, 4-7 and 8-11, so that deeper models fall out of the groups and the embeddings
    learn faster than the lowest blocks; here the thirds are of the model's own depth.
    """
    third = 0 if depth == 0 else (depth - 1) * 3 // num_layers
    return float(factor ** (third - 1))


def llrd(depth: int, num_layers: int, *, decay: float) -> float:
    """Return decay^(L + 1 - depth): the top block gets decay, the embeddings (depth 0) decay^(L + 1)."""
    return decay ** (num_layers + 1 - depth)


LAYOUTS: dict[str, Row] = {
    "unified": Row(unified, "one learning rate for the backbone, one for the head", "common practice"),
    "module_wise": Row(module_wise, "embeddings, blocks and head each at their own rate", "rhtsingh, Kaggle 2021"),
    "layer_wise": Row(layer_wise, "thirds of the blocks at lr / 2.6, lr and lr x 2.6", "rhtsingh, Kaggle 2021"),
    "llrd": Row(llrd, "layer-wise learning rate decay from the top block down", "Zhang et al. 2020, arXiv:2006.05987"),
}


def build_groups(
    model: nn.Module,
    *,
    depth_of: Callable[[str], int],
    num_layers: int,
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.01,
    prior_decay: float = 0.0,
    fresh: Collection[nn.Parameter] = (),
    layout: str = "unified",
    **options: Any,
) -> list[ParameterGroup]:
    """Put every trainable parameter into one group per (depth, decay).

    `depth_of` tells a parameter's depth by its name: 0 = embeddings, 1..`num_layers` = block, above = pooler and heads.
    `lr` is the backbone's peak rate, `head_lr` that of pooler and heads (None = `lr`); `options` go to the layout.
    `prior_decay` takes the place of `weight_decay` where there is a pretrained value: in the backbone but for `fresh`
    parameters.
    """
    share: Callable[..., float] = pick(LAYOUTS, layout, "layout").make
    exempt = _no_decay(model)
    without_prior = {id(parameter) for parameter in fresh}
    found: dict[tuple[int, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():  # shared parameters come once
        if parameter.requires_grad:
            depth = depth_of(name)
            # Under `unified` all depths of the backbone share one group: fewer kernels per step.
            depth = num_layers if layout == "unified" and depth <= num_layers else depth
            plain = name in exempt
            pulled = bool(prior_decay) and not plain and depth <= num_layers and id(parameter) not in without_prior
            found.setdefault((depth, plain, pulled), []).append((name, parameter))
    if not found:
        raise ValueError("every parameter is frozen: nothing to train")
    groups = []
    for (depth, plain, pulled), members in sorted(found.items(), key=lambda item: (-item[0][0], *item[0][1:])):
        is_head = depth == num_layers + 1
        rate = (lr if head_lr is None else head_lr) if is_head else lr * share(depth, num_layers, **options)
        place = (
            "head" if is_head else "backbone" if layout == "unified" else f"block {depth}" if depth else "embeddings"
        )
        groups.append(
            ParameterGroup(
                name=f"{place}, no decay" if plain else f"{place}, prior" if pulled else place,
                lr=rate,
                weight_decay=0.0 if plain or pulled else weight_decay,
                prior_decay=prior_decay if pulled else 0.0,
                names=[name for name, _ in members],
                params=[parameter for _, parameter in members],
            )
        )
    listed = [name for group in groups for name in group.names]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(listed) == sorted(trainable), "a trainable parameter is in no group, or in two"
    return groups


def _no_decay(model: nn.Module) -> set[str]:
    """Return the names of biases, of all parameters of norm modules, whatever class the architecture uses, and of
    what a module lists in its `no_decay` (mixing weights of layers)."""
    exempt = set()
    for path, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        listed = getattr(module, "no_decay", ())
        for name, _ in module.named_parameters(recurse=False):
            # torch's recurrent layers call theirs bias_ih_l0; the others end in bias.
            if is_norm or name.endswith("bias") or name.startswith("bias_") or name in listed:
                exempt.add(f"{path}.{name}" if path else name)
    return exempt


def group_table(groups: list[ParameterGroup], num_frozen: int = 0) -> str:
    """Return the groups as text: name, peak learning rate, weight decay, tensors, parameters."""
    lines = [f"{'group':<24}{'lr':>10}{'decay':>8}{'tensors':>9}{'parameters':>13}"]
    for group in groups:
        decay = group.prior_decay or group.weight_decay  # the name says which
        lines.append(f"{group.name:<24}{group.lr:>10.2e}{decay:>8g}{len(group.params):>9}{group.num_parameters:>13,}")
    if num_frozen:
        lines.append(f"{'frozen':<24}{'-':>10}{'-':>8}{'-':>9}{num_frozen:>13,}")
    return "\n".join(lines)
