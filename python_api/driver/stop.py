"""Stop strings of a run: the bytes of a tokenizer's tokens, and the text before a string (DESIGN 3.1)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from power_kernels.errors import ArgumentError
from power_kernels.stop_strings import stop_automaton

_TRIED = 4096  # tokens that are decoded to see that their bytes are right


def stop_table(tokenizer, stop: Sequence[str], vocab_size: int) -> np.ndarray:
    """What `mh_advance` takes as stop_next: int16 [S, vocab_size]. Raises ArgumentError where the tokenizer does not
    say of which bytes its tokens are, and as `stop_automaton` does."""
    return stop_automaton([string.encode() for string in stop], token_bytes(tokenizer, vocab_size))


def before_stop(text: str | None, stop: Sequence[str]) -> str | None:
    """The text of an answer that a stop string closed, up to the first place where one begins."""
    if text is None:
        return None
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else text


def token_bytes(tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each token adds to a text: none for special tokens, which texts leave out, and for ids that no
    token has. Raises ArgumentError for a tokenizer that is neither of the byte-level kind (GPT-2, Llama 3, Qwen) nor of
    SentencePiece's kind with byte tokens (Llama 2, Gemma, Phi-3), or whose decoder gives other texts.
    """
    names = {index: name for name, index in tokenizer.get_vocab().items() if 0 <= index < vocab_size}
    tokens = getattr(tokenizer, "added_tokens_decoder", {})
    added = {index: str(token) for index, token in tokens.items()}
    silent = {*tokenizer.all_special_ids, *(index for index, token in tokens.items() if token.special)}
    spell = _speller(tokenizer)
    found = [b""] * vocab_size
    for index, name in names.items():
        if index in added:
            found[index] = b"" if index in silent else added[index].encode()
        elif index not in silent:
            found[index] = spell(name)
    _check(tokenizer, found, sorted(set(names) - silent))
    return found


def _speller(tokenizer):
    """The function from a token's name in the vocabulary to its bytes."""
    kinds = _decoders(tokenizer)
    if "ByteLevel" in kinds:
        bytes_of = byte_letters()

        def spell(name: str) -> bytes:
            try:
                return bytes(bytes_of[character] for character in name)
            except KeyError:
                return name.encode()  # a token that was added as plain text

        return spell
    if "ByteFallback" in kinds:

        def spell(name: str) -> bytes:
            if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                return bytes([int(name[3:5], 16)])
            return name.replace("\u2581", " ").encode()

        return spell
    raise ArgumentError(
        f"stop is given with a tokenizer whose decoder is {' and '.join(sorted(kinds)) or 'not known'}; stop strings "
        "need one that says of which bytes its tokens are: byte-level, or SentencePiece's with byte fallback"
    )


def _decoders(tokenizer) -> set[str]:
    """The kinds of decoder that a fast tokenizer chains."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str())["decoder"]
    if decoder is None:
        return set()
    return {part["type"] for part in decoder.get("decoders", [decoder])}


def byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for those from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _check(tokenizer, found: list[bytes], tokens: list[int]) -> None:
    """Decodes tokens, each behind another, and compares. Raises ArgumentError naming the first that differs."""
    every = max(1, len(tokens) // _TRIED)
    tried = [token for token in tokens[::every] if found[token]]
    if not tried:
        return
    before = next((token for token in tried if found[token].isascii() and found[token].isalpha()), tried[0])
    texts = tokenizer.batch_decode(
        [[before, token] for token in tried], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    head = found[before]
    for token, text in zip(tried, texts, strict=True):
        wanted = (head + found[token]).decode(errors="replace")
        if text.lstrip(" ") != wanted.lstrip(" "):  # SentencePiece's kind drops the space that a text begins with
            raise ArgumentError(
                f"stop is given with a tokenizer that decodes token {token} to {text!r} behind "
                f"{head.decode(errors='replace')!r}, where its bytes are {found[token]!r}; stop strings need the bytes"
            )
