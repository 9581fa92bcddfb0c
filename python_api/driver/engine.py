"""What the driver asks of the stack that runs the model (DESIGN sections 3.5 and 6).

The driver owns the chains (`ChainState`) and decides; an engine owns the model and whatever it keeps of the past. The
driver never sees a KV cache. A slot holds one chain. A lane draws for it, one token a step: lanes [c*P, (c+1)*P) belong
to slot c. A lane that runs (`LaneStatus.RUNNING`) asks for the token at its POSITION, given the prompt and the first
POSITION tokens of its answer. Those are

    the chain's own, `ChainState.token`, before the lane's DIVERGENCE,   the lane's own, `lane_token`, from there on.

The calls of a run, each of which says below what must hold after it:

    begin -> ( prefill -> transfer | step -> transfer | move | widen )* -> end

There are two ways to keep the past.

**Rows of keys and values.** The engine has a row for each chain and one for each lane. Before each step `transfer` says
which positions to copy from row to row; then every lane is fed one token, `input_id` at `position`, and sampled.
Nothing else needs to be known. `engines/huggingface` does this.

**Requests.** A serving stack (vLLM, SGLang) has no rows to copy. It keeps a request for each lane that runs: prompt and
answer so far, with which the stack does what it always does (its prefix cache finds the shared part). Such an engine
ignores `transfer`, `input_id`, `position` and VALID, and needs to know when a lane's request ends and when another one
begins. It is told so before each step, on the host, if it has a method `requests` (`RequestEngine`): `Ended` and
`Opened`. Until a request ends, the tokens that the engine answered for it are the tokens that it goes on from, and the
engine need not look at the state at all.

An engine that would rather look reads three columns of `lane_field`. A lane asks for something while its STATUS is
RUNNING; while EPOCH stays what it was, its tokens are those of before and the one that the engine answered (none, where
that was PENDING); whenever EPOCH is another, it starts again from its first POSITION tokens, found as above. After
`prefill`, `move` and `widen` it forgets what the lanes of those slots had. No other column tells: a lane may start
again with the SERIAL and the DIVERGENCE that it had, and with nothing to copy.

A lane may have no token yet: it answers PENDING and is asked again. So an engine may wait for some requests and not for
others, prefill long ones in pieces, and let requests run ahead of what is asked: what a request draws depends on its
own tokens and on random numbers that are known when it opens, never on the steps in between. What has run ahead may be
handed over at once, as a run of draws (`Sampled`), and a request may even be drawn to its end without a word between:
`Opened` says what ends it, a rejection included.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from power_kernels.api.driver.particles.state import ParticleState
from power_kernels.rng import STREAM_BITS
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
    ignored. entropy: float32 [L] in nats, of softmax(logits), where the run asked for it; else None.

    Runs, of an engine that keeps requests and whose `device` is the CPU: all are [L, K], a lane's next draws in order,
    PENDING behind the last. Those behind the place where the chain goes another way are ignored.
    """

    token: torch.Tensor
    logq: torch.Tensor
    weight: torch.Tensor
    status: torch.Tensor
    entropy: torch.Tensor | None = None


@runtime_checkable
class Engine(Protocol):
    """A model that can be asked for the next token of any lane.

    device: where the tensors of `ChainState` must live; a serving stack with processes of its own takes the CPU.
    vocab_size: width of the logits. max_context: the most positions a prompt and its answer may take together, or None
    when the model sets no limit. eos_token_ids: the model's own end-of-sequence tokens, possibly none.
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
        """These slots hold these prompts from now on. No lane of theirs runs; what they held before is void.

        Rows: make each chain row hold all but the last token of its prompt, which the first decode feeds; the lanes'
        rows hold nothing (LaneField.VALID is 0). Requests: keep the prompt for those that open. Returns the number of
        tokens forwarded for each prompt: 0 where another slot held the same prompt already, or another entry of this
        call does.
        """
        ...

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        """Rows: commit, then open. Requests: nothing.

        commit_range int32 [C, 4] rows (chain, lane, start, stop): the chain takes the lane's positions [start, stop).
        open_range int32 [C*P, 4] rows (lane, chain, start, stop): the lane takes the chain's. Positions count from the
        start of the prompt; stop <= start moves nothing. The ranges are instructions to copy and nothing else: a lane
        that starts again and already holds what it needs gets an empty one.
        """
        ...

    def step(self, state: ChainState) -> Sampled:
        """Sample every lane that runs of the `state.chains` first slots, or answer PENDING for it.

        Rows: feed `state.input_id` at `state.position`. Requests: the next token of each, or runs, all that they have
        drawn since they were asked. Draws are those of `power_kernels.sample_tokens` with `state.counter` and
        `state.exclude`, which `Opened` gives as well. A lane that answers PENDING is asked for the same token again, at
        once: where no lane has one, wait for the first that does. What is answered for lanes that do not run is
        ignored. Rows may feed them whatever the state holds for them, since nothing at or beyond VALID is trusted.
        """
        ...

    def move(self, source: int, target: int) -> None:
        """Make slot `target`, with its lanes, hold what slot `source` holds. `source` is void afterwards.

        Requests: the prompt moves. Those of both slots' lanes have ended (`RequestEngine.requests` was called), and
        those of `source` will be opened again as requests of `target`'s lanes, with all the tokens that they had.
        """
        ...

    def end(self) -> None:
        """Free what the run held, requests included, and leave the model as `begin` found it. Does nothing when no run
        is on."""
        ...


class Ended(NamedTuple):
    """Nothing more will be asked of this request: it was rejected, finished, made void by a change of its chain, or its
    chain stopped, moved or got more lanes."""

    lane: int
    request: int


THETA_SLACK = 1e-9


class Opened(NamedTuple):
    """The request of a lane that starts, or starts again.

    request: its number, another for each request of a run. tokens: those of the answer so far, on top of the prompt of
    slot lane // P. horizon: no token at or beyond this position of the answer will be asked for. serial, chain_id,
    prompt_id: words of its random numbers (DESIGN section 4). exclude: the token that may not be drawn next, that is at
    position len(tokens) and at no later one; -1 for none.

    What follows is for engines that end a request by themselves, and the others need not look at it. eos: the tokens
    that end an answer. stops: whether a stop string may end one, too, which the chain alone can tell. cumw: W of the
    tokens, the sum of their weights in nats. theta: below what the chain rejects the request, see `rejects`; -inf where
    it never does so early. (It lies `THETA_SLACK` (1 + |theta|) below the chain's own, so that no rounding ends what
    the chain lets go on.)
    """

    lane: int
    request: int
    tokens: list[int]
    horizon: int
    serial: int
    chain_id: int
    prompt_id: int
    exclude: int
    cumw: float
    theta: float
    length_bonus: float
    eos: tuple[int, ...]
    stops: bool

    @property
    def ends_early(self) -> bool:
        """Whether an EOS token or a stop string may end the answer before the horizon."""
        return bool(self.eos) or self.stops

    @property
    def stand_in(self) -> int:
        """The token that the chain is given of a draw that a worker has rejected and not shown.

        The chain rejects it, too, whatever it is, but for the excluded one: that it would keep and walk on.
        """
        return 1 if self.exclude == 0 else 0

    def rejects(self, n: int, cumw: float) -> bool:
        """Whether the chain rejects the request at its n-th token or an earlier one, and takes nothing more of it.

        cumw: W of the n tokens, as the running float64 sum. With term(n) = length_bonus n - log n this is
            cumw + max(term(m), term(horizon)) < theta,
        m being n where the answer may end early, else horizon. Whoever asks a device the same, which rounds otherwise,
        finds it here if it was found there: half of the slack is given away.
        """
        most = max(self.length_bonus * m - math.log(m) for m in (n if self.ends_early else self.horizon, self.horizon))
        return self.theta > -math.inf and cumw + most < self.theta + 0.5 * THETA_SLACK * (1 + abs(self.theta))

    def counter(self, position: int) -> tuple[int, int, int, int]:
        """What `power_kernels.sample_tokens` takes as the counter of the token at a position of the answer."""
        words = position, self.serial, self.chain_id, self.prompt_id << STREAM_BITS
        return tuple((word + 2**31) % 2**32 - 2**31 for word in words)  # 32 bits, as int32 holds them


@runtime_checkable
class RequestEngine(Engine, Protocol):
    """An engine that keeps a request for each lane that runs, and is told when they end and begin.

    It may stop drawing for a request by itself, where `Opened` says that the chain will reject it or where an EOS token
    has come. What it hands over are the tokens that it drew, with their own weights. Where the lane goes on all the
    same, it is asked for more of the same request, which goes on from the tokens that it has.

    Where the state is on a device this costs a copy a step, which the host waits for: it needs the tokens.
    """

    def requests(self, opened: list[Opened], ended: list[Ended]) -> None:
        """First forget what has ended, then take on what was opened; a lane may be in both. All else goes on.

        Called, when there is anything to say, before `step`, and before `prefill`, `move` and `widen` change what the
        slots and lanes stand for.
        """
        ...


@runtime_checkable
class CapturableEngine(Engine, Protocol):
    """An engine whose step can be recorded, as a CUDA graph, and replayed.

    `step(state)` does the same as `decode(state, prepare(state))`.
    """

    def prepare(self, state: ChainState) -> Hashable:
        """Do the host's part of the next step, and return its key: all that the host decides about its launches.

        Never waits for a device. Called once before each step, recorded or not.
        """
        ...

    def decode(self, state: ChainState, key: Hashable) -> Sampled:
        """Launch the step. The same state and key give the same launches on the same tensors; nothing is looked at.

        For the same key, a recording of what this launches stays right as long as the run lasts.
        """
        ...


@runtime_checkable
class WideningEngine(Engine, Protocol):
    """An engine whose chains can get more lanes while a run is on."""

    def widen(self, chains: int, lanes: int) -> None:
        """From now on there are `chains` slots of `lanes` lanes each: fewer slots, more lanes, no more rows in all.

        What was lane p of slot c, row c * P + p, is row c * lanes + p now. The chains of the slots that stay and the
        lanes that they had are what they were; the others hold nothing (LaneField.VALID is 0). Called between two
        steps, after `transfer`. Requests: all have ended, and those that go on will be opened again; an engine that
        looks forgets what all lanes had.
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


@runtime_checkable
class QueueingEngine(Engine, Protocol):
    """An engine that works on so many requests at once and lets more of them wait.

    most_requests: the driver keeps as many lanes busy where nobody says how many chains are to run.
    """

    most_requests: int


@runtime_checkable
class ParticleEngine(Engine, Protocol):
    """An engine that runs particles (DESIGN 3.9): N lanes a slot, which fork from each other, and two chain rows, one
    of the current answer, which a sweep refers to, and one of the candidate that is kept.

    most_rows: rows of a step up to which more of them are worth it.
    The calls of a run: begin_particles -> ( prefill -> copy_particles | children -> copy_particles | move )* -> end.
    """

    most_rows: int

    def particle_bytes(self, *, groups: int, particles: int, max_length: int) -> int:
        """Bytes that a run of this size takes on `device`, on top of what is taken now."""
        ...

    def check_particles(self) -> None:
        """Raise UnsupportedModelError where particles do not run with this model."""
        ...

    def begin_particles(self, *, groups: int, particles: int, max_length: int) -> None:
        """Get ready for `groups` slots of so many particles, with all positions below max_length. Raises as `begin`."""
        ...

    def copy_particles(self, state: ParticleState) -> None:
        """First what the kept candidates take (`keep_from_lane`, `keep_from_answer`), then what the lanes take
        (`fork_from_lane`, `fork_from_answer`): rows (to, from, start, stop) as in `transfer`. Lane n of slot g is row
        g * N + n, and its chain rows are 2 g and 2 g + 1, the first of which takes the prompt."""
        ...

    def children(self, state: ParticleState) -> torch.Tensor:
        """Logits [G * (N + 1), V] of the next position: of each lane with a particle (`state.live`), which feeds
        `input_id` at `position`, and of each slot's reference (where `state.reference` is not -1), whose last token
        stands at the same position and went through the model when the answer was drawn. Others are not looked at."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What a call of `step` cost. Only the accounts of a run depend on it.

    fed: lanes that went through the model, tokens where a lane was fed several. recalled: those that were sampled
    without, from an earlier forward pass of the same prefix. forward_seconds: of the host, in the model and its head.

    Tokens by lane, of an engine that keeps requests and learns by its replies what they cost. prefilled: of a chain's
    prompt, in its first request; recomputed: of prompt and answer, in every later one, both without the token that gave
    the first draw; cached: those found in a prefix cache. undelivered: drawn for requests that had ended before.
    """

    fed: int
    recalled: Sequence[int]
    forward_seconds: float
    prefilled: Mapping[int, int] = field(default_factory=dict)
    recomputed: Mapping[int, int] = field(default_factory=dict)
    cached: Mapping[int, int] = field(default_factory=dict)
    undelivered: Mapping[int, int] = field(default_factory=dict)


@runtime_checkable
class ReportingEngine(Engine, Protocol):
    """An engine that knows more of its last step than that it fed every lane of the active slots."""

    def step_report(self) -> StepReport:
        """Of the last step."""
        ...


class Ranks(Protocol):
    """The processes that hold one model together and make the same calls (`engines/huggingface/tensor_parallel.py`)."""

    def check_same(self, **given) -> None:
        """Raise ArgumentError, in every process, where the processes were given different values."""
        ...

    def least(self, value: float) -> float:
        """The least of the processes' values."""
        ...


@runtime_checkable
class SharedEngine(Engine, Protocol):
    """An engine that may be one of several processes' part of a model. ranks: None where it holds all of it."""

    ranks: Ranks | None


def ranks_of(engine: Engine) -> Ranks | None:
    """The processes that must plan alike and be given the same, or None."""
    return engine.ranks if isinstance(engine, SharedEngine) else None
