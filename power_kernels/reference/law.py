"""One chain in float64 Python: the law of DESIGN section 3, one proposal after the other.

What the operators store in float32 (logq and weights, DESIGN 5.5) is rounded to float32 here too, so that chains can be
compared bit for bit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import rng
from ..law import Law
from ..state import Outcome
from .rows import draw_token, entropy, token_quantities


def leave_probability(logq: float) -> float:
    """1 - q(x_t) = -expm1(logq), by Kahan's formula, which every backend evaluates in the same way."""
    x = float(logq)
    if x >= 0.0:
        return 0.0
    e = math.exp(x)
    if e == 1.0:
        return -x
    if e == 0.0:
        return 1.0
    return (1.0 - e) * x / math.log(e)


_LOGQ_UNIT = 2.0**-32


def fixed_point_sum(logq: np.ndarray) -> float:
    """The sum of float32 logq in whole units of 2^-32 nats, each cut towards 0: the same in any order."""
    units = np.maximum(logq.astype(np.float64), -(2.0**16)) / _LOGQ_UNIT
    return float(units.astype(np.int64).sum()) * _LOGQ_UNIT


def length_table(law: Law) -> np.ndarray:
    """What an answer's length n adds to W, for n = 0..H + 1: the one table that all backends read (section 3.3).

    lambda n - log n under the uniform cut (log 0 taken as 0), lambda n under a divergence cut, whose log Z is a sum of
    the answer, and 0 in the published code.
    """
    n = np.arange(law.max_new_tokens + 2, dtype=np.float64)
    if law.karan_du:
        return np.zeros_like(n)
    bonus = law.length_bonus * n
    return bonus if law.diverges else bonus - np.log(np.maximum(n, 1.0))


@dataclass(frozen=True)
class Answer:
    """A state of the chain: n tokens, their logq, and running float64 sums over them (n + 1 entries).

    cumw: of the weights. cumz: of (1 - q) h, the masses of the places to leave the answer under a divergence cut.
    stop_state: the stop automaton's state after t tokens, -1 once a stop string is complete.
    """

    tokens: tuple[int, ...] = ()
    logq: tuple[float, ...] = ()
    cumw: tuple[float, ...] = (0.0,)
    cumz: tuple[float, ...] = (0.0,)
    stop_state: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.tokens)

    def prefix(self, n: int) -> Answer:
        sums = self.cumw[: n + 1], self.cumz[: n + 1]
        return Answer(self.tokens[:n], self.logq[:n], *sums, self.stop_state[: n + 1])

    def append(self, token: int, logq: float, weight: float, h: float = 1.0, stop_state: int = 0) -> Answer:
        return Answer(
            (*self.tokens, token),
            (*self.logq, logq),
            (*self.cumw, self.cumw[-1] + weight),
            (*self.cumz, self.cumz[-1] + leave_probability(logq) * max(h, 0.0)),  # rounding; Z must not fall
            (*self.stop_state, stop_state),
        )


class ReferenceChain:
    """One chain, from its first token to its last step.

    next_logits: a function from a tuple of answer tokens to the logits [V] of the next one.
    lanes: proposals prefetched from the same state (section 3.5); the chain is the same for any number.
    stop_next: int16 [S, V], the stop strings' automaton (3.1): the state after a token, -1 where a string is complete.
    """

    def __init__(
        self,
        next_logits: Callable[[tuple[int, ...]], np.ndarray],
        law: Law,
        *,
        alpha: float,
        beta: float | None = None,
        seed: int = 0,
        eos: Sequence[int] = (),
        chain_id: int = 0,
        prompt_id: int = 0,
        lanes: int = 1,
        stop_next: np.ndarray | None = None,
    ):
        self.next_logits = next_logits
        self.law = law
        self.alpha = alpha
        self.beta = alpha if beta is None else beta
        self.seed = seed
        self.eos = frozenset(eos)
        self.ids = (chain_id, prompt_id)
        self.lanes = lanes
        self.stop_next = stop_next
        self.length_term = length_table(law)
        self.serial = 0  # of the last step made
        self.outcomes: list[Outcome] = []
        self.left: dict[int, int] = {}  # by serial: where its proposal left the answer of its time, -1 if it did not

    # -- the schedule (3.1)

    def run(self) -> Answer:
        law, answer = self.law, Answer()
        for stage in range(1, law.stages + 1):
            start = len(answer) if law.karan_du else (stage - 1) * law.block_size
            horizon = min(start + law.block_size, law.max_new_tokens)
            answer = self.extend(answer, horizon, stage)
            answer = self.steps(answer, horizon, law.mcmc_steps)
            if self.ends(answer):
                break
        return self.steps(answer, law.max_new_tokens, law.final_steps)

    def ends(self, answer: Answer) -> bool:
        """Whether an EOS token or a stop string closes the answer."""
        return len(answer) > 0 and (answer.tokens[-1] in self.eos or answer.stop_state[-1] < 0)

    @property
    def can_end_early(self) -> bool:
        return bool(self.eos) or self.stop_next is not None

    def extend(self, answer: Answer, horizon: int, stage: int) -> Answer:
        # The published code can extend from the same position twice; those draws must not repeat.
        serial = -stage if self.law.karan_du else 0
        while len(answer) < horizon:
            answer = self.draw(answer, serial)
            if self.ends(answer):
                break
        return answer

    def steps(self, answer: Answer, horizon: int, count: int) -> Answer:
        last = self.serial + count
        while self.serial < last:
            prefetched = range(self.serial + 1, min(self.serial + self.lanes, last) + 1)
            proposals = [self.propose(answer, horizon, serial) for serial in prefetched]
            for serial, proposal in zip(prefetched, proposals, strict=True):
                self.serial = serial
                outcome, answer = self.resolve(answer, proposal)
                self.outcomes.append(outcome)
                if outcome is Outcome.ACCEPTED:
                    break  # every later proposal started from a state that is gone
        return answer

    def resolve(self, answer: Answer, proposal: Answer | None) -> tuple[Outcome, Answer]:
        if proposal is None:
            return Outcome.REJECTED, answer
        if proposal is answer:
            return Outcome.UNCHANGED, answer
        return Outcome.ACCEPTED, proposal

    # -- one step (3.2)

    def propose(self, answer: Answer, horizon: int, serial: int) -> Answer | None:
        """The outcome of step `serial` from `answer`: a new answer, `answer` itself (unchanged), or None (rejected)."""
        cut_uniform, accept_uniform = self.step_uniforms(serial)
        cap = len(answer) if self.law.karan_du else horizon
        theta = self.threshold(answer, float(accept_uniform))
        divergence = self.leave(answer, self.cut(answer, float(cut_uniform)), serial)
        while divergence < len(answer):
            exclude = answer.tokens[divergence]
            proposal = self.draw(answer.prefix(divergence), serial, exclude)
            if proposal.tokens[-1] != exclude:
                return self.complete(answer, proposal, serial, cap, theta)
            # Nothing else has mass: the token is kept and the walk goes on. A divergence cut has no walk, and only
            # rounding takes it to such a place: the step changes nothing.
            divergence = self.leave(answer, len(answer) if self.law.diverges else divergence + 1, serial)
        return answer

    def complete(self, answer: Answer, proposal: Answer, serial: int, cap: int, theta: float) -> Answer | None:
        """Draw on from a proposal's first own token until it is closed, or known to be rejected (None)."""
        while True:
            closed = len(proposal) == cap or self.ends(proposal)
            if self.rejects(answer, proposal, closed, theta, cap):
                return None
            if closed:
                return proposal
            proposal = self.draw(proposal, serial)

    def cut(self, answer: Answer, u: float) -> int:
        """Where to leave the answer, or under the uniform cut where to begin the walk. Its length: nowhere."""
        n = len(answer)
        if not self.law.diverges:
            return min(int(u * n), n - 1)
        # The first d with cumz[d + 1] > u Z. There is none when Z = 0: nothing else can be drawn anywhere.
        return bisect_right(answer.cumz, u * answer.cumz[n], lo=1) - 1

    def leave(self, answer: Answer, start: int, serial: int) -> int:
        """First position >= start at which the proposal leaves the answer; its length when it never does."""
        divergence = start if self.law.diverges else self.walk(answer, start, serial)
        self.left[serial] = divergence if divergence < len(answer) else -1
        return divergence

    def walk(self, answer: Answer, start: int, serial: int) -> int:
        """First position >= start at which the proposal leaves the answer; its length when it never does (3.4)."""
        for t in range(start, len(answer)):
            keep = self.position_uniforms(t, serial)[1]
            if keep < leave_probability(answer.logq[t]):
                return t
        return len(answer)

    def draw(self, answer: Answer, serial: int, exclude: int = -1) -> Answer:
        """`answer` with one more token from q, that token not being `exclude`."""
        z = self.next_logits(answer.tokens)
        u = float(self.position_uniforms(len(answer), serial)[0])
        token = draw_token(z, self.beta, u, exclude)
        return self.with_token(answer, z, token)  # of the full row, whatever is excluded

    def with_token(self, answer: Answer, z: np.ndarray, token: int) -> Answer:
        """`answer` and a token drawn under logits z [V]."""
        row = token_quantities(z, token, self.alpha, self.beta)
        state = self.next_stop_state(answer, token)
        return answer.append(token, self.stored(row.logq), self.stored(row.weight), self.cut_weight(z), state)

    def next_stop_state(self, answer: Answer, token: int) -> int:
        """The stop automaton's state after one more token (3.1)."""
        return 0 if self.stop_next is None else int(self.stop_next[answer.stop_state[-1], token])

    def cut_weight(self, z: np.ndarray) -> float:
        """h of a divergence cut at a row of logits (3.6)."""
        return self.stored(entropy(z)) if self.law.needs_entropy else 1.0

    # -- where its numbers come from (tests read them from tables, or enumerate them)

    def step_uniforms(self, serial: int) -> np.ndarray:
        return rng.step_uniforms(self.seed, serial, *self.ids)

    def position_uniforms(self, position: int, serial: int) -> np.ndarray:
        return rng.position_uniforms(self.seed, position, serial, *self.ids)

    @staticmethod
    def stored(value: float) -> float:
        """logq, weights and entropies as the operators return them."""
        return float(np.float32(value))

    # -- acceptance (3.1, 3.2, 3.3, 3.6)

    def log_f(self, answer: Answer, length: int | None = None) -> float:
        """F = W(x) + lambda n - log n, or W(x) + lambda n - log Z(x); `length` stands for n."""
        n = len(answer) if length is None else length
        return answer.cumw[-1] + self.length_term[n] - self.log_z(answer)

    def log_z(self, answer: Answer) -> float:
        """log Z under a divergence cut; 0 under the uniform cut, whose log n is part of `length_term`."""
        if not self.law.diverges:
            return 0.0
        return math.log(answer.cumz[-1]) if answer.cumz[-1] > 0 else -math.inf

    def threshold(self, answer: Answer, u: float) -> float:
        log_u = math.log(1.0 - u)
        return log_u if self.law.karan_du else self.log_f(answer) + log_u

    def rejects(self, answer: Answer, proposal: Answer, closed: bool, theta: float, cap: int) -> bool:
        """Whether the proposal is known to be rejected: at its last token, or before it when that is exact."""
        if self.law.karan_du:  # sums over the overlap only, no cut-law ratio
            return closed and proposal.cumw[-1] - answer.cumw[len(proposal)] < theta
        if closed and self.law.diverges and proposal.cumz[-1] == 0.0:
            # Z = 0 takes rounding (the answer it came from is then less probable than float32 can say); no step leaves
            # such an answer, so none may go there.
            return True
        if closed:
            return self.log_f(proposal) < theta
        return self.law.early_rejection and self.most_log_f(proposal, cap) < theta

    def most_log_f(self, proposal: Answer, cap: int) -> float:
        """The most that F of an open proposal can become: no weight is positive, Z only grows, and lambda n - log n is
        convex. It ends at its next token at the earliest, and at `cap` if nothing can end it before."""
        at_least = len(proposal) + 1 if self.can_end_early else cap
        return max(self.log_f(proposal, at_least), self.log_f(proposal, cap))
