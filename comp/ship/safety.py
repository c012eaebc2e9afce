"""What must not be in a bundle: pickles and other code that loading runs, keys and tokens, paths of this machine."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from comp.ship.manifest import files_of

__all__ = ["scrubbed", "unsafe"]

TEXT = (".json", ".yaml", ".txt", ".md", ".py", ".ipynb", ".jinja")
ARRAYS = (".npy", ".npz")
BINARY = (".model",)  # SentencePiece
PICKLE = re.compile(rb"\x80[\x02-\x05]")
"""How a pickle of protocol 2 to 5 begins."""
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill", ".h5")
NATIVE = (".so", ".pyd", ".dll", ".dylib")
SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SHORTEST = 12
"""A shorter value of an environment variable is found everywhere by chance."""
TOKENS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|KGAT_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Tokens of Hugging Face, Kaggle, GitHub and AWS by their form."""


def unsafe(folder: Path) -> list[str]:
    """Return what must not be in a bundle, each by file name; [] when all is well.

    Files are of a few known kinds, or refused. Of weights the header is searched for secrets, of wheels every member.
    """
    secrets, paths, faults = _secrets(os.environ), _paths(), []
    for name in files_of(folder):
        path = folder / name
        suffix = path.suffix.lower()
        if suffix == ".py" and not name.startswith("comp/"):
            faults.append(f"{name} is code of a checkpoint, which comp never runs")
            continue
        try:
            for member, raw in _pieces(path):
                where = name if member is None else f"{name} ({member})"
                if reason := _form(raw, suffix if member is None else Path(member).suffix.lower(), member is None):
                    faults.append(f"{where} {reason}")
                known = {} if _published(name, member) else paths
                faults += [f"{where} holds {what}" for what, mark in (secrets | known).items() if mark in raw]
                if token := TOKENS.search(raw):
                    faults.append(f"{where} holds what looks like a key: {token[0][:6].decode()}...")
        except (ValueError, OSError, zipfile.BadZipFile) as fault:
            faults.append(f"{name} is no readable {suffix or 'file'} ({fault})")
    return faults


def _pieces(path: Path) -> Iterator[tuple[str | None, bytes]]:
    """Yield (member or None, bytes) of what is searched in a file."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for member in wheel.namelist():
                yield member, wheel.read(member)
    elif path.suffix == ".safetensors":
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, 100_000_000))
        json.loads(header)
        yield None, header
    else:
        if path.suffix in ARRAYS:
            found: Any = np.load(path, allow_pickle=False)  # raises for an array of objects
            if path.suffix == ".npz":
                with found:
                    for member in found.files:
                        yield member, np.ascontiguousarray(found[member]).tobytes()
        yield None, path.read_bytes()


def _published(name: str, member: str | None) -> bool:
    """Tell whether this is code of another package as it was published: a path in it is nobody's home."""
    return member is not None and member.endswith(".py") and not Path(name).name.startswith("comp-")


def _form(raw: bytes, suffix: str, whole: bool) -> str | None:
    """Tell why a file, or a member of one, is of a form that a bundle does not hold."""
    if suffix == ".pth" and not whole and raw.isascii() and b"\0" not in raw:
        return None  # lines for sys.path, of a package like setuptools, not weights
    if suffix in PICKLES or PICKLE.match(raw[:2]):
        return "is a pickle, or may be one, which runs code when it is loaded"
    if suffix in NATIVE:
        return "is compiled for one machine"
    if not whole or suffix in (*ARRAYS, *BINARY, ".whl", ".safetensors"):
        return None
    if suffix not in TEXT and suffix:
        return f"is of a kind that a bundle does not hold ({suffix})"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "is no UTF-8 text"
    if suffix in (".json", ".ipynb"):
        json.loads(text)
    return None


def _secrets(environment: Mapping[str, str]) -> dict[str, bytes]:
    """Return what to look for everywhere: what it is -> its bytes."""
    return {
        f"the value of ${name}": value.encode()
        for name, value in environment.items()
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST and not os.path.exists(value)
    }


def _paths() -> dict[str, bytes]:
    """Return the paths of this machine that nobody else should read: what it is -> its bytes."""
    places = {"the path of the home folder": Path.home(), "the path of the project": Path.cwd()}
    return {what: f"{path}/".encode() for what, path in places.items() if len(path.parts) > 1}


def scrubbed(value: Any) -> Any:
    """Return JSON or YAML data with every path of this machine cut to its last part."""
    if isinstance(value, dict):
        return {key: scrubbed(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(part) for part in value]
    if isinstance(value, str) and re.match(r"(/|~|\.\.?/|[A-Za-z]:\\)[^\s]", value) and len(value) < 4096:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
