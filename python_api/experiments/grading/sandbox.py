"""Runs a Python program that nobody has read, in a process of its own with limits.

Always: a limit on wall-clock time, CPU time, address space and the size of files; no core file; an empty environment,
nothing on stdin, output thrown away; a fresh working folder that is gone afterwards; and all of the program's
processes killed at its end, whatever sessions they began.

Where the kernel allows it (`barriers()` tries): namespaces without a network, in which the program sees Python's own
files, read-only, and an empty working folder in memory, without privileges, and a limit on the number of its processes.
Elsewhere, a weaker guard inside the interpreter: an audit hook that refuses sockets, new processes, and changes to
files outside the working folder. It stops Python code that does such things, not code that goes round Python (an
extension module, an `os.open` beside a folder's descriptor), and it does not keep the program from reading files.

Neither is a security boundary against an attacker: the namespaces share this machine's kernel and its faults, limits
are a process's (so a program may use its memory limit in each of its processes), and a program that searches its own
interpreter for the runner's token can claim to have reached its end. It is for the mistakes of models, which delete,
loop, fork and fill memory without intent.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from power_kernels.errors import ArgumentError

_LAUNCHER = Path(__file__).with_name("launcher.py")
_SLACK_S = 60.0  # for the start of an interpreter on a busy machine; the supervisor keeps the program's own clock

Isolation = Literal["namespaces", "guard"]


class SandboxError(RuntimeError):
    """The barriers could not be raised, so the program was not run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. `processes` (threads count) holds with namespaces; the guard lets none begin.

    Args:
        timeout: wall-clock seconds.
        memory_bytes: address space of each process.
        file_bytes: size of a file, and with namespaces of all files together.
        processes: processes and threads at a time.
    """

    timeout: float = 3.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    processes: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 86_400:
            raise ArgumentError(f"timeout is {self.timeout}; it must lie in (0, 86400] seconds")
        if self.memory_bytes < 64 << 20:
            raise ArgumentError(f"memory_bytes is {self.memory_bytes}; Python itself needs {64 << 20}")
        for name in ("file_bytes", "processes"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Outcome:
    """How a program ended: it `finished` its last line, or what happened before it could.

    Args:
        kind: "finished", "assertion", "exception", "exited" (SystemExit), "memory" (MemoryError), "timeout", "signal",
            or "ended" (by os._exit, or without the runner's token).
        detail: the last line of its traceback, the name of the signal, or the limit.
    """

    kind: str
    detail: str


@dataclass(frozen=True)
class Barriers:
    """What keeps a program in, in words. `weaker_because` is None with namespaces, else why there are none here."""

    isolation: Isolation
    network: str
    files: str
    processes: str
    survivors: str
    weaker_because: str | None


# Fails unless every barrier of the namespaces holds.
_PROBE = """
import os, socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
    raise AssertionError("it reached a network")
except ConnectionRefusedError:
    raise AssertionError("it reached the loopback device") from None
except OSError:
    pass
for path in ("/probe", os.path.join(os.path.dirname(os.__file__), "probe")):
    try:
        open(path, "w")
        raise AssertionError(f"it wrote {path}")
    except OSError:
        pass
assert os.getpid() < 10, "it sees the processes outside"
children = []
try:
    for _ in range(64):
        children.append(os.fork())
        if children[-1] == 0:
            import time
            time.sleep(60)
    raise AssertionError("it began 64 processes")
except BlockingIOError:
    pass
"""


@functools.cache
def barriers() -> Barriers:
    """What is enforced on this machine: found once, by running a program that tries to break out of the namespaces."""
    try:
        outcome = run(_PROBE, Limits(timeout=20.0), isolation="namespaces")
        because = None if outcome.kind == "finished" else f"{outcome.kind}: {outcome.detail}"
    except SandboxError as error:
        because = str(error)
    if because is None:
        return Barriers(
            isolation="namespaces",
            network="none: a network namespace without devices",
            files="Python's own, read-only; a working folder in memory that ends with the program",
            processes="few (RLIMIT_NPROC), without privileges, in a PID namespace",
            survivors="killed by the kernel with the first process of the namespace",
            weaker_because=None,
        )
    return Barriers(
        isolation="guard",
        network="an audit hook in Python refuses sockets",
        files="an audit hook in Python refuses changes outside the working folder; reading is free",
        processes="an audit hook in Python refuses new ones",
        survivors="found by a child subreaper and killed",
        weaker_because=because,
    )


def run(
    program: str,
    limits: Limits = Limits(),
    *,
    name: str = "__main__",
    isolation: Isolation | None = None,
) -> Outcome:
    """Runs `program` and returns when it and all its processes are gone.

    Args:
        program: the source of a Python program.
        limits: what it may use.
        name: its `__name__`; with another than "__main__" its `if __name__ == "__main__":` does not run.
        isolation: None for the best that `barriers()` found.

    Raises:
        SandboxError: the barriers could not be raised; the program was not run.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"programs are run on Linux only, not on {sys.platform}")
    if isolation is None:
        isolation = barriers().isolation
    folder = tempfile.mkdtemp(prefix="power-kernels-")
    request = {
        "program": program,
        "name": name,
        "namespaces": isolation == "namespaces",
        "timeout": limits.timeout,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "processes": limits.processes,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", str(_LAUNCHER), folder],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            env={},
            cwd="/",
            start_new_session=True,
            timeout=limits.timeout + _SLACK_S,
        )
        if done.returncode != 0:
            raise SandboxError(f"the launcher ended with {done.returncode}: {done.stderr.strip()[-400:]}")
        report = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"the launcher did not answer in {error.timeout:g} s") from error
    finally:
        _remove(folder)
    if report["kind"] == "setup":
        raise SandboxError(report["detail"])
    return Outcome(str(report["kind"]), str(report["detail"]))


def _remove(folder: str) -> None:
    """Removes a folder whatever modes the program gave to those in it."""
    if not os.path.isdir(folder):
        return
    os.chmod(folder, stat.S_IRWXU)
    for parent, names, _ in os.walk(folder):  # top down: it enters them afterwards
        for path in (os.path.join(parent, name) for name in names):
            if not os.path.islink(path):
                os.chmod(path, stat.S_IRWXU)
    shutil.rmtree(folder)
