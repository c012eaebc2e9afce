"""Backbones too large for one GPU: each of several processes keeps a part of every matrix (`training.shard`).

Fully sharded data parallel, Zhao et al. 2023, arXiv:2304.11277, by torch's `fully_shard`: the weights of a block are
put together while it computes and let go of after it, so that a process holds its part of weights, gradients and
moments, and one whole block at a time. Pooler and heads stay whole in every process.

The optimizer gets this process's parts as plain tensors: right, and with its fused kernels, as long as it moves every
number by itself. Gradients are summed, not averaged, as in ranks.py. Each pass of one process needs the parts of all,
so every process makes as many as the others: where one has no rows left, it makes some without effect.

What is saved is whole, put together by the first process in main memory, one tensor after the other: weights and states
are those of a run that was not sharded, and another number of processes may go on from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

from comp.model.text_model import TextModel
from comp.optim.groups import ParameterGroup
from comp.runtime import Runtime
from comp.training.ranks import Gather, Ranks, Rows

__all__ = ["Shards", "shard"]

APART = ("model", "optimizer")
"""What of a saved state is sent tensor by tensor: each process would hold the whole in main memory otherwise."""


def shard(model: TextModel, fresh: Sequence[nn.Parameter], device: torch.device) -> tuple[Shards, list[nn.Parameter]]:
    """Leave this process its part of the backbone, on `device`; parameters are new objects then.

    Returns the processes, and the new ones of the parameters `fresh`.
    """
    known = {id(parameter) for parameter in fresh}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in known]
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*model.backbone.blocks, model.backbone):
        # Let go of at the root too, where torch would not: what an evaluation leaves is stale once weights change.
        own: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        own.set_gradient_divide_factor(1.0)
        own.set_force_sum_reduction_for_comms(True)  # gloo has no other
    new = dict(model.named_parameters())
    return Shards(model), [new[name] for name in names]


class Shards(Ranks):
    """One of several processes that have a part each of the backbone of `model`."""

    sharded = True

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model
        whole = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        self.parts = {id(p): nn.Parameter(p.to_local().detach(), requires_grad=p.requires_grad) for p in whole}
        """By the id of a parameter of the model: this process's part, in the same memory, which the optimizer moves."""
        self.whole = {id(self.parts[id(p)]): p for p in whole}
        """The other way round."""

    def own_parts(self, groups: list[ParameterGroup]) -> list[ParameterGroup]:
        return [replace(group, params=[self.parts.get(id(p), p) for p in group.params]) for group in groups]

    def grad_scaler(self, runtime: Runtime) -> torch.amp.GradScaler:
        # a step that overflows in one part is skipped in all
        return ShardedGradScaler(runtime.device.type, enabled=runtime.precision == "fp16")

    # --- a step ------------------------------------------------------------------------------------------------------

    def idle(self, window: Sequence[Rows]) -> Sequence[Rows]:
        passes = [len(self._share(window, rank)) for rank in range(self.size)]
        return [window[0][:1]] * (max(passes) - passes[self.rank])

    @contextmanager
    def summing(self, model: nn.Module) -> Iterator[Gather]:
        with super().summing(model) as gather:

            def gather_all(loss: torch.Tensor, tokens: int) -> tuple[torch.Tensor, int]:
                found = gather(loss, tokens)
                for own in self.parts.values():
                    self._take_gradient(own)
                return found

            yield gather_all

    def _take_gradient(self, own: nn.Parameter) -> None:
        """Move the gradient of a parameter of the model, summed by `fully_shard`, to where the optimizer reads it."""
        whole = self.whole[id(own)]
        here = whole.to_local().detach()
        if own.data_ptr() != here.data_ptr():  # some torch moves uneven parts at the first pass
            own.data = here
        gradient: Any = whole.grad
        own.grad, whole.grad = None if gradient is None else gradient.to_local(), None

    def _summed_here(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in super()._summed_here(model) if not isinstance(parameter, DTensor)]

    def clip(self, trainable: Sequence[nn.Parameter], limit: float) -> torch.Tensor:
        device = trainable[0].device
        whole, parts = (
            nn.utils.get_total_norm(
                [p.grad for p in trainable if p.grad is not None and (id(p) in self.whole) is apart]
            ).to(device, torch.float64)
            ** 2
            for apart in (False, True)
        )
        torch.distributed.all_reduce(parts)
        norm = (whole + parts).sqrt().float()
        nn.utils.clip_grads_with_norm_(trainable, limit, norm)
        return norm

    @contextmanager
    def in_step(self, passes: int) -> Iterator[None]:
        most = self.most(passes) or 0  # asked before: afterwards others may wait for our parts, and not for this
        yield
        was_training = self.model.training
        self.model.eval()
        ids = torch.ones((1, 2), dtype=torch.int64, device=next(iter(self.parts.values())).device)
        with torch.inference_mode():
            for _ in range(most - passes):
                self.model.backbone(ids, torch.ones_like(ids), layers=self.model.pooler.layers)
        self.model.train(was_training)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        state = model.state_dict(keep_vars=True)
        found: dict[int, torch.Tensor] = {}  # tied weights have two names, and stay one tensor
        for tensor in state.values():
            if id(tensor) not in found:
                found[id(tensor)] = self.gather(_local(tensor), tensor)
        return {name: found[id(tensor)] for name, tensor in state.items()} if self.first else {}

    def read_weights(self, path: Path, model: nn.Module) -> None:
        if not self.first:
            self.put_weights(model, {})
            return
        with safe_open(path, "pt") as file:
            self.put_weights(model, {name: partial(file.get_tensor, name) for name in file.keys()})  # noqa: SIM118

    def put_weights(self, model: nn.Module, read: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Give every process its parts of the weights that `read` returns, by their names, in the first."""
        done = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in done:
                done.add(id(tensor))
                _local(tensor).copy_(self.scatter(read[name]() if self.first else None, tensor))

    def stateful(self, thing: Any) -> Any:
        return _WholeModel(self, thing) if isinstance(thing, nn.Module) else _WholeOptimizer(self, thing)

    def hand_out(self, saved: dict[str, Any] | None) -> dict[str, Any] | None:
        rest = self.of_first(None if saved is None else {n: v for n, v in saved.items() if n not in APART})
        return None if rest is None else {**dict.fromkeys(APART), **rest, **(saved or {})}

    def gather(self, own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Put what is cut as `like` is together: in main memory of the first process, empty in the others."""
        if not isinstance(like, DTensor):
            return own
        mesh, cut = like.device_mesh, like.placements
        whole = DTensor.from_local(own, mesh, cut, run_check=False, shape=like.shape, stride=like.stride())
        full = whole.full_tensor()
        return full.cpu() if self.first else full.new_empty(0)

    def scatter(self, whole: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Return this process's part of what the first has, cut as `like` is, and on its device."""
        here = _local(like)
        sent = torch.empty(like.shape, dtype=here.dtype, device=here.device) if whole is None else whole.to(here.device)
        torch.distributed.broadcast(sent, src=0)
        if not isinstance(like, DTensor):
            return sent
        pieces = sent.chunk(self.size)
        return (pieces[self.rank] if self.rank < len(pieces) else sent[:0]).clone()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what of a tensor is in this process, to be read or written."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class _WholeModel:
    """Saves and restores a sharded model as one that is not."""

    def __init__(self, shards: Shards, model: nn.Module) -> None:
        self.shards, self.model = shards, model

    def state_dict(self) -> dict[str, Any]:
        return self.shards.weights(self.model)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Go on from `state_dict`; None = the first process has it."""
        self.shards.put_weights(self.model, {name: tensor.detach for name, tensor in (state_dict or {}).items()})


class _WholeOptimizer:
    """Saves and restores an optimizer of parts as one of whole parameters."""

    def __init__(self, shards: Shards, optimizer: torch.optim.Optimizer) -> None:
        self.shards, self.optimizer = shards, optimizer

    def _whole(self) -> dict[Any, DTensor | None]:
        """Return the parameters of the model by their places in the optimizer; None = not in parts."""
        params = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return {place: self.shards.whole.get(id(parameter)) for place, parameter in enumerate(params)}

    def state_dict(self) -> dict[str, Any]:
        found, whole = self.optimizer.state_dict(), self._whole()
        state = {}
        for place, own in found["state"].items():
            like = whole.get(place)
            state[place] = own
            if like is not None:
                shape = _local(like).shape
                state[place] = {k: self.shards.gather(v, like) if v.shape == shape else v for k, v in own.items()}
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Go on from `state_dict`; None = the first process has it."""
        whole, apart, rest = self._whole(), {}, state_dict
        if state_dict is not None:
            likes = {place: like for place in state_dict["state"] if (like := whole.get(place)) is not None}
            apart = {
                (place, key): value
                for place, like in likes.items()
                for key, value in state_dict["state"][place].items()
                if value.shape == like.shape
            }
            state = dict(state_dict["state"])
            for place in likes:
                state[place] = {k: v for k, v in state[place].items() if (place, k) not in apart}
            rest = {**state_dict, "state": state}
        rest, sent = self.shards.of_first((rest, list(apart)))
        for place, key in sent:
            like = whole[place]
            assert like is not None
            rest["state"][place][key] = self.shards.scatter(apart.get((place, key)), like)
        self.optimizer.load_state_dict(rest)
