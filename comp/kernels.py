"""Which attention and which precision train fastest here: measured once per device and backbone, kept, chosen from.

One block of the backbone's shape, with its dropout, goes forward and backward under torch's fused attention (sdpa),
under plain matrix products (eager) and, on a CPU, in blocks (blocked: model/attention.py), in the hardware's half
precision and in float32. On a CPU, sdpa with attention dropout has no fused kernel: torch takes its slowest path there
without a word. What is chosen is written into the run's manifest: a run that goes on takes the same, whatever a later
measurement says. Where nothing can be kept nothing is measured, so that two runs never differ by the noise of a clock.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# runtime.py imports doctor.py, which imports this file.
Runtime = Any

__all__ = [
    "Kernels",
    "attentions_of",
    "attentions_on",
    "cache_file",
    "choose",
    "describe",
    "device_name",
    "kept",
    "measure",
    "render_rates",
]

MARGIN = 1.05  # what is not the usual choice must be faster by more than this
PASSES = 4  # the first does not count, of the others the fastest does
ROWS = {"cpu": 4}
MOST_TOKENS = 256
PLAIN = "without dropout"
# Architectures whose texts can be laid end to end: they take positions, and hand the lengths on to their attention.
PACKS = ("albert", "bert", "camembert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class Kernels:
    """What a run trains with."""

    shape: str
    """What was asked: backbone, dropout, tokens, wishes."""
    attention: str
    """sdpa | eager | blocked | packed, of training passes."""
    precision: str
    """bf16 | fp16 | fp32"""
    device: str
    """Where it was chosen."""
    rates: dict[str, float] = field(default_factory=dict)
    """"sdpa bf16", ... -> tokens per second through one block, forward and backward; empty = nothing to choose."""


def choose(
    config: Any,
    runtime: Runtime,
    *,
    attention: str,
    precision: str,
    max_length: int,
    compiled: bool = False,
    known: Mapping[str, Any] | None = None,
    say: Callable[[str], None],
) -> tuple[Kernels, Runtime]:
    """Return what to train with, and the runtime in that precision.

    `config`: the backbone's, of transformers, its dropout set. `runtime`: as opened with `precision`. What is not auto
    of `attention` (auto | sdpa | eager | blocked | packed) and `precision` is not measured. `compiled`: torch.compile
    will run the passes, and blocked, whose blocks go by the batch's shape, is not for it. `known`: what the run's
    manifest holds of an earlier choice, which stands as long as the question is the same.
    """
    tokens = min(max_length, MOST_TOKENS)
    shape = f"{_shape(config)}, {tokens} tokens; attention {attention}, precision {precision}"
    if known is not None and known.get("shape") == shape:
        chosen = Kernels(**known)
        # On another kind of device the precision may not be there.
        same = chosen.device.split(",")[0] == device_name(runtime.device).split(",")[0]
        return chosen, replace(runtime, precision=chosen.precision) if same else runtime
    there = tuple(one for one in attentions_on(config, runtime.device.type) if not (compiled and one == "blocked"))
    attentions = there if attention == "auto" else (attention,)
    halves = (runtime.precision, "fp32") if precision == "auto" and runtime.precision != "fp32" else ()
    usual = f"{attentions[0]} {runtime.precision}"
    rates: dict[str, float] = {}
    if len(attentions) > 1 or halves:
        found = _kept_or_measured(config, runtime, tokens, say)
        precisions = halves or (runtime.precision,)
        wanted = [f"{one} {other}" for one in attentions for other in precisions]
        rates = {name: rate for name, rate in found.items() if name in wanted or PLAIN in name}
        fastest = max(wanted, key=lambda name: rates.get(name, 0.0))
        if rates.get(fastest, 0.0) > MARGIN * rates.get(usual, 0.0):
            usual = fastest
        if rates:
            say(_told(usual, rates))
    kernel, half = usual.split()
    return Kernels(shape, kernel, half, device_name(runtime.device), rates), replace(runtime, precision=half)


def _told(chosen: str, rates: Mapping[str, float]) -> str:
    """Say what was chosen and what dropout costs."""
    line = f"attention and precision: {describe(chosen, rates)}"
    plain = max((rate for name, rate in rates.items() if PLAIN in name), default=0.0)
    if plain > 1.1 * rates[chosen]:
        share = 1 - rates[chosen] / plain
        line += f"; dropout costs {share:.0%} of a block's speed here, model.dropout 0 would spare it"
    return line


def describe(chosen: str, rates: Mapping[str, float]) -> str:
    """Return "eager bf16, 9,800 tokens/s a block (sdpa bf16 8,100, ...)"."""
    others = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items() if name != chosen)
    return f"{chosen}, {rates[chosen]:,.0f} tokens/s a block" + (f" ({others})" if others else "")


def render_rates(rates: Mapping[str, float]) -> str:
    """Return rates in words, the fastest first."""
    return describe(max((name for name in rates if PLAIN not in name), key=lambda name: rates[name]), rates)


def attentions_of(config: Any) -> tuple[str, ...]:
    """Return the attentions an architecture has, the usual one first."""
    from transformers import MODEL_MAPPING
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kind = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else None  # noqa: SIM401  (it is no dict)
    if not getattr(kind, "_supports_sdpa", False):
        return ("eager",)
    # comp.model.backbone brings them; what only measures would know them by name alone
    ours = "blocked" in ALL_ATTENTION_FUNCTIONS.valid_keys() and getattr(kind, "_supports_attention_backend", False)
    packed = ("packed",) if config.model_type in PACKS else ()
    return ("sdpa", "eager", "blocked", *packed) if ours else ("sdpa", "eager")


def attentions_on(config: Any, device: str) -> tuple[str, ...]:
    """Return those that are worth measuring on a kind of device.

    Blocked is made for the caches of a CPU. What packed spares is padding, of which bucketing leaves next to nothing.
    """
    without = ("packed",) if device == "cpu" else ("packed", "blocked")
    return tuple(one for one in attentions_of(config) if one not in without)


def _dropouts(config: Any) -> dict[str, float]:
    found = config.to_dict().items()
    numbers = {key: value for key, value in found if "dropout" in key and isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if not isinstance(value, bool)}


def _shape(config: Any) -> str:
    heads = getattr(config, "num_attention_heads", "?")
    dropouts = _dropouts(config)
    inside = max((value for key, value in dropouts.items() if "att" in key), default=0.0)
    rest = max((value for key, value in dropouts.items() if "att" not in key and "class" not in key), default=0.0)
    return f"{config.model_type} {config.hidden_size}x{heads}, dropout {rest:g}, in attention {inside:g}"


def device_name(device: torch.device) -> str:
    """Return the name of the device that times depend on; of a CPU its model and torch's threads."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return str(device.type)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = match[1].strip() if match else name
    return f"{name.replace(',', '')}, {torch.get_num_threads()} threads"


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(config: Any, runtime: Runtime, *, tokens: int) -> dict[str, float]:
    """Return "attention precision" -> tokens per second through one block of the backbone, forward and backward.

    With dropout in the config there is also "... without dropout". No random number of the run is drawn.
    """
    import torch

    attentions = attentions_on(config, runtime.device.type)
    halves = dict.fromkeys((runtime.precision, "fp32"))
    ways = {f"{one} {half}": (one, half, False) for one in attentions for half in halves}
    if any(_dropouts(config).values()):
        ways |= {f"{one} {runtime.precision} {PLAIN}": (one, runtime.precision, True) for one in attentions}
    rows = ROWS.get(runtime.device.type, 16)
    fastest = dict.fromkeys(ways, float("inf"))
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        blocks = {key: _block(config, key[0], plain=key[1]).to(runtime.device) for key in _kinds(ways.values())}
        ids = torch.randint(5, 50, (rows, tokens), device=runtime.device)
        mask = torch.ones_like(ids)
        mask[0, tokens // 2 :] = 0  # a batch has padding, and a mask costs
        for number in range(PASSES):  # in turns, so that a drift of the machine's speed favours none
            for name, (attention, half, plain) in ways.items():
                took = _pass(blocks[attention, plain], ids, mask, replace(runtime, precision=half))
                fastest[name] = min(fastest[name], took) if number else fastest[name]
    return {name: round(rows * tokens / seconds) for name, seconds in fastest.items()}


def _kinds(ways: Any) -> list[tuple[str, bool]]:
    return list(dict.fromkeys((attention, plain) for attention, _, plain in ways))


def _block(config: Any, attention: str, *, plain: bool) -> Any:
    """Build one block of the architecture with random weights and a small vocabulary."""
    from transformers import AutoModel

    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    small.vocab_size = min(small.vocab_size, max(1000, (small.pad_token_id or 0) + 1))
    if plain:
        for key in _dropouts(small):
            setattr(small, key, 0.0)
    model = AutoModel.from_config(small, attn_implementation=attention, trust_remote_code=False)
    return (model.get_encoder() if small.is_encoder_decoder else model).float().train()


def _pass(model: Any, ids: Any, mask: Any, runtime: Runtime) -> float:
    started = time.perf_counter()
    with runtime.autocast():
        state = model(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
    state.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    _wait(runtime)
    return time.perf_counter() - started


def _wait(runtime: Runtime) -> None:
    import torch

    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    elif runtime.device.type == "mps":
        torch.mps.synchronize()


# --- what is kept ----------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Return where measurements are kept: in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comp" / "kernels.json"


def kept() -> dict[str, dict[str, dict[str, float]]]:
    """Return device -> backbone -> rates, as measured before; empty where the file is missing or damaged."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        return {
            str(device): {str(shape): {str(n): float(r) for n, r in rates.items()} for shape, rates in own.items()}
            for device, own in found.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _kept_or_measured(config: Any, runtime: Runtime, tokens: int, say: Callable[[str], None]) -> dict[str, float]:
    """Return rates from the cache, or measure them and keep them; empty where they cannot be kept or measured."""
    import torch

    place = f"{device_name(runtime.device)}; torch {torch.__version__}"
    shape = f"{_shape(config)}, {tokens} tokens"
    known = kept()
    before = known.get(place, {}).get(shape, {})
    if {name.split()[0] for name in before} == set(attentions_on(config, runtime.device.type)):
        return before
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return {}
    try:
        rates = measure(config, runtime, tokens=tokens)
    except Exception as fault:  # of an architecture that does not come apart into blocks: training needs no figures
        say(
            f"attention and precision could not be measured ({type(fault).__name__}: {fault}): the usual ones are taken"
        )
        return {}
    known.setdefault(place, {})[shape] = rates
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:  # a full disk
        temporary.unlink(missing_ok=True)
        return {}
    return rates
