"""Processes that grade mathematics and that can be killed: SymPy can hang for ever, in places where no signal handler
and no thread can stop it.

`Workers` keeps them and gives each answer to one. A worker that does not answer in time is killed, and another takes
its place at the next answer. A worker also kills itself: an alarm without a handler ends it in the kernel, and
with its parent gone it finds its input closed. As a script, this file is the worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from power_kernels.api.experiments.grading.published_math import is_right, last_boxed

_START_S = 120.0  # the import of SymPy on a busy machine
_MEMORY_BYTES = 4 << 30


class WorkerError(RuntimeError):
    """A worker could not be started."""


class _Worker:
    """One process; its answers come a line each."""

    def __init__(self) -> None:
        here = "power_kernels.api.experiments.grading.workers"
        self._process = subprocess.Popen(
            [sys.executable, "-m", here],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._line(_START_S) != "ready":
            self.kill()
            raise WorkerError(f"a grader's process did not start; status {self._process.returncode}")

    def ask(self, request: dict, timeout: float) -> dict | None:
        """The answer, or None if there is none in time or the process died: kill it then."""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._line(timeout)
        return None if line is None else json.loads(line)

    def _line(self, timeout: float) -> str | None:
        end, got = time.monotonic() + timeout, b""
        while not got.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                return None
            got += part
        return got.decode().strip()

    def died_of(self) -> int | None:
        """The number of the signal that ended it, or None."""
        try:
            status = self._process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            return None
        return -status if status < 0 else None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # the rest of a request to a process that had died
            self._process.stdin.close()
        self._process.stdout.close()


class Workers:
    """A few processes that grade, started when they are needed, safe to use from several threads.

    Args:
        count: the most processes at a time.
    """

    def __init__(self, count: int = 2) -> None:
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()

    def ask(self, grader: str, answer: str, truth: str, timeout: float) -> dict:
        """What a worker answers: "correct", "parsed", "reason" and "detail" of a Grade; a timeout if it does not."""
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker()
                with self._lock:
                    self._all.add(worker)
            request = {"grader": grader, "answer": answer, "truth": truth, "timeout": timeout}
            said = worker.ask(request, timeout)
            if said is None:
                died = worker.died_of()
                self._drop(worker)
                worker = None
                if died in (None, signal.SIGALRM):
                    return _grade("timeout", detail=f"{timeout:g} s")
                return _grade("error", detail=f"the grader died of {signal.Signals(died).name}")
            return said
        except BaseException:
            if worker is not None:
                self._drop(worker)
                worker = None
            raise
        finally:
            self._idle.put(worker)

    def _drop(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.kill()

    def pids(self) -> list[int]:
        """The processes that run."""
        with self._lock:
            return [worker._process.pid for worker in self._all]

    def close(self) -> None:
        """Kills them all; one that is asked afterwards is started anew."""
        with self._lock:
            ending, self._all = self._all, set()
        for worker in ending:
            worker.kill()
        count = self._idle.qsize()
        for _ in range(count):
            self._idle.get()
        for _ in range(count):
            self._idle.put(None)


def _grade(reason: str, correct: bool = False, parsed: str | None = None, detail: str = "") -> dict[str, Any]:
    return {"correct": correct, "parsed": parsed, "reason": reason, "detail": detail}


# ---------------------------------------------------------------- the worker's side


def _published(answer: str, truth: str) -> dict:
    boxed = last_boxed(answer)
    if boxed is None:
        return _grade("no answer")
    right = is_right(boxed, truth)
    return _grade("passed" if right else "wrong", right, boxed)


def _math_verify(answer: str, truth: str) -> dict:
    from math_verify import parse, verify

    gold = parse(f"${truth}$", parsing_timeout=None)  # its own timeouts are alarms; this process has a better one
    boxed = last_boxed(answer)  # of several boxes it would take all for parts of one answer
    found = parse(answer if boxed is None else f"\\boxed{{{boxed}}}", parsing_timeout=None)
    if not gold:
        return _grade("error", detail=f"the truth {truth!r} cannot be parsed")
    if not found:
        return _grade("no answer")
    right = verify(gold, found, timeout_seconds=None)
    return _grade("passed" if right else "wrong", right, str(found[-1]))


_GRADERS = {"published": _published, "math_verify": _math_verify}


def _serve() -> None:
    import sympy  # noqa: F401 (before the first clock runs)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["timeout"])
        try:
            said = _GRADERS[request["grader"]](request["answer"], request["truth"])
        except MemoryError:
            said = _grade("memory", detail=f"{_MEMORY_BYTES >> 30} GiB")
        except Exception as error:  # whatever the libraries raise on odd texts: this answer's grade, not the run's end
            said = _grade("error", detail=f"{type(error).__name__}: {error}"[:400])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(said), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
