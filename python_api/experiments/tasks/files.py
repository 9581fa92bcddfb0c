"""Files of questions, read with errors that name the argument, the file and the line."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

from power_kernels.errors import ArgumentError


def read_entries(path: str | Path, fields: tuple[str, ...] = ()) -> tuple[str, list[dict]]:
    """The digest of a file and its entries: a JSON list, or an object a line; .gz is unpacked. fields: strings that
    each entry must hold. Raises ArgumentError."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
        if text.lstrip().startswith("["):
            entries = json.loads(text)
        else:
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]  # JSON may hold other line breaks
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise ArgumentError(f"data {path} cannot be read: {error}") from None
    if not entries:
        raise ArgumentError(f"data {path} holds nothing")
    for number, entry in enumerate(entries, 1):
        try:
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                f"data {path} entry {number} holds half of a surrogate pair, which is no text"
            ) from None
        missing = [key for key in fields if not isinstance(entry, dict) or not isinstance(entry.get(key), str)]
        if missing or not isinstance(entry, dict):
            raise ArgumentError(f"data {path} entry {number} must be an object with {', '.join(fields)} (text)")
    return hashlib.sha256(raw).hexdigest(), entries


def asked(text: str, chat: bool) -> dict:
    """A text as a prompt, or as the user's turn of a conversation."""
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
