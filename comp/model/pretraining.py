"""Models to pre-train a backbone with, and the folder that is left: a checkpoint's own MLM head on it, or SimCSE's.

Shapes: B rows, P pieces of text (B, or more where long texts are windows), T tokens, M tokens to guess, V words of the
vocabulary, H wide.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comp.data.batches import Batch
from comp.data.masking import chosen_of
from comp.model.backbone import Backbone, load_backbone, load_weights_of, recompute_activations
from comp.model.sources import quiet_transformers, read_config
from comp.model.text_model import VECTOR, mean_of_windows

__all__ = ["LOGITS", "MaskedLM", "SentenceEncoder", "load_masked_lm", "load_sentence_encoder", "write_backbone"]

LOGITS = "logits*"  # no task can be called so
INSTEAD = "use pretrain.objective.name simcse, or a backbone of BERT's or RoBERTa's kind"
NO_MASKS = {
    "electra": "ELECTRA's discriminator has no head that guesses words: it was made by telling replaced tokens, with a "
    "second model that replaces them, which its checkpoint has not",
    "xlnet": "XLNet guesses words in permuted order, from two streams of states, and has no masked-language-model head",
}
Weights = dict[str, torch.Tensor]


class MaskedLM(nn.Module):
    """A transformers model with its masked-language-model head.

    `forward(batch)` returns LOGITS -> (M, V), of the tokens to guess alone: the head, which costs as much as several
    blocks, never sees the others. For that, a hook hands it their states as if they were the whole text; every such
    head works token by token. `pooler`: the checkpoint's own pooler, which training leaves as it is.
    """

    def __init__(self, model: Any, pooler: Weights) -> None:
        super().__init__()
        self.model = model
        self.pooler = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in pooler.items()}
        self._takes_type_ids = "token_type_ids" in inspect.signature(model.base_model.forward).parameters
        self._chosen: torch.Tensor | None = None
        model.base_model.register_forward_hook(self._choose)

    def _choose(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[self._chosen][None]
        return output

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self._chosen = chosen_of(batch)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask}
        if batch.token_type_ids is not None and self._takes_type_ids:
            inputs["token_type_ids"] = batch.token_type_ids
        try:
            return {LOGITS: self.model(**inputs, return_dict=True).logits[0]}
        finally:
            self._chosen = None

    def is_head(self, name: str) -> bool:
        """Tell whether a parameter of this module is the head's own; the tied decoder is the backbone's."""
        return not name.startswith(f"model.{self.model.base_model_prefix}.")

    @property
    def max_positions(self) -> int | None:
        """Longest input, or None."""
        return Backbone(self.model.base_model, cls_last=False).max_positions


class SentenceEncoder(nn.Module):
    """A backbone whose text vectors SimCSE compares.

    `forward(batch)` returns VECTOR -> (B, H), not normalised. `vector`: cls, through a dense layer and tanh of its own
    (dropped afterwards, as published), or mean over the tokens. The windows of a long text are averaged.
    """

    def __init__(self, backbone: Backbone, pooler: Weights, *, vector: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooler = dict(pooler)
        self.dense = nn.Linear(backbone.hidden_size, backbone.hidden_size) if vector == "cls" else None
        if self.dense is not None:
            nn.init.normal_(self.dense.weight, std=float(getattr(backbone.config, "initializer_range", 0.02)))
            nn.init.zeros_(self.dense.bias)

    @property
    def model(self) -> Any:
        return self.backbone.model

    def is_head(self, name: str) -> bool:
        """Tell whether a parameter of this module is the dense layer's."""
        return name.startswith("dense.")

    @property
    def max_positions(self) -> int | None:
        return self.backbone.max_positions

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        states = self.backbone(batch.input_ids, batch.mask, batch.token_type_ids)[-1]
        assert states is not None
        if self.dense is None:
            mask = batch.mask[..., None].to(states.dtype)
            vector = (states * mask).sum(1) / mask.sum(1)
        else:
            vector = torch.tanh(self.dense(states[:, -1 if self.backbone.cls_last else 0]))
        if batch.window_of is not None:
            vector = mean_of_windows(vector, batch.window_of, len(batch.rows))
        return {VECTOR: vector}


# --- loading ---------------------------------------------------------------------------------------------------------


def load_masked_lm(
    source: str, *, dropout: float | None, allow_pickle: bool = False, gradient_checkpointing: bool = False
) -> tuple[MaskedLM, str]:
    """Load a checkpoint with its MLM head, the decoder tied to the word table; return it and words about the head.

    A head that the checkpoint has not is drawn anew. Raises ValueError for a model that was not made to guess masked
    words, and says what to use instead.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM

    config = _config(source, dropout)
    if config.model_type in NO_MASKS or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        reason = NO_MASKS.get(config.model_type, f"{config.model_type} has no masked-language-model head")
        raise ValueError(f"model.backbone '{source}': {reason}; {INSTEAD}")

    def load() -> tuple[Any, dict[str, set[str]]]:
        return load_weights_of(AutoModelForMaskedLM, source, config, allow_pickle=allow_pickle)

    model, report = load()
    if any(name.startswith("lm_predictions.") for name in report["unexpected_keys"]):
        config.legacy = False  # DeBERTa's released checkpoints have the authors' head, not transformers' old one
        model, report = load()
    inside = f"{model.base_model_prefix}."
    lost = sorted(name for name in report["missing_keys"] if name.startswith(inside))
    if lost:
        raise ValueError(
            f"model.backbone '{source}': {len(lost)} parameters are not in its weights and would be random, for "
            f"example {lost[0]}; the checkpoint does not fit its config.json"
        )
    new = sorted(name for name in report["missing_keys"] if not name.startswith(inside))
    words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    if any(name.endswith("decoder.weight") for name in new):  # a config that unties what no weights are there for
        decoder.weight, model.config.tie_word_embeddings = words.weight, True
    about = "from the checkpoint"
    if new:
        about = f"new, as the checkpoint has none ({len(new)} tensors, {new[0]}, ...)"
    pooler = _trained_pooler(source, allow_pickle=allow_pickle)
    if gradient_checkpointing:
        recompute_activations(model)
    return MaskedLM(model, pooler), about


def load_sentence_encoder(
    source: str,
    tokenizer: Any,
    *,
    vector: str,
    dropout: float | None,
    allow_pickle: bool = False,
    gradient_checkpointing: bool = False,
) -> SentenceEncoder:
    """Load a backbone for SimCSE. Raises ValueError when it has no dropout, or no encoder of its own."""
    config = _config(source, dropout)
    backbone = load_backbone(source, tokenizer, dropout=dropout, with_pooler=False, allow_pickle=allow_pickle)
    rates = {
        key: value
        for key, value in config.to_dict().items()
        if "dropout" in key and not key.startswith(("classifier", "summary")) and isinstance(value, float)
    }
    if not any(rates.values()):
        raise ValueError(
            f"model.backbone '{source}': SimCSE tells two passes apart by dropout alone, and every dropout of this "
            f"checkpoint is 0 ({', '.join(rates) or config.model_type}); set pretrain.dropout to 0.1"
        )
    if gradient_checkpointing:
        backbone.checkpoint_gradients()
    return SentenceEncoder(backbone, _trained_pooler(source, allow_pickle=allow_pickle), vector=vector)


def _config(source: str, dropout: float | None) -> Any:
    config = read_config(source, dropout)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model.backbone '{source}': {config.model_type} is an encoder-decoder, which is pre-trained by restoring "
            "whole texts, and `comp pretrain` does not do that; use a backbone of BERT's or RoBERTa's kind"
        )
    return config


def _trained_pooler(source: str, *, allow_pickle: bool) -> Weights:
    """Return the weights of the checkpoint's own pooler, by their names in AutoModel; {} where it has none."""
    from transformers import MODEL_MAPPING, AutoModel

    config = read_config(source)
    kind = MODEL_MAPPING.get(type(config), None)
    if kind is None or "add_pooling_layer" not in inspect.signature(kind.__init__).parameters:
        return {}
    model, report = load_weights_of(AutoModel, source, config, allow_pickle=allow_pickle)
    if any(name.startswith("pooler.") for name in report["missing_keys"]):
        return {}
    return {name: own.clone() for name, own in model.state_dict().items() if name.startswith("pooler.")}


# --- writing ---------------------------------------------------------------------------------------------------------


def write_backbone(folder: Path, learner: MaskedLM | SentenceEncoder, tokenizer: Any, source: str) -> None:
    """Write config (the source's own, dropout included), tokenizer and weights, from which `load_backbone` loads.

    A masked language model keeps its head, to go on with; the source's pooler is there as it was. The folder is
    replaced when all is written.
    """
    whole = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(whole, ignore_errors=True)
    model = learner.model.to("cpu")
    config = read_config(source)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    for key in ("legacy", "tie_word_embeddings"):  # which head it is
        if hasattr(config, key):
            setattr(config, key, getattr(model.config, key))
    with quiet_transformers():
        model.save_pretrained(whole, state_dict={**model.state_dict(), **learner.pooler})
        config.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
    shutil.rmtree(folder, ignore_errors=True)
    whole.rename(folder)
