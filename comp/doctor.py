"""What this machine can do for a run, and what will go wrong on it: the findings behind `comp doctor`.

No check stops the report: one that fails becomes a finding. torch is imported inside functions.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "Finding",
    "cpu_has_bf16",
    "examine",
    "has_problem",
    "hub_answers",
    "kernel_fault",
    "render",
]

State = Literal["ok", "note", "problem"]

# Lowest versions, as in pyproject.toml (a test compares them): what inference and training cannot do without.
REQUIRED = {
    "torch": "2.4",
    "transformers": "5.0",
    "numpy": "1.26",
    "pandas": "2.2",
    "scikit-learn": "1.6",
    "safetensors": "0.4",
    "PyYAML": "6.0",
    "pydantic": "2.7",
}
# Imported only where used, with what is lost without them.
OPTIONAL = {
    "typer": "the command line",
    "tqdm": "the progress bar",
    "pyarrow": "parquet tables, the out-of-fold files among them",
    "iterative-stratification": "the splitter multilabel_stratified",
    "wandb": "Weights & Biases, extra `track`",
    "torch-optimizer": "its optimizers by name, extra `optimizers`",
    "optuna": "extra `hpo`",
    "ray": "extra `ray`",
    "captum": "extra `explain`",
    "lit-nlp": "extra `lit`",
    "kaggle": "extra `kaggle`",
}
GIB = 2**30
LOW_MEMORY = 4 * GIB
"""A base-sized model takes 2 GB while training (weights, gradients, Adam's moments), activations apart."""
LOW_DISK, NO_DISK = 10 * GIB, 1 * GIB
"""Five folds of a large model are 5 x 1.4 GB, and a fold keeps its best and its last weights."""
HUB = "https://huggingface.co"
HUB_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    title: str
    state: State
    """ok; note = works, with something to know; problem = a run will fail or not start."""
    message: str
    """What was found, and the next step where there is one."""


def examine(answers: Callable[[], bool] | None = None) -> list[Finding]:
    """Return every finding about this machine, in the order of the report. Never raises.

    `answers` tells whether the model hub can be reached; None = `hub_answers`, which asks it.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("Python", _python),
        ("libraries", _libraries),
        ("CPU", _cpu),
        ("memory", _memory),
        ("disk", _disk),
        ("GPU", _gpus),
        ("attention", _attention),
        ("W&B", _tracking),
        ("model hub", lambda: _hub(answers or hub_answers)),
        ("Kaggle", _kaggle),
    ]
    findings: list[Finding] = []
    for title, check in checks:
        try:
            findings += check()
        except Exception as fault:  # whatever a driver or a broken installation throws belongs in the report
            findings.append(Finding(title, "problem", f"the check failed: {type(fault).__name__}: {fault}"))
    return findings


def has_problem(findings: Sequence[Finding]) -> bool:
    """Tell whether a finding stops a run: `comp doctor` then exits with 1."""
    return any(finding.state == "problem" for finding in findings)


def render(findings: Sequence[Finding]) -> str:
    """Return the findings as a plain table: state, title, message; problems are counted in the last line."""
    width = max((len(finding.title) for finding in findings), default=0)
    lines = [f"{finding.state:<8} {finding.title:<{width}}  {finding.message}" for finding in findings]
    count = sum(finding.state == "problem" for finding in findings)
    lines.append("no problem found" if not count else f"{count} problem{'s' if count > 1 else ''} found, see above")
    return "\n".join(lines)


# --- what the hardware can do -------------------------------------------------------------------------------


def kernel_fault(arch_list: Sequence[str], capability: tuple[int, int]) -> str | None:
    """Tell why a torch build has no kernels for a GPU, with the next step; None when it has them.

    `arch_list` is `torch.cuda.get_arch_list()`, `capability` the GPU's compute capability (major, minor).
    Compiled code (sm_XY) runs on major version X from minor Y on, so an L4 (8.9) runs sm_86. PTX (compute_XY)
    is compiled on the spot for any capability from X.Y on. Suffix a: for that one capability; f: within its
    family, the rule of a plain sm_. Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX
    Compatibility".
    ROCm's gfx names say nothing about capability and are not judged.

    `torch.cuda.is_available()` is true for a GPU without kernels; the first operation on it then fails.
    """
    if any(arch.startswith("gfx") for arch in arch_list):
        return None
    for arch in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if not match:
            continue
        kind, major, minor, suffix = match[1], int(match[2]), int(match[3]), match[4]
        same_family = major == capability[0] and minor <= capability[1]
        if suffix == "a":
            runs = (major, minor) == capability
        elif kind == "sm" or suffix == "f":
            runs = same_family
        else:
            runs = (major, minor) <= capability
        if runs:
            return None
    wanted = f"sm_{capability[0]}{capability[1]}"
    has = ", ".join(arch_list) or "none, it is a CPU build"
    return (
        f"this torch build has no kernels for {wanted} (it has: {has}). Choose another accelerator "
        f"(on Kaggle: GPU T4 x2), or install a torch build made for {wanted}"
    )


def cpu_has_bf16() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's BF16).

    Emulated, bfloat16 is slower than float32.
    """
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = [bool(getattr(torch.cpu, check)()) for check in checks if hasattr(torch.cpu, check)]
    return any(found) or bool({"bf16", "avx512_bf16", "amx_bf16"} & _cpu_flags())


def _cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the first processor's feature names ("flags" on x86, "Features" on Arm); empty off Linux."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return set()
    return set(match[1].split()) if match else set()


def _torch() -> Any:
    """Return the torch module, or None when it cannot be imported (`_libraries` then says so)."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


# --- the checks ---------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    where = f"{platform.system()} {platform.machine()}"
    yield Finding("Python", "ok", f"{platform.python_version()}, {where}, {sys.executable}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _libraries() -> Iterator[Finding]:
    for name, lowest in REQUIRED.items():
        version = _version(name)
        if version is None:
            yield Finding(name, "problem", f"not installed; pip install '{name}>={lowest}'")
        elif _release(version) < _release(lowest):
            yield Finding(name, "problem", f"{version} is too old; pip install '{name}>={lowest}'")
        else:
            yield Finding(name, "ok", version)
    found = {name: _version(name) for name in OPTIONAL}
    there = [f"{name} {version}" for name, version in found.items() if version]
    absent = [f"{name} ({OPTIONAL[name]})" for name, version in found.items() if not version]
    if there:
        yield Finding("optional", "ok", ", ".join(there))
    if absent:
        yield Finding("optional", "note", f"not installed: {', '.join(absent)}")
    if _version("torch") is not None and _torch() is None:
        yield Finding("torch", "problem", "is installed but cannot be imported; run `python -c 'import torch'`")


def _cpu() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = f"{usable} core{'s' if usable > 1 else ''} usable"
    torch = _torch()
    if torch is None:
        yield Finding("CPU", "ok", cores)
        return
    threads = torch.get_num_threads()
    if threads > usable:
        slow = f"more than cores slow it down; set OMP_NUM_THREADS={usable}"
        yield Finding("CPU", "note", f"{cores}, torch uses {threads} threads: {slow}")
    else:
        yield Finding("CPU", "ok", f"{cores}, torch uses {threads} thread{'s' if threads > 1 else ''}")
    if cpu_has_bf16():
        yield Finding("bf16 on CPU", "ok", "in hardware")
    else:
        yield Finding("bf16 on CPU", "note", "not in hardware; precision auto takes fp32 on the CPU")


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def memory_bytes(root: Path = Path("/")) -> tuple[int, int] | None:
    """Return (total, available) memory in bytes, a container's limit counted in; None when nothing tells."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8")
        kib = {match[1]: int(match[2]) for match in re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
        total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, KeyError):
        try:
            page = os.sysconf("SC_PAGE_SIZE")
            total, available = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    for group in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = (_read_number(root / part) for part in group)
        if limit is not None and limit < total:
            total, available = limit, min(available, max(limit - (used or 0), 0))
    return total, available


def _memory() -> Iterator[Finding]:
    found = memory_bytes()
    if found is None:
        yield Finding("memory", "note", "this system does not tell")
        return
    total, available = found
    message = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < LOW_MEMORY:
        yield Finding("memory", "note", f"{message}: little for training; lower micro_batch_size or max_length")
    else:
        yield Finding("memory", "ok", message)


def _disk() -> Iterator[Finding]:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    message = f"{free / GIB:.1f} GiB free in {folder}"
    if free < NO_DISK:
        advice = "no room for checkpoints; free some, or start in another folder"
        yield Finding("disk", "problem", f"{message}: {advice}")
    elif free < LOW_DISK:
        yield Finding("disk", "note", f"{message}: a large model needs 1.4 GB a checkpoint, up to two a fold")
    else:
        yield Finding("disk", "ok", message)


def _gpus() -> Iterator[Finding]:
    torch = _torch()
    if torch is None:
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        major, minor = torch.cuda.get_device_capability(index)
        rocm = torch.version.hip is not None
        message = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, "
        message += f"ROCm {torch.version.hip}" if rocm else f"sm_{major}{minor}"
        fault = kernel_fault(torch.cuda.get_arch_list(), (major, minor))
        if fault:
            yield Finding(f"GPU {index}", "problem", f"{message}: {fault}")
        elif major >= 8:
            yield Finding(f"GPU {index}", "ok", f"{message}, bf16 in hardware")
        else:
            yield Finding(f"GPU {index}", "note", f"{message}: no bf16 in hardware, precision auto takes fp16")
    mps = torch.backends.mps.is_available()
    if mps:
        yield Finding("GPU", "ok", "Apple MPS, precision auto takes fp32")
    if not count and not mps:
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Finding("GPU", "note", f"none usable ({build}); a run takes the CPU")


def _attention() -> Iterator[Finding]:
    from comp.kernels import device_name, kept, render_rates

    torch = _torch()
    if torch is None:
        return
    here = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = [(shape, rates) for place, own in kept().items() if place.startswith(here) for shape, rates in own.items()]
    for shape, rates in found:
        yield Finding("attention", "ok", f"{shape}: {render_rates(rates)}")
    if not found:
        yield Finding("attention", "ok", "not measured on this device yet; the first `comp train` of a backbone does")


def _tracking() -> Iterator[Finding]:
    from comp.tracking import wandb_mode

    mode, reason = wandb_mode("auto")
    yield Finding("W&B", "ok" if mode != "off" else "note", f"{mode}: {reason}")


def hub_answers(url: str | None = None, seconds: float = HUB_SECONDS) -> bool:
    """Tell whether the model hub (HF_ENDPOINT, else huggingface.co) answers within `seconds`; never raises.

    Any HTTP answer counts. The name look-up has no time limit of its own, hence the thread.
    """
    endpoint = url or os.environ.get("HF_ENDPOINT") or HUB
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError, HTTPException):  # no route, no name, no certificate, no such address
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    return answered.is_set()


def _hub(answers: Callable[[], bool]) -> Iterator[Finding]:
    local = "backbones come from folders and the cache"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            yield Finding("model hub", "note", f"off ({name} is set): {local}")
            return
    if answers():
        yield Finding("model hub", "ok", "answers")
    else:
        yield Finding("model hub", "note", f"does not answer, so this machine is offline: {local}")


def _kaggle() -> Iterator[Finding]:
    kind = os.environ.get("KAGGLE_KERNEL_RUN_TYPE")
    if kind:
        scored = ", the scored rerun" if os.environ.get("KAGGLE_IS_COMPETITION_RERUN") else ""
        advice = "write to /kaggle/working; /kaggle/input is read-only"
        yield Finding("Kaggle", "note", f"notebook ({kind}{scored}): {advice}")
