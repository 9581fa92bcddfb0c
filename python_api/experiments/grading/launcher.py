"""Runs one program behind the barriers of `sandbox`, as a script in a process of its own: standard library only.

The working folder is its argument, the request comes as JSON on stdin, the report leaves as JSON on stdout. With
`namespaces`:

    launcher          outside; makes the namespaces, dies with its parent
      supervisor      process 1 of the PID namespace: keeps the clock; when it ends, the kernel ends all others in there
        program       limits, no privileges; sees Python's own files, read-only, and its working folder

With `guard` the launcher itself is the supervisor and a child subreaper: what the program leaves behind falls to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import secrets
import signal
import sys
import time
import traceback
import types

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 0x1, 0x2
_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A barrier cannot be raised here."""


def _checked(what: str, result: int) -> None:
    if result == -1:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _prctl(option: int, value: int) -> None:
    _checked(f"prctl {option}", _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data and data.encode()
    )
    _checked(f"mount {source} at {target}", result)


# ---------------------------------------------------------------- namespaces


def _enter_namespaces() -> bool:
    """No network, a PID namespace for the next child, mounts of its own; and where root's own privileges did not do for
    that (False), a user namespace."""
    kinds = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    if os.geteuid() == 0 and _libc.unshare(kinds) == 0:
        return True
    user, group = os.geteuid(), os.getegid()
    _checked("unshare", _libc.unshare(kinds | _CLONE_NEWUSER))
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        raise SetupError(f"/proc/self/{name}: {error.strerror}") from error
    return False


def _visible() -> list[str]:
    """What Python needs to import: its search path, shared libraries, time zones; parents before what lies in them."""
    wanted = [os.path.abspath(path) for path in sys.path if os.path.exists(path)]
    wanted += [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.prefix)]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    wanted += ["/dev/null", "/dev/zero", "/dev/urandom"]
    kept: list[str] = []
    for path in sorted({path for path in wanted if os.path.exists(path)}, key=lambda path: (len(path), path)):
        if not any(path.startswith(f"{parent}/") for parent in kept if not os.path.islink(parent)):
            kept.append(path)
    return kept


def _build_root(root: str, file_bytes: int) -> None:
    """Makes `root`, an empty folder, the root of the file system: Python's files, read-only, and, at the same path, a
    working folder in memory."""
    visible = _visible()
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m,nr_inodes=1024")
    for path in visible:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path) and os.path.isdir(path) and os.path.dirname(path) == "/":  # /lib -> usr/lib
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT, 0o644))
        _mount(path, target, None, _MS_BIND | _MS_REC)
    os.makedirs(root + root, exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    result = _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, root.encode(), _AT_RECURSIVE, ctypes.byref(attributes), 32)
    _checked("mount_setattr", result)
    size = max(file_bytes, 4096)
    _mount("tmpfs", root + root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={size},nr_inodes=256")
    machine = os.uname().machine
    if machine not in _SYS_PIVOT_ROOT:
        raise SetupError(f"pivot_root: its number is not known on {machine}")
    os.chdir(root)
    _checked("pivot_root", _libc.syscall(_SYS_PIVOT_ROOT[machine], b".", b"."))
    _checked("umount of the old root", _libc.umount2(b".", _MNT_DETACH))
    os.chdir(root)


def _drop_privileges(user: int | None) -> None:
    """Leaves root for `user`, which no one else is, and gives up every capability for good."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        for capability in range(64):
            _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _checked("capset", _libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())))
    try:
        with open(traceback.__file__):
            pass
    except OSError as error:
        raise SetupError(f"Python's own files cannot be read by another user: {error}") from error


# ---------------------------------------------------------------- the guard


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.system", "pty.spawn", "subprocess.Popen",
)  # fmt: skip
_REFUSED_FAMILIES = ("ctypes.", "ftplib.", "http.", "imaplib.", "poplib.", "smtplib.", "socket.", "urllib.")
_CHANGES_FILES = {  # event: how many of its arguments are paths, and where the folders' descriptors for them begin
    "os.chmod": (1, 2), "os.chown": (1, 3), "os.link": (2, 2), "os.mkdir": (1, 2), "os.remove": (1, 1),
    "os.rename": (2, 2), "os.rmdir": (1, 1), "os.symlink": (2, 2), "os.truncate": (1, 2), "os.utime": (1, 3),
}  # fmt: skip


def _raise_guard(folder: str) -> None:
    """Python's audit hook, which cannot be taken away again: no sockets, no processes, no changes outside `folder`."""
    folder = os.path.realpath(folder)
    realpath, join, fsdecode, local = os.path.realpath, os.path.join, os.fsdecode, 1  # AF_UNIX: asyncio needs a pair

    def inside(path: object, descriptor: int = -1) -> bool:
        if isinstance(path, int):
            return True
        beside = f"/proc/self/fd/{descriptor}" if descriptor >= 0 else ""
        real = realpath(join(beside, fsdecode(path)))
        return real == folder or real.startswith(folder + "/") or real == "/dev/null"

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if path is not None and isinstance(flags, int) and flags & _WRITES and not inside(path):
                raise PermissionError(f"the sandbox refuses to write to {path!r}")
        elif event in _CHANGES_FILES:
            count, first = _CHANGES_FILES[event]
            beside = (*arguments[first:], -1, -1)
            if not all(inside(arguments[i], beside[min(i, len(arguments) - first)]) for i in range(count)):
                raise PermissionError(f"the sandbox refuses {event} of {arguments[0]!r}")
        elif event == "socket.__new__":
            if arguments[1] != local:
                raise PermissionError("the sandbox refuses sockets")
        elif event == "ctypes.dlopen" and arguments[0] is None:
            pass  # the import of ctypes, and NumPy's of it
        elif event in _REFUSED or event.startswith(_REFUSED_FAMILIES):
            raise PermissionError(f"the sandbox refuses {event}")

    for name in [name for name in sys.modules if name in ("ctypes", "_ctypes") or name.startswith("ctypes.")]:
        del sys.modules[name]
    sys.addaudithook(hook)


# ---------------------------------------------------------------- the program


def _limit(request: dict) -> None:
    seconds = int(request["timeout"]) + 2
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
    }
    if request["namespaces"]:  # elsewhere it would count all that the user runs; the guard refuses to fork at all
        limits[resource.RLIMIT_NPROC] = request["processes"]
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"], request["memory_bytes"] + _TO_SAY_SO))


_TO_SAY_SO = 32 << 20  # address space for the report of a program that has used all of its own


def _describe(error: BaseException, program: str) -> str:
    """The traceback's last line, and the line of the program that it names."""
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<program>"]
        if lines and lines[-1]:
            text += f" (line {lines[-1]}: {program.splitlines()[lines[-1] - 1].strip()[:120]})"
        return text[:400]
    except BaseException:  # whatever the program's own exceptions do when they are printed
        return type(error).__name__[:100]


def _program(request: dict, report: int, token: str) -> None:
    """The child that is the program. It says on `report` how it ended; one that ends without the token did not."""
    say, leave, encode, who, own = os.write, os._exit, json.dumps, os.getpid, os.getpid()

    def end(kind: str, detail: str = "") -> None:
        if who() != own:  # a child of the program, which has come to the same end
            leave(1)
        say(report, encode({"token": token, "kind": kind, "detail": detail}).encode())
        leave(0)

    try:
        os.setsid()
        os.closerange(3, report)
        os.closerange(report + 1, 1024)
        if not request["namespaces"]:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        os.environ.clear()
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HOME=os.getcwd(), TMPDIR=os.getcwd())
        if request["namespaces"]:
            _drop_privileges(request["user"])
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _limit(request)
        name, program, guarded = request["name"], request["program"], not request["namespaces"]
        request.clear()
        module = types.ModuleType(name)
        sys.modules[name] = module
        sys.argv = ["program"]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if guarded:
            _raise_guard(os.getcwd())
    except BaseException as error:
        end("setup", f"{type(error).__name__}: {error}")
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
    except MemoryError as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
        end("memory", _describe(error, program))
    except AssertionError as error:
        end("assertion", _describe(error, program))
    except SystemExit as error:
        end("exited", _describe(error, program))
    except BaseException as error:
        end("exception", _describe(error, program))
    end("finished")


def _supervise(request: dict) -> dict:
    """Forks the program and waits for it, no longer than its limit: how it ended. Its children may be left."""
    token, timeout = secrets.token_hex(16), request["timeout"]
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    program = os.fork()
    if program == 0:
        os.close(reading)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        number = 20 + secrets.randbelow(40)
        os.dup2(writing, number, inheritable=False)
        os.close(writing)
        try:
            _program(request, number, token)
        finally:
            os._exit(1)
    os.close(writing)
    status, end = None, time.monotonic() + timeout
    while status is None and (left := end - time.monotonic()) > 0:
        signal.sigtimedwait({signal.SIGCHLD}, left)
        while True:
            try:
                pid, found = os.waitpid(-1, os.WNOHANG)  # orphans too
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == program:
                status = found
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program, signal.SIGKILL)
        return {"kind": "timeout", "detail": f"{timeout:g} s"}
    try:
        said = json.loads(os.read(reading, 1 << 16))
        if said.pop("token") != token:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, BlockingIOError):
        said = {"kind": "ended", "detail": "ended before its last line"}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return {"kind": "timeout", "detail": "CPU time"}
        return {"kind": "signal", "detail": signal.Signals(number).name}
    if said["kind"] != "ended" and os.WEXITSTATUS(status) != 0:  # a fork of the program said it, not the program
        return {"kind": "ended", "detail": f"exit status {os.WEXITSTATUS(status)}"}
    return said


def _sweep() -> None:
    """Kills all descendants, again and again until none is left: orphans fall to this process, a subreaper."""
    own = os.getpid()
    while True:
        parents: dict[int, int] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat") as file:
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
        found, level = [], {own}
        while level := {pid for pid, parent in parents.items() if parent in level}:
            found += level
        for number in (signal.SIGSTOP, signal.SIGKILL):  # first none of them may fork any more
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _in_namespaces(request: dict) -> dict:
    request["user"] = 1_900_000_000 + os.getpid() if _enter_namespaces() else None
    reading, writing = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(reading)
            _build_root(sys.argv[1], request["file_bytes"])
            report = _supervise(request)
        except BaseException as error:
            report = {"kind": "setup", "detail": str(error)}
        os.write(writing, json.dumps(report).encode())
        os._exit(0)  # and with process 1 all others of the namespace
    os.close(writing)
    os.waitpid(supervisor, 0)  # returns when the namespace is empty
    return json.loads(os.read(reading, 1 << 16) or b'{"kind": "setup", "detail": "the supervisor died"}')


def _in_guard(request: dict) -> dict:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    os.chdir(sys.argv[1])
    try:
        return _supervise(request)
    finally:
        _sweep()


def main() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)  # the program's user must be able to enter the folders that are made for it
    request = json.load(sys.stdin)
    try:
        report = _in_namespaces(request) if request["namespaces"] else _in_guard(request)
    except SetupError as error:
        report = {"kind": "setup", "detail": str(error)}
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
