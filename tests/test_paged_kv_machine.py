"""Chains on a paged cache as a state machine, against a plain Python model of it (DESIGN 5.7).

Random forks, tokens, commits, rollbacks and releases of many rows at once. After every operator the reference counts
and the free list account for every block, and every sequence's keys and values are those of the model, in which blocks
are Python objects; nothing is ever written to a block that is shared.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels.block_tables import BlockStatus, BlockTables
from tests.op_helpers import BACKENDS, serving
from tests.test_paged_kv import audit, int32

pytest.importorskip("hypothesis")  # a machine that only checks a GPU may lack it
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

OK, OUT = BlockStatus.OK, BlockStatus.OUT_OF_BLOCKS


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


ROWS, MAX_BLOCKS, HEADS, DIM = 6, 5, 2, 3
SEEDS = st.integers(0, 2**32 - 1)  # of numpy's generator: hypothesis chooses the operators, it their arguments


class Block:
    def __init__(self, slots: list[int]):
        self.slots = slots


class Model:
    """Rows are lists of `Block`s, shared as Python shares objects; nothing is counted, everything can be."""

    def __init__(self, blocks: int, block_size: int):
        self.blocks, self.block_size = blocks, block_size
        self.rows: list[list[Block]] = [[] for _ in range(ROWS)]
        self.length = [0] * ROWS
        self.fresh = 0

    def tokens(self, r: int) -> list[int]:
        return [slot for block in self.rows[r] for slot in block.slots][: self.length[r]]

    def free(self) -> int:
        return self.blocks - len({id(block) for row in self.rows for block in row})

    def holders(self, block: Block) -> int:
        return sum(block is other for row in self.rows for other in row)

    def copy(self, block: Block, stop: int) -> Block:
        return Block(block.slots[:stop] + [-1] * (self.block_size - stop))

    def fork(self, parent: list[int], tokens: list[int]) -> list[BlockStatus]:
        free, found = self.free(), []
        for r, (p, n) in enumerate(zip(parent, tokens, strict=True)):
            full, split = divmod(n, self.block_size)
            needs = p >= 0 and split > 0
            free -= needs
            found.append(OUT if needs and free < 0 else OK)
            if p >= 0 and found[r] is OK:
                self.rows[r] = self.rows[p][:full]
                if split:
                    self.rows[r].append(self.copy(self.rows[p][full], split))
                self.length[r] = n
        return found

    def extend(self, tokens: list[int]) -> list[BlockStatus]:
        free, found = self.free(), []
        for r, n in enumerate(tokens):
            found.append(OK)
            if n <= self.length[r]:
                continue
            row, split = list(self.rows[r]), self.length[r] % self.block_size
            shared = split > 0 and self.holders(row[-1]) > 1
            new = math.ceil(n / self.block_size) - len(row) + shared
            free -= new
            if new and free < 0:
                found[r] = OUT
                continue
            if shared:
                row.append(self.copy(row.pop(), split))
            row += [Block([-1] * self.block_size) for _ in range(new - shared)]
            self.rows[r], self.length[r] = row, n
        return found

    def commit(self, source: list[int]) -> None:
        for r, s in enumerate(source):
            if s >= 0:
                self.rows[r], self.length[r] = self.rows[s], self.length[s]
                self.rows[s], self.length[s] = [], 0

    def rollback(self, tokens: list[int]) -> None:
        for r, n in enumerate(tokens):
            if 0 <= n < self.length[r]:
                del self.rows[r][math.ceil(n / self.block_size) :]
                self.length[r] = n


class Machine(RuleBasedStateMachine):
    """The operators and the pool on one side, the model on the other; equal after every operator."""

    met: Counter

    # 7 blocks: less than two whole rows; 19: enough unless most rows share little
    @initialize(
        blocks=st.sampled_from([7, 13, 19]), block_size=st.integers(1, 6), layout=st.sampled_from(["NHD", "HND"])
    )
    def begin(self, blocks: int, block_size: int, layout: str) -> None:
        self.model, self.layout = Model(blocks, block_size), layout
        self.tables = BlockTables.allocate(ROWS, MAX_BLOCKS, blocks, block_size)
        inner = (block_size, HEADS) if layout == "NHD" else (HEADS, block_size)
        self.pool = torch.full((2, blocks, *inner, DIM), -7, dtype=torch.int32)
        self.by_position = self.pool if layout == "NHD" else self.pool.transpose(2, 3)  # [2, N, bs, heads, D]

    def content(self, token: int) -> torch.Tensor:
        return token * 100 + torch.arange(2 * HEADS * DIM, dtype=torch.int32).view(2, HEADS, DIM)

    def expect(self, status: list[BlockStatus], operator: str) -> None:
        assert self.tables.status.tolist() == status
        self.met[f"{operator} out of blocks"] += status.count(OUT)

    def copy(self) -> None:
        counts = self.tables.refcount.tolist()
        for to, _, start, stop in self.tables.copies.tolist():
            if start < stop:
                assert counts[to] == 1, "a copy would write a block that is shared"
                self.met["copies"] += 1
        pk.kv_copy_blocks(self.pool, self.tables.copies, self.layout)

    def fork(self, seed: int) -> None:
        draw, length = np.random.default_rng(seed), self.model.length
        parents = [r for r in range(ROWS) if length[r]]
        parent, tokens = [-1] * ROWS, [0] * ROWS
        for r in range(ROWS):
            if length[r] == 0 and parents and draw.random() < 0.7:
                parent[r] = int(draw.choice(parents))
                tokens[r] = int(draw.integers(length[parent[r]] + 1))
        pk.block_table_fork(self.tables, int32(parent), int32(tokens))
        self.expect(self.model.fork(parent, tokens), "fork")
        self.copy()
        self.met["forks"] += sum(p >= 0 for p in parent)

    def append(self, seed: int) -> None:
        """Most rows go on by a few tokens, some empty ones begin with a prompt."""
        draw, old = np.random.default_rng(seed), list(self.model.length)
        most = MAX_BLOCKS * self.model.block_size
        growth = [draw.choice([0, 1, 2, 7], p=[0.4, 0.3, 0.2, 0.1] if n else [0.8, 0, 0, 0.2]) for n in old]
        tokens = [min(n + int(more), most) if more else -1 for n, more in zip(old, growth, strict=True)]
        pk.block_table_extend(self.tables, int32(tokens))
        copied = (self.tables.copies[:, 3] > 0).sum().item()
        self.met["copies on write"] += copied
        status = self.model.extend(tokens)
        self.expect(status, "extend")
        self.copy()
        counts, table = self.tables.refcount.tolist(), self.tables.block_table.tolist()
        for r, n in enumerate(tokens):
            for t in range(old[r], n if status[r] is OK else old[r]):
                block, place = table[r][t // self.model.block_size], t % self.model.block_size
                assert counts[block] == 1, "a row would write a block that is shared"
                self.model.fresh += 1
                self.model.rows[r][t // self.model.block_size].slots[place] = self.model.fresh
                self.by_position[:, block, place] = self.content(self.model.fresh)
                self.met["tokens"] += 1

    def commit(self, seed: int) -> None:
        order, source = np.random.default_rng(seed).permutation(ROWS).tolist(), [-1] * ROWS
        for r, s in zip(order[0:4:2], order[1:4:2], strict=True):
            if self.model.length[s]:
                source[r] = s
        pk.block_table_commit(self.tables, int32(source))
        self.model.commit(source)
        self.expect([OK] * ROWS, "commit")
        self.met["commits"] += sum(s >= 0 for s in source)

    def rollback(self, seed: int) -> None:
        """Rows give everything back, or a part of it, are left alone, or have no more."""
        draw = np.random.default_rng(seed)
        parts = [int(draw.integers(n + 2)) for n in self.model.length]
        cuts = [int(draw.choice([0, part, -1], p=[0.15, 0.55, 0.3])) for part in parts]
        pk.block_table_rollback(self.tables, int32(cuts))
        self.met["rollbacks"] += sum(0 <= n < old for n, old in zip(cuts, self.model.length, strict=True))
        self.model.rollback(cuts)

    @rule(seed=SEEDS)
    def rows_go_on(self, seed: int) -> None:
        self.append(seed)

    @rule(seed=SEEDS)
    def rows_are_forked(self, seed: int) -> None:
        self.fork(seed)

    @rule(seed=SEEDS)
    def proposals_are_accepted(self, seed: int) -> None:
        self.commit(seed)

    @rule(seed=SEEDS)
    def rows_are_cut(self, seed: int) -> None:
        self.rollback(seed)

    @rule(seed=SEEDS)
    def a_sampler_makes_a_step(self, seed: int) -> None:
        """Some proposals are accepted, some lanes start again, often inside a block that they share, and all go on."""
        for operator in (self.commit, self.fork, self.rollback, self.append):
            operator(seed)
            self.everything_agrees()

    @invariant()
    def everything_agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        audit(self.tables)
        assert self.tables.length.tolist() == self.model.length
        assert int(self.tables.free_count) == self.model.free()
        table = self.tables.block_table
        for r, n in enumerate(self.model.length):
            tokens = self.model.tokens(r)
            if not tokens:
                continue
            position = torch.arange(n)
            blocks = table[r].long()[position // self.model.block_size]
            found = self.by_position[:, blocks, position % self.model.block_size]  # [2, n, heads, D]
            assert torch.equal(found, torch.stack([self.content(token) for token in tokens], dim=1))


# Triton's interpreter takes 10 ms a launch.
BUDGET = {"cpp": (60, 30), "reference": (45, 30), "triton": (6, 10)}


def test_random_chains_equal_a_plain_model_after_every_operator(backend):
    """No leak, no double free, no block written while shared, contents equal; what happened is counted."""
    examples, steps = BUDGET[backend]
    met = Counter()

    class Run(Machine):
        pass

    Run.met = met
    run_state_machine_as_test(
        Run,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    for event in ("forks", "copies", "commits", "rollbacks", "tokens", "extend out of blocks"):
        assert met[event] >= (1 if backend == "triton" else 20), (event, met)
    if backend != "triton":  # too rare in a run this short; test_paged_kv.py has them in lockstep
        for event in ("copies on write", "fork out of blocks"):
            assert met[event] >= 3, (event, met)
