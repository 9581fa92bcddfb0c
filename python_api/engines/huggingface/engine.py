"""A transformers causal LM as an engine: ragged rows, rollback by copying, no re-prefill (DESIGN section 6).

During a forward pass, and only then, the model has another attention implementation, no module in training,
and rotary frequencies that do not depend on the batch (`patches.py`, `rope.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

import power_kernels
from power_kernels.api.driver import captured
from power_kernels.api.driver.engine import EngineBusyError, Sampled, UnsupportedModelError
from power_kernels.api.engines.huggingface import decode_attention
from power_kernels.api.engines.huggingface.compiled import CompiledForward
from power_kernels.api.engines.huggingface.cpu_linear import packed_bytes, speed_up
from power_kernels.api.engines.huggingface.length_bound import LengthBound
from power_kernels.api.engines.huggingface.lm_head import LmHead
from power_kernels.api.engines.huggingface.patches import Patches
from power_kernels.api.engines.huggingface.prefix_memory import PrefixMemory
from power_kernels.api.engines.huggingface.ragged_attention import (
    NAME,
    DecodeView,
    PrefillView,
    Probe,
    Segment,
    attached,
)
from power_kernels.api.engines.huggingface.ragged_cache import KvLayout, KvSlabs, RaggedCache, RaggedLayer
from power_kernels.api.engines.huggingface.rope import check_rope, pin_rope
from power_kernels.api.engines.huggingface.tensor_parallel import TensorParallelGroup
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.rng import as_int64
from power_kernels.state import ChainState, LaneField, LaneStatus, Status

_REWINDABLE = frozenset({"full_attention", "sliding_attention", "attention"})

# Root mean square error of the self check, relative to that of the centred logits. A wrong mask or position
# gives more than a half; rounding through the layers stays well below these.
_CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}

_DEVICE_MULTIPLE = 64  # positions: keeps masks aligned and the number of distinct shapes small

# Rows of a step beyond which lanes cannot be nearly free, on a CPU and on a device: the processor is busy by then.
_MOST_ROWS = (16, 256)
_TIMED_LENGTH = (64, 512)  # positions that each row of a timed step reads, likewise


_measured: WeakKeyDictionary[PreTrainedModel, dict] = WeakKeyDictionary()


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
    self_check: first compare a small ragged batch with a rollback to plain forward passes of the untouched model.
    compile: run decode forward passes under torch.compile (`compiled.py`). It compiles here, which takes a
        minute or so the first time. A string names a backend of torch.compile other than its default.

    Raises UnsupportedModelError for a model whose past cannot be rewound exactly or whose attention this
    engine does not know: recurrent, linear, convolutional and chunked layers, encoder-decoders, attention
    sinks, position biases.

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
        self_check: bool = True,
        compile: bool | str = False,
    ):
        if not isinstance(model, PreTrainedModel):
            raise ArgumentTypeError(f"model is a {type(model).__name__}; it must be a transformers PreTrainedModel")
        for name, value in (("prefill_chunk", prefill_chunk), ("length_multiple", length_multiple)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name} is {value!r}; it must be an integer of at least 1")
        _refuse(model)
        self.ranks = TensorParallelGroup.of(model)  # the processes that hold the model with this one, or None
        self.model, self.prefill_chunk, self.remember = model, prefill_chunk, remember
        self._config = model.config.get_text_config()
        self._decoder = model.get_decoder()
        self.device = next(model.parameters()).device
        self.dtype = model.dtype
        self.max_context = getattr(self._config, "max_position_embeddings", None)
        self.eos_token_ids = _eos_token_ids(model)
        on_device = self.device.type != "cpu"
        self.length_multiple = length_multiple or (_DEVICE_MULTIPLE if on_device else 1)
        self.most_rows = _MOST_ROWS[on_device]
        self.forward_seconds = 0.0  # of the host, in the model and its head, prefill included
        self._input_vocab = model.get_input_embeddings().weight.shape[0]
        self._slabs: KvSlabs | None = None
        self._patches: Patches | None = None
        self._memory: PrefixMemory | None = None
        self._layout, self._windows, self.vocab_size = self._probe()
        _check_windows(self._config, self._windows)
        if self.ranks is not None:
            self.ranks.check_logits(model, self.vocab_size)
        heads = self._config.num_attention_heads // (1 if self.ranks is None else self.ranks.size)
        if attention is None and on_device and getattr(self._config, "attn_logit_softcapping", None):
            attention = decode_attention.PADDED  # the flash kernel has no soft cap
        self.attention = decode_attention.choose(self._layout, heads, self.device, attention)
        # Of engines that decode this model alike, whichever was asked first.
        alike = self.device, self.dtype, self.attention, compile, torch.get_num_threads()
        self._decode_seconds = _measured.setdefault(model, {}).setdefault(alike, {})
        self._head = self._find_head()
        self._compiled = None
        if compile is not False:
            self._compile(compile)
        if self_check:
            check_rope(model, self.device, self.dtype)
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
        for name, value in (("chains", chains), ("lanes", lanes), ("max_length", max_length)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} is {value!r}; it must be an integer of at least 1")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and value > 0):
                raise ArgumentError(f"{name} is {value!r}; it must be finite and positive")
        if self.max_context is not None and max_length > self.max_context:
            raise ArgumentError(f"max_length is {max_length}; the model's context is {self.max_context}")
        if self._slabs is not None:
            raise EngineBusyError("a run of this engine is on; exhaust its stream or close() it first")
        if self._head is not None and self.model.get_output_embeddings() is not self._head.module:
            self._head = self._find_head()  # the owner gave the model another
        self._patches = self._patched(max_length)
        slabs = KvSlabs(
            self._layout, chains=chains, lanes=lanes, positions=self._positions(max_length), device=self.device
        )
        self._cache = RaggedCache(slabs, len(self._layout.layers))
        self._max_length, self._chains, self._entropy = max_length, chains, entropy
        rows = chains * lanes
        self._alpha = torch.full((rows,), alpha, dtype=torch.float32, device=self.device)
        self._beta = torch.full((rows,), beta, dtype=torch.float32, device=self.device)
        self._seed = torch.tensor([as_int64(seed)], device=self.device)
        self._row = torch.arange(rows, dtype=torch.int32, device=self.device)
        self._steps = 0
        self._prompts: list[tuple[int, ...] | None] = [None] * chains
        # How far a slot's rows may have been written: `base` positions at step number `at`, one more a step.
        self._written: list[tuple[int, int] | None] = [None] * chains
        self._length = LengthBound(self.device)
        # On a device it would have to be waited for what is known and what is not.
        self._memory = None
        if self.remember and self._head is not None and self.device.type == "cpu":
            weight = self._head.module.weight
            self._memory = PrefixMemory(slabs, chains=chains, hidden_size=weight.shape[1], dtype=weight.dtype)
        self._slabs = slabs

    def end(self) -> None:
        """Free the KV. Does nothing when no run is on."""
        if self._patches is not None:
            self._patches.restore()  # for an interrupt that came between two lines of their own clean-up
        self._slabs = self._cache = self._patches = self._memory = None

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        """Write all but the last token of each prompt into its chain slot. Returns the tokens forwarded for each.

        A prompt that a slot of this run already holds is copied from it and costs nothing.
        Raises ArgumentError, before any work, for slots, lengths or token ids out of range.
        """
        self._check_running()
        if self.ranks is not None:
            self.ranks.check_same(slots=slots, prompts=prompts)
        self._check_prompts(slots, prompts)
        return self._prefill(slots, [tuple(prompt) for prompt in prompts])

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        """Copy lane -> chain ranges int32 [C, 4], then chain -> lane ranges int32 [C*P, 4]. See the protocol."""
        self._check_running()
        self._slabs.commit(commit_range)
        self._slabs.open(open_range)

    def step(self, state: ChainState) -> Sampled:
        """Feed and sample every lane of the first `state.chains` slots. Never waits for a device.

        `decode(state, plan(state))`, but that on a CPU lanes that do not run are not fed, and a lane whose prefix was
        forwarded before in this run is answered without a forward pass; while there are such lanes the others wait.
        """
        if self.device.type != "cpu":
            return self.decode(state, self.plan(state))
        self._check_running()
        if self._memory is not None:
            lanes, hidden = self._memory.recall(state)
            if lanes:
                self._steps += 1
                return self._spread(state, lanes, self._draw(state, lanes, hidden), recalled=True)
        length, lanes = self.plan(state), range(state.position.shape[0])
        if self.attention == decode_attention.ROWS:
            status = state.lane_field[:, LaneField.STATUS].tolist()
            lanes = [lane for lane in lanes if status[lane] == LaneStatus.RUNNING]
        if not lanes:  # all of them wait for one that is decided without a token
            return self._spread(state, [], _nothing_drawn(self.device, self._entropy))
        output = self._fed(state, length, lanes=lanes)
        drawn = self._draw(state, lanes, output)
        good = drawn.status == Status.OK
        if self._memory is not None:
            self._memory.learn(state, lanes, output, good)
        if not bool(good.all()):
            self._scrub(lanes, state.position[lanes], drawn.status)
        return self._spread(state, lanes, drawn)

    def plan(self, state: ChainState) -> int:
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
        self._steps += 1
        if self.attention == decode_attention.FLASH:
            return self._slabs.positions
        return min(_bucket(length, self.length_multiple), self._slabs.positions)

    def decode(self, state: ChainState, plan: int) -> Sampled:
        """Launch the step that was planned: forward, draw, wipe what rows with bad logits wrote. May be recorded."""
        lanes = slice(0, state.position.shape[0])
        output = self._fed(state, plan, decode_attention.recordable(self.attention))
        drawn = self._draw(state, lanes, output)
        self._scrub(lanes, state.position, drawn.status)
        return Sampled(drawn.token, drawn.logq, drawn.weight, drawn.status, entropy=drawn.entropy)

    def _fed(self, state: ChainState, length: int, kernel: str | None = None, lanes=None) -> torch.Tensor:
        """Feed some lanes of the state, or all. Returns what `_output` does."""
        input_id, position = state.input_id, state.position
        if lanes is not None and len(lanes) < len(position):
            input_id, position = input_id[lanes], position[lanes]
        else:
            lanes = None
        view = DecodeView(position, length, kernel or self.attention, lanes)
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

    def _spread(
        self, state: ChainState, lanes, drawn: power_kernels.SampleOutput, *, recalled: bool = False
    ) -> Sampled:
        """What was drawn for some lanes, among all of them; the others are PENDING."""
        rows = state.position.shape[0]

        def spread(values: torch.Tensor | None, elsewhere: int = 0) -> torch.Tensor | None:
            if values is None or len(lanes) == rows:
                return values
            out = values.new_full((rows,), elsewhere)
            out[lanes] = values
            return out

        status = spread(drawn.status, Status.PENDING)
        return Sampled(
            spread(drawn.token),
            spread(drawn.logq),
            spread(drawn.weight),
            status,
            recalled=status != Status.PENDING if recalled else None,
            entropy=spread(drawn.entropy),
            fed=0 if recalled else len(lanes),
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
        self._slabs.move(source, target, self._reach(source))
        self._prompts[target], self._prompts[source] = self._prompts[source], None
        self._written[target] = self._written[source]
        if self._memory is not None:
            self._memory.move(source, target)

    # -- what a run takes

    def run_bytes(self, *, chains: int, lanes: int, max_length: int) -> int:
        """Bytes of the KV of a run, of its logits, and on a CPU of what speeds it up."""
        positions, rows = self._positions(max_length), chains * lanes
        logits = 3 * rows * self.vocab_size * 4  # as the model gives them, in float32, and a workspace
        total = (rows + chains) * positions * self._layout.token_bytes + logits
        if self.device.type == "cpu":
            total += packed_bytes(self.model)
            if self.remember and self._head is not None:
                weight = self._head.module.weight
                total += PrefixMemory.bytes_of(self._layout, weight, chains=chains, positions=positions)
        return total

    def decode_seconds(self, rows: Sequence[int]) -> list[float]:
        """Seconds of the forward pass of a step of each number of rows, the least of four; replayed where the driver's
        steps are. Measured once for each number."""
        new = sorted(set(rows) - set(self._decode_seconds))
        if new:
            length = _TIMED_LENGTH[self.device.type != "cpu"]
            length = min(length, self.max_context or length)
            self.begin(chains=1, lanes=new[-1], max_length=length, alpha=1.0, beta=1.0, seed=0)
            try:
                steps = [self._step_to_time(count, length) for count in new]
                # In turns, so that what else the machine does meets all of them.
                rounds = [[_seconds(step, self.device) for step in steps] for _ in range(4)]
                for count, seconds in zip(new, zip(*rounds, strict=True), strict=True):
                    self._decode_seconds[count] = self._agreed(min(seconds))
            finally:
                self.end()
        return [self._decode_seconds[count] for count in rows]

    def _step_to_time(self, rows: int, length: int) -> Callable[[], None]:
        """A forward pass of so many rows at the end of their slabs, run once; recorded where the driver would do so."""
        position = torch.full((rows, 1), length - 1, device=self.device)
        tokens = torch.zeros_like(position)
        graphs = captured.recorder(self.device)
        kernel = self.attention if graphs is None else decode_attention.recordable(self.attention)

        def step() -> None:
            self._logits(self._output(DecodeView(position[:, 0], length, kernel), tokens, position))

        if graphs is None:
            step()
            return step
        steps = captured.CapturedSteps(graphs)
        steps.run(rows, step)
        return lambda: steps.run(rows, step)

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
        with self._forward_clock(), self._patches, attached(view), torch.inference_mode():
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

    def _scrub(self, lanes, position: torch.Tensor, status: torch.Tensor) -> None:
        """Wipe what lanes with bad logits just wrote: 0 * NaN would carry it into the lane's next proposal.

        Earlier positions are finite, or an earlier step's logits would have been bad: a position always sees itself.
        """
        bad = status != Status.OK
        row, start = self._row[lanes], position.to(torch.int32)
        self._slabs.scrub_lanes(torch.stack([row, row, start, start + bad], dim=1).to(torch.int32))

    # -- prompts

    def _prefill(self, slots: list[int], prompts: list[tuple[int, ...]]) -> list[int]:
        holders = {held: slot for slot, held in enumerate(self._prompts) if held is not None and slot not in slots}
        fresh: list[tuple[int, tuple[int, ...]]] = []
        copies: list[tuple[int, int, int]] = []
        for slot, prompt in zip(slots, prompts, strict=True):
            keep = len(prompt) - 1 if self._prompts[slot] == prompt else 0
            self._clear(slot, keep)
            if keep == 0 and len(prompt) > 1:
                if prompt in holders:
                    copies.append((holders[prompt], slot, len(prompt) - 1))
                else:
                    fresh.append((slot, prompt))
            holders.setdefault(prompt, slot)
            self._prompts[slot] = None  # until it is written
            self._written[slot] = (len(prompt), self._steps)
            self._length.admit(len(prompt))
        for chunk in _packed(((slot, prompt[:-1]) for slot, prompt in fresh), self.prefill_chunk):
            tokens, positions, segments = chunk
            ids = torch.tensor([tokens], device=self.device)
            position = torch.tensor([positions], device=self.device)
            self._forward(self._decoder, PrefillView(segments, position[0]), ids, position)
        for source, target, stop in copies:
            self._slabs.copy_chain(source, target, stop)
        for slot, prompt in zip(slots, prompts, strict=True):
            self._prompts[slot] = prompt
            if self._memory is not None:
                self._memory.admit(slot, prompt)
        forwarded = {slot: len(prompt) - 1 for slot, prompt in fresh}
        return [forwarded.get(slot, 0) for slot in slots]

    def _reach(self, slot: int) -> int:
        """No position of this slot's rows at or beyond this one has been written."""
        if self._written[slot] is None:
            return 0
        base, at = self._written[slot]
        return min(base + self._steps - at, self._slabs.positions)

    def _clear(self, slot: int, keep: int = 0) -> None:
        reach = self._reach(slot)
        self._slabs.clear(slot, lanes_stop=reach, chain_start=keep, chain_stop=reach)

    # -- checks of arguments

    def _check_running(self) -> None:
        if self._slabs is None:
            raise ArgumentError("no run is on; call begin() first")

    def _check_prompts(self, slots: list[int], prompts: list[list[int]]) -> None:
        if len(slots) != len(prompts) or len(set(slots)) != len(slots):
            raise ArgumentError(f"slots is {slots!r} for {len(prompts)} prompts; it must name one slot each, once")
        for slot, prompt in zip(slots, prompts, strict=True):
            if not 0 <= slot < self._chains:
                raise ArgumentError(f"slot {slot} is out of range; slots lie in [0, {self._chains})")
            if not 1 <= len(prompt) < self._max_length:
                raise ArgumentError(
                    f"a prompt has {len(prompt)} tokens; it must have at least 1 and fewer than {self._max_length}"
                )
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= self._input_vocab:
                raise ArgumentError(
                    f"a prompt has token ids in [{low}, {high}]; the model embeds [0, {self._input_vocab})"
                )

    # -- what changes on the model during a forward pass

    def _patched(self, max_length: int, *, attention: bool = True) -> Patches:
        patches = Patches()
        for module in self.model.modules():
            if module.training:
                patches.add(module, "training", False)
        pin_rope(self.model, max_length, patches)
        if attention:
            speed_up(self.model, patches)
            for config in _configs(self.model):
                patches.add(config, "_attn_implementation_internal", NAME)
        return patches

    # -- what the model is like

    def _probe(self) -> tuple[KvLayout, dict[int, int | None], int]:
        """One token through the model: the shape of each layer's KV, its window, the width of the logits."""
        layers = self._config.num_hidden_layers
        recorder = Cache(layers=[_RecorderLayer() for _ in range(layers)])
        probe = Probe(recorder.layers)
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        try:
            with self._patched(1), attached(probe), torch.inference_mode():
                logits = self.model(
                    input_ids=token, position_ids=token, past_key_values=recorder, use_cache=True
                ).logits
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not take a ragged cache: {type(error).__name__}: {error}"
            ) from error
        written = [layer.shape for layer in recorder.layers]
        if None in written or sorted(probe.windows) != list(range(layers)):
            missing = [i for i, shape in enumerate(written) if shape is None or i not in probe.windows]
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: layers {missing} keep no keys and values of their own; what they keep "
                "cannot be rewound"
            )
        dtypes = {layer.dtype for layer in recorder.layers}
        if len(dtypes) != 1:
            raise UnsupportedModelError(f"layers cache different dtypes: {sorted(map(str, dtypes))}")
        return KvLayout(tuple(written), dtypes.pop()), probe.windows, logits.shape[-1]

    def _check_with_or_without_head(self) -> None:
        try:
            self._self_check()
        except UnsupportedModelError:
            if self._head is None:
                raise
            self._head = None  # whatever else there is between the decoder and the logits, the whole model has it
            self._self_check()

    def _compile(self, backend: bool | str) -> None:
        """Compile here rather than in the first run: a model that cannot be compiled is refused before any work."""
        self._compiled = CompiledForward(
            self.model, _configs(self.model), layers=self._config.num_hidden_layers, backend=backend
        )
        try:
            self.begin(chains=2, lanes=1, max_length=1, alpha=1.0, beta=1.0, seed=0)
            self._decode_rows([0, 0], [0, 0])
        finally:
            self.end()

    def _agreed(self, value: float) -> float:
        """A number that every process takes the same decision by."""
        return value if self.ranks is None else self.ranks.first(value)

    def _find_head(self) -> LmHead | None:
        head = LmHead.of(self.model)
        if head is None:
            return None
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)

        def call(module):
            recorder = Cache(layers=[_RecorderLayer() for _ in range(self._config.num_hidden_layers)])
            with self._patched(1), attached(Probe(recorder.layers)), torch.inference_mode():
                return module(input_ids=token, position_ids=token, past_key_values=recorder, use_cache=True)

        explained = head.explains(
            lambda: call(self.model).logits, lambda: getattr(call(self._decoder), "last_hidden_state", None)
        )
        return head if self._agreed(explained) else None

    def _self_check(self) -> None:
        """Compare ragged decoding, a commit and a rollback with plain forward passes; a few tokens each."""
        limit = min(self._input_vocab, self.vocab_size)
        ids = torch.randint(0, limit, (24,), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
        short, long = ids[:3], ids[3:9]
        # What each row has been fed when it is looked at: then row 0 goes back to its prompt and takes
        # another way.
        after = [[*short, ids[9], ids[10]], [*long, ids[11], ids[12]]]
        again = [[*short, ids[9], ids[13]], [*long, ids[11], ids[12], ids[14]]]
        max_length = max(map(len, again))
        if self.max_context is not None and max_length > self.max_context:
            return
        try:
            got = []
            self.begin(chains=2, lanes=1, max_length=max_length, alpha=1.0, beta=1.0, seed=0)
            self._prefill([0, 1], [tuple(short), tuple(long)])
            self._open([(0, 0, 0, len(short) - 1), (1, 1, 0, len(long) - 1)])
            for fed in range(3):
                at = [len(short) - 1 + fed, len(long) - 1 + fed]
                logits = self._decode_rows([after[r][at[r]] for r in range(2)], at)
                got += [(after[r][: at[r] + 1], logits[r]) for r in range(2)]
            self._commit([(0, 0, len(short) - 1, len(short) + 1), (1, 1, len(long) - 1, len(long) + 1)])
            self._slabs.clear(0, lanes_stop=max_length, chain_start=max_length, chain_stop=max_length)
            self._open([(0, 0, 0, len(short) + 1)])
            at = [len(short) + 1, len(long) + 2]
            logits = self._decode_rows([again[r][at[r]] for r in range(2)], at)
            got += [(again[r][: at[r] + 1], logits[r]) for r in range(2)]
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} failed the self check: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.end()
        self._compare(got, max_length)

    def _compare(self, got: list[tuple[list[int], torch.Tensor]], max_length: int) -> None:
        plain: dict[tuple[int, ...], torch.Tensor] = {}
        errors = []
        with self._patched(max_length, attention=False), torch.inference_mode():
            for tokens, _ in sorted(got, key=lambda pair: -len(pair[0])):
                if not any(known[: len(tokens)] == tuple(tokens) for known in plain):
                    full = torch.tensor([tokens], device=self.device)
                    plain[tuple(tokens)] = self.model(input_ids=full, use_cache=False).logits[0]
        for tokens, logits in got:
            whole = next(known for known in plain if known[: len(tokens)] == tuple(tokens))
            reference = plain[whole][len(tokens) - 1].double()
            scale = (reference - reference.mean()).square().mean().sqrt()
            errors.append(((logits.double() - reference).square().mean().sqrt() / scale).item())
        # The median: in half precision one expert's tie may go the other way in one row of a mixture.
        errors.sort()
        worst = errors[-1] if self.dtype in (torch.float32, torch.float64) else errors[len(errors) // 2]
        tolerance = _CHECK_TOLERANCE.get(self.dtype, _CHECK_TOLERANCE[torch.bfloat16])
        if not self._agreed(worst) <= tolerance:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} decodes differently through the ragged cache than by itself: "
                f"relative error {worst:.2g}, allowed {tolerance:.2g} for {self.dtype}. It uses "
                f"attn_implementation={self.model.config._attn_implementation!r}; 'eager' is the plainest"
            )

    def _decode_rows(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        position = torch.tensor(positions, device=self.device)
        view = DecodeView(position, max(positions) + 1, self.attention)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        return self._logits(self._output(view, ids, position[:, None]))

    def _open(self, ranges: list[tuple[int, int, int, int]]) -> None:
        self._slabs.open(torch.tensor(ranges, dtype=torch.int32, device=self.device))

    def _commit(self, ranges: list[tuple[int, int, int, int]]) -> None:
        self._slabs.commit(torch.tensor(ranges, dtype=torch.int32, device=self.device))


class _RecorderLayer(RaggedLayer):
    """Keeps nothing but the shape of what its layer would cache."""

    def __init__(self):
        CacheLayerMixin.__init__(self)
        self.is_initialized = True
        self.shape, self.dtype, self._positions = None, None, 1

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.shape = tuple((states.shape[1], states.shape[-1]) for states in (key_states, value_states))
        self.dtype = key_states.dtype
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _packed(
    prompts: Iterable[tuple[int, tuple[int, ...]]], most: int
) -> Iterator[tuple[list[int], list[int], list[Segment]]]:
    """Cut (slot, tokens) pairs into forward passes of at most `most` tokens: (tokens, positions,
    segments)."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for slot, prompt in prompts:
        start = 0
        while start < len(prompt):
            stop = min(len(prompt), start + most - len(tokens))
            segments.append(Segment(slot, len(tokens), len(tokens) + stop - start, start))
            tokens += prompt[start:stop]
            positions += range(start, stop)
            start = stop
            if len(tokens) == most:
                yield tokens, positions, segments
                tokens, positions, segments = [], [], []
    if tokens:
        yield tokens, positions, segments


def _nothing_drawn(device: torch.device, entropy: bool) -> power_kernels.SampleOutput:
    token, status = (torch.zeros(0, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
    value = torch.zeros(0, device=device)
    return power_kernels.SampleOutput(token, value, value, value, value if entropy else None, status)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def _bucket(length: int, multiple: int) -> int:
    """A bound above `length` that few lengths have their own of: four to an octave, multiples of `multiple`."""
    if multiple > 1:
        multiple = max(multiple, 1 << max(0, (length - 1).bit_length() - 3))
    return _round_up(length, multiple)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def _configs(model: PreTrainedModel) -> list:
    """Every configuration object that a module of the model reads its attention implementation from."""
    configs = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    return list(configs.values())


def _refuse(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for what the configuration already tells."""
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    devices = {str(p.device) for p in model.parameters()}
    reason = None
    if model.config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif not model.can_generate():
        reason = "is not a causal language model"
    elif kinds - _REWINDABLE:
        reason = f"has layers of type {', '.join(sorted(kinds - _REWINDABLE))}, whose state cannot be rewound"
    elif getattr(model, "_is_stateful", False):
        reason = "keeps a recurrent state, which cannot be rewound"
    elif getattr(config, "use_bidirectional_attention", None):
        reason = "attends to later positions"
    elif not model._can_set_attn_implementation():
        reason = "does not use transformers' attention interface"
    elif len(devices) != 1 or "meta" in devices:
        reason = f"has its parameters on {', '.join(sorted(devices))}; they must all be on one device"
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}")


def _check_windows(config, windows: dict[int, int | None]) -> None:
    """Hold the windows that layers ask for to those of the configuration, from which transformers builds
    its masks.

    The self check is shorter than any real window, so a layer that masks one but does not ask for it would
    pass.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    for layer, asked in windows.items():
        sliding = window is not None if kinds is None else kinds[layer] == "sliding_attention"
        expected = window if sliding else None
        if asked != expected:
            raise UnsupportedModelError(
                f"layer {layer} asks for a window of {asked} where the configuration means {expected}"
            )
