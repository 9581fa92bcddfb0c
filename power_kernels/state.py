"""The chain state that `mh_advance` reads and writes (DESIGN section 5.5), as plain tensors.

C chains, P lanes a chain (lane c*P + p belongs to chain c), H = max_new_tokens, S = the most steps a chain can make.
Integer fields are packed, one row a chain or lane; the enums below name the columns, and csrc/state.h mirrors them
(an extension built from others is not loaded).

Everything here is answer-relative except `BASE` (the prompt's length), `VALID`, `position` and the KV ranges, which
count from the start of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import torch

from .errors import ArgumentError, ArgumentTypeError
from .law import Law, check_integer
from .rng import MAX_PROMPT_ID

# Lanes a chain that the triton backend compiles for; the others take any number.
MAX_LANES = 16

MAX_STOP_STATES = 2**15  # of a stop automaton, whose states are int16


class ChainField(IntEnum):
    """Columns of `ChainState.field` int32 [C, 16]."""

    MODE = 0  # a Mode
    LENGTH = 1  # n, tokens in the current answer
    OPENED = 2  # the next serial to open
    LAST = 3  # the last serial of this stage
    HORIZON = 4  # H_k
    STAGE = 5  # k = 1, 2, ...
    FINAL = 6  # 1 while the `final_steps` run
    BASE = 7  # prompt length
    CHAIN_ID = 8
    PROMPT_ID = 9
    FAULT = 10  # the Status that stopped the chain, 0 while it is healthy
    CLOSED = 11  # 1 when an EOS token or a stop string ends the current answer
    PROMPT_TOKEN = 12  # the prompt's last token, which the first decode of an empty answer feeds


CHAIN_FIELDS = 16  # row pitch: one 64-byte line a chain


class Mode(IntEnum):
    IDLE = 0
    START = 1  # admitted: BASE, CHAIN_ID and PROMPT_ID are set, the next launch opens its first lane
    EXTEND = 2  # lane 0 grows the answer to the stage's horizon
    PROPOSE = 3  # lanes run Metropolis-Hastings proposals
    DONE = 4
    FAULT = 5


class LaneField(IntEnum):
    """Columns of `ChainState.lane_field` int32 [C*P, 8]."""

    STATUS = 0  # a LaneStatus
    SERIAL = 1
    DIVERGENCE = 2  # tokens [0, d) are the chain's, [d, pos) the lane's own
    POSITION = 3  # the position to sample next
    VALID = 4  # positions of the lane's KV row, from the start of the prompt, that agree with its chain
    EXCLUDE = 5  # the token that may not be drawn next, -1 for none
    FAULT = 6
    # For engines that keep requests instead of KV rows. If a lane runs and EPOCH is what it was, the lane's tokens
    # before POSITION are what they were plus the token it was just given (or nothing, if that was PENDING). If EPOCH is
    # greater, they are the chain's first POSITION tokens, whatever the lane held. It grows at each opening (after a
    # change before them, the same SERIAL and DIVERGENCE may open again), when the walk goes on past a kept token, and
    # at each position of a forwarded prefix, where the chain's token takes the place of the sampled one.
    # `admit` and `retire` leave it, so that it never falls or repeats in a slot; `move` takes it along with the lane.
    EPOCH = 7


LANE_FIELDS = 8


class LaneStatus(IntEnum):
    IDLE = 0
    RUNNING = 1
    CLOSED = 2  # passed its acceptance test, waits until it holds the lowest unresolved serial
    FAULTED = 3  # its logits were bad; stops the chain only if the serial chain would have got there


class Outcome(IntEnum):
    """Entries of `ChainState.outcome` int8 [C, S+1], by serial (entry 0, the extension, is not used)."""

    REJECTED = 0
    UNCHANGED = 1  # every token was kept, by the walk or because no other can be drawn: a step that changed nothing
    ACCEPTED = 2


class Cost(IntEnum):
    """Columns of `ChainState.cost` int64 [C, 4], in tokens."""

    EXTENSION = 0  # forwarded while extending
    PROPOSAL = 1  # forwarded for proposals, those that a change voided included
    SAVED_PREFIX = 2  # positions a proposal kept without a forward pass
    SAVED_EARLY = 3  # positions left to the cap when a proposal was rejected early


class Status(IntEnum):
    """What a row's logits were like. Reported by every op that reads logits or weights, one per row."""

    PENDING = -1  # only as an input of mh_advance: this lane has no sample this time
    OK = 0
    NAN = 1  # among the logits; or alpha or beta is not finite and positive
    POS_INF = 2
    NO_MASS = 3  # every logit is -inf
    BAD_TOKEN = 4  # a token outside [0, V)
    BAD_LENGTH = 5


_PER_CHAIN = {
    "field", "token", "logq", "cumw", "cumz", "stop_state", "outcome", "left", "forwarded", "step_weight", "step_logq",
    "cost", "commit_range",
}  # fmt: skip


@dataclass
class ChainState:
    """Every tensor of `mh_advance`, in the order of its schema. Rows of chains, rows of lanes, then what comes next.

    Z = H + 1 under a divergence cut and 0 otherwise; A = H + 1 with stop strings and 0 otherwise. By serial: column s
    of [C, S+1] belongs to step s, and is settled once s < OPENED and no lane holds it.

    step_weight and step_logq [C, S+2] hold the sums over the whole answer after step s, where that step was accepted,
    and in the column of the next serial when a stage has extended the answer; the others say nothing (the sums are
    those of the step before): `driver/results.py` reads them so. logq is summed in units of 2^-32 nats, so that no
    order of summation shows.
    """

    field: torch.Tensor  # i32 [C, 16]
    token: torch.Tensor  # i32 [C, H+1]
    logq: torch.Tensor  # f32 [C, H+1]
    cumw: torch.Tensor  # f64 [C, H+1], cumw[t] = sum of the first t weights
    cumz: torch.Tensor  # f64 [C, Z], cumz[t] = sum of (1 - q) h over the first t tokens, h as the cut law says
    stop_state: torch.Tensor  # i16 [C, A], the stop automaton's state after t tokens, -1 once a stop string is complete
    outcome: torch.Tensor  # i8 [C, S+1], by serial: an Outcome
    left: torch.Tensor  # i32 [C, S+1], by serial: where the proposal left the answer of its time, -1 if unchanged
    forwarded: torch.Tensor  # i32 [C, S+1], by serial: tokens forwarded for the proposal
    step_weight: torch.Tensor  # f64 [C, S+2], by serial: W of the answer, nats
    step_logq: torch.Tensor  # f64 [C, S+2], by serial: log q of the answer, nats
    cost: torch.Tensor  # i64 [C, 4]
    lane_field: torch.Tensor  # i32 [C*P, 8]
    lane_token: torch.Tensor  # i32 [C*P, H+1], valid on [DIVERGENCE, POSITION)
    lane_logq: torch.Tensor  # f32 [C*P, H+1], the same
    lane_cumw: torch.Tensor  # f64 [C*P, H+1], valid on (DIVERGENCE, POSITION]
    lane_cumz: torch.Tensor  # f64 [C*P, Z], the same
    lane_stop_state: torch.Tensor  # i16 [C*P, A], the same
    lane_theta: torch.Tensor  # f64 [C*P], F(x) + log(1-u), fixed when the proposal opens
    input_id: torch.Tensor  # i64 [C*P]: the token each lane feeds next
    position: torch.Tensor  # i64 [C*P]: its position, prompt included
    counter: torch.Tensor  # i32 [C*P, 4]: the block that draws the next token
    exclude: torch.Tensor  # i64 [C*P]
    commit_range: torch.Tensor  # i32 [C, 4]: (chain, lane, start, stop), lane KV -> chain KV
    open_range: torch.Tensor  # i32 [C*P, 4]: (lane, chain, start, stop), chain KV -> lane KV

    checked = None  # not a field: what `mh_advance` last found sound in this object, so that it need not look again

    @staticmethod
    def allocate(chains: int, lanes: int, law: Law, device: torch.device | str = "cpu") -> ChainState:
        """A state of `chains` >= 1 idle chains with `lanes` >= 1 lanes each. Raises as `Law` does."""
        check_integer("chains", chains, 1)
        check_integer("lanes", lanes, 1)
        if not isinstance(law, Law):
            raise ArgumentTypeError(f"law is a {type(law).__name__}; it must be a Law")

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, width, serials = chains * lanes, law.max_new_tokens + 1, law.max_steps + 1
        z_width = width if law.diverges else 0
        a_width = width if law.stops else 0
        return ChainState(
            field=zeros(chains, CHAIN_FIELDS, dtype=torch.int32),
            token=zeros(chains, width, dtype=torch.int32),
            logq=zeros(chains, width, dtype=torch.float32),
            cumw=zeros(chains, width, dtype=torch.float64),
            cumz=zeros(chains, z_width, dtype=torch.float64),
            stop_state=zeros(chains, a_width, dtype=torch.int16),
            outcome=zeros(chains, serials, dtype=torch.int8),
            left=zeros(chains, serials, dtype=torch.int32),
            forwarded=zeros(chains, serials, dtype=torch.int32),
            step_weight=zeros(chains, serials + 1, dtype=torch.float64),
            step_logq=zeros(chains, serials + 1, dtype=torch.float64),
            cost=zeros(chains, len(Cost), dtype=torch.int64),
            lane_field=zeros(rows, LANE_FIELDS, dtype=torch.int32),
            lane_token=zeros(rows, width, dtype=torch.int32),
            lane_logq=zeros(rows, width, dtype=torch.float32),
            lane_cumw=zeros(rows, width, dtype=torch.float64),
            lane_cumz=zeros(rows, z_width, dtype=torch.float64),
            lane_stop_state=zeros(rows, a_width, dtype=torch.int16),
            lane_theta=zeros(rows, dtype=torch.float64),
            input_id=zeros(rows, dtype=torch.int64),
            position=zeros(rows, dtype=torch.int64),
            counter=zeros(rows, 4, dtype=torch.int32),
            exclude=zeros(rows, dtype=torch.int64),
            commit_range=zeros(chains, 4, dtype=torch.int32),
            open_range=zeros(rows, 4, dtype=torch.int32),
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple([getattr(self, name) for name in self.__dataclass_fields__])

    @property
    def chains(self) -> int:
        return self.field.shape[0]

    @property
    def lanes(self) -> int:
        return self.lane_field.shape[0] // max(self.field.shape[0], 1)

    def first(self, chains: int) -> ChainState:
        """A view of the first `chains` chains and their lanes."""
        rows = chains * self.lanes
        return ChainState(
            **{f.name: getattr(self, f.name)[: chains if f.name in _PER_CHAIN else rows] for f in fields(self)}
        )

    def admit(self, chain: int, prompt: list[int], chain_id: int, prompt_id: int) -> None:
        """Put a fresh chain into slot `chain`; the next `mh_advance` opens it. Its lanes' KV rows hold nothing.

        prompt: token ids, at least one. chain_id in [0, 2^31) and prompt_id in [0, `rng.MAX_PROMPT_ID`] are words of
        the chain's random numbers (DESIGN section 4). Raises as `Law` does.
        """
        self.admit_all([chain], [prompt], [chain_id], [prompt_id])

    def admit_all(
        self, chains: list[int], prompts: list[list[int]], chain_ids: list[int], prompt_ids: list[int]
    ) -> None:
        """`admit` of several chains, each to a slot of its own. What a device gets is one copy, which the host does not
        wait for."""
        rows = torch.zeros(
            len(chains), 1 + CHAIN_FIELDS, dtype=torch.int32, device="cpu", pin_memory=self.field.device.type == "cuda"
        )
        given = zip(rows, chains, prompts, chain_ids, prompt_ids, strict=True)
        for row, chain, prompt, chain_id, prompt_id in given:
            check_integer("chain", chain, 0, self.chains - 1)
            check_integer("chain_id", chain_id, 0)
            check_integer("prompt_id", prompt_id, 0, MAX_PROMPT_ID)
            if len(prompt) == 0:
                raise ArgumentError("prompt is empty; the first decode feeds its last token")
            check_integer("prompt[-1]", prompt[-1], 0)
            row[0], field = chain, row[1:]
            field[ChainField.MODE] = Mode.START
            field[ChainField.BASE] = len(prompt)
            field[ChainField.PROMPT_TOKEN] = prompt[-1]
            field[ChainField.CHAIN_ID] = chain_id
            field[ChainField.PROMPT_ID] = prompt_id
        rows = rows.to(self.field.device, non_blocking=True)
        slots = rows[:, 0].long()
        self.field.index_copy_(0, slots, rows[:, 1:])
        self.outcome.index_fill_(0, slots, 0)
        self.cost.index_fill_(0, slots, 0)
        self._fields_of_a_start().index_fill_(0, slots, 0)

    def retire(self, chain: int) -> None:
        """Leave slot `chain` idle: stepping on it changes nothing, and its lanes trust nothing of their KV rows.

        Its answer, outcomes and costs stay until `admit`.
        """
        check_integer("chain", chain, 0, self.chains - 1)
        lanes = slice(chain * self.lanes, (chain + 1) * self.lanes)
        self.field[chain, ChainField.MODE] = Mode.IDLE
        self._fields_of_a_start()[chain] = 0
        self.input_id[lanes] = 0
        self.position[lanes] = 0
        self.exclude[lanes] = -1
        self.commit_range[chain, 2:] = 0
        self.open_range[lanes, 2:] = 0

    def _fields_of_a_start(self) -> torch.Tensor:
        """[C, P, ...]: all fields of the lanes but EPOCH, the last one, which goes on counting. A view."""
        return self.lane_field.unflatten(0, (self.chains, self.lanes))[..., : LaneField.EPOCH]

    def move(self, source: int, target: int) -> None:
        """Move the chain of slot `source`, with its lanes, into slot `target`."""
        lanes = self.lanes
        for f in fields(self):
            tensor = getattr(self, f.name)
            if f.name in _PER_CHAIN:
                tensor[target] = tensor[source]
            else:
                tensor[target * lanes : (target + 1) * lanes] = tensor[source * lanes : (source + 1) * lanes]

    def widened(self, chains: int, lanes: int) -> ChainState:
        """The first `chains` chains with `lanes` lanes each, no fewer than now; those that are new are idle.

        Chains stay where they are in memory, lanes are copied. The KV ranges of the last launch are not: they must have
        been followed. Raises as `Law` does.
        """
        check_integer("chains", chains, 1, self.chains)
        check_integer("lanes", lanes, self.lanes)

        def of_lanes(name: str) -> torch.Tensor:
            old = getattr(self, name)
            new = old.new_zeros(chains, lanes, *old.shape[1:])
            if name == "exclude":
                new.fill_(-1)
            if name != "open_range":
                new[:, : self.lanes] = old[: chains * self.lanes].unflatten(0, (chains, self.lanes))
            return new.flatten(0, 1)

        return ChainState(
            **{
                f.name: getattr(self, f.name)[:chains] if f.name in _PER_CHAIN else of_lanes(f.name)
                for f in fields(self)
            }
        )
