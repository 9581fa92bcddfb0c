"""mh_accept and mh_advance in Python: the law of DESIGN section 3, one lane after the other."""

from __future__ import annotations

import math

import numpy as np
import torch

from .. import rng
from ..law import Law
from ..state import ChainField as CF
from ..state import ChainState, Cost, LaneStatus, Mode, Outcome, Status
from ..state import LaneField as LF
from . import law as ref
from .sampling import write

_NAN = float("nan")


def mh_accept_out(weights_cur, weights_prop, len_cur, len_prop, log_u, accept, log_ratio, status) -> None:
    """The acceptance test of section 3.2 for stacks that keep their own chains. See `power_kernels.mh_accept`."""
    accepts, ratios, statuses = [], [], []
    for b in range(log_u.shape[0]):
        current, proposal = int(len_cur[b]), int(len_prop[b])
        verdict = (False, _NAN)
        if not (1 <= current <= weights_cur.shape[1] and 1 <= proposal <= weights_prop.shape[1]):
            row = Status.BAD_LENGTH
        else:
            w_cur = weights_cur[b, :current].to("cpu", torch.float64).numpy()
            w_prop = weights_prop[b, :proposal].to("cpu", torch.float64).numpy()
            used = np.concatenate([w_cur, w_prop, [float(log_u[b])]])
            row = Status.NAN if np.isnan(used).any() else Status.POS_INF if (used == np.inf).any() else Status.OK
        if row is Status.OK:
            # cumsum is the plain running sum in position order; sum() would be pairwise
            f_cur = np.cumsum(w_cur)[-1] - math.log(current)
            f_prop = np.cumsum(w_prop)[-1] - math.log(proposal)
            with np.errstate(invalid="ignore"):
                ratio = f_prop - f_cur
            if np.isnan(ratio):  # -inf against -inf: neither answer can occur
                row = Status.NAN
            else:
                verdict = (not f_prop < f_cur + float(log_u[b]), ratio)
        accepts.append(verdict[0])
        ratios.append(verdict[1])
        statuses.append(row)
    accept.copy_(torch.tensor(accepts, dtype=torch.bool, device="cpu"))
    write(log_ratio, ratios)
    write(status, statuses)


def mh_advance(*args) -> None:
    """One decode step of the law of section 3 for every lane, or several. See `power_kernels.mh_advance`.

    Takes the tensors of `ChainState` in order, length_term, seed, eos, stop_next, the sampled (token, logq, weight,
    status, entropy), and `Law.constants()`.
    """
    n_state = len(ChainState.__dataclass_fields__)
    state = ChainState(*args[:n_state])
    length_term, seed, eos, stop_next, token, logq, weight, status, entropy = args[n_state : n_state + 9]
    law = Law.of_constants(*args[n_state + 9 :])
    if not law.needs_entropy:
        entropy = torch.ones_like(weight)
    rows = state.lane_field.shape[0]
    sampled = [column.cpu().reshape(rows, -1).numpy() for column in (token, logq, weight, status, entropy)]
    host = ChainState(*(t.cpu() for t in state.tensors()))
    advance = _Advance(
        host,
        law,
        length_term.cpu().numpy(),
        seed.tolist() * (host.chains if len(seed) == 1 else 1),
        frozenset(eos.tolist()),
        stop_next.cpu().numpy(),
        sampled,
    )
    for chain in range(host.chains):
        advance.chain(chain)
    for target, source in zip(state.tensors(), host.tensors(), strict=True):
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)


def log_z(z: float) -> float:
    return math.log(z) if z > 0 else -math.inf


class _Advance:
    """One launch. Chains are independent of each other; `chain` is what one Triton program does."""

    def __init__(
        self, state: ChainState, law: Law, length_term, seeds: list[int], eos: frozenset[int], stop_next, sampled
    ):
        self.law, self.length_term, self.seeds, self.eos, self.stop_next = law, length_term, seeds, eos, stop_next
        self.can_end_early = bool(eos) or law.stops
        # Rows by position whose entry t belongs to the first t tokens.
        self.sums = ("cumw", *(("cumz",) if law.diverges else ()), *(("stop_state",) if law.stops else ()))
        self.lanes = state.lanes
        self.sampled = sampled
        self.s = {name: getattr(state, name).numpy() for name in ChainState.__dataclass_fields__}

    def chain(self, c: int) -> None:
        self.c, self.seed = c, self.seeds[c]
        self.field = self.s["field"][c]
        self.first = c * self.lanes
        self.mine = range(self.first, self.first + self.lanes)
        self.takers = {lane: self.lane(lane, LF.EPOCH) for lane in self.mine}
        draws = self.sampled[0].shape[1]
        for turn in range(draws):
            if not self.turn(turn):  # nor will any later one have a draw: they would only clear the ranges
                if turn + 1 < draws:
                    self.clear_ranges()
                break
        for lane in self.mine:
            self.emit(lane)

    def turn(self, turn: int) -> bool:
        """The next draw of each lane that has one, and all that follows from them. Returns whether a lane had one."""
        self.clear_ranges()
        received = []
        if self.field[CF.MODE] in (Mode.EXTEND, Mode.PROPOSE):
            for lane in self.mine:
                if self.has_draw(lane, turn):
                    self.receive(lane, *(column[lane, turn] for column in self.sampled))
                    received.append(lane)
            self.resolve()
        self.schedule()
        return bool(received)

    def has_draw(self, lane: int, turn: int) -> bool:
        """A lane's draws are those of what it ran when the launch began: once it runs something else, or has none this
        time, the rest of its row is void."""
        has = (
            self.lane(lane, LF.STATUS) == LaneStatus.RUNNING
            and self.takers.get(lane) == self.lane(lane, LF.EPOCH)
            and self.sampled[3][lane, turn] != Status.PENDING
        )
        if not has:
            self.takers.pop(lane, None)
        return has

    # -- small accessors

    def lane(self, lane: int, name: LF) -> int:
        return int(self.s["lane_field"][lane, name])

    def set_lane(self, lane: int, **values: int) -> None:
        for name, value in values.items():
            self.s["lane_field"][lane, LF[name]] = value

    def cap(self) -> int:
        """Where a closed answer must end: the horizon, or the current length in the published code."""
        capped = self.law.karan_du and self.field[CF.MODE] == Mode.PROPOSE
        return int(self.field[CF.LENGTH] if capped else self.field[CF.HORIZON])

    def add_cost(self, column: Cost, tokens: int) -> None:
        self.s["cost"][self.c, column] += tokens

    def clear_ranges(self) -> None:
        self.s["commit_range"][self.c] = (self.c, 0, 0, 0)
        for lane in self.mine:
            self.s["open_range"][lane] = (lane, self.c, 0, 0)

    # -- 1. a sampled token of one running lane

    def receive(self, lane: int, token, logq, weight, status, h) -> None:
        law, c = self.law, self.c
        extending = self.field[CF.MODE] == Mode.EXTEND
        serial, div, pos = (self.lane(lane, f) for f in (LF.SERIAL, LF.DIVERGENCE, LF.POSITION))
        self.add_cost(Cost.EXTENSION if extending else Cost.PROPOSAL, 1)
        if not extending:
            self.s["forwarded"][c, serial] += 1
        if pos <= div:
            self.set_lane(lane, VALID=int(self.field[CF.BASE]) + pos)  # the token it fed is the chain's own
        if pos < div:  # a forwarded prefix: what was sampled there is not used
            self.set_lane(lane, POSITION=pos + 1)
            if pos + 1 == self.field[CF.LENGTH]:
                self.unchanged(lane, serial)
            else:
                self.set_lane(lane, EPOCH=self.lane(lane, LF.EPOCH) + 1)
            return
        if status == Status.OK:  # numbers that would poison the chain, whoever made them
            if np.isnan(weight) or np.isnan(logq) or np.isnan(h):
                status = Status.NAN
            elif weight == np.inf or h == np.inf:
                status = Status.POS_INF
            elif law.stops and not 0 <= token < self.stop_next.shape[1]:
                status = Status.BAD_TOKEN
        if status != Status.OK:
            self.set_lane(lane, STATUS=LaneStatus.FAULTED, FAULT=status)
            return
        if pos == div and not extending and token == self.lane(lane, LF.EXCLUDE):
            # Nothing else has mass: the token is kept and the walk goes on (3.4). A divergence cut has no walk, and
            # only rounding takes it to such a place.
            if law.diverges:
                self.unchanged(lane, serial)
            else:
                self.start(lane, serial, from_position=pos + 1)
            return
        total = float(self.before("cumw", lane, pos)) + float(weight)
        self.s["lane_token"][lane, pos] = token
        self.s["lane_logq"][lane, pos] = logq
        self.s["lane_cumw"][lane, pos + 1] = total
        if law.diverges:
            # max: entropies round, and Z must not fall
            z = float(self.before("cumz", lane, pos)) + ref.leave_probability(logq) * max(float(h), 0.0)
            self.s["lane_cumz"][lane, pos + 1] = z
        ends = token in self.eos
        if law.stops:
            stop_state = self.stop_next[self.before("stop_state", lane, pos), token]
            self.s["lane_stop_state"][lane, pos + 1] = stop_state
            ends = ends or stop_state < 0
        pos += 1
        self.set_lane(lane, POSITION=pos)
        cap = self.cap()
        closed = ends or pos == cap
        rejected = False
        if not extending:
            theta = self.s["lane_theta"][lane]
            if law.karan_du:
                rejected = closed and total - self.s["cumw"][c, pos] < theta
            elif closed or law.early_rejection:
                # An open answer ends at its next token at the earliest, and at the horizon if nothing else ends it. In
                # between F can become no more than at these two: no weight is positive, the term is convex, Z grows.
                at_least = pos if closed else pos + 1 if self.can_end_early else cap
                most = max(self.length_term[at_least], self.length_term[pos if closed else cap])
                # Z = 0 takes rounding, and no step leaves such an answer: none may go there.
                stuck = law.diverges and closed and z == 0.0
                rejected = stuck or total + most - (log_z(z) if law.diverges else 0.0) < theta
        if rejected:
            self.s["outcome"][c, serial] = Outcome.REJECTED
            self.set_lane(lane, STATUS=LaneStatus.IDLE)
            if not closed:
                self.add_cost(Cost.SAVED_EARLY, cap - pos)
        elif closed:
            self.set_lane(lane, STATUS=LaneStatus.CLOSED)

    def before(self, name: str, lane: int, pos: int):
        """What the proposal has summed up before its token at `pos`: `name` is one of `sums`."""
        own = pos > self.lane(lane, LF.DIVERGENCE)
        return self.s["lane_" + name][lane, pos] if own else self.s[name][self.c, pos]

    # -- 2. the lowest unresolved serial, if its lane is closed

    def held(self) -> list[int]:
        return [lane for lane in self.mine if self.lane(lane, LF.STATUS) != LaneStatus.IDLE]

    def resolve(self) -> None:
        if not self.held():
            return
        lane = min(self.held(), key=lambda row: self.lane(row, LF.SERIAL))
        if self.lane(lane, LF.STATUS) == LaneStatus.FAULTED:
            if self.field[CF.MODE] == Mode.PROPOSE:  # this step and those prefetched after it were not made
                self.field[CF.OPENED] = self.lane(lane, LF.SERIAL)
            self.stop(Mode.FAULT, self.lane(lane, LF.FAULT))
        elif self.lane(lane, LF.STATUS) == LaneStatus.CLOSED:
            self.commit(lane)

    def stop(self, mode: Mode, fault: int = 0) -> None:
        self.field[CF.MODE], self.field[CF.FAULT] = mode, fault
        for lane in self.mine:
            self.set_lane(lane, STATUS=LaneStatus.IDLE)

    def commit(self, lane: int) -> None:
        s, c, field = self.s, self.c, self.field
        base, length = int(field[CF.BASE]), int(field[CF.LENGTH])
        serial, div, pos = (self.lane(lane, f) for f in (LF.SERIAL, LF.DIVERGENCE, LF.POSITION))
        for name in ("token", "logq"):
            s[name][c, div:pos] = s["lane_" + name][lane, div:pos]
        for name in self.sums:
            s[name][c, div + 1 : pos + 1] = s["lane_" + name][lane, div + 1 : pos + 1]
        field[CF.LENGTH] = pos
        field[CF.CLOSED] = int(s["token"][c, pos - 1]) in self.eos or (self.law.stops and s["stop_state"][c, pos] < 0)
        # The chain's KV lacks its last token; an extension starts there and so must copy it too.
        s["commit_range"][c] = (c, lane, base + min(div, length - 1), base + pos - 1)
        for other in self.mine:
            # A lane that walked on in this launch counts on a copy that its next opening will replace.
            start, stop = s["open_range"][other, 2:]
            copied = self.lane(other, LF.VALID) if stop <= start else int(start)
            self.set_lane(other, STATUS=LaneStatus.IDLE, VALID=min(copied, base + div))
        self.set_lane(lane, VALID=base + pos - 1)
        extending = field[CF.MODE] == Mode.EXTEND
        if extending:
            field[CF.MODE] = Mode.PROPOSE
            field[CF.LAST] = field[CF.OPENED] - 1 + self.law.mcmc_steps
        else:
            s["outcome"][c, serial] = Outcome.ACCEPTED
            field[CF.OPENED] = serial + 1
        column = int(field[CF.OPENED]) if extending else serial
        s["step_weight"][c, column] = s["cumw"][c, pos]
        s["step_logq"][c, column] = ref.fixed_point_sum(s["logq"][c, :pos])

    # -- 3. the schedule (3.1): open lanes, end stages

    def schedule(self) -> None:
        law, field = self.law, self.field
        if field[CF.MODE] == Mode.START:
            field[CF.OPENED] = 1
            for name in self.sums:
                self.s[name][self.c, 0] = 0
            self.extend()
        while field[CF.MODE] == Mode.PROPOSE:
            for lane in self.mine:
                while self.lane(lane, LF.STATUS) == LaneStatus.IDLE and field[CF.OPENED] <= field[CF.LAST]:
                    self.open(lane)
            if self.held():
                return
            last_stage = field[CF.CLOSED] or field[CF.STAGE] * law.block_size >= law.max_new_tokens
            if not last_stage and not field[CF.FINAL]:
                self.extend()
            elif law.final_steps > 0 and not field[CF.FINAL]:
                field[CF.FINAL] = 1
                field[CF.HORIZON] = law.max_new_tokens
                field[CF.LAST] = field[CF.OPENED] - 1 + law.final_steps
            else:
                self.stop(Mode.DONE)

    def extend(self) -> None:
        """Begin the next stage: lane 0 of the chain grows the answer. An extension is always accepted."""
        law, field = self.law, self.field
        length, stage = int(field[CF.LENGTH]), int(field[CF.STAGE])
        start = length if law.karan_du else stage * law.block_size
        field[CF.MODE] = Mode.EXTEND
        field[CF.STAGE] = stage + 1
        field[CF.HORIZON] = min(start + law.block_size, law.max_new_tokens)
        # The published code can extend from the same position twice; those draws must not repeat.
        serial = -(stage + 1) if law.karan_du else 0
        self.run(self.first, serial, length, length, -1)

    def open(self, lane: int) -> None:
        """Open the next serial on an idle lane; a step that turns out unchanged leaves the lane idle."""
        field = self.field
        serial, length = int(field[CF.OPENED]), int(field[CF.LENGTH])
        field[CF.OPENED] = serial + 1
        cut_uniform, accept_uniform = rng.step_uniforms(self.seed, serial, field[CF.CHAIN_ID], field[CF.PROMPT_ID])
        log_u = math.log(1.0 - accept_uniform)
        self.s["forwarded"][self.c, serial] = 0
        f = float(self.s["cumw"][self.c, length]) + self.length_term[length]
        if self.law.diverges:
            cumz = self.s["cumz"][self.c, : length + 1]
            self.s["lane_theta"][lane] = f - log_z(float(cumz[length])) + log_u
            # The first d with cumz[d + 1] > u Z. There is none when Z = 0: nothing else can be drawn anywhere.
            div = int(np.searchsorted(cumz[1:], cut_uniform * cumz[length], side="right"))
            if div == length:
                self.unchanged(lane, serial)
            else:
                self.run(lane, serial, div, div, int(self.s["token"][self.c, div]))
            return
        self.s["lane_theta"][lane] = log_u if self.law.karan_du else f + log_u
        self.start(lane, serial, from_position=min(int(cut_uniform * length), length - 1))

    def start(self, lane: int, serial: int, from_position: int) -> None:
        """Walk the free prefix from a position (3.4) and run the lane from where it leaves the current answer."""
        length = int(self.field[CF.LENGTH])
        keep = rng.position_uniforms(
            self.seed,
            np.arange(from_position, length),
            serial,
            self.field[CF.CHAIN_ID],
            self.field[CF.PROMPT_ID],
        )[:, 1]
        leaves = (
            from_position + i
            for i, v in enumerate(keep)
            if v < ref.leave_probability(self.s["logq"][self.c, from_position + i])
        )
        div = next(leaves, length)
        position = div if self.law.free_prefix else from_position
        self.add_cost(Cost.SAVED_PREFIX, position - from_position)
        if position == length:
            self.unchanged(lane, serial)
        else:
            self.run(lane, serial, div, position, int(self.s["token"][self.c, div]) if div < length else -1)

    def unchanged(self, lane: int, serial: int) -> None:
        """The proposal is the current answer: a step that changed nothing, whatever lanes run beside it."""
        self.s["outcome"][self.c, serial] = Outcome.UNCHANGED
        self.s["left"][self.c, serial] = -1
        self.set_lane(lane, STATUS=LaneStatus.IDLE)

    def run(self, lane: int, serial: int, div: int, pos: int, exclude: int) -> None:
        """Start a lane that shares [0, div) with its chain and samples position `pos` next."""
        if self.field[CF.MODE] == Mode.PROPOSE:
            self.s["left"][self.c, serial] = div
        start, stop = self.lane(lane, LF.VALID), int(self.field[CF.BASE]) + pos - 1
        self.s["open_range"][lane] = (lane, self.c, start, max(start, stop))
        self.set_lane(
            lane,
            STATUS=LaneStatus.RUNNING,
            SERIAL=serial,
            DIVERGENCE=div,
            POSITION=pos,
            VALID=stop,
            EXCLUDE=exclude,
            FAULT=0,
            EPOCH=self.lane(lane, LF.EPOCH) + 1,
        )

    # -- 4. what each lane feeds next

    def emit(self, lane: int) -> None:
        s, c, field = self.s, self.c, self.field
        status, div, pos = (self.lane(lane, f) for f in (LF.STATUS, LF.DIVERGENCE, LF.POSITION))
        base = int(field[CF.BASE])
        if status == LaneStatus.IDLE:
            # Harmless: nothing at or beyond VALID is trusted.
            s["input_id"][lane], s["position"][lane] = 0, self.lane(lane, LF.VALID)
        else:
            own = s["lane_token"][lane] if pos > div else s["token"][c]
            s["input_id"][lane] = own[pos - 1] if pos > 0 else field[CF.PROMPT_TOKEN]
            s["position"][lane] = base + pos - 1
        s["exclude"][lane] = self.lane(lane, LF.EXCLUDE) if status == LaneStatus.RUNNING and pos == div else -1
        words = (pos, self.lane(lane, LF.SERIAL), field[CF.CHAIN_ID], field[CF.PROMPT_ID] << rng.STREAM_BITS)
        s["counter"][lane] = np.array(words, dtype=np.int64).astype(np.uint32).view(np.int32)
