"""One process writes into a run folder: runs/.NAME.lock, held while it does.

The lock is the kernel's (flock), which dies with its process, SIGKILL included; the text in the file says whose it is.
Where a file system has no flock, and for the text of another machine, the text alone decides: a process of this
machine that is gone, or whose number another one has now, holds nothing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["hold", "lock_of"]

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]


def lock_of(folder: Path) -> Path:
    """Return the lock file of a run folder: beside it, since the folder itself may be removed and made anew."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def hold(folder: Path) -> Iterator[int]:
    """Keep other processes out of a run folder; give the open lock file. Raises ValueError that says who is in it.

    A worker that inherits the file holds the lock too: it is free when all of them are gone.
    """
    path, made = lock_of(folder), not folder.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path, folder)
    try:
        yield handle
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody locks a file that is about to go, see _take
        os.close(handle)
        if made:
            with suppress(OSError):  # it is not empty: a run was made
                path.parent.rmdir()


def _take(path: Path, folder: Path) -> int:
    """Return the open lock file, ours now."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _lock(handle)
            owner = _owner(handle)
            if locked is False or _holds(owner, locked=bool(locked)):
                raise ValueError(_refusal(owner, path, folder))
            try:
                if os.stat(path).st_ino != os.fstat(handle).st_ino:
                    raise FileNotFoundError
            except FileNotFoundError:  # the one before let go between our opening and our locking
                os.close(handle)
                continue
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(_ourselves()).encode())
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        return handle


def _lock(handle: int) -> bool | None:
    """Return True when it is ours now, False when another process has it, None where there is no such thing."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _ourselves() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "since": now}


def _owner(handle: int) -> dict[str, Any]:
    """Return what the file says; {} when it says nothing, as where its writer was killed before."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        found = json.loads(os.read(handle, 4096))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _holds(owner: dict[str, Any], *, locked: bool) -> bool:
    """Tell whether the process in the text still holds a lock that flock has given us, or knows nothing of."""
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True  # flock may not reach another machine
    return not locked and _alive(owner.get("pid"), owner.get("started"))


def _alive(pid: Any, started: Any) -> bool:
    """Tell whether a process of this machine runs, and is the one that had this number at the time."""
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return started is None or _started(pid) in (None, started)


def _started(pid: int) -> int | None:
    """Return when a process began, in ticks since the machine did; None where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _refusal(owner: dict[str, Any], path: Path, folder: Path) -> str:
    host, pid, since = owner.get("host", "?"), owner.get("pid", "?"), owner.get("since", "?")
    here = host == socket.gethostname()
    advice = "wait until it is done, stop it, or name another run with --run"
    if here and isinstance(pid, int) and not _alive(pid, owner.get("started")):
        advice = "it is gone, but a worker of it is still saving its fold: wait a moment"
    if not here:
        advice += f"; if it is gone, which cannot be seen from {socket.gethostname()}, remove {path}"
    return f"{folder}: process {pid} on {host} has been writing into it since {since}; {advice}"
