"""The machine under a run: memory that is freed and wanted again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource
import torch
from comp.runtime import keep_freed_memory, open_runtime

{setup}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        batch = [torch.ones(5_000_000) for _ in range(4)]  # 80 MB, given back all at once
        del batch
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(json.dumps([faults(), keep_freed_memory()]))
"""
PAGES = 5 * 4 * 20_000_000 // 4096

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back")


def measured(setup: str, **environment: str) -> tuple[int, bool]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(setup=setup)],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, kept = json.loads(done.stdout)
    return found, kept


@glibc
def test_memory_that_tensors_free_is_not_fetched_anew() -> None:
    pages, kept = measured("open_runtime(device='cpu')")
    assert kept
    assert pages < PAGES / 10


@glibc
def test_the_environment_has_the_last_word() -> None:
    pages, kept = measured("open_runtime(device='cpu')", MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert pages > PAGES / 2
