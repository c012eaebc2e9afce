"""The wheels of a bundle: comp from its tree, and pure-Python packages of this environment that Kaggle lacks.

No network is needed: comp is built by setuptools, the others are put together again from what is installed here, which
is what the runs were trained and tested with.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path, PurePosixPath

__all__ = ["ABSENT", "KAGGLE", "PACKAGE", "build_comp", "closure", "repack"]

ABSENT = ("iterative-stratification", "torch-optimizer", "pytorch-ranger")
"""What Kaggle's image lacks and a notebook may want, for training; inference needs none of it."""
KAGGLE = ("torch", "transformers", "numpy", "pandas", "scikit-learn", "safetensors", "PyYAML", "pydantic")
"""What comp's inference takes from Kaggle's image."""
PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of comp itself."""
FIXED_TIME = (2020, 1, 1, 0, 0, 0)  # the same files give the same wheel


def closure(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that `names` need, themselves too, by normalised name.

    What is not installed is left out.
    """
    from packaging.requirements import Requirement

    found: dict[str, metadata.Distribution] = {}
    waiting = [(name, "") for name in names]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        key = normalised(name)
        if (key, extra) in seen:
            continue
        seen.add((key, extra))
        try:
            own = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[key] = own
        for text in own.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed.name, wanted) for wanted in ("", *needed.extras)]
    return found


def normalised(name: str) -> str:
    """Return a distribution's name as the index spells it."""
    return name.lower().replace("_", "-").replace(".", "-")


def build_comp(folder: Path) -> Path:
    """Write the wheel of comp into `folder`: from the tree it runs from, or else from what is installed.

    Raises ValueError when setuptools is missing or fails.
    """
    tree = PACKAGE.parent
    if not (tree / "pyproject.toml").exists():
        return repack("comp", folder)
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "comp"  # a build leaves its folders in the tree
        skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(PACKAGE, copy / "comp", ignore=skipped)
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(tree / file, copy / file)
        code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", code, str(folder.resolve())]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    made = sorted(folder.glob("comp-*.whl"))
    if done.returncode or not made:
        reason = (done.stderr.strip() or "it wrote no wheel").splitlines()[-1]
        raise ValueError(f"the wheel of comp could not be built ({reason}); pip install 'setuptools>=77'")
    return made[-1]


def repack(name: str, folder: Path) -> Path:
    """Write an installed pure-Python distribution as a wheel again.

    Raises ValueError when it is not installed, is not pure Python, or is a link to a source tree.
    """
    try:
        own = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ValueError(f"{name} is not installed, so no wheel can be made of it; pip install {name}") from None
    about = own.read_text("WHEEL") or ""
    if "Root-Is-Purelib: true" not in about:
        raise ValueError(f"{name} is not pure Python: a wheel made here need not work on Kaggle; leave it out")
    files = [
        file
        for file in own.files or ()
        if ".." not in file.parts and "__pycache__" not in file.parts and file.name not in UNPACKED
    ]
    if not any(file.suffix == ".py" for file in files if ".dist-info" not in file.parts[0]):
        raise ValueError(f"{name} is installed as a link to its source; install it, or start from its tree")
    info = next(file.parts[0] for file in files if file.parts[0].endswith(".dist-info"))
    tags = [line.removeprefix("Tag: ").split("-")[0] for line in about.splitlines() if line.startswith("Tag: ")]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{info.removesuffix('.dist-info')}-{'.'.join(sorted(tags))}-none-any.whl"
    lines = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:

        def add(place: str, raw: bytes) -> None:
            wheel.writestr(zipfile.ZipInfo(place, FIXED_TIME), raw, zipfile.ZIP_DEFLATED)

        for file in sorted(files):
            raw = Path(str(own.locate_file(file))).read_bytes()
            add(PurePosixPath(file).as_posix(), raw)
            code = base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
            lines.append(f"{PurePosixPath(file).as_posix()},sha256={code},{len(raw)}")
        add(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,", ""]).encode())
    return path


UNPACKED = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
"""What an installer adds to a distribution; direct_url.json tells where it came from."""
