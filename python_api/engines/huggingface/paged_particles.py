"""Particles on a paged KV cache: they fork by sharing blocks (DESIGN 3.9, 5.7).

    a particle's further child     its row of the table forks the particle's: at most one block is copied
    a candidate is kept            the kept row forks that of the particle that it closes
    a particle dies out            its row gives back its blocks, those that no other row holds become free
    the candidate is the answer    nothing: the two chain rows change their parts (`GroupField.ANSWER_ROW`)

The reference of a sweep is not fed. The last hidden states of the answer lie in the same blocks as its keys and values,
in a pool of their own that every copy of blocks copies, too.
"""

from __future__ import annotations

import torch

from power_kernels.api.driver.particles.state import GroupField, ParticleState
from power_kernels.api.engines.huggingface.paged_rows import PagedRows
from power_kernels.state import Mode

CHAIN_ROWS = 2  # of a slot: the current answer's and the kept candidate's


class PagedParticles:
    """The rows of a run: 2 a slot, behind them N a slot, a particle each.

    groups, particles: slots and N. hidden_size: of a last hidden state.
    """

    def __init__(self, kv: PagedRows, *, groups: int, particles: int, hidden_size: int, dtype: torch.dtype):
        self._kv, self._groups, self._particles = kv, groups, particles
        self._first_lane = CHAIN_ROWS * groups
        pool = kv.add_pool(1, 1, hidden_size, dtype)
        self._hidden = pool[0, :, :, 0].flatten(0, 1)  # [N * block_size, D]

    # -- forks

    def copy(self, state: ParticleState) -> None:
        """What `ParticleEngine.copy_particles` asks for. Where a range starts does not matter: what comes before it is
        shared as well."""
        lane = self._first_lane
        # The candidate first: the particle that it closes may have no child that goes on.
        self._fork((state.keep_from_lane, 0, lane), (state.keep_from_answer, 0, 0))
        self._drop(state)
        self._fork((state.fork_from_lane.flatten(0, 1), lane, lane), (state.fork_from_answer.flatten(0, 1), lane, 0))

    def _fork(self, *copies: tuple[torch.Tensor, int, int]) -> None:
        """Each: ranges (to, from, start, stop), and what is to be added to `to` and to `from` for rows of the table."""
        kv = self._kv
        parent = torch.full((kv.rows,), -1, dtype=torch.int32, device=kv.device)
        tokens = parent
        for ranges, to_base, from_base in copies:
            to, of, start, stop = ranges.unbind(1)
            asked = stop > 0
            parent = torch.maximum(parent, kv.vector(to + to_base, of + from_base, asked))
            tokens = torch.maximum(tokens, kv.vector(to + to_base, stop, asked))
            kv.counts.slab_copied += (stop - start).clamp(min=0).sum()
        kv.rollback(parent.clamp(max=0))  # to nothing where there is a parent: a row to fork into must be empty
        kv.fork(parent, tokens)

    def _drop(self, state: ParticleState) -> None:
        """Give back what nobody reads: lanes without a particle, candidates that were not taken, slots not in use.

        A chain row goes back to its prompt, which other slots may share.
        """
        field, active = state.field, state.groups
        tokens = torch.full((self._kv.rows,), -1, dtype=torch.int32, device=field.device)
        chain = tokens[: self._first_lane].view(self._groups, CHAIN_ROWS)
        lane = tokens[self._first_lane :].view(self._groups, self._particles)
        lane[:active].masked_fill_(~state.live, 0)
        kept = 1 - field[:, GroupField.ANSWER_ROW]
        void = (field[:, GroupField.KEPT_LENGTH] == 0) | (field[:, GroupField.MODE] != Mode.PROPOSE)
        prompt = torch.where(void, field[:, GroupField.BASE] - 1, -1)
        chain[:active].scatter_(1, kept[:, None], prompt.to(torch.int32)[:, None])
        chain[active:], lane[active:] = 0, 0
        self._kv.rollback(tokens)

    # -- a step

    def children(self, state: ParticleState, decode, head) -> torch.Tensor:
        """Logits [G * (N + 1), V], as `ParticleEngine.children` says.

        decode: gives the last hidden states of (rows of the table, token ids, positions) and the places where they were
        written, all [n]. head: logits of hidden states.
        """
        hidden = self._hidden.new_zeros(*state.live.shape[:1], self._particles + 1, self._hidden.shape[1])
        hidden[:, -1] = self._of_references(state)
        lanes = state.live.flatten().nonzero()[:, 0]  # the host looks: empty rows have no block to be written to
        if len(lanes):
            rows, position = lanes + self._first_lane, state.position.flatten()[lanes]
            self._kv.extend(self._kv.vector(rows, position + 1, position >= 0))
            output, written = decode(rows, state.input_id.flatten()[lanes], position)
            self._hidden[written] = output
            self._kv.wipe(written, ~output.isfinite().all(1))
            hidden[lanes // self._particles, lanes % self._particles] = output
        return head(hidden.flatten(0, 1))

    def _of_references(self, state: ParticleState) -> torch.Tensor:
        """[G, D]: of each slot's current answer at the position of its lanes; before there is one, of no meaning."""
        slot = torch.arange(state.groups, device=self._kv.device)
        rows = CHAIN_ROWS * slot + state.field[:, GroupField.ANSWER_ROW]
        return self._hidden[self._kv.places(rows, state.position[:, :1])[:, 0]]
