"""One worker process: a fresh interpreter with this one's sys.path, talked to by pickles over its pipes.

Unlike a process of `multiprocessing` it never imports the script that called, which needs no `if __name__ ==
"__main__"`, and may be a notebook. It ends when its pipe closes, so that none outlives its parent: at once when it
waits, and by a SIGTERM to itself when it is at work, which training heeds by saving what it has.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from comp.runtime import is_ours

__all__ = ["Handle", "Tell", "Worker", "WorkerFault", "thread_variables", "work"]

Handle: TypeAlias = Callable[..., Any]
Tell: TypeAlias = Callable[[Any], None]
COMMAND = "import json, os, sys; sys.path[:] = json.loads(sys.argv[1]); from comp.worker import work; work()"
COMMAND += "; sys.stderr.flush(); os._exit(0)"  # nothing is left to tidy up, which takes torch seconds
LAST_LINES = 20  # of a worker's stderr, shown when it dies


class WorkerFault(RuntimeError):
    """A worker died, or failed for a reason that is no mistake of the user's. `how` it ended: "by SIGKILL, ..."."""

    def __init__(self, message: str, how: str = "with a fault") -> None:
        super().__init__(message)
        self.how = how


def thread_variables(threads: int) -> dict[str, str]:
    """Return the environment of a process of so many threads: read when the libraries start their pools."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def _pass_on(line: str) -> None:
    """Say what a worker says: in a notebook its stderr would end in a log that nobody reads."""
    with suppress(OSError, ValueError):  # nobody may listen to us any more
        sys.stderr.write(line)


class Worker:
    """A process that answers requests, one at a time.

    `name` it has in messages. `settle(tell, *arguments)` is called there first, with what tells the parent something
    before the answer, and returns what answers: a request `(a, b)` by `handle(a, b)`. Both are found by their names in
    their modules. `environment` is added to this process's; `inherit`: open files that it keeps open as long as it
    lives. `hear` gets each line of its stderr, on another thread. `advice`: what to do when it dies.
    """

    def __init__(
        self,
        name: str,
        settle: Callable[..., Handle],
        *arguments: Any,
        environment: Mapping[str, str],
        advice: str,
        hear: Callable[[str], None] = _pass_on,
        inherit: Sequence[int] = (),
    ) -> None:
        self.name, self.advice, self._hear = name, advice, hear
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", COMMAND, json.dumps([str(path) for path in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            pass_fds=tuple(inherit),
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.ask((settle, arguments))

    @property
    def pid(self) -> int:
        return self._process.pid

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace")
            self._said.append(text)
            self._hear(text)

    def ask(self, request: tuple[Any, ...]) -> None:
        """Send a request. Raises WorkerFault when nobody is there."""
        assert self._process.stdin is not None
        try:
            pickle.dump(request, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None

    def answer(self, on_told: Tell | None = None) -> Any:
        """Wait for an answer; what is told before goes to `on_told`.

        Raises ValueError for a user's mistake, WorkerFault for what else goes wrong there.
        """
        assert self._process.stdout is not None
        while True:
            try:
                outcome, value = pickle.load(self._process.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise self._death() from None
            if outcome != "told":
                break
            if on_told is not None:
                on_told(value)
        if outcome == "mistake":
            raise ValueError(value)
        if outcome == "failure":
            raise WorkerFault(f"{self.name} failed:\n{value}")
        return value

    def _death(self) -> WorkerFault:
        """Return how the process ended, its last words included."""
        status = self._process.wait()
        self._listener.join(timeout=5)
        words = "".join(self._said).strip()
        how = f"with exit status {status}"
        if status < 0:
            how = f"by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += ", which is often the system's answer to too little memory"
        heard = f"; it said:\n{words}" if words else ""
        return WorkerFault(f"{self.name} ended {how}; {self.advice}{heard}", how)

    def dismiss(self) -> None:
        """Let it end, by closing its pipe."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it may be gone, and what was to be sent with it
            self._process.stdin.close()

    def close(self, patience: float = 20.0) -> None:
        """Wait for its end, and take its pipes away; a worker that does not end is killed."""
        assert self._process.stdout is not None and self._process.stderr is not None
        self.dismiss()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._listener.join(timeout=5)
        self._process.stderr.close()

    def ask_to_stop(self) -> None:
        """Send SIGTERM: it saves what it is at, or ends where there is nothing to save."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


# --- the other end ---------------------------------------------------------------------------------------------------


def work() -> None:
    """Be a worker: answer requests from standard input until it closes. Called in a fresh interpreter."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not fall between the answers
    requests = sys.stdin.buffer
    busy = threading.Event()
    if hasattr(select, "poll"):  # not on Windows
        threading.Thread(target=_heed_the_end, args=(requests.fileno(), busy), daemon=True).start()

    def reply(outcome: str, value: Any) -> None:
        pickle.dump((outcome, value), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    def tell(value: Any) -> None:
        with suppress(BrokenPipeError):  # nobody hears it; what is at work is told so by SIGTERM
            reply("told", value)

    handle: Handle | None = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        except Exception:  # what was sent cannot be opened here
            reply("failure", traceback.format_exc())
            return
        busy.set()
        try:
            if handle is None:
                settle, arguments = request
                handle = settle(tell, *arguments)
                reply("ready", None)
            else:
                reply("values", handle(*request))
        except BrokenPipeError:
            return
        except ValueError as fault:
            reply("mistake", str(fault)) if is_ours(fault) else reply("failure", traceback.format_exc())
        except Exception:
            reply("failure", traceback.format_exc())
        busy.clear()


def _heed_the_end(pipe: int, busy: threading.Event) -> None:
    """Wait until the parent has let go of the pipe; what is at work then is asked to stop."""
    poll = select.poll()
    poll.register(pipe, 0)  # no event but the one that cannot be left out: the other end is closed
    while not poll.poll():
        pass
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
