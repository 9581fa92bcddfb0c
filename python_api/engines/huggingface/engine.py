"""A transformers causal LM as an engine: ragged rows, rollback by copying, no re-prefill (DESIGN section 6).

During a forward pass, and only then, the model has another attention implementation, no module in training,
and rotary frequencies that do not depend on the batch (`patches.py`, `rope.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

import power_kernels
from power_kernels.api.driver.checks import integer
from power_kernels.api.driver.engine import EngineBusyError, Sampled, StepReport, UnsupportedModelError
from power_kernels.api.driver.particles.state import GroupField, ParticleState
from power_kernels.api.engines.huggingface import decode_attention
from power_kernels.api.engines.huggingface.adapters import Adapters, without_wrapper
from power_kernels.api.engines.huggingface.compiled import CompiledForward
from power_kernels.api.engines.huggingface.decode_attention import DecodeView
from power_kernels.api.engines.huggingface.inspection import (
    check_windows,
    context_of,
    eos_token_ids,
    find_head,
    probe,
    refuse,
    refuse_autocast,
)
from power_kernels.api.engines.huggingface.length_bound import LengthBound
from power_kernels.api.engines.huggingface.lm_head import LmHead
from power_kernels.api.engines.huggingface.memory_account import particle_bytes, run_bytes
from power_kernels.api.engines.huggingface.particles import HiddenStates
from power_kernels.api.engines.huggingface.patched_model import attention_configs, patched, placed_on
from power_kernels.api.engines.huggingface.patches import Patches
from power_kernels.api.engines.huggingface.prefill import HeldPrompts, check_prompts, packed
from power_kernels.api.engines.huggingface.prefix_memory import PrefixMemory
from power_kernels.api.engines.huggingface.ragged_attention import PrefillView, attached
from power_kernels.api.engines.huggingface.ragged_cache import KvSlabs, RaggedCache
from power_kernels.api.engines.huggingface.rope import check_rope
from power_kernels.api.engines.huggingface.self_check import decode_rows
from power_kernels.api.engines.huggingface.self_check import self_check as check_decoding
from power_kernels.api.engines.huggingface.step_timing import decode_seconds, known_times
from power_kernels.api.engines.huggingface.tensor_parallel import TensorParallelGroup
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.rng import as_int64
from power_kernels.state import ChainState, LaneField, LaneStatus, Status

_DEVICE_MULTIPLE = 64  # positions: keeps masks aligned and the number of distinct shapes small

# Rows of a step beyond which more at once save little, on a CPU and on a device: the processor is busy by then.
_MOST_ROWS = (128, 1024)


class HuggingFaceEngine:
    """Runs a transformers causal LM for the driver. `driver/engine.py` says what the calls promise.

    model: any decoder-only `PreTrainedModel` on one device whose layers are full or sliding-window
        attention and go through transformers' attention interface (Llama, Mistral, Qwen2/3, Phi-3, Gemma
        2/3, OLMo, Granite, Cohere, ...). Or this process's part of one that was loaded by transformers'
        tensor-parallel plan; then every process makes the same calls (`tensor_parallel.py`).
    prefill_chunk: the most prompt tokens in one forward pass. Prompts are packed behind each other, never padded.
    remember: on a CPU, keep what a run has forwarded and forward no prefix twice (`prefix_memory.py`).
    length_multiple: attention reads this many positions or a multiple of them, so that steps repeat their shapes; None
        takes 64 on a device, and on a CPU just what the longest row needs.
    attention: the kernel that decodes, of `decode_attention.KERNELS`; None takes the best that works here, and the
        attribute `attention` says which that is.
    max_context: the most positions of a prompt and its answer; None takes what the model's configuration says, and what
        YaRN makes of it.
    self_check: first compare a small ragged batch with a rollback to plain forward passes of the untouched model.
    compile: run decode forward passes under torch.compile (`compiled.py`). It compiles here, which takes a
        minute or so the first time. A string names a backend of torch.compile other than its default.

    Raises UnsupportedModelError for a model whose past cannot be rewound exactly or whose attention this
    engine does not know: recurrent, linear, convolutional and chunked layers, encoder-decoders, position
    biases. docs/models.md has the list.

    Rotary schemes that depend on the longest sequence are fixed for a run by its max_length (longrope:
    above original_max_position_embeddings the long factors for every row, below it the short ones), so that
    a row's law never depends on its batchmates.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        prefill_chunk: int = 1024,
        remember: bool = True,
        length_multiple: int | None = None,
        attention: str | None = None,
        max_context: int | None = None,
        self_check: bool = True,
        compile: bool | str = False,
    ):
        model = without_wrapper(model)
        if not isinstance(model, PreTrainedModel):
            raise ArgumentTypeError(f"model is a {type(model).__name__}; it must be a transformers PreTrainedModel")
        prefill_chunk = integer("prefill_chunk is", prefill_chunk, 1)
        if length_multiple is not None:
            length_multiple = integer("length_multiple is", length_multiple, 1)
        if max_context is not None:
            max_context = integer("max_context is", max_context, 1)
        refuse(model)
        self.ranks = TensorParallelGroup.of(model)  # the processes that hold the model with this one, or None
        self.model, self.prefill_chunk, self.remember = model, prefill_chunk, remember
        self._config = model.config.get_text_config()
        self._decoder = model.get_decoder()
        self.device = next(model.parameters()).device
        self.dtype = model.dtype
        refuse_autocast(self.device)
        self.max_context = context_of(model, max_context)
        self.eos_token_ids = eos_token_ids(model)
        on_device = self.device.type != "cpu"
        self.length_multiple = length_multiple or (_DEVICE_MULTIPLE if on_device else 1)
        self.most_rows = _MOST_ROWS[on_device]
        self.forward_seconds = 0.0  # of the host, in the model and its head, prefill included
        self._input_vocab = model.get_input_embeddings().weight.shape[0]
        self._slabs: KvSlabs | None = None
        self._patches: Patches | None = None
        self._memory: PrefixMemory | None = None
        self._layout, windows, sinks, self.vocab_size = probe(model)
        check_windows(self._config, windows)
        if self.ranks is not None:
            self.ranks.check_logits(model, self.vocab_size)
        heads = self._config.num_attention_heads // (1 if self.ranks is None else self.ranks.size)
        if attention is None and on_device and getattr(self._config, "attn_logit_softcapping", None):
            attention = decode_attention.PADDED  # the flash kernel has no soft cap
        self.attention = decode_attention.choose(self._layout, heads, self.device, attention, sinks=sinks)
        if compile is not False and len(self._layout.layers) < self._config.num_hidden_layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers that attend to another layer's keys and values, which compile=... "
                "does not support; without it the model works"
            )
        self.compile = compile
        self._head = self._find_head()
        self._compiled = None
        if compile is not False:
            self._compile()
        if self_check:
            check_rope(self._decoder, self.device, self.dtype)
            self._check_with_or_without_head()

    # -- a run

    def begin(
        self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int, entropy: bool = False
    ) -> None:
        """Allocate KV for `chains` slots of `lanes` lanes and positions below max_length, and fix the rotary regime.

        Raises ArgumentError for sizes or exponents that are not allowed and for max_length above `max_context`.
        """
        if self.ranks is not None:
            self.ranks.check_same(
                chains=chains, lanes=lanes, max_length=max_length, alpha=alpha, beta=beta, seed=seed, entropy=entropy
            )
        chains, lanes = integer("chains is", chains, 1), integer("lanes is", lanes, 1)
        max_length = integer("max_length is", max_length, 1)
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and value > 0):
                raise ArgumentError(f"{name} is {value!r}; it must be finite and positive")
        self._open(chains=chains, lanes=lanes, max_length=max_length)
        self._entropy = entropy
        rows = chains * lanes
        self._alpha = torch.full((rows,), alpha, dtype=torch.float32, device=self.device)
        self._beta = torch.full((rows,), beta, dtype=torch.float32, device=self.device)
        self._seed = torch.tensor([as_int64(seed)], device=self.device)
        # On a device it would have to be waited for what is known and what is not.
        if self.remember and self._head is not None and self.device.type == "cpu":
            weight = self._head.module.weight
            self._memory = PrefixMemory(self._slabs, chains=chains, hidden_size=weight.shape[1], dtype=weight.dtype)

    def begin_particles(self, *, groups: int, particles: int, max_length: int) -> None:
        """Get ready for `groups` slots of so many particles, with all positions below max_length. See the protocol."""
        groups, particles = integer("groups is", groups, 1), integer("particles is", particles, 2)
        max_length = integer("max_length is", max_length, 1)
        self.check_particles()
        self._open(chains=groups, lanes=particles, max_length=max_length, chain_rows=2)
        weight = self._head.module.weight
        self._hidden = HiddenStates(
            self._slabs, groups=groups, particles=particles, hidden_size=weight.shape[1], dtype=weight.dtype
        )

    def particle_bytes(self, *, groups: int, particles: int, max_length: int) -> int:
        """Bytes of the KV of a run, of its last hidden states and of its logits."""
        return particle_bytes(self, groups=groups, particles=particles, positions=self._positions(max_length))

    def check_particles(self) -> None:
        """Raise UnsupportedModelError where this engine does not run particles with this model."""
        if self._head is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has more than a linear layer between its decoder and its logits, which "
                "particles need to be apart; kernel='mh' works"
            )
        if self.ranks is not None:
            raise UnsupportedModelError(
                "the model is in parts in several processes; only kernel='mh' runs on such ones"
            )

    def _open(self, *, chains: int, lanes: int, max_length: int, chain_rows: int = 1) -> None:
        """The memory and the patches of a run."""
        refuse_autocast(self.device)
        if self.max_context is not None and max_length > self.max_context:
            raise ArgumentError(f"max_length is {max_length}; the model's context is {self.max_context}")
        if self._slabs is not None:
            raise EngineBusyError("a run of this engine is on; exhaust its stream or close() it first")
        if self._head is not None and self.model.get_output_embeddings() is not self._head.module:
            self._head = self._find_head()  # the owner gave the model another
        self._patches = patched(self.model, max_length)
        slabs = KvSlabs(
            self._layout,
            chains=chains,
            lanes=lanes,
            positions=self._positions(max_length),
            device=self.device,
            chain_rows=chain_rows,
        )
        self._cache = RaggedCache(slabs, len(self._layout.layers))
        self._max_length, self._chains = max_length, chains
        self._row = torch.arange(chains * lanes, dtype=torch.int32, device=self.device)
        self._held = HeldPrompts(chains, slabs.positions)
        self._length = LengthBound(self.device)
        self._adapters = Adapters(self.model)
        self._active_adapters = self._adapters.active()
        self._memory = self._hidden = None
        self._slabs = slabs

    def end(self) -> None:
        """Free the KV. Does nothing when no run is on."""
        if self._patches is not None:
            self._patches.restore()  # for an interrupt that came between two lines of their own clean-up
        self._slabs = self._cache = self._patches = self._memory = self._hidden = None

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        """Write all but the last token of each prompt into its chain slot. Returns the tokens forwarded for each.

        A prompt that a slot of this run already holds is copied from it and costs nothing.
        Raises ArgumentError, before any work, for slots, lengths or token ids out of range.
        """
        self._check_running()
        if self.ranks is not None:
            self.ranks.check_same(slots=slots, prompts=prompts)
        check_prompts(slots, prompts, chains=self._chains, max_length=self._max_length, vocab_size=self._input_vocab)
        return self._prefill(slots, [tuple(prompt) for prompt in prompts])

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        """Copy lane -> chain ranges int32 [C, 4], then chain -> lane ranges int32 [C*P, 4]. See the protocol."""
        self._check_running()
        self._slabs.commit(commit_range)
        self._slabs.open(open_range)

    def step(self, state: ChainState) -> Sampled:
        """Feed and sample every lane of the first `state.chains` slots. Never waits for a device.

        `decode(state, prepare(state))`, but that on a CPU lanes that do not run are not fed, and a lane whose prefix
        was forwarded before in this run is answered without a forward pass; while there are such lanes the others wait.
        """
        if self.device.type != "cpu":
            return self.decode(state, self.prepare(state))
        before = self.forward_seconds
        sampled, fed, recalled = self._step_on_cpu(state)
        self._report = StepReport(fed, recalled, self.forward_seconds - before)
        return sampled

    def step_report(self) -> StepReport:
        return self._report

    def _step_on_cpu(self, state: ChainState) -> tuple[Sampled, int, Sequence[int]]:
        """What was drawn, how many lanes were fed, and which were recalled."""
        self._check_running()
        if self._memory is not None:
            lanes, hidden = self._memory.recall(state)
            if lanes:
                self._held.steps += 1
                return self._spread(state, lanes, self._draw(state, lanes, hidden)), 0, lanes
        length, lanes = self.prepare(state), range(state.position.shape[0])
        if self.attention == decode_attention.ROWS:
            status = state.lane_field[:, LaneField.STATUS].tolist()
            lanes = [lane for lane in lanes if status[lane] == LaneStatus.RUNNING]
        output = self._fed(state, length, lanes=lanes)
        drawn = self._draw(state, lanes, output)
        good = drawn.status == Status.OK
        if self._memory is not None:
            self._memory.learn(state, lanes, output, good)
        if not bool(good.all()):
            self._scrub(lanes, state.position[lanes], ~good)
        return self._spread(state, lanes, drawn), len(lanes), ()

    def prepare(self, state: ChainState) -> int:
        """The host's part of the next step. Returns how many positions its attention may have to read.

        Of the flash kernel, which reads each lane's own, this number only chooses how the work is split, and with that
        the rounding: it gets the same one all along, so that what the host knows when changes nothing.
        Raises ArgumentError on a CPU for positions that the run does not have.
        """
        self._check_running()
        length = self._length.of(state)
        if length is None:
            first, length = int(state.position.min()), int(state.position.max()) + 1
            if first < 0 or length > self._max_length:
                raise ArgumentError(f"positions span [{first}, {length}), the run [0, {self._max_length})")
        self._held.steps += 1
        if self.attention == decode_attention.FLASH:
            return self._slabs.positions
        return min(bucket(length, self.length_multiple), self._slabs.positions)

    def decode(self, state: ChainState, length: int) -> Sampled:
        """Launch the step that was prepared: forward, draw, wipe what bad and idle rows wrote. May be recorded.

        The host does not know which lanes run, so all are fed; those that do not attend to one position.
        """
        before, lanes = self.forward_seconds, slice(0, state.position.shape[0])
        running = state.lane_field[:, LaneField.STATUS] == LaneStatus.RUNNING
        output = self._fed(state, length, decode_attention.recordable(self.attention), running=running)
        drawn = self._draw(state, lanes, output)
        # A lane that does not run has not seen what it wrote, so that its logits do not tell whether that is finite.
        self._scrub(lanes, state.position, (drawn.status != Status.OK) | ~running)
        self._report = StepReport(state.position.shape[0], (), self.forward_seconds - before)
        return Sampled(drawn.token, drawn.logq, drawn.weight, drawn.status, entropy=drawn.entropy)

    def copy_particles(self, state: ParticleState) -> None:
        """The copies of keys and values that the state asks for. See the protocol."""
        self._check_running()
        self._slabs.keep(state.keep_from_lane, state.keep_from_answer)
        self._slabs.fork(state.fork_from_lane.flatten(0, 1), state.fork_from_answer.flatten(0, 1))

    def children(self, state: ParticleState) -> torch.Tensor:
        """Logits [G * (N + 1), V] of the first slots' particles, a slot's reference behind its lanes. See the protocol.

        Lanes are fed; of a reference the last hidden state is known. On a CPU empty rows are left out, and their logits
        are whatever the memory held.
        """
        self._check_running()
        self._held.steps += 1
        reference = self._hidden.of_references(state.field[:, GroupField.ANSWER_ROW], state.position[:, 0])
        if self.device.type == "cpu":
            return self._children_on_cpu(state, reference)
        position, live = state.position.flatten(), state.live.flatten()
        view = DecodeView(position, self._slabs.positions, decode_attention.recordable(self.attention), None, live)
        output = self._output(view, state.input_id.flatten()[:, None], position[:, None])
        self._hidden.put(torch.arange(len(position), device=self.device), position, output)
        rows = torch.cat([output.unflatten(0, state.live.shape), reference[:, None]], 1)
        return self._logits(rows.flatten(0, 1))

    def _children_on_cpu(self, state: ParticleState, reference: torch.Tensor) -> torch.Tensor:
        groups, n = state.live.shape
        lanes = state.live.flatten().nonzero()[:, 0]
        referred = (state.reference >= 0).nonzero()[:, 0]
        hidden = reference[referred]
        if len(lanes):
            position = state.position.flatten()[lanes]
            length = min(bucket(int(position.max()) + 1, self.length_multiple), self._slabs.positions)
            if self.attention == decode_attention.ROWS:
                fed, view = lanes, DecodeView(position, length, self.attention, lanes.tolist())
            else:
                fed, view = slice(None), DecodeView(state.position.flatten(), length, self.attention)
            input_ids, at = state.input_id.flatten()[fed], state.position.flatten()[fed]
            output = self._output(view, input_ids[:, None], at[:, None])
            output = output if fed is lanes else output[lanes]
            self._hidden.put(lanes, position, output)
            hidden = torch.cat([output, hidden])
        rows = torch.cat([lanes // n * (n + 1) + lanes % n, referred * (n + 1) + n])
        logits = self._logits(hidden)
        out = logits.new_empty(groups * (n + 1), logits.shape[1])
        out[rows] = logits
        return out

    def _fed(
        self, state: ChainState, length: int, kernel: str | None = None, lanes=None, running: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Feed some lanes of the state, or all. Returns what `_output` does."""
        input_id, position = state.input_id, state.position
        if lanes is not None and len(lanes) < len(position):
            input_id, position = input_id[lanes], position[lanes]
        else:
            lanes = None
        view = DecodeView(position, length, kernel or self.attention, lanes, running)
        return self._output(view, input_id[:, None], position[:, None])

    def _draw(self, state: ChainState, lanes, output: torch.Tensor) -> power_kernels.SampleOutput:
        """Sample lanes of the state from what `_output` gave for them."""
        drawn = self._draw_here(state, lanes, output)
        return drawn if self.ranks is None else self.ranks.drawn(drawn)

    def _draw_here(self, state: ChainState, lanes, output: torch.Tensor) -> power_kernels.SampleOutput:
        draw = (
            self._alpha[lanes],
            self._beta[lanes],
            self._seed,
            state.counter[lanes].contiguous(),
            state.exclude[lanes].contiguous(),
        )
        if self._head is not None and self._head.is_faster_fused(output):
            with self._forward_clock():
                return self._head.sample(output, *draw, return_entropy=self._entropy)
        return power_kernels.sample_tokens(self._logits(output), *draw, return_entropy=self._entropy)

    def _spread(self, state: ChainState, lanes, drawn: power_kernels.SampleOutput) -> Sampled:
        """What was drawn for some lanes, among all of them; the others are PENDING."""
        rows = state.position.shape[0]

        def spread(values: torch.Tensor | None, elsewhere: int = 0) -> torch.Tensor | None:
            if values is None or len(lanes) == rows:
                return values
            out = values.new_full((rows,), elsewhere)
            out[lanes] = values
            return out

        return Sampled(
            spread(drawn.token),
            spread(drawn.logq),
            spread(drawn.weight),
            spread(drawn.status, Status.PENDING),
            entropy=spread(drawn.entropy),
        )

    def move(self, source: int, target: int) -> None:
        """Copy the used positions of slot `source` and its lanes over slot `target`."""
        self._check_running()
        for name, slot in (("source", source), ("target", target)):
            if not 0 <= slot < self._chains:
                raise ArgumentError(f"{name} is {slot}; slots lie in [0, {self._chains})")
        if source == target:
            return
        self._clear(target)
        self._slabs.move(source, target, self._held.reach(source))
        self._held.move(source, target)
        if self._memory is not None:
            self._memory.move(source, target)

    def widen(self, chains: int, lanes: int) -> None:
        """From now on `chains` slots of `lanes` lanes each. See the protocol."""
        self._check_running()
        if not (lanes >= self._slabs.lanes and 1 <= chains <= self._chains and chains * lanes <= len(self._row)):
            raise ArgumentError(
                f"chains is {chains} and lanes {lanes}; a run of {self._chains} chains in {self._slabs.lanes} lanes "
                f"can only have fewer chains in more lanes, {len(self._row)} in all"
            )
        self._slabs.widen(chains, lanes, max(self._held.reach(slot) for slot in range(self._chains)))
        self._chains = chains
        if self._memory is not None:
            self._memory.widen(lanes)

    # -- what a run takes

    def run_bytes(self, *, chains: int, lanes: int, max_length: int) -> int:
        """Bytes of the KV of a run, of its logits, and on a CPU of what speeds it up."""
        return run_bytes(self, chains=chains, lanes=lanes, positions=self._positions(max_length))

    def decode_seconds(self, rows: Sequence[int], length: int) -> list[float]:
        """Seconds of the forward pass of a step of each number of rows that read `length` positions, or about as many.
        See `step_timing.py`."""
        return decode_seconds(self, known_times(self), rows, length)

    def _positions(self, max_length: int) -> int:
        return _round_up(max_length, self.length_multiple)

    # -- decoding

    def _output(self, view, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states [rows, D], or the logits [rows, V] of the next position where the model's head is not
        known."""
        if self._head is None:
            return self._forward(self.model, view, input_ids, position_ids).logits[:, -1]
        return self._forward(self._decoder, view, input_ids, position_ids).last_hidden_state[:, -1]

    def _logits(self, output: torch.Tensor) -> torch.Tensor:
        """What is sampled from, of what `_output` gave."""
        if self._head is None:
            return output
        with self._forward_clock(), self._patches, torch.inference_mode():
            return self._head.logits(output)

    def _forward(self, module, view, input_ids: torch.Tensor, position_ids: torch.Tensor):
        self._cache.attach(view)
        with self._forward_clock(), placed_on(self.device), self._patches, attached(view), torch.inference_mode():
            if self._compiled is not None and not view.of_chains:
                return self._compiled(module, self._cache, input_ids, position_ids)
            return module(input_ids=input_ids, position_ids=position_ids, past_key_values=self._cache, use_cache=True)

    @contextmanager
    def _forward_clock(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.forward_seconds += time.perf_counter() - start

    def _scrub(self, lanes, position: torch.Tensor, bad: torch.Tensor) -> None:
        """Wipe what the lanes marked in `bad` just wrote: 0 * NaN would carry it into the lane's next proposal.

        Earlier positions are finite, or an earlier step's logits would have been bad: a lane that runs always sees what
        it writes.
        """
        row, start = self._row[lanes], position.to(torch.int32)
        self._slabs.scrub_lanes(torch.stack([row, row, start, start + bad], dim=1).to(torch.int32))

    # -- prompts

    def _prefill(self, slots: list[int], prompts: list[tuple[int, ...]]) -> list[int]:
        holders = self._held.holders(but=slots)
        fresh: list[tuple[int, tuple[int, ...]]] = []
        copies: list[tuple[int, int, int]] = []
        for slot, prompt in zip(slots, prompts, strict=True):
            keep = self._held.kept(slot, prompt)
            self._clear(slot, keep)
            if keep == 0 and len(prompt) > 1:
                if prompt in holders:
                    copies.append((holders[prompt], slot, len(prompt) - 1))
                else:
                    fresh.append((slot, prompt))
            holders.setdefault(prompt, slot)
            self._held.start(slot, prompt)
            self._length.admit(len(prompt))
        row = self._slabs.chain_rows
        for chunk in packed(((slot * row, prompt[:-1]) for slot, prompt in fresh), self.prefill_chunk):
            tokens, positions, segments = chunk
            ids = torch.tensor([tokens], device=self.device)
            position = torch.tensor([positions], device=self.device)
            self._forward(self._decoder, PrefillView(segments, position[0]), ids, position)
        for source, target, stop in copies:
            self._slabs.copy_chain(source, target, stop)
        for slot, prompt in zip(slots, prompts, strict=True):
            self._held.finish(slot, prompt)
            if self._memory is not None:
                self._memory.admit(slot, prompt)
        forwarded = {slot: len(prompt) - 1 for slot, prompt in fresh}
        return [forwarded.get(slot, 0) for slot in slots]

    def _clear(self, slot: int, keep: int = 0) -> None:
        reach = self._held.reach(slot)
        self._slabs.clear(slot, lanes_stop=reach, chain_start=keep, chain_stop=reach)

    # -- checks of arguments

    def _check_running(self) -> None:
        if self._slabs is None:
            raise ArgumentError("no run is on; call begin() first")
        refuse_autocast(self.device)
        if self._adapters.active() != self._active_adapters:
            raise ArgumentError(
                "the model's adapters have changed while a run is on, whose past is of the others; exhaust its stream "
                "or close() it before they change"
            )

    # -- what the model is like

    @property
    def head_known(self) -> bool:
        """Whether the logits are the model's last layer of what its decoder gives, and nothing else."""
        return self._head is not None

    def _check_with_or_without_head(self) -> None:
        try:
            check_decoding(self)
        except UnsupportedModelError:
            if self._head is None:
                raise
            self._head = None  # whatever else there is between the decoder and the logits, the whole model has it
            check_decoding(self)

    def _compile(self) -> None:
        """Compile here rather than in the first run: a model that cannot be compiled is refused before any work."""
        self._compiled = CompiledForward(
            self.model, attention_configs(self.model), layers=self._config.num_hidden_layers, backend=self.compile
        )
        try:
            self.begin(chains=2, lanes=1, max_length=1, alpha=1.0, beta=1.0, seed=0)
            decode_rows(self, [0, 0], [0, 0])
        finally:
            self.end()

    def _agreed(self, value: float) -> float:
        """A number that every process takes the same decision by."""
        return value if self.ranks is None else self.ranks.first(value)

    def _find_head(self) -> LmHead | None:
        return find_head(self.model, self._agreed)


def bucket(length: int, multiple: int) -> int:
    """A bound not below `length` that few lengths have their own of: four to an octave, multiples of `multiple`."""
    if multiple > 1:
        multiple = max(multiple, 1 << max(0, (length - 1).bit_length() - 3))
    return _round_up(length, multiple)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
