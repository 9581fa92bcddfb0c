"""The Triton form of branch_particles and select_candidate against the float64 reference: the same survivors in the
same rows, the same candidate, the same tally."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import power_kernels as pk
from power_kernels.particles import Tally
from power_kernels.state import Status
from tests.op_helpers import INF, INTERPRETED, NAN, assert_same_bits, serving, strided

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the hostile values below

ALMOST_ONE = 1.0 - 2.0**-53


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch):
    """Triton's interpreter replaces the functions of triton.language again at each call of a helper, which is most of
    its time here; once a launch is enough."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self):
            pass

    def patch_once(function):
        modules = {v for v in function.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)}
        if modules <= patched:
            return Kept()
        scope = patch(function)
        patched.update(modules)
        restore = scope.restore

        def restored():
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


def position(
    seed: int, N=3, vocab=50, groups=2, *, dtype=torch.float32, alpha=2.0, scale=2.0, spread=1.0, empty=0.0,
    impossible=0.0, reference="any", eos=(1, 7), stops=0.0, last=False, uniform=None, pad=0, rho=0.0,
    length_bonus=0.0, started=True,
) -> dict:  # fmt: skip
    """Arguments of `branch_particles`.

    scale: of the logits; spread: of the weights, nats. empty, impossible: shares of rows without a particle and of
    logits at -inf. reference: "any" token, the "best", one that "closes", or None. stops: the share of the stop table
    that closes; 0 for no table. started: whether there are candidates already.
    """
    rng = np.random.default_rng(seed)
    rows = N + 1
    z = rng.normal(size=(groups, rows, vocab)) * scale
    z[rng.random(z.shape) < impossible] = -INF
    z[..., vocab // 2] = np.maximum(z[..., vocab // 2], -scale)
    z = torch.from_numpy(z).to(dtype)
    weight = rng.normal(size=(groups, rows)) * spread
    weight[rng.random(weight.shape) < empty] = -INF
    weight[:, N] = rng.normal(size=groups) if reference else -INF
    weight[:, 0] = np.maximum(weight[:, 0], -spread)
    wanted = torch.full((groups,), -1)
    if reference == "any":
        wanted = torch.tensor([int(rng.choice(np.flatnonzero(row > -INF))) for row in z[:, N].double().numpy()])
    elif reference == "best":
        wanted = z[:, N].float().argmax(-1)
    elif reference == "closes":
        wanted = torch.full((groups,), eos[0])
        z[:, N, eos[0]] = 1.0
    flat = z.view(groups * rows, vocab)
    tally = rng.normal(size=(groups, len(Tally))) if started else np.full((groups, len(Tally)), -INF)
    tally[:, Tally.REFERENCE] = -INF
    arguments = {
        "logits": strided(flat, pad, pad) if pad else flat,
        "alpha": torch.full((groups,), alpha),
        "log_weight": torch.from_numpy(weight),
        "order": torch.from_numpy(np.argsort(rng.random((groups, rows)))).int(),
        "reference": wanted,
        "last": torch.tensor([last] * groups),
        "closing_bonus": torch.from_numpy(rng.normal(size=groups)),
        "uniform": torch.from_numpy(rng.random((groups, 2))),
        "tally": torch.from_numpy(tally),
        "eos": torch.tensor(eos, dtype=torch.int64),
        "rho": rho,
        "length_bonus": length_bonus,
    }
    if uniform is not None:
        arguments["uniform"] = torch.full((groups, 2), uniform, dtype=torch.float64)
    if stops:
        table = np.where(rng.random((5, vocab)) < stops, -1, rng.integers(0, 5, (5, vocab)))
        arguments["stop_next"] = torch.from_numpy(table).short()
        arguments["stop_state"] = torch.from_numpy(rng.integers(0, 5, (groups, rows))).short()
    return arguments


def branched(arguments: dict, backend: str = "triton"):
    with serving(backend):
        return pk.branch_particles(**arguments)


def assert_as_the_reference(arguments: dict):
    """Survivors, tokens, rows, order, candidate and status equal; quantities as close as float32 records bring them."""
    ours, theirs = branched(arguments), branched(arguments, "reference")
    for name in ("parent", "token", "order", "candidate", "status"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("log_weight", "logp", "candidate_logp", "tally", "log_threshold"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=2e-6, equal_nan=True)
    assert_sound(arguments, ours)
    return ours


def assert_sound(arguments: dict, out) -> None:
    """At most N survivors, each child once, and the reference among them or closed."""
    rows = out.parent.shape[1]
    for g, wanted in enumerate(arguments["reference"].tolist()):
        children = [c for c in zip(out.parent[g].tolist(), out.token[g].tolist(), strict=True) if c[0] >= 0]
        assert len(set(children)) == len(children) <= rows - 1
        if wanted >= 0 and (out.status[g] == Status.OK).all():
            assert (out.parent[g, -1], out.token[g, -1]) == (rows - 1, wanted) or out.tally[g, Tally.REFERENCE] > -INF


CASES = {
    "one token": dict(vocab=1, eos=()),
    "one token, which closes": dict(vocab=1, eos=(0,), reference="closes"),
    "fewer children than N": dict(vocab=2, N=8, empty=0.6, eos=()),
    "a tile": dict(vocab=1024, pad=2),
    "a tile and one": dict(vocab=1025, N=5, dtype=torch.float16, rho=0.1),
    "three tiles": dict(vocab=3000, N=4, dtype=torch.bfloat16, groups=3),
    "a heavy reference": dict(vocab=300, reference="best", alpha=4.0),
    "a reference that closes": dict(vocab=1500, reference="closes"),
    "no reference": dict(vocab=1500, reference=None, rho=0.1),
    "a start": dict(vocab=200, N=8, reference=None, started=False, empty=0.99),
    "the horizon": dict(vocab=1100, last=True),
    "the horizon, no reference": dict(vocab=300, last=True, reference=None, started=False),
    "stop table": dict(vocab=1300, stops=0.05, dtype=torch.float16),
    "a stop table that closes most, rho 1": dict(vocab=500, stops=0.95, rho=1.0, N=5),
    "rho 1": dict(vocab=700, rho=1.0, reference=None, N=6),
    "rho 1, a light reference": dict(vocab=700, rho=1.0, spread=5.0),
    "EOS many, twice and beyond": dict(vocab=1030, eos=(5, 5, -1, 1029, 1030, 1024)),
    "impossible tokens": dict(vocab=1200, impossible=0.97, N=6, empty=0.3),
    "all weight on few": dict(vocab=60, scale=100.0, N=5, rho=0.1),
    "all weight on few, no floor": dict(vocab=60, scale=1000.0, N=5),
    "particles far apart": dict(vocab=90, spread=1000.0, N=4, length_bonus=0.3),
    "particles far apart, rho": dict(vocab=90, spread=1000.0, N=4, rho=0.5),
    "flat": dict(vocab=1025, alpha=0.5, scale=0.1, N=7, length_bonus=-1.0),
    "the first uniform": dict(vocab=400, uniform=0.0, N=4),
    "the last uniform": dict(vocab=400, uniform=ALMOST_ONE, N=4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_survivors_are_those_of_the_reference(name):
    options = CASES[name]
    assert_as_the_reference(position(sum(map(ord, name)), **options))


def test_hundred_and_twenty_eight_particles():
    out = assert_as_the_reference(position(3, N=128, vocab=40, groups=1, spread=2.0, empty=0.9, eos=(1,)))
    assert (out.parent >= 0).sum() == 128


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_equal_children_are_as_likely_as_each_other(rho):
    """Whether children at kappa itself are heavy or light is for rounding to say; who survives is not."""
    flat = dict(reference=None, eos=(), scale=0.0, spread=0.0, started=False)
    arguments = position(1, N=4, vocab=2, groups=1, rho=rho, **flat)
    arguments["log_weight"][:, 2:4] = -INF
    ours, theirs = branched(arguments), branched(arguments, "reference")
    for out in (ours, theirs):
        survivors = sorted(zip(out.parent[0].tolist(), out.token[0].tolist(), strict=True))
        assert survivors[1:] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    torch.testing.assert_close(ours.log_weight[0].sort().values[1:], theirs.log_weight[0].sort().values[1:])


def test_a_bad_row_spoils_its_group_alone():
    """Groups: good, NaN, +inf, no mass, alpha, a weight of NaN, a reference beyond, impossible, and without a row."""
    arguments = position(5, N=2, vocab=40, groups=9)
    z, weight, wanted = arguments["logits"].view(9, 3, 40), arguments["log_weight"], arguments["reference"]
    z[1, 0, 3], z[2, 1, 4], z[3, 0] = NAN, INF, -INF
    z[7, 2, int(wanted[7])] = -INF
    weight[5, 1] = NAN
    weight[:, 1:2][[3, 8]] = -INF
    weight[8, 2] = -INF
    wanted[6] = 40
    with serving("triton"):
        out = assert_as_the_reference(arguments)
    expected = [Status.OK, Status.NAN, Status.POS_INF, Status.NO_MASS, Status.OK, Status.NAN, *[Status.BAD_TOKEN] * 3]
    assert out.status.max(1).values.tolist() == expected
    assert (out.parent[1] == -1).all()
    assert out.log_threshold[1].isnan()
    assert torch.equal(out.tally[1], arguments["tally"][1])


def test_a_group_does_not_depend_on_the_others():
    arguments = position(9, N=3, vocab=1100, groups=3, stops=0.02, rho=0.1)
    together = branched(arguments)
    by_row = ("logits",)
    for g in range(3):
        alone = {
            name: value[4 * g : 4 * g + 4] if name in by_row else value[g : g + 1]
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor) and name not in ("eos", "stop_next")
        }
        alone = branched({**arguments, **alone})
        assert_same_bits(alone, [column[g : g + 1] for column in together])


def test_the_selection_is_that_of_the_reference():
    rng = np.random.default_rng(2)
    others, reference = rng.normal(size=200) * 3, rng.normal(size=200) * 3
    kept = others + np.log(rng.random(200))
    tally = torch.from_numpy(np.stack([others, kept, reference, others], 1))
    tally[:20, Tally.OTHERS] = tally[:20, Tally.KEPT] = -INF
    tally[10:40, Tally.REFERENCE] = -INF
    tally[40:60, Tally.KEPT] = tally[40:60, Tally.OTHERS]
    uniform = torch.from_numpy(rng.random(200))
    moved = []
    for backend in ("triton", "reference"):
        with serving(backend):
            moved.append(pk.select_candidate(tally, uniform))
    assert torch.equal(*moved)
    assert 40 < moved[0].sum() < 180
