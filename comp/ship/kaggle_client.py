"""The kaggle package, behind the few calls that are needed; imported here only, inside functions."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comp.ship.manifest import LOCAL, files_of

__all__ = ["Accepted", "open_client", "push_dataset", "push_kernel", "submit_csv", "validate_metadata"]

HELP = (
    "no Kaggle credentials: call `kaggle auth login`, or make a token at kaggle.com/settings/api and save it as "
    "~/.kaggle/access_token, or set KAGGLE_API_TOKEN (or KAGGLE_USERNAME and KAGGLE_KEY); then call again"
)


def _api() -> Any:
    """Return a client of the kaggle package that has not signed in. Raises ValueError when it is not installed."""
    try:
        with redirect_stdout(io.StringIO()):  # the import signs in, or prints how to
            from kaggle.api.kaggle_api_extended import KaggleApi
    except ImportError:
        raise ValueError("this needs the kaggle package; install the extra: pip install 'comp[kaggle]'") from None
    return KaggleApi()


# --- without the network ---------------------------------------------------------------------------------------------


class _Recorder:
    """Stands for the connection: takes every request, sends none."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> _Recorder:
        return self

    def __call__(self, request: Any) -> _Recorder:
        self.requests.append(request)
        return self


@dataclass(frozen=True)
class Accepted:
    """What kaggle would send of a bundle."""

    version: str
    """Of the kaggle package."""
    kernel: Any
    """Its request that saves the notebook: is_private, enable_internet, enable_gpu, machine_shape, ..."""
    dataset: Any
    """Its request that makes the dataset."""
    uploaded: set[str]
    """Names of the files that reach Kaggle, those of sub-folders from inside their archives."""


def validate_metadata(folder: Path) -> Accepted:
    """Let kaggle's own code check both metadata files and say what it would upload, without network or credentials.

    Raises ValueError with kaggle's words when it refuses one.
    """
    api, recorder = _api(), _Recorder()
    uploaded: set[str] = set()
    api.config_values = {"username": "nobody", "key": "none"}
    api.build_kaggle_client = lambda: recorder

    def upload(path: str, *_: Any) -> str:
        if path.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                uploaded.update(f"{Path(path).stem}/{name}" for name in archive.namelist() if not name.endswith("/"))
        else:
            uploaded.add(Path(path).name)
        return "token"

    api._upload_blob = upload
    api.dataset_status = _not_there
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()) as said:
        # the same names without their gigabytes
        skeleton = Path(name)
        for file in files_of(folder):
            (skeleton / file).parent.mkdir(parents=True, exist_ok=True)
            small = file in LOCAL or file.endswith(".ipynb")
            (skeleton / file).write_bytes((folder / file).read_bytes() if small else b"")
        _kaggles_words("kernel-metadata.json", lambda: api.kernels_push(str(skeleton)))
        _kaggles_words("dataset-metadata.json", lambda: api.dataset_create_new(str(skeleton), dir_mode="zip"))
    if "does not resolve" in said.getvalue():
        raise ValueError(f"{folder}/kernel-metadata.json: title and id do not belong together")
    import kaggle

    kernel, dataset = recorder.requests[0], recorder.requests[-1]
    return Accepted(kaggle.__version__, kernel, dataset, uploaded)


def _not_there(*_: Any) -> None:
    from requests import HTTPError

    raise HTTPError("no such dataset yet")


def _kaggles_words(file: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"kaggle refuses {file}: {fault}") from None


# --- with it ---------------------------------------------------------------------------------------------------------


def open_client() -> Any:
    """Return a client that has signed in. Raises ValueError that says what to do without credentials."""
    api = _api()
    try:
        with redirect_stdout(io.StringIO()):
            api.authenticate()
    except SystemExit:
        raise ValueError(HELP) from None
    return api


def push_dataset(api: Any, folder: Path, note: str) -> str:
    """Create the private dataset of a bundle, or a new version of it; return its address."""
    from requests import HTTPError

    ref = json.loads((folder / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
    try:
        api.dataset_status(ref)
        found = api.dataset_create_version(str(folder), note, quiet=True, dir_mode="zip", delete_old_versions=False)
    except HTTPError as fault:
        if fault.response is not None and fault.response.status_code not in (403, 404):
            raise
        found = api.dataset_create_new(str(folder), public=False, quiet=True, dir_mode="zip")
    _must_be_ok(found, f"dataset {ref}")
    return f"https://www.kaggle.com/datasets/{ref}"


def push_kernel(api: Any, folder: Path) -> str:
    """Push the notebook of a bundle; return its address. ValueError when kaggle takes it without data, or not."""
    found = api.kernels_push(str(folder))
    _must_be_ok(found, "notebook")
    for attribute in ("invalid_dataset_sources", "invalid_competition_sources"):
        if wrong := getattr(found, attribute, None):
            raise ValueError(f"kaggle took the notebook without {', '.join(wrong)}: not there yet, or not yours to see")
    return str(found.url)


def submit_csv(api: Any, path: Path, message: str, competition: str) -> str:
    """Submit a CSV; return kaggle's answer."""
    found = api.competition_submit(str(path), message, competition, quiet=True)
    return str(getattr(found, "message", found))


def _must_be_ok(found: Any, what: str) -> None:
    if error := getattr(found, "error", None):
        raise ValueError(f"kaggle refuses the {what}: {error}")
