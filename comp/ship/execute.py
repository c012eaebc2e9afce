"""Executes a notebook in a fresh environment: run by verify.py as a script, with that environment's Python.

    python execute.py PLAN.json

It imports nothing of comp, which is not installed there. The plan: notebook, bundle, working (the current directory of
the notebook), result (where to write what was found), cut (unshare | guard).
"""

from __future__ import annotations

import json
import resource
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

UP, GET_FLAGS, SET_FLAGS = 0x1, 0x8913, 0x8914  # Linux: IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS


def raise_loopback() -> None:
    """Switch on the loopback interface, which a new network namespace has switched off."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        flags = struct.unpack("16sh", fcntl.ioctl(own, GET_FLAGS, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(own, SET_FLAGS, struct.pack("16sh", b"lo", flags | UP))


def way_out(cut: str) -> str | None:
    """Tell how this process could reach the network, or None."""
    if cut == "unshare":
        others = [name for _, name in socket.if_nameindex() if name != "lo"]
        return f"interfaces {', '.join(others)}" if others else None
    try:
        socket.create_connection(("192.0.2.1", 9), timeout=2).close()
    except PermissionError:
        return None
    except OSError as fault:
        return f"the guard let a connection through ({fault})"
    return "a connection was made"


def imported_from(bundle: str) -> str:
    """Return where `from comp import load` finds comp with the bundle added to sys.path, or what went wrong."""
    code = "import sys; sys.path.append(sys.argv[1]); from comp import load; import comp; print(comp.__file__)"
    done = subprocess.run([sys.executable, "-P", "-B", "-c", code, bundle], capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def execute(plan: dict[str, Any]) -> dict[str, Any]:
    """Execute the notebook; return what verify.py prints."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config

    if plan["cut"] == "unshare":
        with suppress(OSError):
            raise_loopback()
    if out := way_out(plan["cut"]):
        return {"fault": f"the network is not cut: {out}"}
    page = nbformat.read(plan["notebook"], as_version=4)
    nbformat.validate(page)
    imported = imported_from(plan["bundle"])  # before the notebook installs anything
    settings = Config()
    settings.KernelManager.transport = "ipc"  # no port, so the guard need not let any through
    client = NotebookClient(
        page, timeout=None, kernel_name="python3", config=settings, resources={"metadata": {"path": plan["working"]}}
    )
    started = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as fault:
        return {"fault": str(fault)}
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "fault": None,
        "seconds": seconds,
        "peak": peak,
        "said": [
            "".join(output.get("text", "") for output in cell.get("outputs", ()) if output.output_type == "stream")
            for cell in page.cells
        ],
        "imported": imported,
    }


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(wanted["result"]).write_text(json.dumps(execute(wanted)), encoding="utf-8")
