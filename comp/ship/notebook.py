"""The notebook of a bundle, and what Kaggle wants to know about notebook and dataset."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from comp.ship import manifest as manifest_module

__all__ = ["dataset_metadata", "kernel_metadata", "notebook", "slug_of"]

CHECKING = ("places", "sha256_of", "content_of", "read_manifest", "check_files", "find_bundle")
"""Functions of manifest.py that the notebook carries: it checks the bundle before it installs anything of it."""
ACCELERATOR = "NvidiaTeslaT4"
"""GPU T4 x2 (kaggle-cli, docs/kernels.md). The default, a P100, has no kernels in Kaggle's torch."""


def slug_of(name: str) -> str:
    """Return a name as Kaggle spells it in addresses. Raises ValueError when that is not 6 to 50 characters."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not 6 <= len(slug) <= 50:
        raise ValueError(
            f"--out '{name}': Kaggle names the dataset '{slug}', which has {len(slug)} characters; allowed are 6 to 50"
        )
    return slug


def dataset_metadata(owner: str, slug: str, licence: str) -> dict[str, Any]:
    """Return dataset-metadata.json: id, title, exactly one licence."""
    return {"id": f"{owner}/{slug}", "title": slug, "licenses": [{"name": licence}]}


def kernel_metadata(owner: str, slug: str, competition: str, code_file: str) -> dict[str, Any]:
    """Return kernel-metadata.json: a private notebook, internet off (kaggle's default is on), GPU T4 x2."""
    return {
        "id": f"{owner}/{slug}",
        "title": slug,
        "code_file": code_file,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": "true",
        "enable_gpu": "true",
        "enable_tpu": "false",
        "enable_internet": "false",
        "machine_shape": ACCELERATOR,
        "dataset_sources": [f"{owner}/{slug}"],
        "competition_sources": [competition],
        "kernel_sources": [],
        "model_sources": [],
    }


def notebook(manifest: Mapping[str, Any], requirements: Sequence[str]) -> dict[str, Any]:
    """Return the notebook of a bundle as JSON data (nbformat 4.5).

    It finds the bundle by its content, checks every file, installs without index, infers, and shows the submission.
    """
    runs = "\n".join(f"- `{run['path']}`: {run['told']}" for run in manifest["runs"])
    together = "" if manifest["blend"] is None else f"\n\nBlended as `{manifest['blend']}` says."
    about = (
        f"# {manifest['bundle']}\n\nPredicts the test table of `{manifest['competition']}` without internet, and "
        f"leaves `submission.csv`. Made by comp {manifest['comp']}, {manifest['created']}.\n\n{runs}{together}"
    )
    functions = "\n\n".join(inspect.getsource(getattr(manifest_module, name)).rstrip() for name in CHECKING)
    check = f"""from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

INPUTS = Path(os.environ.get("COMP_INPUTS", "/kaggle/input"))
CONTENT = "{manifest["content"]}"

{functions}


BUNDLE, manifest = find_bundle(INPUTS, CONTENT)
print(f"{{BUNDLE}}: {{len(manifest['files'])}} files, as they were made")"""
    install = f"""WHEELS = BUNDLE / "wheels"
wanted = {list(requirements)!r}
options = ["--no-index", "--no-deps", f"--find-links={{WHEELS}}", "--quiet", "--disable-pip-version-check"]
subprocess.run([sys.executable, "-m", "pip", "install", *options, *wanted], check=True)"""
    infer = """from comp.ship.rerun import rerun

submission = rerun(BUNDLE, INPUTS, out="submission.csv")"""
    show = """print(submission.shape)
submission.head()"""
    cells = [_cell("about", "markdown", about)]
    cells += [_cell(name, "code", text) for name, text in (
        ("check", check), ("install", install), ("infer", infer), ("show", show),
    )]  # fmt: skip
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(name: str, kind: str, text: str) -> dict[str, Any]:
    own: dict[str, Any] = {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
    return own | ({"execution_count": None, "outputs": []} if kind == "code" else {})
