"""The results file of `power-kernels generate`: JSON lines, written as answers finish, resumable.

Each record carries a digest of everything its answer depends on. A run that starts again with the same command finds
its own records and draws only the others; a file that holds another run's records is refused. A line that was cut off
by an interruption is dropped, since its answer is drawn again.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from pathlib import Path

from power_kernels.api.results import PowerResult
from power_kernels.errors import ArgumentError


def digest(**everything) -> str:
    """Of JSON-able values: model, config, seed, prompt tokens, ids."""
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def record(result: PowerResult, prompt: dict, run: str) -> dict:
    """One line of the file. prompt: what the prompts file said, repeated so that the line stands alone."""
    return {
        "prompt_id": result.prompt_id,
        "chain_id": result.chain_id,
        **{key: prompt[key] for key in ("id", "prompt", "messages") if key in prompt},
        "text": result.text,
        "tokens": result.tokens,
        "logp": result.logp,
        "finish": result.finish,
        "status": result.status.name,
        "steps": result.steps,
        "accepted": result.accepted,
        "unchanged": result.unchanged,
        "cost": {**dataclasses.asdict(result.cost), "forwarded": result.cost.forwarded},
        "digest": run,
    }


class OutputFile:
    """Open for one process at a time. `finished` holds the (prompt id, chain id) that are there already."""

    def __init__(self, path: str | os.PathLike, digests: dict[tuple[int, int], str]):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.created = not self.path.exists()
            self.file = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise ArgumentError(f"--out {self.path} cannot be written: {error}") from None
        try:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArgumentError(f"--out {self.path} is being written by another process") from None
            self.finished = self._read(digests)
            self.file.seek(0, os.SEEK_END)
        except BaseException:
            self.file.close()
            raise

    def _read(self, digests: dict[tuple[int, int], str]) -> set[tuple[int, int]]:
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        finished = set()
        self.faults = 0  # records of chains that stopped at bad logits
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                known = json.loads(line)
                key = known["prompt_id"], known["chain_id"]
                same = digests.get(key) == known["digest"]
            except (ValueError, KeyError, TypeError):
                raise ArgumentError(
                    f"--out {self.path} line {number} is not a record of power-kernels; name another file"
                ) from None
            if not same:
                raise ArgumentError(
                    f"--out {self.path} line {number} (prompt {key[0]}, chain {key[1]}) was drawn with another model, "
                    "configuration, seed or prompt; name another file or repeat the first command"
                )
            finished.add(key)
            self.faults += known.get("finish") == "fault"
        if len(whole) < len(content):
            self.file.truncate(len(whole))
        return finished

    def write(self, line: dict) -> None:
        """Append one record; it is on disk when this returns."""
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def count(self) -> int:
        """Records in the file now. Counted, since an interruption may come between a write and its bookkeeping."""
        self.file.seek(0)
        return self.file.read().count(b"\n")

    def close(self) -> None:
        if self.created and self.file.tell() == 0:  # bad input stopped the run before its first answer
            self.path.unlink(missing_ok=True)
        self.file.close()
