"""Chains of long answers on made-up samples, for backends that divide an answer's positions among threads.

A toy's answers have a dozen positions, which one warp holds; here they have up to 400, the kernels' blocks 128. The
chains run in C++ (in the reference where there is no extension), and of their launches `telling` hands out those of the
kinds of `KINDS`, each with the state before and after: whatever else implements `mh_advance` makes the same launch
from the same state (`assert_launch`). No launch depends on another backend's, so one that goes wrong hides no other.

The interpreter (test_triton_kernels.py), a device (test_cuda.py) and the executor of compiled kernels (tests/ptx) make
these launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

import power_kernels as pk
from power_kernels import reference, rng
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus, Mode, Outcome, Status
from tests.op_helpers import stop_table
from tests.test_chain_identity import assert_same_state, copied

BLOCK, WARP = 128, 32  # positions that a program, and one of its warps, looks at in one go
VOCAB = 2000
SEED = -9
LAUNCHES = 50_000  # of which no run needs more than a part
PROMPT = [3] * 5


@dataclass(frozen=True)
class Case:
    """chains with `lanes` lanes each. lacks: kinds that this law cannot show."""

    law: Law
    lanes: int
    chains: int = 2
    eos: tuple[int, ...] = ()
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Launch:
    """arguments: of `mh_advance` behind the state. kinds: what it shows, of `KINDS`."""

    before: ChainState
    arguments: tuple
    after: ChainState
    kinds: frozenset[str]


@dataclass
class _Facts:
    """What a launch did, by the most of any chain: commits in positions, opened and voided in lanes."""

    extended: int = 0  # tokens that the end of an extension committed
    commit: int = 0  # tokens that an accepted proposal committed
    searches: tuple[int, ...] = ()  # for each cut, the positions from its start to where the proposal leaves
    walked_on: int = 0  # positions that a walk went on over behind a kept token, where nothing was committed
    opened: int = 0
    voided: int = 0
    ended: int = 0  # chains that are done


KINDS: dict[str, Callable[[_Facts], bool]] = {
    "an extension over several blocks": lambda f: f.extended > BLOCK,
    "a commit over two warps": lambda f: WARP + 8 < f.commit <= BLOCK,
    "a commit over several blocks": lambda f: f.commit > BLOCK,
    "a search over two warps": lambda f: any(WARP < n <= BLOCK for n in f.searches),
    "a search over several blocks": lambda f: any(n > BLOCK for n in f.searches),
    "a walk that goes on over two warps": lambda f: f.walked_on > WARP,
    "a walk that goes on over several blocks": lambda f: f.walked_on > BLOCK,
    "several lanes opened at once": lambda f: f.opened >= 3,
    "lanes voided": lambda f: f.voided >= 2,
    "nothing but tokens": lambda f: f == _Facts(),
    "a chain's end": lambda f: f.ended > 0,
}

# No walk goes on under a divergence cut, whose kept token is an unchanged step.
_NO_WALK = frozenset({"a walk that goes on over two warps", "a walk that goes on over several blocks"})
CASES = {
    "two blocks, sixteen lanes": Case(Law(400, 200, 12, 6), lanes=16),
    "one block with ends, four lanes": Case(Law(400, 400, 40), lanes=4, chains=4, eos=(0, 1)),
    "no shortcut, sixteen lanes": Case(Law(400, 200, 12, early_rejection=False, free_prefix=False), lanes=16),
    "divergence, sixteen lanes": Case(Law(400, 200, 12, 4, cut="divergence"), lanes=16, lacks=_NO_WALK),
    "divergence by entropy, three lanes": Case(
        Law(400, 400, 40, cut="divergence-entropy"), lanes=3, chains=4, eos=(0,), lacks=_NO_WALK
    ),
    "two blocks, one lane": Case(Law(400, 200, 12, 6), lanes=1, lacks=frozenset({"lanes voided"})),
    "divergence, one lane": Case(
        Law(400, 200, 12, 4, cut="divergence"),
        lanes=1,
        lacks=_NO_WALK | {"lanes voided", "several lanes opened at once"},
    ),
    "stop strings and a length term, three lanes": Case(
        Law(400, 400, 40, stops=True, length_bonus=0.01), lanes=3, chains=4
    ),
    "the published code, four lanes": Case(Law(400, 200, 30, 6, False, True, True), lanes=4),
}


def telling(name: str, each: int, *, backend: str | None = None) -> Iterator[Launch]:
    """Launches of `CASES[name]` until every kind that its law can show was there `each` times: at most 10 * each.

    Chains that end are replaced, so the run does not end before. backend: what runs the chains.
    """
    case = CASES[name]
    law, missing = case.law, Counter({kind: each for kind in KINDS if kind not in case.lacks})
    if backend is None:
        backend = "cpp" if pk.backend_for(torch.device("cpu")) == "cpp" else "reference"
    generator = np.random.default_rng(3)
    state = ChainState.allocate(case.chains, case.lanes, law)
    state.exclude.fill_(-1)
    fixed = (
        torch.from_numpy(reference.length_table(law)),
        torch.tensor([SEED]),
        torch.tensor(case.eos).long(),
    )
    stop_next = stop_table(law, VOCAB, closing=1 / 1000) if law.stops else None
    admitted = 0
    for _launch in range(LAUNCHES):
        for slot in range(case.chains):
            if int(state.field[slot, ChainField.MODE]) in (Mode.IDLE, Mode.DONE):
                state.admit(slot, PROMPT, chain_id=admitted, prompt_id=0)
                admitted += 1
        before = copied(state)
        arguments = (law, *fixed, *_made_up(generator, before), stop_next)
        with pk.use_backend(backend):
            pk.mh_advance(state, *arguments)
        facts = _facts(law, before, state, arguments)
        kinds = frozenset(kind for kind in missing if missing[kind] > 0 and KINDS[kind](facts))
        if kinds:
            missing.subtract(kinds)
            yield Launch(before, arguments, copied(state), kinds)
        if not any(missing.values()):
            return
    raise AssertionError(f"{name}: {LAUNCHES} launches did not show {dict(+missing)}")


def assert_launch(launch: Launch, advance: Callable[..., ChainState], *, theta: float) -> None:
    """advance(state, *arguments) makes the launch and returns the state that came of it, on the host.

    theta: the relative error allowed to what exp and log make (`assert_same_state`).
    """
    try:
        assert_same_state(advance(copied(launch.before), *launch.arguments), launch.after, theta=theta)
    except AssertionError as error:
        raise AssertionError(f"{', '.join(sorted(launch.kinds))}: {error}") from error


def _made_up(generator: np.random.Generator, state: ChainState) -> tuple[torch.Tensor, ...]:
    """Samples of no model: a walk leaves one position in some 200, and half of the proposals are accepted."""
    rows, exclude = state.lane_field.shape[0], state.exclude.numpy()
    token = generator.integers(VOCAB, size=rows)
    token = np.where(token == exclude, (token + 1) % VOCAB, token)
    token = np.where((exclude >= 0) & (generator.random(rows) < 0.2), exclude, token)
    logq = generator.choice([-1e-4, -1e-3, -1e-2, -1.0], p=[0.5, 0.4, 0.095, 0.005], size=rows)
    weight = -np.abs(generator.normal(size=rows)) * np.where(generator.random(rows) < 0.02, 1.0, 1e-3)
    entropy = generator.choice([0.0, 0.1, 0.3, 2.0], size=rows)
    logq, weight, entropy = (torch.from_numpy(values.astype(np.float32)) for values in (logq, weight, entropy))
    return torch.from_numpy(token), logq, weight, torch.full((rows,), int(Status.OK), dtype=torch.int32), entropy


def _facts(law: Law, before: ChainState, after: ChainState, arguments: tuple) -> _Facts:
    facts, lanes = _Facts(), before.lanes
    token = arguments[4]
    rows = before.lane_field.tolist()
    for c, (old, new) in enumerate(zip(before.field.tolist(), after.field.tolist(), strict=True)):
        length = new[ChainField.LENGTH]
        held = [row for row in rows[c * lanes : (c + 1) * lanes] if row[LaneField.STATUS] != LaneStatus.IDLE]
        facts.ended += new[ChainField.MODE] == Mode.DONE
        first = old[ChainField.OPENED]
        if old[ChainField.MODE] == Mode.EXTEND:
            if new[ChainField.MODE] != Mode.EXTEND:
                facts.extended = max(facts.extended, length - held[0][LaneField.DIVERGENCE])
        elif old[ChainField.MODE] == Mode.PROPOSE:
            lowest = min(held, key=lambda row: row[LaneField.SERIAL])
            committed = int(after.outcome[c, lowest[LaneField.SERIAL]]) == Outcome.ACCEPTED
            if committed:
                first = lowest[LaneField.SERIAL] + 1  # later ones reopened in this launch
                facts.commit = max(facts.commit, length - lowest[LaneField.DIVERGENCE])
                facts.voided = max(facts.voided, len(held) - 1)
            for lane in range(c * lanes, (c + 1) * lanes):
                position, serial = rows[lane][LaneField.POSITION], rows[lane][LaneField.SERIAL]
                kept = position == rows[lane][LaneField.DIVERGENCE] and int(token[lane]) == int(before.exclude[lane])
                running = rows[lane][LaneField.STATUS] == LaneStatus.RUNNING
                if running and kept and not committed and not law.diverges:
                    left = int(after.left[c, serial])
                    end = left if left >= 0 else old[ChainField.LENGTH]
                    facts.walked_on = max(facts.walked_on, end - position)
        opened = np.arange(first, new[ChainField.OPENED])
        if len(opened) and length:
            facts.opened = max(facts.opened, len(opened))
            left = after.left[c, opened[0] : opened[-1] + 1].numpy()
            uniform = rng.step_uniforms(SEED, opened, new[ChainField.CHAIN_ID], new[ChainField.PROMPT_ID])[..., 0]
            begin = 0 if law.diverges else np.minimum((uniform * length).astype(int), length - 1)
            facts.searches += tuple((np.where(left >= 0, left, length) - begin).tolist())
    return facts
