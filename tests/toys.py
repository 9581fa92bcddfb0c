"""Small models whose every answer can be enumerated, and an engine for them that really depends on its KV cache."""

from __future__ import annotations

import itertools

import numpy as np
import torch

import power_kernels as pk
from power_kernels.api.engine import Sampled


class Toy:
    """A table of logits over answer prefixes. EOS may be any tokens; a prefix never contains one."""

    def __init__(self, vocab: int, horizon: int, *, seed: int, eos: tuple[int, ...] = (), scale: float = 1.0,
                 eos_shift: float = 0.0):  # fmt: skip
        self.vocab, self.horizon, self.eos = vocab, horizon, tuple(eos)
        self.open_tokens = [v for v in range(vocab) if v not in self.eos]
        generator = np.random.default_rng(seed)
        lengths = range(horizon + 1)
        prefixes = [p for n in lengths for p in itertools.product(self.open_tokens, repeat=n)]
        table = generator.normal(size=(len(prefixes), vocab)) * scale
        table[:, list(self.eos)] += eos_shift
        # What the kernels read is float32; the reference must see the same numbers.
        self.table = {p: row for p, row in zip(prefixes, table.astype(np.float32).astype(np.float64), strict=True)}

    def logits(self, tokens: tuple[int, ...]) -> np.ndarray:
        return self.table[tuple(tokens)]

    def answers(self, horizon: int) -> list[tuple[int, ...]]:
        """Every closed answer at a horizon."""
        found = []
        for n in range(1, horizon + 1):
            for prefix in itertools.product(self.open_tokens, repeat=n - 1):
                last = range(self.vocab) if n == horizon else self.eos
                found.extend((*prefix, v) for v in last)
        return found

    def logp(self, answer: tuple[int, ...]) -> float:
        total = 0.0
        for t, token in enumerate(answer):
            z = self.table[answer[:t]]
            total += z[token] - np.logaddexp.reduce(z)
        return float(total)


def power_toy(horizon: int = 5) -> Toy:
    """DESIGN 9.2: V=3, EOS=0 with -1.5, logits from default_rng(20)."""
    return Toy(3, horizon, seed=20, eos=(0,), eos_shift=-1.5)


class ToyEngine:
    """An engine whose KV cache is the tokens themselves, so that every rollback mistake changes the logits.

    Slabs [2, rows, 1, positions, 1] hold token ids (K) and their positions (V), moved by kv_copy_ranges only. The logits
    of a lane are looked up by what its row says, after checking that K and V agree with each other.
    """

    def __init__(self, toy: Toy, dtype: torch.dtype = torch.float32):
        self.toy, self.dtype = toy, dtype
        self.device = torch.device("cpu")
        self.vocab_size = 16  # prompts may hold any token, answers only the toy's
        self.max_context = None
        self.eos_token_ids = toy.eos
        self.forwarded = 0

    def begin(self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int) -> None:
        self.lanes = lanes
        self.chain_kv = torch.full((2, chains, 1, max_length, 1), -1, dtype=torch.int32)
        self.lane_kv = torch.full((2, chains * lanes, 1, max_length, 1), -1, dtype=torch.int32)
        self.prompt_length = [0] * chains
        rows = chains * lanes
        self.alpha = torch.full((rows,), alpha, dtype=torch.float32)
        self.beta = torch.full((rows,), beta, dtype=torch.float32)
        self.seed = torch.tensor([seed])

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.chain_kv[:, slot] = -1
            self.lane_kv[:, slot * self.lanes : (slot + 1) * self.lanes] = -1
            kept = torch.tensor(prompt[:-1], dtype=torch.int32)
            self.chain_kv[0, slot, 0, : len(kept), 0] = kept
            self.chain_kv[1, slot, 0, : len(kept), 0] = torch.arange(len(kept), dtype=torch.int32)
            self.prompt_length[slot] = len(prompt)
        return [len(p) - 1 for p in prompts]

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        pk.kv_copy_ranges(self.chain_kv, self.lane_kv, commit_range)
        pk.kv_copy_ranges(self.lane_kv, self.chain_kv, open_range)

    def step(self, state: pk.ChainState):
        rows = state.input_id.shape[0]
        logits = torch.zeros(rows, self.toy.vocab, dtype=self.dtype)
        running = state.lane_field[:, 0] != 0
        for lane in range(rows):
            position = int(state.position[lane])
            self.lane_kv[0, lane, 0, position, 0] = state.input_id[lane].to(torch.int32)
            self.lane_kv[1, lane, 0, position, 0] = position
            if not running[lane]:
                continue
            self.forwarded += 1
            row = self.lane_kv[:, lane, 0, : position + 1, 0].tolist()
            assert row[1] == list(range(position + 1)), f"lane {lane} reads KV of other positions: {row}"
            answer = tuple(row[0][self.prompt_length[lane // self.lanes] :])
            if any(t in self.toy.eos for t in answer) or len(answer) >= self.toy.horizon:
                continue  # a closed lane that waits: its sample is not used
            logits[lane] = torch.from_numpy(self.toy.logits(answer)).to(self.dtype)
        out = pk.sample_tokens(
            logits, self.alpha[:rows], self.beta[:rows], self.seed, state.counter, state.exclude
        )
        return Sampled(out.token, out.logq, out.weight, out.status)

    def move(self, source: int, target: int) -> None:
        self.chain_kv[:, target] = self.chain_kv[:, source]
        p = self.lanes
        self.lane_kv[:, target * p : (target + 1) * p] = self.lane_kv[:, source * p : (source + 1) * p]
        self.prompt_length[target] = self.prompt_length[source]

    def end(self) -> None:
        pass
