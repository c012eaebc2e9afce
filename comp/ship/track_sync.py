"""`comp track sync`: W&B runs that were written offline, a run folder's folds and its scores, sent to W&B.

Each is sent by `wandb sync` in a process of its own and marked by W&B as sent (a file beside it), so that a call that
was stopped goes on where it was, and a second one sends nothing twice. A folder that was moved is set right before.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from comp.lock import hold
from comp.progress import open_progress
from comp.runs import RUNS, RunFolder
from comp.tracker import without_secrets
from comp.tracking_wandb import LOGIN_HINT, has_key, host_of_wandb, installed, relocate

__all__ = ["offline_runs", "sync"]

TIMEOUT = 5  # seconds to reach the server: `wandb sync` itself tries for a long time
LINES = 5  # of what `wandb sync` said, when it fails


def offline_runs(folder: Path) -> list[Path]:
    """Return the files of the W&B runs written offline under a run folder, oldest first: its folds' and its scores'."""
    found = folder.glob("**/wandb/offline-run-*/run-*.wandb")
    return sorted(found, key=lambda file: (file.parent.name, str(file)))


def _sent(file: Path) -> bool:
    return file.with_name(f"{file.name}.synced").exists()


def sync(
    runs: Sequence[str | Path] = (),
    *,
    say: Callable[[str], None] = print,
    send: Callable[[Sequence[Path]], str | None] | None = None,
) -> bool:
    """Send the offline W&B runs of run folders (none named: of every one in runs/); return whether all went.

    `send`: sends files of one W&B run, returns None or why it failed; by default `wandb sync`. Raises ValueError when a
    folder is no run, or wandb, a key or the network is not there.
    """
    folders = [RunFolder(run) for run in runs] or [
        RunFolder(path.parent) for path in sorted(RUNS.glob("*/config.yaml"))
    ]
    for folder in folders:
        if not folder.config.exists():
            raise ValueError(f"{folder.path} is no run folder: config.yaml is missing; see `ls {RUNS}/`")
    waiting = {folder.path: [file for file in offline_runs(folder.path) if not _sent(file)] for folder in folders}
    for folder in folders:
        there = len(offline_runs(folder.path))
        if not there:
            say(f"{folder.path}: no W&B run was written offline here")
        elif not waiting[folder.path]:
            say(f"{folder.path}: all {there} are sent already")
    number = sum(map(len, waiting.values()))
    if not folders:
        say(f"no run in {RUNS}/")
    if not number:
        return True
    _can_send(number)
    failed, progress = 0, open_progress(number, "W&B", "run")
    try:
        for path, files in waiting.items():
            if files:
                with hold(path):  # of a run that is being trained half would be sent, and marked as the whole
                    failed += _sync_folder(path, files, send or _wandb_sync, progress.advance, say)
    finally:
        progress.close()
    if failed:
        say(f"{failed} of {number} were not sent; the same command tries them again")
    return not failed


def _sync_folder(
    path: Path,
    files: Sequence[Path],
    send: Callable[[Sequence[Path]], str | None],
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> int:
    """Send the files of one run folder; return how many failed."""
    sittings: dict[str, list[Path]] = {}
    for file in files:  # a fold that was stopped and gone on with is several files of one W&B run
        sittings.setdefault(file.name, []).append(file)
    failed = sent = 0
    for parts in sittings.values():
        moved = sum(relocate(file) for file in parts)
        if moved:
            say(f"{parts[0].parent}: the folder was moved; {moved} staged files are found again")
        why = send(parts)
        if why is None and not all(_sent(file) for file in parts):
            why = "`wandb sync` ended without a fault but did not mark it as sent"
        if why is None:
            sent += len(parts)
        else:
            failed += len(parts)
            say(f"{parts[0].parent}: not sent: {without_secrets(why)}")
        advance(len(parts))
    say(f"{path}: {sent} sent" + (f", {failed} not" if failed else ""))
    return failed


def _can_send(number: int) -> None:
    """Raise ValueError that says what is missing to send runs."""
    told = f"{number} W&B runs are waiting, but"
    if not installed():
        raise ValueError(f"{told} wandb is not installed: `pip install wandb` (or the extra comp[track])")
    if not has_key():
        raise ValueError(f"{told} there is no API key: {LOGIN_HINT}")
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return
    host, port = host_of_wandb()
    try:
        socket.create_connection((host, port), timeout=TIMEOUT).close()
    except OSError as fault:
        raise ValueError(
            f"{told} {host} cannot be reached ({fault}); try again with a network, or copy the run folder to where "
            "there is one"
        ) from None


def _wandb_sync(files: Sequence[Path]) -> str | None:
    """Send files of one W&B run by `wandb sync`, in order; return None, or the last lines that it said."""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    command = [sys.executable, "-m", "wandb", "sync", *map(str, files)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, errors="replace"
    )
    if done.returncode == 0 and all(_sent(file) for file in files):
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return f"exit status {done.returncode}: " + "; ".join(lines[-LINES:])
