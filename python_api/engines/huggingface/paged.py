"""Power sampling on a paged KV cache: an example of the `block_table_*` operators, to read and to adapt (DESIGN 5.7).

One pool of blocks and one block table (`paged_rows.py`), whose rows are

    [0, chains)                     the accepted sequences
    [chains, chains * (1 + lanes))  the lanes, which share their chain's past and write blocks of their own

    a lane starts again     rollback to nothing, fork of its chain: full blocks are shared, the split one is copied
    a lane goes on          rollback to the position that it feeds, then room for one more token
    a proposal is accepted  commit: its row becomes the chain's, which gives its old blocks back

Particles have two rows a chain in front, and lanes that fork from each other (`paged_particles.py`).

Attention does here what it is easiest to read: it gathers the blocks of every row into a contiguous tensor, as long as
the longest row, which the host looks up. A serving stack gives the table to its paged attention kernel instead.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import power_kernels as pk
from power_kernels.api.driver.engine import EngineBusyError, Sampled, UnsupportedModelError
from power_kernels.api.driver.particles.state import ParticleState
from power_kernels.api.engines.huggingface.decode_attention import DecodeView
from power_kernels.api.engines.huggingface.inspection import find_head
from power_kernels.api.engines.huggingface.paged_particles import CHAIN_ROWS, PagedParticles
from power_kernels.api.engines.huggingface.paged_rows import KvShape, PagedRows, blocks_of
from power_kernels.api.engines.huggingface.ragged_attention import NAME, PrefillView, Segment, attached
from power_kernels.rng import as_int64

_MODELS = ("llama", "qwen2", "qwen3")


class PagedEngine:
    """Runs a transformers causal LM for the driver on a paged cache. `power_kernels.api.Engine` and `ParticleEngine`
    say what it promises.

    model: a Llama, Qwen2 or Qwen3 without sliding windows, with rotary frequencies that no other row changes.
    block_size: positions of a block. num_blocks: blocks of the pool; by default as many as rows that share nothing
    could need, so that none can be missing. Where it is given, each step waits to see that every row found its blocks.
    Raises UnsupportedModelError for another model, OutOfBlocksError when a row finds no block.
    """

    most_rows = 128  # of particles in a step: more at once save little where attention gathers every row

    def __init__(self, model: PreTrainedModel, *, block_size: int = 16, num_blocks: int | None = None):
        config = model.config.get_text_config()
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if config.model_type not in _MODELS or sliding or rope in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{type(model).__name__} is a {config.model_type!r} with {sorted(sliding)} and rope {rope!r}; "
                f"this example takes {', '.join(_MODELS)} with full attention and fixed rotary frequencies"
            )
        self.model, self.block_size, self.num_blocks = model, block_size, num_blocks
        self.device, self.vocab_size, self.max_context = model.device, config.vocab_size, config.max_position_embeddings
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = KvShape(config.num_hidden_layers, config.num_key_value_heads, head_dim, model.dtype)
        self._hidden_size, self._head = config.hidden_size, find_head(model, lambda value: value)
        eos = model.generation_config.eos_token_id
        self.eos_token_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        self.kv: PagedRows | None = None

    # -- a run

    def begin(
        self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int, entropy: bool = False
    ) -> None:
        self._open(chains=chains, chain_rows=1, lanes=lanes, max_length=max_length)
        self.entropy = entropy
        self.alpha = torch.full((chains * lanes,), alpha, device=self.device)
        self.beta = torch.full((chains * lanes,), beta, device=self.device)
        self.seed = torch.tensor([as_int64(seed)], device=self.device)

    def begin_particles(self, *, groups: int, particles: int, max_length: int) -> None:
        self.check_particles()
        self._open(chains=groups, chain_rows=CHAIN_ROWS, lanes=particles, max_length=max_length)
        self._particles = PagedParticles(
            self.kv, groups=groups, particles=particles, hidden_size=self._hidden_size, dtype=self._shape.dtype
        )

    def _open(self, *, chains: int, chain_rows: int, lanes: int, max_length: int) -> None:
        if self.kv is not None:
            raise EngineBusyError("a run of this engine is on; exhaust its stream or close() it first")
        self.chains, self.chain_rows, self.lanes = chains, chain_rows, lanes
        self.prompts: list[list[int] | None] = [None] * chains
        kv = PagedRows(
            self._shape, rows=chains * (chain_rows + lanes), max_length=max_length, block_size=self.block_size,
            num_blocks=self.num_blocks, device=self.device,
        )  # fmt: skip
        self.counts = kv.counts
        self._attention = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        self.kv = kv

    def end(self) -> None:
        if self.kv is not None:
            self.model.set_attn_implementation(self._attention)
        self.kv = self._particles = None

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        kv, forwarded = self.kv, []
        for slot, prompt in zip(slots, prompts, strict=True):
            keep, row = len(prompt) - 1, slot * self.chain_rows
            kv.rollback(kv.entries(dict.fromkeys(self._rows_of(slot), 0)))
            self.prompts[slot] = None
            if prompt in self.prompts:  # every later state of a chain begins with its prompt: its blocks are shared
                holder = self.prompts.index(prompt) * self.chain_rows
                kv.fork(kv.entries({row: holder}), kv.entries({row: keep}))
                forwarded.append(0)
            else:
                if keep:
                    kv.extend(kv.entries({row: keep}))
                    self._forward_prompt(row, prompt[:-1])
                forwarded.append(keep)
            self.prompts[slot] = prompt
        return forwarded

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        kv = self.kv
        chain, lane, start, stop = commit_range.unbind(1)
        accepted = stop > start
        kv.commit(kv.vector(chain, lane + self.chains, accepted))
        # The lane that was accepted is empty now and starts again from its chain, as every lane that opens does. Where
        # one lane does both, it opens with what was accepted or more.
        again = kv.vector(lane + self.chains, stop, accepted)
        parent = kv.vector(lane + self.chains, chain, accepted)
        opening, of, begin, until = open_range.unbind(1)
        opens = until > begin
        again = torch.maximum(again, kv.vector(opening + self.chains, until, opens))
        parent = torch.maximum(parent, kv.vector(opening + self.chains, of, opens))
        # A lane that waited to be accepted has fed its last token too: the chain ends before it.
        kv.rollback(torch.maximum(kv.vector(chain, stop, accepted), again.clamp(max=0)))
        kv.fork(parent, again)
        kv.counts.slab_copied += ((stop - start).clamp(min=0).sum() + (until - begin).clamp(min=0).sum()).long()

    def step(self, state: pk.ChainState) -> Sampled:
        position, count = state.position, state.position.shape[0]
        rows = torch.arange(count, device=self.device) + self.chains
        here = self.kv.vector(rows, position, position >= 0)
        # What a lane holds at and beyond the position that it feeds is of a proposal that is over.
        self.kv.rollback(here)
        self.kv.extend(torch.where(here >= 0, here + 1, here))
        output, written = self._decode(self.model, rows, state.input_id, position)
        drawn = pk.sample_tokens(
            output.logits[:, -1], self.alpha[:count], self.beta[:count], self.seed, state.counter, state.exclude,
            return_entropy=self.entropy,
        )  # fmt: skip
        self.kv.wipe(written, drawn.status != pk.Status.OK)
        return Sampled(drawn.token, drawn.logq, drawn.weight, drawn.status, entropy=drawn.entropy)

    def move(self, source: int, target: int) -> None:
        if source == target:
            return
        kv, pairs = self.kv, dict(zip(self._rows_of(target), self._rows_of(source), strict=True))
        kv.rollback(kv.entries(dict.fromkeys(pairs, 0)))
        of = kv.entries(pairs)
        holds = kv.tables.length[of.clamp(min=0).long()] > 0
        kv.commit(torch.where(holds, of, -1))
        self.prompts[target], self.prompts[source] = self.prompts[source], None

    def _rows_of(self, slot: int) -> list[int]:
        """Of the table: those of its chain, then those of its lanes."""
        first = self.chains * self.chain_rows + slot * self.lanes
        return [*range(slot * self.chain_rows, (slot + 1) * self.chain_rows), *range(first, first + self.lanes)]

    # -- particles

    def check_particles(self) -> None:
        if self._head is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has more than a linear layer between its decoder and its logits, which "
                "particles need to be apart; kernel='mh' works"
            )

    def particle_bytes(self, *, groups: int, particles: int, max_length: int) -> int:
        """Bytes of the pools, of what attention gathers in one layer, and of the logits."""
        kv, rows = self._shape, groups * (CHAIN_ROWS + particles)
        blocks = blocks_of(rows, max_length, self.block_size) if self.num_blocks is None else self.num_blocks
        pools = blocks * self.block_size * (kv.token_bytes + self._hidden_size * kv.dtype.itemsize)
        gathered = groups * particles * max_length * kv.token_bytes // kv.layers
        return pools + gathered + 3 * groups * (particles + 1) * self.vocab_size * 4

    def copy_particles(self, state: ParticleState) -> None:
        self.prompts[state.groups :] = [None] * (self.chains - state.groups)  # slots not in use give back their blocks
        self._particles.copy(state)

    def children(self, state: ParticleState) -> torch.Tensor:
        return self._particles.children(state, self._hidden_states, self._logits)

    def _hidden_states(self, rows, input_id, position) -> tuple[torch.Tensor, torch.Tensor]:
        output, written = self._decode(self.model.get_decoder(), rows, input_id, position)
        return output.last_hidden_state[:, -1], written

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self._head.logits(hidden)

    # -- the model

    def _forward_prompt(self, row: int, tokens: list[int]) -> None:
        position = torch.arange(len(tokens), device=self.device)
        read = self.kv.places(torch.tensor([row], device=self.device), position)
        view = PrefillView([Segment(0, 0, len(tokens), 0)], position)
        self._forward(
            self.model.get_decoder(), view, torch.tensor([tokens], device=self.device), position[None], read[0], read
        )

    def _decode(self, module, rows, input_id, position) -> tuple:
        """Feed rows of the table a token each, which they have room for. What the module gives, and the places where
        keys and values were written."""
        length = int(position.max()) + 1
        # Beyond a row's blocks the places are of other rows, or of none; the view masks their positions.
        read = self.kv.places(rows, torch.arange(length, device=self.device))
        write = read.gather(1, position[:, None])[:, 0]
        return self._forward(
            module, DecodeView(position, length), input_id[:, None], position[:, None], write, read
        ), write

    def _forward(self, module, view, input_ids, position_ids, write: torch.Tensor, read: torch.Tensor):
        """module: the model or its decoder. write [tokens], read [rows, length]: places in the pool."""
        for layer in self.kv.cache.layers:
            layer.write, layer.read = write, read
        with attached(view), torch.inference_mode():
            return module(input_ids=input_ids, position_ids=position_ids, past_key_values=self.kv.cache, use_cache=True)
