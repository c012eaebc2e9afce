"""`comp bundle verify`: run a bundle's notebook as Kaggle will, before anything is uploaded.

A fresh environment without comp, the network cut, the inputs read-only and mounted in each of Kaggle's shapes; then the
submission is compared with what `comp infer` writes here.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comp.blend.crossfit import read_blend
from comp.data.frames import parse_numbers, read_frame
from comp.runs import RunFolder, read_json
from comp.ship import execute
from comp.ship.infer import infer
from comp.ship.kaggle_client import validate_metadata
from comp.ship.manifest import LOCAL, MANIFEST, check_files, files_of, read_manifest
from comp.ship.rerun import rerun
from comp.ship.safety import unsafe
from comp.ship.wheels import KAGGLE, closure

__all__ = ["SHAPES", "check_bundle", "verify"]

TOLERANCE = 1e-5
SHAPES: dict[str, tuple[str, str]] = {
    "slug": ("{slug}", "{competition}"),
    "owner": ("{owner}/{slug}", "{competition}"),
    "typed": ("datasets/{owner}/{slug}", "competitions/{competition}"),
    "model": ("models/{owner}/{slug}/pytorch/default/1", "competitions/{competition}"),
}
"""How Kaggle mounts inputs: name -> where the bundle is and where the competition is, under /kaggle/input."""
RUNNER = ("nbclient", "nbformat", "ipykernel")
COMPILED = ("lightgbm",)
"""Borrowed where a run needs it: a bundle holds no compiled package."""
GUARD = """import socket

def refuse(*_, **__):
    raise PermissionError("comp bundle verify: the network is cut")

class Socket(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == socket.AF_UNIX else refuse()
    def connect_ex(self, address):
        return super().connect_ex(address) if self.family == socket.AF_UNIX else refuse()
    def sendto(self, *arguments):
        return super().sendto(*arguments) if self.family == socket.AF_UNIX else refuse()

socket.socket, socket.getaddrinfo = Socket, refuse
"""


def check_bundle(folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Check what lies in a bundle and let kaggle's own code check its metadata; return the manifest.

    Raises ValueError that names every file that was changed, added, or must not be there.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    names = set(files_of(folder)) - {MANIFEST}
    if strange := sorted(names - set(manifest["files"])):
        raise ValueError(f"{folder} holds files that were not put in: {', '.join(strange[:5])}; make the bundle anew")
    if faults := unsafe(folder):
        raise ValueError(f"{folder}: {'; '.join(faults)}")
    say(f"{folder}: {len(names)} files, sha256 as made; no pickle, no key, no path of this machine")
    sent = validate_metadata(folder)
    if missing := sorted(names - set(LOCAL) - sent.uploaded):
        raise ValueError(f"{len(missing)} files would not be uploaded, for example {missing[0]}")
    kernel = sent.kernel
    if kernel.enable_internet or not kernel.enable_gpu or not kernel.is_private or not sent.dataset.is_private:
        raise ValueError(f"{folder}: wanted private, internet off, GPU on; change the metadata files back")
    if kernel.dataset_data_sources != [f"{sent.dataset.owner_slug}/{sent.dataset.slug}"]:
        raise ValueError(f"{folder}: the notebook's dataset_sources are not this dataset")
    say(
        f"kaggle {sent.version} accepts both metadata files: private, internet off, GPU {kernel.machine_shape}; "
        f"--dir-mode zip uploads all {len(sent.uploaded)} files"
    )
    return manifest


def verify(
    folder: Path,
    *,
    test: str | None = None,
    sample: str | None = None,
    shapes: Sequence[str] = tuple(SHAPES),
    cut: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Check a bundle and execute its notebook in each shape of mount; raise ValueError for the first that fails.

    `test`, `sample`: tables to predict; None = those of the runs it was made of. `cut`: how the network is cut, unshare
    or guard; None = unshare where the kernel allows it.
    """
    if unknown := [name for name in shapes if name not in SHAPES]:
        raise ValueError(f"--shape {', '.join(unknown)}: allowed are {', '.join(SHAPES)}")
    manifest = check_bundle(folder, say)
    tables = _tables(manifest, test, sample)
    # A short path: the kernel's sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="comp-") as name:
        scratch = Path(name)
        expected, source = _expected(folder, manifest, tables, scratch)
        way = cut or ("unshare" if _allowed(["unshare", "-rn", "true"]) else "guard")
        template = _environment(scratch / "fresh", folder, manifest, way == "guard", say)
        (scratch / "try").mkdir()
        bound = way == "unshare" and _allowed(_unshared(scratch / "try", ["sh", "-c", f"! touch {scratch}/try/x"]))
        why = "; unshare is not permitted here" if way == "guard" and cut is None else ""
        say(f"network: {WAYS[way]}{why}; inputs: {'mounted read-only' if bound else 'without write permission'}")
        for place, shape in enumerate(shapes):
            run = _Trial(scratch / str(place), folder, manifest, tables, SHAPES[shape])
            found = run.execute(template, way, bound)
            largest = _largest_difference(run.working / "submission.csv", expected)
            if place == 0:
                if not found["imported"].startswith(str(run.bundle)):
                    raise ValueError(f"`from comp import load` from the bundle's folder fails: {found['imported']}")
                say("import without install, by sys.path.append: ok")
            where = run.bundle.relative_to(run.inputs)
            say(
                f"/kaggle/input/{where}: {len(expected):,} rows, {found['seconds']:.0f} s, peak memory "
                f"{found['peak'] / 10**6:,.0f} MB; differs from comp infer with {source} by {largest:.1e} at most"
            )
            if largest > TOLERANCE:
                raise ValueError(
                    f"{folder}: the notebook's predictions differ by {largest:.1e}; allowed is {TOLERANCE}"
                )
    say(f"verified: {folder} runs as it will on Kaggle, but for its GPU and its versions of the packages")


WAYS = {
    "unshare": "cut by unshare -rn (no interface but loopback)",
    "guard": "cut by a socket guard in Python, which does not hold back compiled code",
}


# --- what is compared ------------------------------------------------------------------------------------------------


def _tables(manifest: Mapping[str, Any], test: str | None, sample: str | None) -> dict[str, Path]:
    """Return "test" and, where there is one, "sample_submission"."""
    found = {}
    for name, given in (("test", test), ("sample_submission", sample)):
        path = given or (manifest["made_from"][name] if test is None else None)
        if path is None and name == "sample_submission":
            continue
        if path is None or not Path(path).is_file():
            option = "--test" if name == "test" else "--sample"
            raise ValueError(f"no table to verify with: {path or 'the bundle does not tell'}; name one with {option}")
        found[name] = Path(path)
    return found


def _expected(
    folder: Path, manifest: Mapping[str, Any], tables: Mapping[str, Path], scratch: Path
) -> tuple[pd.DataFrame, str]:
    """Return what comp infer writes here, and with what: the runs the bundle was made of, or else its own."""
    origin, out = manifest["made_from"], scratch / "expected.csv"
    same = manifest["half"] is None and all(map(_is_there, origin["runs"], manifest["runs"]))
    if same and (manifest["blend"] is None or (origin["blend"] is not None and Path(origin["blend"]).exists())):
        infer(
            origin["runs"] if manifest["blend"] is None else [],
            blend=None if manifest["blend"] is None else read_blend(origin["blend"]),
            test=str(tables["test"]),
            sample=str(tables["sample_submission"]) if "sample_submission" in tables else None,
            out=str(out),
            folds=manifest["folds"],
            weights=manifest["weights"],
            precision=manifest["precision"],
            fallback=manifest["fallback"],
            labels=manifest.get("labels"),
            say=lambda line: None,
        )
        return read_frame(out, empty=True), "the runs it was made of"
    inputs = scratch / "inputs" / manifest["competition"]
    inputs.mkdir(parents=True)
    for name, path in tables.items():
        shutil.copyfile(path, inputs / manifest["tables"][name])
    found = rerun(folder, scratch / "inputs", out=out, say=lambda line: None)
    why = "halved weights" if manifest["half"] is not None else "those it was made of are gone or trained anew"
    return found, f"its own runs ({why})"


def _is_there(path: str | None, about: Mapping[str, Any]) -> bool:
    if path is None:
        return False
    run = RunFolder(path)
    return run.manifest.exists() and read_json(run.manifest)["fingerprints"] == about["fingerprints"]


def _largest_difference(path: Path, expected: pd.DataFrame) -> float:
    """Return the largest difference of a number. Raises ValueError where anything else differs."""
    if not path.exists():
        raise ValueError("the notebook left no submission.csv")
    found = read_frame(path, empty=True)
    if list(found.columns) != list(expected.columns) or len(found) != len(expected):
        raise ValueError(
            f"the notebook wrote {len(found)} rows of {list(found.columns)}, comp infer {len(expected)} rows of "
            f"{list(expected.columns)}"
        )
    largest = 0.0
    for place, name in enumerate(expected.columns):
        one, two = parse_numbers(found[name])[0], parse_numbers(expected[name])[0]
        if place and np.isfinite(two).all():
            largest = max(largest, float(np.abs(one - two).max(initial=0.0)))
        elif list(found[name]) != list(expected[name]):
            raise ValueError(f"the notebook's column '{name}' differs from comp infer's")
    return largest if np.isfinite(largest) else float("inf")


# --- the environment -------------------------------------------------------------------------------------------------


def _allowed(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _unshared(inputs: Path, command: Sequence[str]) -> list[str]:
    """Return a command inside its own network, where `inputs` is mounted read-only."""
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return ["unshare", "-rnm", "sh", "-c", script, str(inputs), *command]


def _environment(
    path: Path, folder: Path, manifest: Mapping[str, Any], guard: bool, say: Callable[[str], None]
) -> Path:
    """Make an environment with pip alone, and let it see what Kaggle's image has of what is installed here."""
    done = subprocess.run([sys.executable, "-m", "venv", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"no fresh environment: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    names = [*KAGGLE, *(name for name in COMPILED if name in _estimators(folder, manifest))]
    kaggle, runner = closure(names), closure(RUNNER)
    if absent := [name for name in RUNNER if name not in runner]:
        raise ValueError(f"{', '.join(absent)} not installed; install the extra: pip install 'comp[kaggle]'")
    borrowed = path / "borrowed"
    borrowed.mkdir()
    for own in {**kaggle, **runner}.values():
        entries = {file.parts[0] for file in own.files or () if ".." not in file.parts and file.suffix != ".pth"}
        for entry in sorted(entries - {"__pycache__"}):
            link = borrowed / entry
            if not link.exists():
                link.symlink_to(Path(str(own.locate_file(entry))))
    assert not (borrowed / "comp").exists(), "comp itself must come from the bundle"
    packages = next(path.glob("lib*/python*/site-packages"))
    (packages / "borrowed.pth").write_text(f"{borrowed}\n" + ("import comp_guard\n" if guard else ""))
    if guard:
        (packages / "comp_guard.py").write_text(GUARD)
    versions = ", ".join(f"{name} {kaggle[name.lower()].version}" for name in names if name.lower() in kaggle)
    others = len({*kaggle, *runner} - {name.lower() for name in (*names, *RUNNER)})
    say(
        f"fresh environment, Python {'.'.join(map(str, sys.version_info[:3]))}: sees {versions}, for the notebook "
        f"{', '.join(RUNNER)}, and the {others} packages they need, borrowed from here; nothing else, comp least of all"
    )
    return path


def _estimators(folder: Path, manifest: Mapping[str, Any]) -> set[str]:
    classical = [RunFolder(folder / run["path"]).classical for run in manifest["runs"]]
    return {read_json(path)["estimator"] for path in classical if path.exists()}


# --- one execution ---------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """One execution of the notebook."""

    path: Path
    folder: Path
    manifest: Mapping[str, Any]
    tables: Mapping[str, Path]
    shape: tuple[str, str]

    @property
    def inputs(self) -> Path:
        return self.path / "input"

    @property
    def working(self) -> Path:
        return self.path / "working"

    @property
    def bundle(self) -> Path:
        """Where the bundle is mounted."""
        return self.inputs / self._filled(self.shape[0])

    def _filled(self, text: str) -> str:
        about = read_json(self.folder / "dataset-metadata.json")
        owner, slug = about["id"].split("/")
        return text.format(owner=owner, slug=slug, competition=self.manifest["competition"])

    def execute(self, template: Path, way: str, bound: bool) -> dict[str, Any]:
        """Lay out the inputs, execute; return what execute.py found. Raises ValueError when it failed."""
        self._lay_out()
        before = _listed(self.inputs)
        for folder in (self.working, self.path / "home", self.path / "tmp"):
            folder.mkdir(parents=True)
        environment = self.path / "venv"
        shutil.copytree(template, environment, symlinks=True)
        python = environment / "bin" / "python"
        plan = {
            "notebook": str(next(self.bundle.glob("*.ipynb"))),
            "bundle": str(self.bundle),
            "working": str(self.working),
            "result": str(self.path / "result.json"),
            "cut": way,
        }
        (self.path / "plan.json").write_text(json.dumps(plan))
        command = [str(python), str(Path(execute.__file__).resolve()), str(self.path / "plan.json")]
        if way == "unshare":
            command = _unshared(self.inputs, command) if bound else ["unshare", "-rn", *command]
        done = subprocess.run(command, cwd=self.working, env=self._variables(), capture_output=True, text=True)
        result = self.path / "result.json"
        found = read_json(result) if result.exists() else {"fault": done.stderr.strip()[-3000:] or "it was killed"}
        if found["fault"]:
            raise ValueError(
                f"the notebook failed under {self.inputs.name}/{self._filled(self.shape[0])}:\n{found['fault']}"
            )
        if _listed(self.inputs) != before:
            raise ValueError("the notebook wrote into its inputs, which are read-only on Kaggle")
        left = sorted(path.name for path in self.working.iterdir())
        if left != ["submission.csv", "submission.json"]:
            raise ValueError(f"the notebook left {', '.join(left)} in /kaggle/working; wanted submission.csv and .json")
        return dict(found)

    def _lay_out(self) -> None:
        """Put bundle and tables where Kaggle mounts them, without write permission."""
        for name in files_of(self.folder):
            if name not in LOCAL:
                _link(self.folder / name, self.bundle / name)
        competition = self.inputs / self._filled(self.shape[1])
        for name, path in self.tables.items():
            to = competition / self.manifest["tables"][name]
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
        for path in [*self.inputs.rglob("*"), self.inputs]:
            if path.is_dir():
                path.chmod(stat.S_IRUSR | stat.S_IXUSR)

    def _variables(self) -> dict[str, str]:
        """Return the environment variables of the notebook: none of the user's own."""
        kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LANG", "LC_ALL") if name in os.environ}
        scratch = str(self.path / "tmp")
        return {
            **kept,
            "HOME": str(self.path / "home"),
            "TMPDIR": scratch,
            "JUPYTER_RUNTIME_DIR": scratch,
            "IPYTHONDIR": str(self.path / "home" / "ipython"),
            "PIP_CONFIG_FILE": os.devnull,
            "COMP_INPUTS": str(self.inputs),
        }


def _link(source: Path, to: Path) -> None:
    """Make a file appear in a second place; where the disk has no such links, copy it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)


def _listed(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
