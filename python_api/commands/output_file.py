"""The results file of `power-kernels generate`: JSON lines, written as answers finish, resumable, ordered at the end.

Each record carries a digest of everything its answer depends on. A run that starts again with the same command finds
its own records and draws only the others; a file that holds another run's records is refused. A line that was cut off
by an interruption is dropped, since its answer is drawn again.

Of several processes, the first appends to the file itself and each other one to a part beside it, `<file>.part-<rank>`.
Whoever opens the file takes over the parts that are there, of however many processes. When all answers are there the
records are put into prompt-major order: a new file, `<file>.tmp`, is written, synchronised and put in the place of the
old one, so that at every moment all that was finished is in the file or its parts.

A line is on the disk when `write` returns: no signal and no power cut can take it back. A synchronisation takes
milliseconds, an answer seconds to minutes.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from power_kernels.api.driver.results import PowerResult
from power_kernels.errors import ArgumentError


def digest(**everything) -> str:
    """Of JSON-able values: model, config, seed, prompt tokens, ids."""
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def record(result: PowerResult, prompt: dict, run: str) -> dict:
    """One line of the file. prompt: what the prompts file said, repeated so that the line stands alone: an answer to
    compare with, a level, whatever stood there, but for a prompt's token ids. A key that the record has itself is
    repeated behind "prompt_".

    Everything but `cost`, the last entry, is the answer's and the same however the run was divided or interrupted, as
    far as the model's logits are. What was forwarded also depends on which chains ran beside it and in how many lanes.
    logp is rounded to 1e-4 nats: sums of fp32 logits differ below that from batch to batch. trace has an entry a step:
    log p and W of the answer after it, its outcome (R rejected, U unchanged, A accepted), where its proposal left the
    answer, -1 where it kept every token, and its horizon. sweeps, of particles: see `SweepResult`; the first is the
    start.
    """
    place = {"prompt_id": result.prompt_id, "chain_id": result.chain_id}
    answer = {
        "text": result.text,
        "tokens": result.tokens,
        "logp": round(result.logp, 4),
        "finish": result.finish,
        "status": result.status.name,
        "steps": result.steps,
        "accepted": result.accepted,
        "unchanged": result.unchanged,
        "trace": {
            "logp": [round(value, 4) for value in result.step_logp],
            "weight": [round(value, 4) for value in result.step_weight],
            "outcome": "".join(outcome.name[0] for outcome in result.outcomes),
            "left": result.left,
            "horizon": result.step_horizon,
        },
        "digest": run,
        "cost": {**dataclasses.asdict(result.cost), "forwarded": result.cost.forwarded},
    }
    if result.sweeps:
        sweeps = [dataclasses.asdict(sweep) for sweep in result.sweeps]
        answer["sweeps"] = [{k: round(v, 4) if isinstance(v, float) else v for k, v in s.items()} for s in sweeps]
    repeated = {}
    for key, value in prompt.items():
        if key == "tokens" and isinstance(value, list):
            continue
        name = key
        while name in place or name in answer or (name != key and name in prompt):
            name = f"prompt_{name}"
        repeated[name] = value
    return {**place, **repeated, **answer}


class RecordFile:
    """A file that one process at a time appends records to."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
        missing = [place for place in (self.path, *self.path.parents) if not place.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"--out {self.path} cannot be written: {error}") from None
        self.created = self.path in missing
        self.file = _open_locked(self.path)
        for place in missing:  # a file that is synchronised may still lose its name
            _sync_folder(place.parent)

    @property
    def identity(self) -> int:
        """The same wherever this file is seen."""
        return os.fstat(self.file).st_ino

    def write(self, line: dict) -> None:
        """Append one record, with one call unless the disk is full, and wait until it is on the disk."""
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        written = os.write(self.file, data)
        while written < len(data):
            written += os.write(self.file, data[written:])
        os.fsync(self.file)

    def close(self) -> None:
        if self.file < 0:
            return
        file, self.file = self.file, -1
        try:
            if os.fstat(file).st_size:
                os.fsync(file)  # an interruption may have come between a record and its synchronisation
            elif self.created:  # bad input stopped the run before its first answer
                self.path.unlink(missing_ok=True)
        finally:
            os.close(file)


def part(path: str | os.PathLike, rank: int) -> RecordFile:
    """The part of the results file `path` that process `rank` > 0 writes."""
    return RecordFile(f"{os.path.realpath(path)}.part-{rank}")


class OutputFile(RecordFile):
    """The whole file. `finished`: (prompt id, chain id) of the answers that were there, `faults` of them bad."""

    def __init__(self, path: str | os.PathLike, digests: dict[tuple[int, int], str]):
        """digests: of every answer that is wanted, by (prompt id, chain id), in prompt-major order."""
        super().__init__(path)
        self.digests = digests
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            self.temporary.unlink(missing_ok=True)
            found = self._take_over()
        except BaseException:
            self.close()
            raise
        self.finished, self.faults = set(found.places), found.faults

    def finish(self) -> int:
        """Put the records, those of the parts among them, into order. Returns how many answers are missing."""
        found = self._take_over(order=True)
        return len(self.digests) - len(found.places)

    def count(self) -> int:
        """Records that are there now. Counted, since an interruption may come between a write and its bookkeeping."""
        return sum(1 for path in (self.path, *self._parts()) for _ in whole_lines(path))

    def _take_over(self, order: bool = False) -> _Found:
        """Read what is there, into one file where there are parts, or where `order` asks for what is not so yet."""
        locks = [_open_locked(path) for path in self._parts()]
        try:
            found = self._read()
            if self._parts() or (order and not found.ordered):
                self._rewrite(found)
            elif found.end < os.fstat(self.file).st_size:
                os.ftruncate(self.file, found.end)
            return found
        finally:
            for lock in locks:
                os.close(lock)

    def _parts(self) -> list[Path]:
        prefix = self.path.name + ".part-"
        return sorted(path for path in self.path.parent.iterdir() if path.name.startswith(prefix))

    def _read(self) -> _Found:
        found = _Found()
        last = (-1, -1)
        for path in (self.path, *self._parts()):
            for number, start, line in whole_lines(path):
                key, fault = self._check(path, number, line)
                if key not in found.places:  # a record may have been copied out of a part before it was removed
                    found.places[key] = path, start, len(line)
                    found.faults += fault
                found.ordered &= key > last
                last = key
                if path == self.path:
                    found.end = start + len(line)
        return found

    def _check(self, path: Path, number: int, line: bytes) -> tuple[tuple[int, int], bool]:
        try:
            known = json.loads(line)
            key = known["prompt_id"], known["chain_id"]
            same = self.digests.get(key) == known["digest"]
        except (ValueError, KeyError, TypeError):
            raise ArgumentError(
                f"--out {path} line {number} is not a record of power-kernels; name another file"
            ) from None
        if not same:
            raise ArgumentError(
                f"--out {path} line {number} (prompt {key[0]}, chain {key[1]}) was drawn with another model, "
                "configuration, seed or prompt; name another file or repeat the first command"
            )
        return key, known.get("finish") == "fault"

    def _rewrite(self, found: _Found) -> None:
        parts = self._parts()
        new = _open_locked(self.temporary)  # locked before it has the name that others lock
        try:
            os.fchmod(new, stat.S_IMODE(os.fstat(self.file).st_mode))
            sources = {path: open(path, "rb") for path in (self.path, *parts)}  # noqa: SIM115 - closed below
            try:
                with open(new, "wb", closefd=False) as target:
                    for _, (path, start, size) in sorted(found.places.items()):
                        sources[path].seek(start)
                        target.write(sources[path].read(size))
            finally:
                for source in sources.values():
                    source.close()
            os.fsync(new)
            os.replace(self.temporary, self.path)
        except BaseException:
            os.close(new)
            self.temporary.unlink(missing_ok=True)
            raise
        old, self.file = self.file, new  # first: an interruption must not leave a closed descriptor here
        os.close(old)
        _sync_folder(self.path.parent)
        for path in parts:
            path.unlink()


@dataclasses.dataclass
class _Found:
    """places: file, first byte and length of each record, by (prompt id, chain id). end: of the whole lines of the
    file itself. ordered: each record comes after the one before."""

    places: dict[tuple[int, int], tuple[Path, int, int]] = dataclasses.field(default_factory=dict)
    end: int = 0
    ordered: bool = True
    faults: int = 0


def whole_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and bytes of each line that was not cut off."""
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, start, line
            start += len(line)


def _open_locked(path: Path) -> int:
    """A descriptor for appending that no other process gets until it is closed."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ArgumentError(f"--out {path} cannot be written: {error}") from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ArgumentError(f"--out {path} is not a regular file; leave --out away to print the answers")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArgumentError(f"--out {path} is being written by another process") from None
            except OSError as error:
                raise ArgumentError(f"--out {path} is on a file system without locks: {error}") from None
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # between the two calls the file was replaced or removed


def _sync_folder(path: Path) -> None:
    """Makes the names in this folder last."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # said by file systems, of other machines mostly, that have no such call
            raise
    finally:
        os.close(folder)
