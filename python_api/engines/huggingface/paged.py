"""Power sampling on a paged KV cache: an example of the `block_table_*` operators, to read and to adapt (DESIGN 5.7).

One pool of blocks [2 * layers, N, block_size, heads, head_dim] and one block table, whose rows are

    [0, chains)                     the accepted sequences
    [chains, chains * (1 + lanes))  the lanes, which share their chain's past and write blocks of their own

    a lane starts again     rollback to nothing, fork of its chain: full blocks are shared, the split one is copied
    a lane goes on          rollback to the position that it feeds, then room for one more token
    a proposal is accepted  commit: its row becomes the chain's, which gives its old blocks back

The tables live on the device and nobody waits for them. Attention does here what it is easiest to read: it gathers the
blocks of every row into a contiguous tensor, as long as the longest row, which the host looks up. A serving stack gives
the table to its paged attention kernel instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

import power_kernels as pk
from power_kernels.api.driver.engine import EngineBusyError, Sampled, UnsupportedModelError
from power_kernels.api.engines.huggingface.decode_attention import DecodeView
from power_kernels.api.engines.huggingface.ragged_attention import NAME, PrefillView, Segment, attached
from power_kernels.rng import as_int64

_MODELS = ("llama", "qwen2", "qwen3")


class OutOfBlocksError(RuntimeError):
    """The pool has too few blocks for this run."""


@dataclass
class PagedCounts:
    """What a run moved, in tokens of KV (all layers), and the blocks it held. token_bytes: bytes of one token's KV."""

    shared: torch.Tensor  # i64: taken over by forks without a copy
    copied: torch.Tensor  # i64: copied by `kv_copy_blocks`
    slab_copied: torch.Tensor  # i64: what copies between rows of their own would have moved
    peak_blocks: torch.Tensor  # i64: most blocks in use after a step
    block_size: int
    token_bytes: int
    slab_tokens: int  # positions that rows of their own would have reserved


class PagedEngine:
    """Runs a transformers causal LM for the driver on a paged cache. `power_kernels.api.Engine` says what it promises.

    model: a Llama, Qwen2 or Qwen3 without sliding windows, with rotary frequencies that no other row changes.
    block_size: positions of a block. num_blocks: blocks of the pool; by default as many as rows that share nothing
    could need, so that none can be missing. Where it is given, each step waits to see that every row found its blocks.
    Raises UnsupportedModelError for another model, OutOfBlocksError when a row finds no block.
    """

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
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size, self.max_context = config.vocab_size, config.max_position_embeddings
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        eos = model.generation_config.eos_token_id
        self.eos_token_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        self.tables: pk.BlockTables | None = None

    # -- a run

    def begin(
        self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int, entropy: bool = False
    ) -> None:
        if self.tables is not None:
            raise EngineBusyError("a run of this engine is on; exhaust its stream or close() it first")
        self.chains, self.lanes, self.entropy = chains, lanes, entropy
        self.rows = chains * (1 + lanes)
        most = -(-max_length // self.block_size)
        blocks = self.rows * most if self.num_blocks is None else self.num_blocks
        tables = pk.BlockTables.allocate(self.rows, most, blocks, self.block_size, self.device)
        shape = (2 * self.layers, blocks, self.block_size, self.heads, self.head_dim)
        self.pool = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.cache = Cache(layers=[_PagedLayer(self.pool[2 * i : 2 * i + 2]) for i in range(self.layers)])
        self.alpha = torch.full((chains * lanes,), alpha, device=self.device)
        self.beta = torch.full((chains * lanes,), beta, device=self.device)
        self.seed = torch.tensor([as_int64(seed)], device=self.device)
        self.prompts: list[list[int] | None] = [None] * chains
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        token_bytes = 2 * self.layers * self.heads * self.head_dim * self.pool.element_size()
        self.counts = PagedCounts(
            zero.clone(), zero.clone(), zero.clone(), zero.clone(), self.block_size, token_bytes, self.rows * max_length
        )
        self._attention = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        self.tables = tables

    def end(self) -> None:
        if self.tables is not None:
            self.model.set_attn_implementation(self._attention)
        self.tables = self.pool = self.cache = None

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        forwarded = []
        for slot, prompt in zip(slots, prompts, strict=True):
            keep = len(prompt) - 1
            self._rollback(dict.fromkeys([slot, *self._lane_rows(slot)], 0))
            self.prompts[slot] = None
            if prompt in self.prompts:  # every later state of a chain begins with its prompt: its blocks are shared
                self._fork({slot: self.prompts.index(prompt)}, {slot: keep})
                forwarded.append(0)
            else:
                if keep:
                    self._extend({slot: keep})
                    self._forward_prompt(slot, prompt[:-1])
                forwarded.append(keep)
            self.prompts[slot] = prompt
        return forwarded

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        chain, lane, start, stop = commit_range.unbind(1)
        accepted = stop > start
        source = self._vector(chain, lane + self.chains, accepted)
        pk.block_table_commit(self.tables, source)
        # The lane that was accepted is empty now and starts again from its chain, as every lane that opens does. Where
        # one lane does both, it opens with what was accepted or more.
        again = self._vector(lane + self.chains, stop, accepted)
        parent = self._vector(lane + self.chains, chain, accepted)
        opening, of, begin, until = open_range.unbind(1)
        opens = until > begin
        again = torch.maximum(again, self._vector(opening + self.chains, until, opens))
        parent = torch.maximum(parent, self._vector(opening + self.chains, of, opens))
        # A lane that waited to be accepted has fed its last token too: the chain ends before it.
        cut = torch.maximum(self._vector(chain, stop, accepted), torch.where(again >= 0, 0, -1).to(torch.int32))
        pk.block_table_rollback(self.tables, cut)
        self._run_fork(parent, again)
        self.counts.slab_copied += ((stop - start).clamp(min=0).sum() + (until - begin).clamp(min=0).sum()).long()

    def step(self, state: pk.ChainState) -> Sampled:
        position = state.position
        rows = torch.arange(position.shape[0], device=self.device) + self.chains
        here = self._vector(rows, position, position >= 0)
        # What a lane holds at and beyond the position that it feeds is of a proposal that is over.
        pk.block_table_rollback(self.tables, here)
        self._run_extend(torch.where(here >= 0, here + 1, here))
        table, length = self.tables.block_table[rows].long(), int(position.max()) + 1
        column = torch.arange(length, device=self.device)
        # Entries beyond a row's blocks are of other rows, or of none; the view masks their positions.
        read = table[:, column // self.block_size] * self.block_size + column % self.block_size
        write = read.gather(1, position[:, None])[:, 0]
        view = DecodeView(position, length)
        logits = self._forward(view, state.input_id[:, None], position[:, None], write, read)
        count = position.shape[0]
        drawn = pk.sample_tokens(
            logits, self.alpha[:count], self.beta[:count], self.seed, state.counter, state.exclude,
            return_entropy=self.entropy,
        )  # fmt: skip
        # 0 * NaN is NaN: what a row with bad logits wrote must not stay where others may read it masked.
        bad = (drawn.status != pk.Status.OK)[:, None, None]
        slots = self.pool.flatten(1, 2)
        slots[:, write] = slots[:, write].masked_fill(bad, 0)
        in_use = self.pool.shape[1] - self.tables.free_count[0]
        self.counts.peak_blocks = torch.maximum(self.counts.peak_blocks, in_use)
        return Sampled(drawn.token, drawn.logq, drawn.weight, drawn.status, entropy=drawn.entropy)

    def move(self, source: int, target: int) -> None:
        if source == target:
            return
        pairs = dict(zip([target, *self._lane_rows(target)], [source, *self._lane_rows(source)], strict=True))
        self._rollback(dict.fromkeys(pairs, 0))
        of = self._from(pairs)
        holds = self.tables.length[of.clamp(min=0).long()] > 0
        pk.block_table_commit(self.tables, torch.where(holds, of, -1))
        self.prompts[target], self.prompts[source] = self.prompts[source], None

    # -- block tables: every operator takes one entry a row, -1 where nothing is asked

    def _vector(self, rows: torch.Tensor, values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """int32 [R]: values[i] at rows[i] where chosen[i], -1 elsewhere."""
        out = torch.full((self.rows + 1,), -1, dtype=torch.int32, device=self.device)
        out[torch.where(chosen, rows, self.rows).long()] = values.to(torch.int32)
        return out[: self.rows]

    def _from(self, entries: dict[int, int]) -> torch.Tensor:
        return torch.tensor([entries.get(r, -1) for r in range(self.rows)], dtype=torch.int32, device=self.device)

    def _lane_rows(self, slot: int) -> range:
        return range(self.chains + slot * self.lanes, self.chains + (slot + 1) * self.lanes)

    def _rollback(self, tokens: dict[int, int]) -> None:
        pk.block_table_rollback(self.tables, self._from(tokens))

    def _extend(self, tokens: dict[int, int]) -> None:
        self._run_extend(self._from(tokens))

    def _fork(self, parent: dict[int, int], tokens: dict[int, int]) -> None:
        self._run_fork(self._from(parent), self._from(tokens))

    def _run_extend(self, tokens: torch.Tensor) -> None:
        pk.block_table_extend(self.tables, tokens)
        self._copy_split_blocks()

    def _run_fork(self, parent: torch.Tensor, tokens: torch.Tensor) -> None:
        pk.block_table_fork(self.tables, parent, tokens)
        self._copy_split_blocks()
        full = tokens.clamp(min=0) // self.block_size * self.block_size
        self.counts.shared += full.sum()

    def _copy_split_blocks(self) -> None:
        pk.kv_copy_blocks(self.pool, self.tables.copies)
        self.counts.copied += self.tables.copies[:, 3].sum()
        if self.num_blocks is not None and self.tables.status.any():
            rows = self.tables.status.nonzero()[:, 0].tolist()
            raise OutOfBlocksError(
                f"no block is left for rows {rows}; the pool has {self.pool.shape[1]} of {self.block_size} positions"
            )

    # -- the model

    def _forward_prompt(self, slot: int, tokens: list[int]) -> None:
        position = torch.arange(len(tokens), device=self.device)
        table = self.tables.block_table[slot].long()
        read = table[position // self.block_size] * self.block_size + position % self.block_size
        view = PrefillView([Segment(0, 0, len(tokens), 0)], position)
        self._forward(view, torch.tensor([tokens], device=self.device), position[None], read, read[None])

    def _forward(self, view, input_ids, position_ids, write: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Last logits. write [tokens], read [rows, length]: places in the pool, block * block_size + position."""
        for layer in self.cache.layers:
            layer.write, layer.read = write, read
        with attached(view), torch.inference_mode():
            return self.model(
                input_ids=input_ids, position_ids=position_ids, past_key_values=self.cache, use_cache=True
            ).logits[:, -1]


class _PagedLayer(CacheLayerMixin):
    """One layer's blocks: new states go to `write`, attention gets what lies at `read`."""

    is_sliding = False

    def __init__(self, pool: torch.Tensor):  # [2, N, block_size, heads, head_dim]
        super().__init__()
        self.is_initialized = True
        self.keys, self.values = pool.flatten(1, 2).unbind(0)  # [N * block_size, heads, head_dim]
        self.write = self.read = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """States [rows, heads, 1, dim] or [1, heads, tokens, dim]. Returns K and V, each [rows, heads, length, dim]."""
        both = []
        for slots, states in ((self.keys, key_states), (self.values, value_states)):
            slots.index_copy_(0, self.write, states.transpose(1, 2).flatten(0, 1))
            both.append(slots[self.read].transpose(1, 2))
        return tuple(both)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.read.shape[1], 0

    def get_seq_length(self) -> int:
        return 0  # rows have different lengths; positions always come as `position_ids`

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
