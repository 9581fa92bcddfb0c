"""Stop strings of a run: their automaton over a tokenizer's tokens, and the text before a string (DESIGN 3.1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from power_kernels.api.driver.text import answer_text
from power_kernels.errors import ArgumentError
from power_kernels.stop_strings import stop_automaton

_TRIED = 4096  # tokens that are decoded to see that their bytes are right


@dataclass(frozen=True)
class StopStrings:
    """strings: those of the config. token_bytes: the bytes that each token adds for them. table: what `mh_advance`
    takes as stop_next, int16 [S, V]. tokenizer, tokens, special: whose they are, and what it held at the time."""

    strings: tuple[str, ...]
    token_bytes: list[bytes]
    table: np.ndarray
    tokenizer: object
    tokens: int
    special: tuple[int, ...]

    @staticmethod
    def of(tokenizer, strings: Sequence[str], vocab_size: int) -> StopStrings:
        """A special token adds no text, and so no bytes, unless a string is its very name: "<|im_end|>" then means the
        token, too.

        Raises ArgumentError where the tokenizer does not say of which bytes its tokens are, and as `stop_automaton`
        does.
        """
        found = token_bytes(tokenizer, vocab_size)
        for string in strings:
            index = tokenizer.get_vocab().get(string, vocab_size)
            if index < vocab_size and not found[index]:
                found[index] = string.encode()
        table = stop_automaton([string.encode() for string in strings], found)
        return StopStrings(tuple(strings), found, table, tokenizer, *_extent(tokenizer))

    def fit(self, tokenizer, strings: tuple[str, ...]) -> bool:
        """Whether these are the strings, and the tokenizer is the one of then and has got no tokens since."""
        same = tokenizer is self.tokenizer and strings == self.strings
        return same and _extent(tokenizer) == (self.tokens, self.special)

    def before(self, tokenizer, prompt: list[int], tokens: list[int]) -> str:
        """The text of an answer whose last token completes a string, up to where that string begins.

        The place is found among the bytes, as the law finds it. In the text a string may stand earlier (a character
        that began in the prompt) or not at all (decoders write U+FFFD for bytes beside others that are no character).
        """
        pieces = [self.token_bytes[token] for token in tokens]
        written, last = b"".join(pieces), len(pieces[-1])
        begins = len(written)
        for string in self.strings:
            wanted = string.encode()
            place = written.find(wanted, max(0, len(written) - last - len(wanted) + 1))
            begins = place if 0 <= place < begins else begins
        text, rest = answer_text(tokenizer, prompt, tokens), written[begins:].decode(errors="replace")
        if text.endswith(rest):
            return text[: len(text) - len(rest)]
        kept, size = 0, 0
        while size + len(pieces[kept]) <= begins:
            size += len(pieces[kept])
            kept += 1
        return answer_text(tokenizer, prompt, tokens[:kept]) + pieces[kept][: begins - size].decode(errors="replace")


def _extent(tokenizer) -> tuple[int, tuple[int, ...]]:
    return len(tokenizer), tuple(tokenizer.all_special_ids)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first place where one of the strings begins: the cut that harnesses make afterwards."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else text


def token_bytes(tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each token adds to a text: none for special tokens, which texts leave out, and for ids that no
    token has. Raises ArgumentError for a tokenizer that is neither of the byte-level kind (GPT-2, Llama 3, Qwen) nor of
    SentencePiece's kind with byte tokens (Llama 2, Gemma, Phi-3), or whose decoder gives other texts.
    """
    if not callable(getattr(tokenizer, "get_vocab", None)):
        raise ArgumentError(
            f"stop is given with a tokenizer of the type {type(tokenizer).__name__}, which has no get_vocab(); stop "
            "strings need one of transformers that says of which bytes its tokens are"
        )
    names = {index: name for name, index in tokenizer.get_vocab().items() if 0 <= index < vocab_size}
    tokens = getattr(tokenizer, "added_tokens_decoder", {})
    silent = {*tokenizer.all_special_ids, *(index for index, token in tokens.items() if token.special)}
    spell = _speller(tokenizer)
    found = [b""] * vocab_size
    for index in names.keys() - silent:
        found[index] = spell(names[index])
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
