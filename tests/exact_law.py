"""The law of a chain as numbers: a toy's answers, transition matrices, products of stages, and a test.

Two independent derivations of one step's matrix K meet here (DESIGN section 9):

* `direct_matrix` writes the formula of DESIGN 3.2 and 3.6 down (a cut, a suffix from q, one acceptance at the
  end) from the toy's table alone. It shares no code with the package.
* `enumerated_matrix` runs the reference's own `propose` once for every branch that its uniforms can take, each
  branch weighted by the measure of the uniforms that lead there. Free prefix, exclusion and early rejection are
  what the code does, not what this file believes about them.

`simulate` runs many reference chains at the speed of table lookups; `chi_square` tests where they ended.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from power_kernels import rng
from power_kernels.law import Law
from power_kernels.reference import Answer, ReferenceChain, leave_probability
from power_kernels.state import Outcome
from tests.toys import Toy

Tokens = tuple[int, ...]
NAN = float("nan")
SMALLEST, LARGEST = 2.0**-60, 1.0 - 2.0**-53  # uniforms that stand for the ends of [0, 1)

# -----------------------------------------------------------------------------------------------------------
# From the toy's table alone


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.logaddexp.reduce(z)


def entropy(logp: np.ndarray) -> float:
    possible = logp[logp > -math.inf]
    return float(-(np.exp(possible) * possible).sum())


@dataclass(frozen=True)
class Space:
    """The closed answers of a toy that can occur at one horizon, and what the law says of them."""

    answers: list[Tokens]
    index: dict[Tokens, int]
    logp: np.ndarray  # [N]
    logq: list[np.ndarray]  # of each answer, log q of its first t tokens, t = 0..n
    target: np.ndarray  # [N] p^alpha e^(lambda n), normalised
    proposal: np.ndarray  # [N] q of the whole answer
    entropy: list[np.ndarray]  # of each answer, the entropy of softmax(z) before each of its n tokens, in nats


def space(toy: Toy, horizon: int, alpha: float, beta: float, length_bonus: float = 0.0) -> Space:
    answers = [x for x in toy.answers(horizon) if toy.logp(x) > -math.inf]
    steps = [[log_softmax(beta * toy.logits(x[:t]))[x[t]] for t in range(len(x))] for x in answers]
    logp = np.array([toy.logp(x) for x in answers])
    log_target = alpha * logp + length_bonus * np.array([len(x) for x in answers])
    power = np.exp(log_target - log_target.max())
    rows = [[log_softmax(toy.logits(x[:t])) for t in range(len(x))] for x in answers]
    return Space(
        answers=answers,
        index={x: i for i, x in enumerate(answers)},
        logp=logp,
        logq=[np.concatenate([[0.0], np.cumsum(row)]) for row in steps],
        target=power / power.sum(),
        proposal=np.exp([sum(row) for row in steps]),
        entropy=[np.array([entropy(row) for row in of_answer]) for of_answer in rows],
    )


def direct_matrix(
    toy: Toy, horizon: int, alpha: float, beta: float, cut: str = "uniform", length_bonus: float = 0.0
) -> np.ndarray:
    """K [N, N] of one step, accepted with min(1, r).

    cut="uniform" (3.2): cut anywhere, regenerate from q. The divergence cuts (3.6): leave the answer at d with
    probability (1 - q(x_d)) h / Z(x), by a token from q without x_d, and regenerate what follows from q.
    """
    s = space(toy, horizon, alpha, beta)
    matrix = np.zeros((len(s.answers),) * 2)
    leaving = [leaving_masses(s, i, cut) for i in range(len(s.answers))]
    cuts = [len(x) for x in s.answers] if cut == "uniform" else [masses.sum() for masses in leaving]
    log_f = alpha * s.logp - [row[-1] for row in s.logq] - np.log(np.where(np.array(cuts) > 0, cuts, 1.0))
    log_f += length_bonus * np.array([len(x) for x in s.answers])
    for i, x in enumerate(s.answers):
        for j, y in enumerate(s.answers):
            same = next((t for t, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), None)  # as far as that
            if cut == "uniform":
                places = range(len(x) if same is None else same + 1)
                regenerated = sum(math.exp(s.logq[j][-1] - s.logq[j][c]) for c in places) / len(x)
            elif same is None:
                continue  # the same answer: a closed one is never the prefix of another
            else:
                own = -math.expm1(s.logq[i][same + 1] - s.logq[i][same])
                regenerated = leaving[i][same] / cuts[i] * math.exp(s.logq[j][-1] - s.logq[j][same]) / own
            matrix[i, j] += regenerated * min(1.0, math.exp(min(log_f[j] - log_f[i], 0.0)))
        matrix[i, i] += 1.0 - matrix[i].sum()
    return matrix


def leaving_masses(s: Space, i: int, cut: str) -> np.ndarray:
    """(1 - q(x_t)) h of each token of answer i: where a divergence cut leaves it, not normalised."""
    leave = -np.expm1(np.diff(s.logq[i]))
    return leave * s.entropy[i] if cut == "divergence-entropy" else leave


def output_law(
    toy: Toy, law: Law, alpha: float, beta: float, matrix: Callable[..., np.ndarray] = direct_matrix
) -> dict[Tokens, float]:
    """The law of a whole run: extensions from q, `mcmc_steps` a stage, the stop at EOS, `final_steps`."""
    finished: dict[Tokens, float] = defaultdict(float)
    unfinished: dict[Tokens, float] = {(): 1.0}
    for stage in range(1, law.stages + 1):
        horizon = min(stage * law.block_size, law.max_new_tokens)
        s = space(toy, horizon, alpha, beta)
        start = np.zeros(len(s.answers))
        for i, x in enumerate(s.answers):
            for t in range(len(x)):
                if x[:t] in unfinished:  # an unfinished answer is open, so at most one prefix of x is
                    start[i] += unfinished[x[:t]] * math.exp(s.logq[i][-1] - s.logq[i][t])
        step = matrix(toy, horizon, alpha, beta, law.cut, law.length_bonus)
        end = start @ np.linalg.matrix_power(step, law.mcmc_steps)
        unfinished = {}
        for x, mass in zip(s.answers, end, strict=True):
            if toy.ends(x) or stage == law.stages:
                finished[x] += mass
            else:
                unfinished[x] = mass
    s = space(toy, law.max_new_tokens, alpha, beta)
    end = np.array([finished[x] for x in s.answers])
    if law.final_steps:
        last = matrix(toy, law.max_new_tokens, alpha, beta, law.cut, law.length_bonus)
        end = end @ np.linalg.matrix_power(last, law.final_steps)
    return dict(zip(s.answers, end, strict=True))


# -----------------------------------------------------------------------------------------------------------
# The reference, branch by branch


def pieces(f: Callable[[float], object], guesses: list[float]) -> list[tuple[object, float, float]]:
    """[(value, low, high)] of a piecewise constant f on [0, 1), its steps found to 1e-13.

    guesses: where f may step. A wrong or missing guess costs a bisection, not the answer; what f may not do is
    step and step back between two guesses.
    """
    width = 1e-13
    near = {g + side for g in guesses for side in (-width, width)}
    points = [SMALLEST, *sorted(g for g in near if SMALLEST < g < LARGEST), LARGEST]
    values = [f(u) for u in points]
    found: list[tuple[object, float, float]] = []

    def split(low: float, at_low: object, high: float, at_high: object) -> None:
        if at_low == at_high:
            return
        middle = (low + high) / 2
        if high - low <= 2.1 * width:
            start = found[-1][2] if found else 0.0
            found.append((at_low, start, middle))
            return
        at_middle = f(middle)
        split(low, at_low, middle, at_middle)
        split(middle, at_middle, high, at_high)

    for i in range(len(points) - 1):
        split(points[i], values[i], points[i + 1], values[i + 1])
    found.append((values[-1], found[-1][2] if found else 0.0, 1.0))
    return found


def cdf_steps(z: np.ndarray, beta: float, exclude: int) -> list[float]:
    """Where an inverse-CDF draw from softmax(beta z) steps, with and without a token."""
    steps: list[float] = []
    for skip in {-1, exclude}:
        mass = np.exp(log_softmax(beta * z))
        if skip >= 0:
            mass[skip] = 0.0
        if mass.sum() > 0:
            steps.extend(np.cumsum(mass)[:-1] / mass.sum())
    return steps


class _Source(ReferenceChain):
    """Innermost, below any fault a test injects: where uniforms come from."""

    probe: tuple[float, float] | None = None  # set while a table is made

    def position_uniforms(self, position, serial):
        return self.uniforms_at(position, serial) if self.probe is None else self.probe


class _Tables(ReferenceChain):
    """Outermost: the chain's own `draw` as a table over its uniform, made once and kept in `tables`."""

    tables: dict

    def probed(self, probe: tuple[float, float], call: Callable[[], object]) -> object:
        self.probe = probe
        try:
            return call()
        finally:
            self.probe = None

    def draw_table(self, answer: Answer, exclude: int) -> tuple[list[float], list[Answer]]:
        """(where each piece ends, what `draw` returns on it). The unused keep uniform is NaN."""
        key = (answer.tokens, answer.logq, answer.cumw, answer.cumz, answer.stop_state, exclude)
        table = self.tables.get(key)
        if table is None:
            plain = super().draw
            found = pieces(
                lambda u: self.probed((u, NAN), lambda: plain(answer, 0, exclude)),
                cdf_steps(self.next_logits(answer.tokens), self.beta, exclude),
            )
            table = self.tables[key] = ([high for _, _, high in found[:-1]], [value for value, _, _ in found])
        return table


class _BranchSource(_Source):
    def step_uniforms(self, serial):
        return self.branch(self.cuts()), self.accept

    def uniforms_at(self, position, serial):
        return self.pair(position)


class _Enumerated(_Tables):
    """A chain whose uniforms are branches: `propose`, replayed along all of them, gives the law of a step."""

    accept: float  # the acceptance uniform of this replay, NaN when nothing may be rejected
    path: list[list]  # [branch taken, [(low, high), ...]] of each uniform read so far

    def begin(self, path: list[list], accept: float) -> None:
        self.path, self.depth, self.measure, self.accept = path, 0, 1.0, accept

    def branch(self, intervals: list[tuple[float, float]]) -> float:
        if self.depth == len(self.path):
            self.path.append([0, intervals])
        taken, intervals = self.path[self.depth]
        self.depth += 1
        low, high = intervals[taken]
        self.measure *= high - low
        return (low + high) / 2

    def paths(self, answer: Answer, horizon: int) -> Iterator[tuple[Answer | None, float, list[list]]]:
        """Every (proposal, probability, path), nothing being rejected that can be accepted."""
        path: list[list] = []
        while True:
            self.begin(path, NAN)
            proposal = self.propose(answer, horizon, 0)
            yield proposal, self.measure, path
            while path and path[-1][0] + 1 == len(path[-1][1]):
                path.pop()
            if not path:
                return
            path[-1][0] += 1

    def step_law(self, answer: Answer, horizon: int) -> dict[Tokens, float]:
        law: dict[Tokens, float] = defaultdict(float)
        for proposal, probability, path in self.paths(answer, horizon):
            if proposal is None or proposal is answer:
                law[answer.tokens] += probability
                continue

            def accepted(u: float, path: list[list] = path) -> bool:
                self.begin(path, u)
                return self.propose(answer, horizon, 0) is not None

            ratio = math.exp(min(self.log_f(proposal) - self.log_f(answer), 0.0))
            accepts = sum(high - low for yes, low, high in pieces(accepted, [1.0 - ratio, ratio]) if yes)
            law[proposal.tokens] += probability * accepts
            law[answer.tokens] += probability * (1.0 - accepts)
        return law

    # -- the branches of each uniform

    def propose(self, answer, horizon, serial):
        self.current = answer
        return super().propose(answer, horizon, serial)

    def threshold(self, answer, u):
        return -math.inf if math.isnan(self.accept) else super().threshold(answer, u)

    def cuts(self) -> list[tuple[float, float]]:
        x = self.current
        sums = x.cumz if self.law.diverges and x.cumz[-1] > 0 else range(len(x) + 1)
        found = pieces(lambda u: self.cut(x, u), [step / sums[-1] for step in sums[1:-1]])
        return [(low, high) for _, low, high in found]

    def walk(self, answer, start, serial):
        plain = super().walk

        def pair(t: int) -> tuple[float, float]:
            key = ("walk", answer.tokens[: t + 1], answer.logq[: t + 1])
            if key not in self.tables:
                short = answer.prefix(t + 1)
                leave = leave_probability(short.logq[t])
                found = pieces(lambda u: self.probed((NAN, u), lambda: plain(short, t, 0)), [leave])
                self.tables[key] = [(low, high) for _, low, high in found]
            return NAN, self.branch(self.tables[key])

        self.pair = pair
        return plain(answer, start, serial)

    def draw(self, answer, serial, exclude=-1):
        ends, values = self.draw_table(answer, exclude)
        u = self.branch(list(zip([0.0, *ends], [*ends, 1.0], strict=True)))
        return values[bisect_right(ends, u)]


def _compose(outer: type, chain: type, source: type) -> type:
    inner = (source,) if chain is ReferenceChain else (chain, source)
    return type(f"{outer.__name__}{chain.__name__}", (outer, *inner), {})


def float64_storage(chain: type) -> type:
    """The chain without the rounding of logq and weights to float32, which alone costs K some 1e-8."""
    return type(f"Float64{chain.__name__}", (chain,), {"stored": staticmethod(float)})


def answer_of(chain: ReferenceChain, tokens: Tokens) -> Answer:
    """The state that `chain` would hold had it drawn these tokens."""
    answer = Answer()
    for t, token in enumerate(tokens):
        answer = chain.with_token(answer, chain.next_logits(tokens[:t]), token)
    return answer


def compose_enumerated(chain: type[ReferenceChain], toy: Toy, law: Law, alpha: float, beta: float) -> _Enumerated:
    enumerated = _compose(_Enumerated, chain, _BranchSource)
    one = enumerated(toy.logits, law, alpha=alpha, beta=beta, eos=toy.eos, stop_next=toy.stop_next)
    one.tables = {}
    return one


def enumerated_matrix(
    chain: type[ReferenceChain],
    toy: Toy,
    law: Law,
    alpha: float,
    beta: float,
    states: list[Tokens],
) -> np.ndarray:
    """K [N, N] between `states` at horizon `law.max_new_tokens`, exactly as `chain.propose` acts. A row misses what a
    faulty step takes out of the states."""
    index = {x: i for i, x in enumerate(states)}
    matrix = np.zeros((len(states),) * 2)
    one = compose_enumerated(chain, toy, law, alpha, beta)
    for x in states:
        for y, probability in one.step_law(answer_of(one, x), law.max_new_tokens).items():
            if y in index:
                matrix[index[x], index[y]] += probability
    return matrix


# -----------------------------------------------------------------------------------------------------------
# Many chains


class _TableSource(_Source):
    step_rows: list  # [serial][2]
    position_rows: list  # [serial][2 * position + (0 for the token, 1 for the keep uniform)]

    def step_uniforms(self, serial):
        return self.step_rows[serial]

    def uniforms_at(self, position, serial):
        row = self.position_rows[serial]
        return row[2 * position], row[2 * position + 1]


class _Fast(_Tables):
    path: list[Answer]

    def extend(self, answer, horizon, stage):
        self.path.append(super().extend(answer, horizon, stage))
        return self.path[-1]

    def resolve(self, answer, proposal):
        outcome, answer = super().resolve(answer, proposal)
        self.path.append(answer)
        return outcome, answer

    def draw(self, answer, serial, exclude=-1):
        ends, values = self.draw_table(answer, exclude)
        return values[bisect_right(ends, self.position_uniforms(len(answer), serial)[0])]


@dataclass(frozen=True)
class Run:
    answer: Answer
    outcomes: list[Outcome]
    path: list[Answer]  # the answer after each extension and after each step


def simulate(
    chain: type[ReferenceChain],
    toy: Toy,
    law: Law,
    *,
    alpha: float,
    beta: float,
    seed: int,
    chains: int,
    starts: list[Tokens] | None = None,
) -> list[Run]:
    """Chains 0..chains-1 of prompt 0: whole runs, or `mcmc_steps` steps from answers at the last horizon.

    Uniforms are computed for many chains at once, draws are read from tables; the rest is the chain's code.
    """
    fast, stop_next = _compose(_Fast, chain, _TableSource), toy.stop_next
    tables: dict = {}
    started: dict[Tokens, Answer] = {}
    runs: list[Run] = []
    serial = np.arange(law.max_steps + 1)
    block = 4096  # bounds the memory of the uniforms
    for first in range(0, chains, block):
        ids = np.arange(first, min(first + block, chains))[:, None]
        steps = rng.step_uniforms(seed, serial, ids, 0).tolist()
        places = np.arange(law.max_new_tokens)
        positions = rng.position_uniforms(seed, places, serial[:, None], ids[:, :, None], 0)
        positions = positions.reshape(len(ids), len(serial), -1).tolist()
        for i, chain_id in enumerate(ids[:, 0].tolist()):
            one = fast(
                toy.logits, law, alpha=alpha, beta=beta, seed=seed, eos=toy.eos, chain_id=chain_id, stop_next=stop_next
            )
            one.tables, one.step_rows, one.position_rows, one.path = tables, steps[i], positions[i], []
            if starts is None:
                answer = one.run()
            else:
                x = starts[chain_id]
                if x not in started:
                    started[x] = answer_of(one, x)
                answer = one.steps(started[x], law.max_new_tokens, law.mcmc_steps)
            runs.append(Run(answer, one.outcomes, one.path))
    return runs


def chi_square(observed: Iterable[Tokens], law: dict[Tokens, float]) -> float:
    """p-value of Pearson's test of draws against a law. Every state is a cell; cells under 5 are pooled.

    One draw to which the law gives no probability makes it 0.
    """
    counts = Counter(observed)
    total = sum(counts.values())
    assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-9)
    if any(law.get(x, 0.0) == 0.0 for x in counts):
        return 0.0
    cells = sorted((p * total, counts[x]) for x, p in law.items() if p > 0)
    pooled = [0.0, 0]
    kept: list[tuple[float, int]] = []
    for expected, seen in cells:
        if expected < 5 or 0 < pooled[0] < 5:  # a pool that is itself too small takes the smallest cells
            pooled = [pooled[0] + expected, pooled[1] + seen]
        else:
            kept.append((expected, seen))
    if pooled[0] > 0:
        kept.append((pooled[0], pooled[1]))
    expected, seen = np.array(kept).T
    stats = pytest.importorskip("scipy.stats")
    return float(stats.chi2.sf(((seen - expected) ** 2 / expected).sum(), len(kept) - 1))
