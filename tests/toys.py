"""Small models whose every answer can be enumerated, and an engine for them that really depends on its KV cache."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import power_kernels as pk
from power_kernels.api.driver.engine import EngineBusyError, Sampled
from power_kernels.api.driver.stop import byte_letters
from power_kernels.rng import as_int64
from power_kernels.state import LaneField, LaneStatus
from tests.devices import DEVICE


class Toy:
    """A table of logits over answer prefixes. EOS may be any tokens; a prefix never contains one."""

    def __init__(self, vocab: int, horizon: int, *, seed: int, eos: tuple[int, ...] = (), scale: float = 1.0,
                 eos_shift: float = 0.0, impossible: float = 0.0, forced: float = 0.0,
                 spell: tuple[bytes, ...] = (), stop: tuple[str, ...] = ()):  # fmt: skip
        """impossible: the share of logits that are -inf. forced: that of rows where one token has all the mass.
        spell: the bytes of each token, for the stop strings `stop`."""
        self.vocab, self.horizon, self.eos = vocab, horizon, tuple(eos)
        self.spell, self.stop = spell, stop
        self.open_tokens = [v for v in range(vocab) if v not in self.eos]
        generator = np.random.default_rng(seed)
        lengths = range(horizon + 1)
        prefixes = [p for n in lengths for p in itertools.product(self.open_tokens, repeat=n)]
        table = generator.normal(size=(len(prefixes), vocab)) * scale
        table[:, list(self.eos)] += eos_shift
        holes = np.random.default_rng([seed, 1])  # of its own: the finite logits do not depend on the holes
        only = holes.integers(vocab, size=(len(prefixes), 1)) == np.arange(vocab)
        lost = holes.random((len(prefixes), vocab)) < impossible
        lost |= holes.random((len(prefixes), 1)) < forced
        table[lost & ~only] = -np.inf
        # What the kernels read is float32; the reference must see the same numbers.
        self.table = dict(zip(prefixes, table.astype(np.float32).astype(np.float64), strict=True))

    def logits(self, tokens: tuple[int, ...]) -> np.ndarray:
        return self.table[tuple(tokens)]

    def answers(self, horizon: int) -> list[tuple[int, ...]]:
        """Every closed answer at a horizon, the short ones first."""
        found, still_open = [], [()]
        for n in range(1, horizon + 1):
            longer = [(*prefix, v) for prefix in still_open for v in range(self.vocab)]
            found.extend(x for x in longer if n == horizon or self.ends(x))
            still_open = [x for x in longer if not self.ends(x)]
        return found

    def ends(self, answer: tuple[int, ...]) -> bool:
        """Whether EOS or a stop string closes it, by the definition: a string is there."""
        text = b"".join(self.spell[token] for token in answer) if self.stop else b""
        return answer[-1] in self.eos or any(string.encode() in text for string in self.stop)

    @property
    def stop_next(self) -> np.ndarray | None:
        if not self.stop:
            return None
        return pk.stop_automaton([string.encode() for string in self.stop], list(self.spell))

    def tokenizer(self):
        """Of the byte-level kind: what the driver asks the tokens' bytes of. None for a toy without stop strings."""
        if not self.stop:
            return None
        letters = {byte: letter for letter, byte in byte_letters().items()}
        names = ["".join(letters[byte] for byte in token) or f"<{i}>" for i, token in enumerate(self.spell)]
        names += [f"<{i}>" for i in range(len(names), 16)]  # prompts may hold any token
        words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[-1]))
        words.decoder = decoders.ByteLevel()
        silent = [name for i, name in enumerate(names) if i >= len(self.spell) or not self.spell[i]]
        return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=silent)

    def logp(self, answer: tuple[int, ...]) -> float:
        total = 0.0
        for t, token in enumerate(answer):
            z = self.table[answer[:t]]
            total += z[token] - np.logaddexp.reduce(z)
        return float(total)


def straddling_toy(seed: int = 194, scale: float = 1.0) -> Toy:
    """Stop strings that overlap, of one token and of several, one of them inside a token; a token of no bytes."""
    return Toy(4, 5, seed=seed, scale=scale, spell=(b"a", b"b", b"cabd", b""), stop=("ab", "bba"))


def split_characters_toy() -> Toy:
    """Tokens that are no whole characters, and an EOS beside the stop strings."""
    spell = (b"", b"\xc3", b"\xa9x", b"\xa9")
    return Toy(4, 4, seed=32, eos=(0,), eos_shift=-1.0, spell=spell, stop=("\xe9",))


def power_toy(horizon: int = 5) -> Toy:
    """DESIGN 9.2: V=3, EOS=0 with -1.5, logits from default_rng(20)."""
    return Toy(3, horizon, seed=20, eos=(0,), eos_shift=-1.5)


def peaked_toy() -> Toy:
    """Weights near 0 (one token has nearly all of most rows), so that lengths decide, early rejections included."""
    return Toy(3, 4, seed=59, eos=(0,), scale=4.0)


class ToyEngine:
    """An engine whose KV cache is the tokens themselves, so that every rollback mistake changes the logits.

    Slabs [2, rows, 1, positions, 1] hold token ids (K) and their positions (V), moved by kv_copy_ranges only. A lane's
    logits are looked up by what its row says, after checking that K and V agree with each other and with the prompt.
    forwarded: tokens fed to running lanes, of all runs.
    """

    def __init__(self, toy: Toy, dtype: torch.dtype = torch.float32):
        self.toy, self.dtype = toy, dtype
        self.device = DEVICE
        self.vocab_size = 16  # prompts may hold any token, answers only the toy's
        self.max_context = None
        self.eos_token_ids = toy.eos
        self.forwarded = 0
        self.running = False

    def begin(
        self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int, entropy: bool = False
    ) -> None:
        if self.running:
            raise EngineBusyError("a run of this engine is on")
        self.running = True
        self.lanes, self.entropy = lanes, entropy
        self.chain_kv = torch.full((2, chains, 1, max_length, 1), -1, dtype=torch.int32, device=self.device)
        self.lane_kv = torch.full((2, chains * lanes, 1, max_length, 1), -1, dtype=torch.int32, device=self.device)
        self.prompts: list[list[int]] = [[]] * chains
        rows = chains * lanes
        self.alpha = torch.full((rows,), alpha, dtype=torch.float32, device=self.device)
        self.beta = torch.full((rows,), beta, dtype=torch.float32, device=self.device)
        self.seed = torch.tensor([as_int64(seed)], device=self.device)

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.chain_kv[:, slot] = -1
            self.lane_kv[:, slot * self.lanes : (slot + 1) * self.lanes] = -1
            kept = torch.tensor(prompt[:-1], dtype=torch.int32, device=self.device)
            self.chain_kv[0, slot, 0, : len(kept), 0] = kept
            self.chain_kv[1, slot, 0, : len(kept), 0] = torch.arange(len(kept), dtype=torch.int32, device=self.device)
            self.prompts[slot] = list(prompt)
        return [len(p) - 1 for p in prompts]

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        pk.kv_copy_ranges(self.chain_kv, self.lane_kv, commit_range)
        pk.kv_copy_ranges(self.lane_kv, self.chain_kv, open_range)

    def step(self, state: pk.ChainState) -> Sampled:
        out = pk.sample_tokens(
            torch.from_numpy(self.logits(state)).to(self.device, self.dtype),
            self.alpha[: state.lane_field.shape[0]],
            self.beta[: state.lane_field.shape[0]],
            self.seed,
            state.counter,
            state.exclude,
            return_entropy=self.entropy,
        )
        return Sampled(out.token, out.logq, out.weight, out.status, entropy=out.entropy)

    def logits(self, state: pk.ChainState) -> np.ndarray:
        """Feed every lane; float32 [rows, V], zeros where the sample is not used."""
        rows = torch.arange(state.input_id.shape[0], device=self.device)
        self.lane_kv[0, rows, 0, state.position, 0] = state.input_id.to(torch.int32)
        self.lane_kv[1, rows, 0, state.position, 0] = state.position.to(torch.int32)
        keys, at = self.lane_kv[:, : len(rows), 0, :, 0].tolist()
        logits = np.zeros((len(rows), self.toy.vocab), np.float32)
        statuses, positions = state.lane_field[:, LaneField.STATUS].tolist(), state.position.tolist()
        for lane, (status, position) in enumerate(zip(statuses, positions, strict=True)):
            if status == LaneStatus.IDLE:
                continue
            row, prompt = keys[lane][: position + 1], self.prompts[lane // self.lanes]
            assert at[lane][: position + 1] == list(range(position + 1)), f"lane {lane} reads KV of other positions"
            assert row[: len(prompt)] == prompt, f"lane {lane} reads KV of another prompt"
            if status == LaneStatus.RUNNING:  # a closed lane that waits has nothing left to sample
                self.forwarded += 1
                logits[lane] = self.toy.logits(tuple(row[len(prompt) :]))
        return logits

    def move(self, source: int, target: int) -> None:
        self.chain_kv[:, target] = self.chain_kv[:, source]
        p = self.lanes
        self.lane_kv[:, target * p : (target + 1) * p] = self.lane_kv[:, source * p : (source + 1) * p]
        self.prompts[target] = self.prompts[source]

    def widen(self, chains: int, lanes: int) -> None:
        old = self.lane_kv[:, : chains * self.lanes].unflatten(1, (chains, self.lanes)).clone()
        self.lane_kv = torch.full_like(self.lane_kv, -1)
        self.lane_kv[:, : chains * lanes].unflatten(1, (chains, lanes))[:, :, : self.lanes] = old
        self.lanes = lanes

    def end(self) -> None:
        self.running = False
