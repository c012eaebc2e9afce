"""The findings of `comp doctor`, on machines made up for the purpose."""

from __future__ import annotations

import http.server
import re
import socket
import threading
import time
import tomllib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comp import doctor
from comp.doctor import GIB, Finding, examine, has_problem, hub_answers, kernel_fault, render

KAGGLE_ARCHS = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
"""torch 2.10+cu128, the build of Kaggle's image."""


def titled(findings, title):
    return [finding for finding in findings if finding.title == title]


def look(check):
    (finding,) = check()
    return finding


# --- kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        (KAGGLE_ARCHS, (7, 5), True),  # T4
        (KAGGLE_ARCHS, (8, 9), True),  # L4: sm_86 code runs on 8.9
        (KAGGLE_ARCHS, (9, 0), True),
        (KAGGLE_ARCHS, (12, 0), True),  # three digits
        (KAGGLE_ARCHS, (6, 0), False),  # P100
        (KAGGLE_ARCHS, (11, 0), False),  # compiled code does not cross major versions
        (["sm_86"], (8, 0), False),  # nor go back to an earlier minor one
        (["sm_60"], (6, 0), True),
        (["sm_50", "compute_60"], (7, 5), True),  # PTX is compiled for later GPUs
        (["sm_80", "compute_80"], (7, 5), False),  # but not for earlier ones
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_90a"], (10, 0), False),
        (["gfx90a", "gfx1100"], (11, 0), True),  # ROCm
        ([], (8, 0), False),
    ],
)
def test_kernel_fault(archs, capability, fits):
    assert (kernel_fault(archs, capability) is None) == fits


def test_kernel_fault_says_what_there_is_and_what_to_do():
    fault = kernel_fault(KAGGLE_ARCHS, (6, 0))
    assert fault is not None
    assert "no kernels for sm_60 (it has: sm_70, sm_75," in fault
    assert "Choose another accelerator (on Kaggle: GPU T4 x2), or install a torch build made for sm_60" in fault
    assert "none, it is a CPU build" in str(kernel_fault([], (8, 0)))


def pretend_gpus(monkeypatch, *gpus, archs=KAGGLE_ARCHS):
    """Let torch.cuda claim `gpus`: (name, bytes, capability)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][2])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(name=gpus[index][0], total_memory=gpus[index][1]),
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_gpus_with_and_without_kernels_and_bf16(monkeypatch):
    pretend_gpus(
        monkeypatch,
        ("Tesla T4", 15 * GIB, (7, 5)),
        ("NVIDIA L4", 22 * GIB, (8, 9)),
        ("Tesla P100", 16 * GIB, (6, 0)),
    )
    findings = examine(lambda: True)
    (t4,), (l4,), (p100,) = (titled(findings, f"GPU {index}") for index in range(3))
    assert (t4.state, l4.state, p100.state) == ("note", "ok", "problem")
    assert t4.message == "Tesla T4, 15.0 GiB, sm_75: no bf16 in hardware, precision auto takes fp16"
    assert l4.message == "NVIDIA L4, 22.0 GiB, sm_89, bf16 in hardware"
    assert "no kernels for sm_60" in p100.message
    assert has_problem(findings)


def test_no_gpu_and_apples(monkeypatch):
    pretend_gpus(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert look(doctor._gpus) == Finding("GPU", "note", "none usable (torch is a CPU build); a run takes the CPU")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "torch is built for CUDA 12.8" in look(doctor._gpus).message
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert look(doctor._gpus).message == "Apple MPS, precision auto takes fp32"


def test_a_check_that_throws_is_a_finding_and_the_rest_goes_on(monkeypatch):
    pretend_gpus(monkeypatch, ("Tesla T4", 15 * GIB, (7, 5)))

    def broken(index):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    findings = examine(lambda: True)
    assert titled(findings, "GPU") == [Finding("GPU", "problem", "the check failed: RuntimeError: driver too old")]
    assert titled(findings, "W&B")


# --- libraries ----------------------------------------------------------------------------------------------


def test_lowest_versions_are_pyprojects():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(line.split(">=") for line in project["dependencies"])
    assert {name: bounds[name] for name in doctor.REQUIRED} == doctor.REQUIRED
    assert set(bounds) <= set(doctor.REQUIRED) | set(doctor.OPTIONAL), "a dependency the doctor does not know"
    named = {match[1] for match in re.finditer(r"extra `(\w+)`", " ".join(doctor.OPTIONAL.values()))}
    assert named <= set(project["optional-dependencies"])


def test_missing_and_old_libraries(monkeypatch):
    installed = {
        "transformers": "4.57.1",
        "numpy": None,
        "torch": "2.13.0+cpu",
        "wandb": None,
        "tqdm": "4.70",
    }
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name, "99.0"))
    findings = list(doctor._libraries())
    assert titled(findings, "transformers") == [
        Finding("transformers", "problem", "4.57.1 is too old; pip install 'transformers>=5.0'")
    ]
    assert titled(findings, "numpy") == [Finding("numpy", "problem", "not installed; pip install 'numpy>=1.26'")]
    assert titled(findings, "torch") == [Finding("torch", "ok", "2.13.0+cpu")]
    there, absent = titled(findings, "optional")
    assert there.state == "ok"
    assert "tqdm 4.70" in there.message
    assert absent == Finding("optional", "note", "not installed: wandb (Weights & Biases, extra `track`)")


def test_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(doctor, "_torch", lambda: None)
    findings = examine(lambda: True)
    assert "cannot be imported" in titled(findings, "torch")[-1].message
    assert has_problem(findings)
    assert not titled(findings, "GPU")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("5.0.0rc1", (5, 0, 0)), ("2.10", (2, 10)), ("unknown", ())],
)
def test_release(version, numbers):
    assert doctor._release(version) == numbers


# --- processor, memory, disk --------------------------------------------------------------------------------


def test_more_threads_than_cores_is_noted(monkeypatch):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    cpu = next(iter(doctor._cpu()))
    assert cpu.state == "note"
    assert "2 cores usable, torch uses 16 threads" in cpu.message
    assert "OMP_NUM_THREADS=2" in cpu.message


def test_cpu_bf16_by_torchs_word_or_the_processors_flags(monkeypatch, tmp_path):
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False, raising=False)
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"fpu", "avx2"})
    assert not doctor.cpu_has_bf16()
    assert titled(doctor._cpu(), "bf16 on CPU")[0].state == "note"
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"asimd", "bf16"})
    assert doctor.cpu_has_bf16()
    assert titled(doctor._cpu(), "bf16 on CPU")[0].state == "ok"
    monkeypatch.setattr(doctor, "_cpu_flags", set)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert doctor.cpu_has_bf16()


def test_processor_flags_are_read(tmp_path):
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor : 0\nflags\t\t: fpu avx512_bf16\nbugs : x\n", encoding="utf-8")
    arm.write_text("processor : 0\nFeatures\t: asimd bf16\n", encoding="utf-8")
    assert doctor._cpu_flags(x86) == {"fpu", "avx512_bf16"}
    assert doctor._cpu_flags(arm) == {"asimd", "bf16"}
    assert doctor._cpu_flags(tmp_path / "absent") == set()


def test_memory_counts_the_containers_limit(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n", encoding="utf-8"
    )
    assert doctor.memory_bytes(tmp_path) == (16 * GIB, 8 * GIB)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n", encoding="utf-8")
    assert doctor.memory_bytes(tmp_path) == (16 * GIB, 8 * GIB)
    (group / "memory.max").write_text(f"{4 * GIB}\n", encoding="utf-8")
    (group / "memory.current").write_text(f"{1 * GIB}\n", encoding="utf-8")
    assert doctor.memory_bytes(tmp_path) == (4 * GIB, 3 * GIB)


@pytest.mark.parametrize(
    ("found", "state", "message"),
    [
        ((16 * GIB, 8 * GIB), "ok", "8.0 of 16.0 GiB available"),
        ((16 * GIB, 2 * GIB), "note", "2.0 of 16.0 GiB available: little for training"),
        (None, "note", "this system does not tell"),
    ],
)
def test_memory_states(monkeypatch, found, state, message):
    monkeypatch.setattr(doctor, "memory_bytes", lambda: found)
    finding = look(doctor._memory)
    assert finding.state == state
    assert finding.message.startswith(message)


@pytest.mark.parametrize(("free", "state"), [(50 * GIB, "ok"), (5 * GIB, "note"), (GIB // 2, "problem")])
def test_disk_states(monkeypatch, isolated, free, state):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: asked.append(folder) or usage(100 * GIB, 0, free))
    finding = look(doctor._disk)
    assert finding.state == state
    assert f"{free / GIB:.1f} GiB free in {isolated.resolve()}" in finding.message
    assert asked == [Path.cwd()]


# --- hub, tracking, Kaggle ----------------------------------------------------------------------------------


class Refuses(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_hub_that_answers_even_with_an_error(no_proxy):
    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert hub_answers(f"http://127.0.0.1:{server.server_port}", seconds=5)
        thread.join()


def test_hub_that_refuses_hangs_or_is_no_address(no_proxy, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert not hub_answers(closed, seconds=2)
    assert not hub_answers("no address", seconds=2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert not hub_answers(seconds=0.2)
        assert time.monotonic() - start < 3


def test_hub_findings(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = []
    assert titled(examine(lambda: asked.append(1) or True), "model hub")[0].message.startswith(
        "off (HF_HUB_OFFLINE is set)"
    )
    assert not asked, "set offline, the network is left alone"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert titled(examine(lambda: True), "model hub") == [Finding("model hub", "ok", "answers")]
    (offline,) = titled(examine(lambda: False), "model hub")
    assert offline.state == "note"
    assert "this machine is offline" in offline.message


def test_tracking_says_mode_and_reason(monkeypatch):
    from comp import tracking

    monkeypatch.setattr(tracking, "wandb_mode", lambda setting: ("offline", f"asked for {setting}"))
    assert look(doctor._tracking) == Finding("W&B", "ok", "offline: asked for auto")
    monkeypatch.setattr(tracking, "wandb_mode", lambda setting: ("off", "wandb is not installed"))
    assert look(doctor._tracking) == Finding("W&B", "note", "off: wandb is not installed")


def test_kaggle_is_recognised(monkeypatch):
    assert list(doctor._kaggle()) == []
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert look(doctor._kaggle).message.startswith("notebook (Interactive): write to /kaggle/working")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    assert "notebook (Batch, the scored rerun)" in look(doctor._kaggle).message


# --- the report ---------------------------------------------------------------------------------------------


def test_this_machine_is_examined_whole():
    titles = [finding.title for finding in examine(lambda: False)]
    for title in ("Python", "torch", "CPU", "bf16 on CPU", "memory", "disk", "W&B", "model hub"):
        assert title in titles


def test_render_is_a_table_with_a_verdict():
    fine = [Finding("CPU", "ok", "2 cores"), Finding("model hub", "note", "offline")]
    assert render(fine) == ("ok       CPU        2 cores\nnote     model hub  offline\nno problem found")
    bad = [*fine, Finding("disk", "problem", "full")]
    assert render(bad).splitlines()[2:] == ["problem  disk       full", "1 problem found, see above"]
    assert render([*bad, bad[-1]]).endswith("2 problems found, see above")
    assert (has_problem(fine), has_problem(bad)) == (False, True)
