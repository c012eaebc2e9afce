"""The encoder: built, loaded, taken apart into blocks.

`depth_of` tells how deep a parameter lies: 0 = embeddings, 1..L = block, L + 1 = anything above the blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comp.kernels import attentions_of
from comp.model.attention import PACKED  # which registers its attentions with transformers
from comp.model.packing import Packing
from comp.model.sources import cls_is_last, config_in, has_weights, local_only, quiet_hub, resolve_source

__all__ = [
    "Backbone",
    "load_backbone",
    "load_weights_of",
    "rebuild_backbone",
    "recompute_activations",
    "save_recipe",
]

# Norms that follow the last block learn at the top block's rate; every other parameter outside the blocks (embeddings,
# their projection, relative position tables shared by all blocks) at the embeddings'.
AFTER_BLOCKS = ("final_norm", "final_layer_norm", "ln_f")
# Models whose decoder reads the text itself, shifted by one, when it is given nothing else.
DECODERS = ("bart",)
# What freezing the embeddings means in models without a module for all of them.
EMBEDDINGS = ("shared", "embed_tokens", "embed_positions", "layernorm_embedding", "word_embedding")


class Backbone(nn.Module):
    """A transformers encoder behind one signature.

    Attributes: `model` (the PreTrainedModel), `num_layers` (blocks between the text and the head), `num_states` L
    (blocks whose states a pooler can read: the same, but for BART's decoder, which stands on an encoder),
    `hidden_size` H, `vocab_size`, `max_positions` (longest input, or None when positions are relative), `cls_last`
    (True when the classification token closes the text, as in XLNet and BART's decoder).
    """

    compiled: Any
    """What `compile_training` made of `model`, or None."""

    def __init__(self, model: nn.Module, *, cls_last: bool, part: str = "encoder") -> None:
        super().__init__()
        self.model: Any = model
        config: Any = model.config
        self.config = config
        self._decodes = part == "decoder"
        if self._decodes:
            self.num_states = int(config.decoder_layers)
            self.num_layers = int(config.encoder_layers) + self.num_states
            self._block_prefixes = {"encoder.layers": 0, "decoder.layers": int(config.encoder_layers)}
        else:
            self.num_layers = self.num_states = int(config.num_hidden_layers)
            self._block_prefixes = {_block_prefix(model, self.num_layers): 0}
        self.hidden_size = int(config.hidden_size)
        whole: Any = model
        self.vocab_size = int(whole.get_input_embeddings().num_embeddings)
        self.cls_last = cls_last or self._decodes
        self.max_positions = _max_positions(model)
        self._first_position = _first_position(model)
        self._takes_type_ids = "token_type_ids" in inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"use_cache": False} if self._decodes else {}
        usual = config._attn_implementation
        self._attention = {True: usual, False: usual}  # in training, in evaluation
        self.__dict__["compiled"] = None  # not a child: the weights would have two names
        self.lowest: Any = None
        """Set by `skip_lowest`."""

    @property
    def shares_blocks(self) -> bool:
        """True when all depths are one block (ALBERT): depth is then undefined."""
        return any("albert_layer_groups" in prefix for prefix in self._block_prefixes)

    def forward(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        *,
        layers: Sequence[int] = (-1,),
        lower: torch.Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[torch.Tensor | None]:
        """Return L + 1 hidden states (B, T, H), index 0 = embeddings; those not in `layers` may be None.

        Hidden states below the last are only kept when `layers` asks for one. Where the model normalises before each
        block (ModernBERT), the final norm is applied to all of them, so that they are of one scale. `lower` (B, T, H):
        what `lowest_states` gave for the batch, in place of the blocks below; states under it are then not true.
        `lengths` (B,): tokens of each text, where they are known without waiting for the device of `mask`.
        """
        packing = self.packing(mask, lengths)
        if lower is not None:
            with self.lowest.going_on_from(lower if packing is None else packing.pack(lower)):
                return self(input_ids, mask, token_type_ids, layers=layers, lengths=lengths)
        if self.config._attn_implementation != self._attention[self.training]:
            self.config._attn_implementation = self._attention[self.training]
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if token_type_ids is not None and self._takes_type_ids:
            inputs["token_type_ids"] = token_type_ids
        if packing is None:
            inputs["attention_mask"] = mask
        else:
            inputs = packing.inputs(self._first_position, **inputs)
        last = self.num_states
        wanted = {index % (last + 1) for index in layers}
        model = self.compiled if self.training and self.compiled is not None else self.model
        outputs = model(**inputs, output_hidden_states=wanted != {last}, return_dict=True, **self._extra)
        states: list[torch.Tensor | None] = [None] * last + [outputs.last_hidden_state]
        if wanted != {last}:
            found = outputs.decoder_hidden_states if self._decodes else outputs.hidden_states
            for index in wanted - {last}:
                states[index] = self._normed(found[index]) if index else found[index]
        if packing is None:
            return states
        return [None if state is None else packing.unpack(state) for state in states]

    @property
    def packs(self) -> bool:
        """True when texts go through the blocks end to end, without padding, in the present mode."""
        return self._attention[self.training] == PACKED

    def packing(self, mask: torch.Tensor, lengths: Sequence[int] | None = None) -> Packing | None:
        """Return how a batch is laid end to end; None where it stays padded. Arguments as for `forward`."""
        if not self.packs:
            return None
        return Packing(mask.sum(1).tolist() if lengths is None else lengths, mask.shape[1], mask.device)

    def attend(self, *, training: str | None = None, evaluating: str | None = None) -> None:
        """Attend by sdpa (torch's fused kernels), eager (matrix products), blocked or packed (attention.py).

        None = as it is.

        Raises ValueError when the architecture does not have it.
        """
        for mode, wanted in ((True, training), (False, evaluating)):
            if wanted is not None and wanted not in attentions_of(self.config):
                raise ValueError(
                    f"model.attention is '{wanted}', but {self.config.model_type} has only "
                    f"{' and '.join(attentions_of(self.config))}; set it to auto or one of these"
                )
            self._attention[mode] = wanted or self._attention[mode]

    def compile_training(self, backend: str) -> None:
        """Run training passes through torch.compile, for any batch and length."""
        self.__dict__["compiled"] = torch.compile(self.model, dynamic=True, backend=backend)

    def _normed(self, state: torch.Tensor) -> torch.Tensor:
        norm = next((module for name, module in self.model.named_children() if name in AFTER_BLOCKS), None)
        return state if norm is None else norm(state)

    def depth_of(self, name: str) -> int:
        """Return the depth of one of this module's parameters, by its name in `named_parameters()`."""
        name = name.removeprefix("model.")
        for prefix, below in self._block_prefixes.items():
            if name.startswith(prefix + "."):
                if self.shares_blocks:
                    return self.num_layers
                return below + int(name[len(prefix) + 1 :].split(".")[0]) + 1
        if name.split(".")[0] == "pooler":
            return self.num_layers + 1
        return self.num_layers if name.split(".")[0] in AFTER_BLOCKS else 0

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, bottom to top; of BART's decoder those of the encoder first."""
        return [block for prefix in self._block_prefixes for block in self.model.get_submodule(prefix)]

    def embeddings(self) -> list[nn.Module]:
        """Return the modules that make the embeddings: words, positions, types and their norm."""
        found = getattr(self.model, "embeddings", None)
        if isinstance(found, nn.Module):
            return [found]
        return [module for name, module in self.model.named_modules() if name.split(".")[-1] in EMBEDDINGS]

    def freeze(self, *, embeddings: bool | str, num_layers: int) -> None:
        """Stop gradients for the embeddings ("words" = the word table alone) and for the lowest `num_layers` blocks."""
        if num_layers and self.shares_blocks:
            raise ValueError("freeze_layers: this model's blocks share one set of weights (ALBERT); set it to 0")
        if num_layers > self.num_layers:
            raise ValueError(f"freeze_layers is {num_layers}, but the backbone has {self.num_layers} blocks")
        if embeddings == "words":
            self.model.get_input_embeddings().requires_grad_(False)
        elif embeddings:
            for module in self.embeddings():
                module.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if 1 <= self.depth_of(name) <= num_layers:
                parameter.requires_grad_(False)

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them. ValueError where the model cannot."""
        recompute_activations(self.model)

    def take_pooler(self) -> nn.Module:
        """Detach and return the checkpoint's own pooler, so that it belongs to one module only."""
        pooler = getattr(self.model, "pooler", None)
        if not isinstance(pooler, nn.Module):
            raise ValueError(_no_pooler(self.config.model_type))
        self.model.pooler = None
        return pooler


def recompute_activations(model: Any) -> None:
    """Make a PreTrainedModel recompute activations in the backward pass. ValueError where it cannot."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{model.config.model_type} cannot recompute activations; set gradient_checkpointing to false")
    # transformers 5 renamed it; the old name is all that 5.0 has.
    new = getattr(model, "activation_checkpointing_enable", None)
    enable: Any = new or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _no_pooler(model_type: str) -> str:
    return f"pooler 'pooler_output': {model_type} has no pooler of its own; use pooler 'cls' or 'mean'"


def _block_prefix(model: nn.Module, num_layers: int) -> str:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    shared = [name for name in lists if name.endswith("albert_layer_groups")]
    fitting = shared or sorted((name for name, m in lists.items() if len(m) == num_layers), key=len)
    if not fitting:
        raise ValueError(
            f"{type(model).__name__}: no list of {num_layers} blocks among its modules ({', '.join(lists) or 'none'}); "
            "this architecture is not supported"
        )
    return fitting[0]


def _position_table(model: nn.Module) -> nn.Embedding | None:
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    return next((module for module in tables if isinstance(module, nn.Embedding)), None)


def _first_position(model: nn.Module) -> int:
    table = _position_table(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1  # as RoBERTa counts


def _max_positions(model: nn.Module) -> int | None:
    table = _position_table(model)
    if table is not None:
        return table.num_embeddings - _first_position(model)
    limit = getattr(model.config, "max_position_embeddings", None)
    relative = getattr(model.config, "relative_attention", False)  # DeBERTa has no limit
    return int(limit) if isinstance(limit, int) and limit > 0 and not relative else None


_PICKLED = (
    "model.backbone '{source}': its weights are a pickle (pytorch_model.bin), which can hold code to run; convert them "
    "once (model.save_pretrained writes safetensors), or, if you trust where they come from, set model.allow_pickle to "
    "true"
)


# --- building --------------------------------------------------------------------------------------------------------


def load_backbone(
    source: str,
    tokenizer: Any,
    *,
    dropout: float | None,
    with_pooler: bool,
    part: str = "encoder",
    new_tokens: Sequence[str] = (),
    allow_pickle: bool = False,
) -> Backbone:
    """Load pretrained weights as float32 (a half-precision checkpoint would otherwise train in half precision).

    `dropout` replaces every dropout of the model; None keeps the checkpoint's. `with_pooler` keeps the checkpoint's
    pooler and refuses a checkpoint that was saved without one, since it would be random. `new_tokens`: of the
    tokenizer, which get embeddings. `allow_pickle`: read weights from pytorch_model.bin where there are no safetensors.
    """
    from transformers import AutoModel

    def build(config: Any, **options: Any) -> tuple[nn.Module, set[str]]:
        model, report = load_weights_of(AutoModel, source, config, allow_pickle=allow_pickle, **options)
        _embed_new(model, tokenizer.convert_tokens_to_ids(list(new_tokens)))
        return model, report["missing_keys"]

    with quiet_hub(source):
        backbone, missing = _build(config_in(resolve_source(source), dropout), build, tokenizer, with_pooler, part)
    pooler = sorted(name for name in missing if name.split(".")[0] == "pooler")
    if pooler:
        raise ValueError(
            f"pooler 'pooler_output': '{source}' was saved without a trained pooler ({', '.join(pooler)} are missing "
            "and would be random); use pooler 'cls' or 'mean'"
        )
    if missing:
        raise ValueError(
            f"model.backbone '{source}': {len(missing)} parameters are not in its weights and would be random, "
            f"for example {sorted(missing)[0]}; the checkpoint does not fit its config.json"
        )
    return backbone


def _embed_new(model: Any, ids: Sequence[int]) -> None:
    """Give new tokens the mean of all embeddings before them, as a token that is yet like no other.

    Hewitt 2021, "Initializing new word embeddings for pretrained language models". A table that has room for them, as
    DeBERTa's has, stays as large as it is; the rows there were never trained.
    """
    if not ids:
        return
    table = model.get_input_embeddings()
    mean = table.weight.detach()[: min(ids)].mean(dim=0)
    if max(ids) >= table.num_embeddings:
        table = model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        table.weight[list(ids)] = mean


def load_weights_of(
    auto: Any, source: str, config: Any, *, allow_pickle: bool, **options: Any
) -> tuple[Any, dict[str, set[str]]]:
    """Load a checkpoint into a model of transformers' class `auto` (AutoModel, ...) as float32.

    Returns the model and what its weights lack and have too much: "missing_keys", "unexpected_keys". Raises ValueError
    when they cannot be read, are a pickle without `allow_pickle`, or are of other shapes than the config says.
    """
    folder = resolve_source(source)
    if not allow_pickle and not any(Path(folder).glob("*.safetensors")) and has_weights(Path(folder)):
        raise ValueError(_PICKLED.format(source=source))
    with quiet_hub(source):
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            trust_remote_code=False,
            local_files_only=local_only(folder),
            **options,
        )
    wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"model.backbone '{source}': {len(wrong)} weights do not fit its config.json, for example {wrong[0]}; the "
            "two are of different models"
        )
    return model, {key: set(report[key]) for key in ("missing_keys", "unexpected_keys")}


def rebuild_backbone(
    folder: Path | str, tokenizer: Any, *, dropout: float | None, with_pooler: bool, part: str = "encoder"
) -> Backbone:
    """Build the architecture of a run's `backbone/` folder without weights and without the hub."""
    from transformers import AutoModel

    def build(config: Any, **options: Any) -> tuple[nn.Module, set[str]]:
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **options), set()

    with quiet_hub(str(folder), "config"):
        return _build(config_in(str(folder), dropout), build, tokenizer, with_pooler, part)[0]


def _build(
    config: Any, build: Callable[..., tuple[nn.Module, set[str]]], tokenizer: Any, with_pooler: bool, part: str
) -> tuple[Backbone, set[str]]:
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"model type '{config.model_type}' has no encoder in transformers' AutoModel")
    two_halves = bool(getattr(config, "is_encoder_decoder", False))
    if part == "decoder" and config.model_type not in DECODERS:
        what = "its decoder does not read the text by itself" if two_halves else "it has no decoder"
        raise ValueError(
            f"model.part is 'decoder', but this is {config.model_type}: {what}; set model.part to encoder (decoder is "
            f"for {', '.join(DECODERS)})"
        )
    kind = MODEL_MAPPING[type(config)]
    optional_pooler = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    if with_pooler and not optional_pooler:
        raise ValueError(_no_pooler(config.model_type))
    # A pooler that the head never reads would be trained by nothing and sit unused in every checkpoint.
    if tokenizer.vocab_size > getattr(config, "vocab_size", tokenizer.vocab_size):
        raise ValueError(
            f"model.backbone '{config.name_or_path}': its tokenizer has {tokenizer.vocab_size:,} tokens, but the "
            f"model has embeddings of {config.vocab_size:,}: they do not fit; put the model's own tokenizer beside it"
        )
    model, missing = build(config, **({"add_pooling_layer": with_pooler} if optional_pooler else {}))
    if two_halves and part == "encoder":
        whole: Any = model
        model = whole.get_encoder()
    return Backbone(model, cls_last=cls_is_last(tokenizer), part=part), missing


def save_recipe(backbone: Backbone, tokenizer: Any, folder: Path) -> None:
    """Write config and tokenizer, no weights, so that `rebuild_backbone` needs no hub."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
