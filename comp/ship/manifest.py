"""What is in a bundle, and that it is what was put in: MANIFEST.json, sha256 of every file, names that stay inside.

Needs the standard library only: the notebook carries these functions' text, and checks a bundle before it installs
anything of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = [
    "LOCAL",
    "MANIFEST",
    "check_files",
    "content_of",
    "files_of",
    "find_bundle",
    "places",
    "read_manifest",
    "sha256_of",
]

MANIFEST = "MANIFEST.json"
LOCAL = ("dataset-metadata.json", "kernel-metadata.json")
"""Files that kaggle reads and does not upload."""


def places(root: Path, pattern: str, depth: int = 6) -> Iterator[Path]:
    """Yield the files that fit a pattern in folders under `root`, the nearest first.

    Kaggle mounts a dataset as <slug>, <owner>/<slug> or datasets/<owner>/<slug>, a model six folders deep.
    """
    for level in range(depth + 1):
        yield from sorted(path for path in root.glob("*/" * level + pattern) if path.is_file())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 over a manifest, all but the notebook and the metadata, which say it themselves."""
    files = {name: file for name, file in manifest["files"].items() if not file.get("outside")}
    told = {**manifest, "files": files, "content": None}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a bundle's MANIFEST.json. Raises ValueError when it is none, or a name in it leads out of the bundle."""
    path = folder / "MANIFEST.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = [*manifest["files"], *(run["path"] for run in manifest["runs"])]
        content = manifest["content"]
    except FileNotFoundError:
        raise ValueError(f"{folder} is no bundle: MANIFEST.json is missing; make one with `comp bundle`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"{path} is damaged ({type(fault).__name__}: {fault}); make the bundle anew") from None
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
            raise ValueError(f"{path}: the name '{name}' leads out of the bundle; make the bundle anew")
    if content != content_of(manifest):
        raise ValueError(f"{path} was changed after the bundle was made; make the bundle anew")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], *, uploaded: bool = False) -> None:
    """Raise ValueError that names every file of a bundle that is missing or changed. `uploaded`: not the metadata."""
    faults = []
    for name, file in manifest["files"].items():
        path = folder / name
        if uploaded and name in ("dataset-metadata.json", "kernel-metadata.json"):
            continue
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != file["bytes"] or sha256_of(path) != file["sha256"]:
            faults.append(f"{name} was changed (sha256)")
    if faults:
        raise ValueError(
            f"{folder} is not the bundle that was made: {'; '.join(faults[:5])}{', ...' * (len(faults) > 5)}"
        )


def find_bundle(root: Path, content: str) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the one bundle under `root` with this content, its files checked, and its manifest.

    `content`: the digest that the notebook was made with. Raises ValueError when it is not there, or was changed.
    """
    others = []
    for path in places(root, "MANIFEST.json"):
        try:
            manifest = read_manifest(path.parent)
        except ValueError as fault:
            others.append(str(fault))
            continue
        if manifest["content"] == content:
            check_files(path.parent, manifest, uploaded=True)
            return path.parent, manifest
        others.append(f"{path.parent} is '{manifest['bundle']}' of {manifest['created']}, another version")
    raise ValueError(
        f"the bundle of this notebook is not under {root}; add its dataset, in the version that was made together with "
        f"the notebook{': ' if others else ''}{'; '.join(others)}"
    )


def files_of(folder: Path) -> Iterable[str]:
    """Return the names of all files in a folder, sorted, with slashes. Raises ValueError for a link."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; a bundle holds files only")
        if path.is_file():
            found.append(path.relative_to(folder).as_posix())
    return found
