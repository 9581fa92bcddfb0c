"""What the driver asks of the stack that runs the model (DESIGN sections 3.5 and 6).

The driver owns the chains (`ChainState`) and decides, an engine owns the model and whatever it keeps of the
past. The driver never sees a KV cache. It names positions, and each call below says what must hold
afterwards:

    begin -> (prefill | transfer -> step | move)* -> end

A lane is a row that may be fed; lanes [c*P, (c+1)*P) belong to chain slot c. Before each `step` the driver hands over
two lists of ranges: `commit_range` (an accepted lane's tokens become its chain's) and `open_range` (a lane starts
again from a prefix of its chain). An engine that keeps KV rows copies them. One that does not (a serving stack with a
prefix cache) watches the lanes' serials instead, submits prompt + prefix as a new request when a lane starts again, and
reports the lane as PENDING until its first token is there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from power_kernels.state import ChainState


class UnsupportedModelError(ValueError):
    """The model holds or computes something that this engine cannot rewind exactly. Raised before any
    work."""


class EngineBusyError(RuntimeError):
    """The engine is in the middle of another run, which goes on. Exhaust that stream or close() it first."""


@dataclass(frozen=True)
class Sampled:
    """One decode step's draws, a row a lane; what `power_kernels.mh_advance` takes.

    token int64 [L]; logq float32 [L] and weight float32 [L] in nats (DESIGN section 2); status int32 [L], a
    `power_kernels.Status`: PENDING for a lane that has no sample this time, whose other entries are then
    ignored. recalled: bool [L] where lanes were sampled without a forward pass, None where none was. entropy: float32
    [L] in nats, of softmax(logits), where the run asked for it; else None. fed: how many lanes went through the model,
    None for all of them.
    """

    token: torch.Tensor
    logq: torch.Tensor
    weight: torch.Tensor
    status: torch.Tensor
    recalled: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    fed: int | None = None


@runtime_checkable
class Engine(Protocol):
    """A model that can be fed at any position of any lane.

    device: where the tensors of `ChainState` must live. vocab_size: width of the logits. max_context: the
    most positions a prompt and its answer may take together, or None when the model sets no limit.
    eos_token_ids: the model's own end-of-sequence tokens, possibly none.
    """

    device: torch.device
    vocab_size: int
    max_context: int | None
    eos_token_ids: tuple[int, ...]

    def begin(
        self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int, entropy: bool = False
    ) -> None:
        """Get ready for `chains` slots of `lanes` lanes each, with all positions below `max_length`.

        max_length: prompt + max_new_tokens of the longest request. alpha, beta: the exponents of the
        target and of the proposal (DESIGN section 2). seed: 64 bits. entropy: every sample needs the entropy of its
        row, for the cut law "divergence-entropy". Raises EngineBusyError, and leaves the other run alone, while one is
        on: an engine keeps the past of one run.
        """
        ...

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        """Make each chain slot hold all but the last token of its prompt; the first decode feeds that one.

        The slots' lanes hold nothing afterwards (LaneField.VALID is 0). Returns the number of tokens forwarded for
        each prompt: 0 where another slot held the same prompt already, or another entry of this call does.
        """
        ...

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        """Commit, then open. commit_range int32 [C, 4] rows (chain, lane, start, stop): the chain takes the
        lane's positions [start, stop). open_range int32 [C*P, 4] rows (lane, chain, start, stop): the lane
        takes the chain's; positions are absolute. stop <= start moves nothing.

        The ranges are instructions to copy and nothing else: a lane that already holds what it needs gets an empty one.
        An engine without KV rows of its own sees a lane start again by its SERIAL or DIVERGENCE in `lane_field`
        changing, and finds the tokens to start from in the chain's row of `ChainState.token`.
        """
        ...

    def step(self, state: ChainState) -> Sampled:
        """Feed `state.input_id` at `state.position` on every lane of the `state.chains` first slots, and
        sample.

        Draws use `state.counter` and `state.exclude`. A lane may answer PENDING; the driver then repeats
        its input. Lanes that do not run (LaneStatus) may be fed whatever the state holds for them, since nothing at or
        beyond VALID is trusted, or left out as PENDING.
        """
        ...

    def move(self, source: int, target: int) -> None:
        """Make slot `target`, with its lanes, hold what slot `source` holds. `source` is void afterwards."""
        ...

    def end(self) -> None:
        """Free what the run held and leave the model as `begin` found it. Does nothing when no run is on."""
        ...


@runtime_checkable
class CapturableEngine(Engine, Protocol):
    """An engine whose step can be recorded, as a CUDA graph, and replayed.

    `step(state)` does the same as `decode(state, plan(state))`.
    """

    def plan(self, state: ChainState) -> Hashable:
        """Do the host's part of the next step, and return everything that it decides about that step's launches.

        Never waits for a device. Called once before each step, recorded or not.
        """
        ...

    def decode(self, state: ChainState, plan: Hashable) -> Sampled:
        """Launch the step. The same state and plan give the same launches on the same tensors; nothing is looked at.

        For the same plan, a recording of what this launches stays right as long as the run lasts.
        """
        ...


@runtime_checkable
class WideningEngine(Engine, Protocol):
    """An engine whose chains can get more lanes while a run is on."""

    def widen(self, chains: int, lanes: int) -> None:
        """From now on there are `chains` slots of `lanes` lanes each: fewer slots, more lanes, no more rows in all.

        What was lane p of slot c, row c * P + p, is row c * lanes + p now. The chains of the slots that stay and the
        lanes that they had are what they were; the others hold nothing (LaneField.VALID is 0). Called between two
        steps, after `transfer`.
        """
        ...


@runtime_checkable
class SizedEngine(Engine, Protocol):
    """An engine that can say what a run would take.

    most_rows: rows up to which it is worth asking `decode_seconds`.
    """

    most_rows: int

    def run_bytes(self, *, chains: int, lanes: int, max_length: int) -> int:
        """Bytes that a run of this size takes on `device`, on top of what is taken now."""
        ...

    def decode_seconds(self, rows: Sequence[int], length: int) -> list[float]:
        """Seconds of one decode step of so many rows each, that each read about `length` positions.

        Measured when first asked. Raises EngineBusyError.
        """
        ...
