"""comp bundle verify: kaggle's own checks offline, and the notebook executed with the network cut."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bundling import bundle, train
from conftest import TinyCompetition
from typer.testing import CliRunner

from comp.cli import app
from comp.ship import submit as submitting
from comp.ship.leaderboard import read_log
from comp.ship.manifest import content_of, read_manifest, sha256_of
from comp.ship.verify import SHAPES, check_bundle, verify

for _name in ("kagglesdk", "nbclient", "ipykernel"):
    pytest.importorskip(_name, reason="the extra `kaggle` is not installed")
FOLDER = Path("bundles/tiny-blend")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Any:
    from bundling import inside

    folder = tmp_path_factory.mktemp("project")
    competition = train(folder, tiny_model_folder("bert"))
    with inside(folder):
        bundle()
        yield competition


@pytest.fixture
def copy(project: TinyCompetition, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "tiny-blend"))


def sealed(folder: Path) -> Path:
    """Make a damaged bundle's MANIFEST.json fit it again."""
    manifest = read_manifest(folder)
    for name, file in manifest["files"].items():
        file.update(sha256=sha256_of(folder / name), bytes=(folder / name).stat().st_size)
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "content": content_of(manifest)}))
    return folder


def unshare_is_permitted() -> bool:
    try:
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


# --- kaggle's own checks ---------------------------------------------------------------------------------------------


def test_kaggle_accepts_it_and_uploads_every_file(project: TinyCompetition) -> None:
    said: list[str] = []
    manifest = check_bundle(FOLDER, said.append)
    uploaded = len(manifest["files"]) - 2 + 1  # without the two metadata files, with the manifest
    assert (
        said[0]
        == f"{FOLDER}: {len(manifest['files'])} files, sha256 as made; no pickle, no key, no path of this machine"
    )
    assert "accepts both metadata files: private, internet off, GPU NvidiaTeslaT4" in said[1]
    assert f"--dir-mode zip uploads all {uploaded} files" in said[1]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("dataset-metadata.json", {"title": "x"}, "The dataset title must be between 6 and 50 characters"),
        ("dataset-metadata.json", {"id": "someone/x"}, "The dataset slug must be between 6 and 50 characters"),
        ("dataset-metadata.json", {"licenses": []}, "Please specify exactly one license"),
        ("kernel-metadata.json", {"language": "cobol"}, "A valid language must be specified"),
        ("kernel-metadata.json", {"code_file": "gone.ipynb"}, "Source file not found"),
        ("kernel-metadata.json", {"title": "something else"}, "title and id do not belong together"),
        ("kernel-metadata.json", {"enable_internet": "true"}, "wanted private, internet off, GPU on"),
        ("kernel-metadata.json", {"enable_internet": None}, "kaggle refuses kernel-metadata.json"),
        ("kernel-metadata.json", {"is_private": "false"}, "wanted private, internet off, GPU on"),
        ("kernel-metadata.json", {"dataset_sources": []}, "dataset_sources are not this dataset"),
    ],
)
def test_metadata_that_kaggle_or_we_refuse(file: str, change: dict[str, Any], words: str, copy: Path) -> None:
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    sealed(copy)
    with pytest.raises(ValueError, match=".") as fault:
        check_bundle(copy, lambda line: None)
    assert words in str(fault.value)


def test_kaggles_default_for_the_internet_is_refused(copy: Path) -> None:
    path = copy / "kernel-metadata.json"
    about = json.loads(path.read_text())
    del about["enable_internet"]
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="wanted private, internet off"):
        check_bundle(sealed(copy), lambda line: None)


def test_files_that_were_added_or_changed_are_named(copy: Path) -> None:
    (copy / "runs/a/backbone/extra.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds files that were not put in: runs/a/backbone/extra.txt"):
        check_bundle(copy, lambda line: None)
    (copy / "runs/a/backbone/extra.txt").unlink()
    (copy / "runs/a/scores.json").write_text("{}")
    with pytest.raises(ValueError, match=r"runs/a/scores.json was changed \(sha256\)"):
        check_bundle(copy, lambda line: None)


def test_submit_pushes_dataset_then_notebook(project: TinyCompetition, monkeypatch: pytest.MonkeyPatch) -> None:
    from requests import HTTPError, Response

    calls: list[Any] = []
    states = iter(["missing", "pending", "ready"])

    class Client:
        def dataset_status(self, ref: str) -> str:
            state = next(states)
            calls.append((ref, state))
            if state == "missing":
                answer = Response()
                answer.status_code = 404
                raise HTTPError(response=answer)
            return state

        def dataset_create_new(self, folder: str, public: bool, quiet: bool, dir_mode: str) -> Any:
            calls.append(("new", folder, public, dir_mode))

        def kernels_push(self, folder: str) -> Any:
            calls.append(("push", folder))
            return type("Answer", (), {"error": "", "url": "https://kaggle/code"})()

    monkeypatch.setattr(submitting, "open_client", Client)
    said: list[str] = []
    submitting.submit(FOLDER, say=said.append, sleep=calls.append)
    assert calls == [
        ("someone/tiny-blend", "missing"),
        ("new", str(FOLDER), False, "zip"),
        ("someone/tiny-blend", "pending"),
        10.0,
        ("someone/tiny-blend", "ready"),
        ("push", str(FOLDER)),
    ]
    (entry,) = read_log()
    assert entry.competition == "tiny-comp" and entry.how == "cross-fitted" and entry.cv is not None
    with pytest.raises(ValueError, match="was made for 'tiny-comp', not for 'other'"):
        submitting.submit(FOLDER, competition="other")


# --- the notebook, executed ------------------------------------------------------------------------------------------


def test_the_notebook_runs_with_the_network_cut(project: TinyCompetition) -> None:
    """A fresh environment, no network, read-only inputs: what comp infer writes here, by one command."""
    found = CliRunner().invoke(app, ["bundle", "verify", str(FOLDER), "--shape", "owner"])
    assert found.exit_code == 0, found.exception
    cut = "cut by unshare -rn" if unshare_is_permitted() else "cut by a socket guard"
    assert f"network: {cut}" in found.output
    assert "import without install, by sys.path.append: ok" in found.output
    assert "/kaggle/input/someone/tiny-blend: 20 rows, " in found.output
    assert "differs from comp infer with the runs it was made of by 0.0e+00 at most" in found.output
    assert "comp least of all" in found.output and "accelerate" not in found.output
    assert "verified: bundles/tiny-blend" in found.output


@pytest.mark.slow
def test_every_shape_and_the_guard(project: TinyCompetition) -> None:
    said: list[str] = []
    verify(FOLDER, say=said.append)
    assert sum("differs from comp infer" in line for line in said) == len(SHAPES)
    verify(FOLDER, shapes=["slug"], cut="guard", say=said.append)
    assert any("cut by a socket guard" in line for line in said)


@pytest.mark.slow
def test_a_notebook_that_fails_or_differs_is_told(copy: Path, project: TinyCompetition) -> None:
    page = json.loads((copy / "tiny-blend.ipynb").read_text())
    for cell in page["cells"]:
        if cell["id"] == "show":
            cell["source"] = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)"
    (copy / "tiny-blend.ipynb").write_text(json.dumps(page))
    with pytest.raises(
        ValueError, match=r"the notebook failed under input/tiny-blend:(.|\n)*(unreachable|network is cut)"
    ):
        verify(sealed(copy), shapes=["slug"], say=lambda line: None)
    for cell in page["cells"]:
        if cell["id"] == "show":
            cell["source"] = (
                "import pandas as pd\nframe = pd.read_csv('submission.csv')\n"
                "frame.assign(target=frame['target'] + 1e-3).to_csv('submission.csv', index=False)"
            )
    (copy / "tiny-blend.ipynb").write_text(json.dumps(page))
    with pytest.raises(ValueError, match="predictions differ by 1.0e-03; allowed is 1e-05"):
        verify(sealed(copy), shapes=["slug"], say=lambda line: None)


def test_what_verify_refuses(project: TinyCompetition, copy: Path) -> None:
    with pytest.raises(ValueError, match="--shape flat: allowed are slug, owner, typed, model"):
        verify(FOLDER, shapes=["flat"])
    with pytest.raises(ValueError, match="no table to verify with: gone.csv; name one with --test"):
        verify(FOLDER, test="gone.csv", say=lambda line: None)
    with pytest.raises(ValueError, match="is no bundle"):
        verify(Path("data"))


def test_the_commands(project: TinyCompetition, tmp_path: Path) -> None:
    """`comp bundle` makes, `comp bundle verify` is a command of its own, and both say what is missing."""
    runner = CliRunner()
    out = str(tmp_path / "by-hand")
    words = ["--owner", "someone", "--competition", "tiny-comp"]
    made = runner.invoke(app, ["bundle", "--run", "runs/a", "--out", out, *words, "--time-budget", "none"])
    assert made.exit_code == 0, made.exception
    assert f"next: comp bundle verify {out}" in made.output
    assert read_manifest(Path(out))["time_budget"] is None
    assert "needs --run or --blend, --out, --owner and --competition" in str(runner.invoke(app, ["bundle"]).exception)
    both = runner.invoke(app, ["bundle", "--blend", "blends/all", "--weights", "last", "--out", out, *words])
    assert "leave out --weights" in str(both.exception)
    assert len(pd.read_csv(project.test)) == 20
