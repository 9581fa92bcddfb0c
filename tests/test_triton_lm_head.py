"""The Triton kernels of the fused LM head, called directly: against float64, in the interpreter (or on a GPU).

bfloat16 products are wrong in the interpreter; test_lm_head.py has the operators on every backend.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from power_kernels import reference as ref
from power_kernels import rng
from power_kernels.state import Status
from power_kernels.triton import lm_head
from tests.devices import DEVICE, host_only
from tests.op_helpers import draw_error

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinities and NaN below
SEED = 0x299F31D0A4093822
NAN = float("nan")
INF = float("inf")
ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float16]


def padded(values: torch.Tensor, dtype, pad: int) -> torch.Tensor:
    """The rows of values `pad` entries further apart than they are long, with NaN between them."""
    full = torch.full((values.shape[0], values.shape[1] + pad), NAN, dtype=dtype, device=DEVICE)
    full[:, : values.shape[1]] = values
    return full[:, : values.shape[1]]


def make(rows: int, width: int, vocabulary: int, dtype=torch.float32, pad: int = 0, seed: int = 0):
    """hidden [rows, width] and lm_head [vocabulary, width] with logits of about 3."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    head = torch.randn(vocabulary, width, generator=g) * (3 / width**0.5)
    return padded(hidden, dtype, pad), padded(head, dtype, pad)


def exact_logits(hidden, head, bias, softcap, scale) -> np.ndarray:
    z = hidden.double().cpu().numpy() @ head.double().cpu().numpy().T
    z = scale * (z if bias is None else z + bias.double().cpu().numpy())
    return softcap * np.tanh(z / softcap) if softcap else z


def vectors(rows: int, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((rows,), NAN, device=DEVICE) for name in names}


def spread(value, rows: int) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32).expand(rows).contiguous().to(DEVICE)


def counters(rows: int, seed: int = 0) -> torch.Tensor:
    words = np.random.default_rng(seed).integers(0, 2**32, (rows, 4), dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32)).to(DEVICE)


def workspace(rows: int, vocabulary: int) -> torch.Tensor:
    """The least that launchers may be given, and what must stay as it was behind it."""
    return torch.full((rows * 4 * -(-vocabulary // 256) + rows + 8,), NAN, device=DEVICE)


def sample(hidden, head, alpha=4.0, beta=4.0, words=None, exclude=None, bias=None, softcap=0.0, scale=1.0, pad=0):
    rows, vocabulary = hidden.shape[0], head.shape[0]
    out = {
        "logits": torch.full((rows, vocabulary + pad), NAN, device=DEVICE),
        "token": torch.full((rows,), -77, device=DEVICE),
        **vectors(rows, "logp", "logq", "weight", "entropy"),
        "status": torch.full((rows,), -77, dtype=torch.int32, device=DEVICE),
    }
    memory = workspace(rows, vocabulary)
    lm_head.sample_from_hidden_out(
        hidden,
        head,
        bias,
        spread(alpha, rows),
        spread(beta, rows),
        torch.tensor([SEED], device=DEVICE),
        counters(rows) if words is None else words,
        None if exclude is None else torch.as_tensor(exclude, device=DEVICE),
        softcap,
        scale,
        out["logits"][:, :vocabulary],
        memory,
        *list(out.values())[1:],
    )
    assert memory[-8:].isnan().all()
    assert out["logits"][:, vocabulary:].isnan().all()
    out["logits"] = out["logits"][:, :vocabulary]
    return {k: v.cpu() for k, v in out.items()}


def score(hidden, head, tokens, alpha=4.0, beta=4.0, bias=None, softcap=0.0, scale=1.0):
    rows, vocabulary = hidden.shape[0], head.shape[0]
    out = {
        **vectors(rows, "logp", "logq", "weight", "entropy"),
        "status": torch.full((rows,), -77, dtype=torch.int32, device=DEVICE),
    }
    memory = workspace(rows, vocabulary)
    lm_head.score_from_hidden_out(
        hidden,
        head,
        bias,
        torch.as_tensor(tokens, device=DEVICE),
        spread(alpha, rows),
        spread(beta, rows),
        softcap,
        scale,
        memory,
        *out.values(),
    )
    assert memory[-8:].isnan().all()
    return {k: v.cpu() for k, v in out.items()}


def check_quantities(z: np.ndarray, tokens, got, alpha, beta, error: float) -> None:
    """Each quantity of the rows z [rows, V], float64, within what logits off by `error` and fp32 may do to it."""
    for i, token in enumerate(tokens):
        want = ref.token_quantities(z[i], int(token), alpha, beta)
        pairs = (("logp", want.logp), ("logq", want.logq), ("weight", want.weight), ("entropy", ref.entropy(z[i])))
        for name, value in pairs:
            bound = (2 * error + 2e-6 * max(abs(value), 1.0)) * max(alpha, beta)
            assert abs(float(got[name][i]) - value) <= bound, (name, i, float(got[name][i]), value)


def check(hidden, head, alpha=4.0, beta=4.0, **options) -> None:
    """Logits within twice the error of the float32 torch expression, and one ulp; draws and quantities of these."""
    rows, vocabulary = hidden.shape[0], head.shape[0]
    bias, softcap, scale = (options.get(k, d) for k, d in (("bias", None), ("softcap", 0.0), ("scale", 1.0)))
    z = exact_logits(hidden, head, bias, softcap, scale)
    naive = scale * (hidden.float() @ head.float().T + (0.0 if bias is None else bias.float()))
    naive = softcap * torch.tanh(naive / softcap) if softcap else naive
    error = 2 * np.abs(naive.double().cpu().numpy() - z).max() + 2.0**-23 * np.abs(z).max()

    words = counters(rows, vocabulary)
    drawn = sample(hidden, head, alpha, beta, words, **options)
    assert drawn["status"].tolist() == [Status.OK] * rows
    assert np.abs(drawn["logits"].double().numpy() - z).max() <= error
    uniform = rng.uniforms(words.cpu().numpy().view(np.uint32), SEED)[:, 0]
    stored = drawn["logits"].double().numpy()
    for i in range(rows):
        assert draw_error(stored[i], beta, uniform[i], -1, int(drawn["token"][i])) < 1e-6
    check_quantities(stored, drawn["token"], drawn, alpha, beta, 0.0)

    tokens = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(vocabulary))
    scored = score(hidden, head, tokens, alpha, beta, **options)
    assert scored["status"].tolist() == [Status.OK] * rows
    check_quantities(z, tokens, scored, alpha, beta, error)


# V: no rest at all; a row less than a tensor core's least; one off half a tile and a tile; some tiles and a tail
# D: less than a vector; half a step; one more than a step of fp32; a step of fp16; steps and a tail
# B: one; less than any row tile; more rows than one tile has in fp32
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [
        (1, 1, 1),
        (3, 16, 2),
        (3, 33, 127),
        (1, 64, 129),
        (3, 130, 255),
        (3, 64, 256),
        (17, 33, 257),
        (17, 136, 600),
        (1, 16, 300),
    ],
)
def test_sampling_and_scoring_agree_with_float64(rows, width, vocabulary, dtype):
    check(*make(rows, width, vocabulary, dtype))


def test_rows_of_a_second_tile_are_their_own():
    hidden, head = make(65, 24, 257, torch.float16)  # sampling has tiles of 64
    check(hidden, head)
    hidden = torch.cat([hidden, hidden])[:129]  # scoring of 128
    scored = score(hidden, head, torch.arange(129) % 65)
    assert all(torch.equal(column[:64], column[65:]) for column in scored.values())


@pytest.mark.parametrize(
    ("dtype", "pad"), [(torch.float32, 4), (torch.float32, 3), (torch.float16, 8), (torch.float16, 1)]
)
def test_rows_may_lie_any_distance_apart(dtype, pad):
    hidden, head = make(3, 64, 300, dtype, pad)
    check(hidden, head)
    drawn = sample(hidden, head, pad=5)  # and those of the scratch
    plain = sample(hidden.contiguous(), head.contiguous())
    if pad in (4, 8):  # the same tile: 16-byte loads
        assert all(torch.equal(drawn[k], plain[k]) for k in drawn)


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [
        (torch.float32, None),
        (torch.float32, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 1.0), (2.0, 0.75), (0.0, 3.0), (30.0, 1.0)])
def test_bias_cap_and_scale_are_applied_in_this_order(dtype, bias_dtype, softcap, scale):
    hidden, head = make(3, 33, 300, dtype)
    bias = None
    if bias_dtype is not None:
        bias = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(DEVICE, bias_dtype)
    check(hidden, head, 4.0, 2.5, bias=bias, softcap=softcap, scale=scale)


def test_the_cap_overflows_nowhere_and_keeps_its_digits():
    # both branches, their seam at 0.625 of the cap, and sums that infinity bounds
    t = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 18.74, 18.76, 40.0, 300.0, 1e30, INF])
    head = torch.cat([t, -t])[:, None].to(DEVICE)
    drawn = sample(torch.ones(1, 1, device=DEVICE), head, softcap=30.0)
    want = 30.0 * np.tanh(np.concatenate([t.double(), -t.double()]) / 30.0)
    assert drawn["status"].tolist() == [Status.OK]
    np.testing.assert_allclose(drawn["logits"][0].numpy(), want, rtol=4 * 2.0**-23, atol=1e-37)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_a_bad_row_is_reported_and_spoils_no_other(softcap):
    hidden, head = make(5, 20, 300)
    good = sample(hidden, head, softcap=softcap)
    hidden[1, 3] = NAN
    hidden[3, 19] = INF  # of both signs in the logits
    for got in (sample(hidden, head, softcap=softcap), score(hidden, head, [7] * 5, softcap=softcap)):
        capped = Status.OK if softcap else Status.POS_INF
        assert got["status"].tolist() == [Status.OK, Status.NAN, Status.OK, capped, Status.OK]
        assert all(got[k][1].isnan() for k in ("logp", "logq", "weight", "entropy"))
    got = sample(hidden, head, softcap=softcap)
    assert int(got["token"][1]) == -1
    for key in good:
        assert torch.equal(got[key][[0, 2, 4]], good[key][[0, 2, 4]]), key


@pytest.mark.parametrize("entry", [0, 255, 256, 299])  # the last is read again past the vocabulary
def test_a_nan_among_the_weights_is_every_rows(entry):
    hidden, head = make(3, 20, 300)
    head[entry, 5] = NAN
    assert sample(hidden, head)["status"].tolist() == [Status.NAN] * 3
    assert score(hidden, head, [0, 1, 299])["status"].tolist() == [Status.NAN] * 3


def test_what_lies_past_the_vocabulary_the_width_and_the_rows_is_never_read_as_data():
    """NaN and infinity behind each, in the same storage: a mask before the product would keep 0 * inf."""
    for dtype in DTYPES:
        hidden, head = make(6, 40, 302, dtype)
        hidden[3:], head[300:] = INF, NAN
        hidden[:, 33:], head[:, 33:] = NAN, INF
        check(hidden[:3, :33], head[:300, :33])


def test_minus_infinity_forbids_a_token():
    hidden, head = make(8, 16, 300)
    bias = torch.zeros(300, device=DEVICE)
    bias[::2] = -INF
    drawn = sample(hidden, head, 1.0, 1.0, bias=bias)
    assert (drawn["token"] % 2 == 1).all()
    z = exact_logits(hidden, head, bias, 0.0, 1.0)
    check_quantities(z, drawn["token"], drawn, 1.0, 1.0, 1e-5)
    scored = score(hidden, head, [2] * 4 + [3] * 4, bias=bias)
    assert scored["logp"][:4].tolist() == scored["weight"][:4].tolist() == [-INF] * 4
    assert scored["logp"][4:].isfinite().all()
    bias[:] = -INF
    assert sample(hidden, head, bias=bias)["status"].tolist() == [Status.NO_MASS] * 8
    bias[256:] = 0.0  # a tile without mass beside one with
    drawn = sample(hidden, head, bias=bias)
    assert (drawn["token"] >= 256).all()
    bias[299] = INF
    assert score(hidden, head, [0] * 8, bias=bias)["status"].tolist() == [Status.POS_INF] * 8


def test_the_excluded_token_is_not_drawn_and_the_rest_keeps_its_law():
    rows = 12
    hidden, head = make(rows, 16, 300)
    words = counters(rows, 3)
    exclude = exact_logits(hidden, head, None, 0.0, 1.0).argmax(1)
    exclude[::3] = -1
    drawn = sample(hidden, head, 4.0, 2.5, words, exclude)
    uniform = rng.uniforms(words.cpu().numpy().view(np.uint32), SEED)[:, 0]
    for i in range(rows):
        z = drawn["logits"][i].double().numpy()
        assert int(drawn["token"][i]) != exclude[i]
        assert draw_error(z, 2.5, uniform[i], int(exclude[i]), int(drawn["token"][i])) < 1e-6
    check_quantities(drawn["logits"].double().numpy(), drawn["token"], drawn, 4.0, 2.5, 0.0)  # of the full row
    assert sample(hidden, head, exclude=[300] * rows)["status"].tolist() == [Status.BAD_TOKEN] * rows


def test_tokens_outside_the_vocabulary_are_reported():
    hidden, head = make(7, 16, 300)
    scored = score(hidden, head, [0, 299, 300, 511, -1, 2**32, -(2**40)])
    assert scored["status"].tolist() == [Status.OK] * 2 + [Status.BAD_TOKEN] * 5
    assert scored["logp"][2:].isnan().all()


def test_exponents_that_are_not_positive_and_finite_are_reported():
    hidden, head = make(5, 16, 300)
    alpha, beta = torch.tensor([4.0, NAN, 4.0, 4.0, INF]), torch.tensor([4.0, 4.0, 0.0, -1.0, 4.0])
    want = [Status.OK] + [Status.NAN] * 4
    assert sample(hidden, head, alpha, beta)["status"].tolist() == want
    assert score(hidden, head, [0] * 5, alpha, beta)["status"].tolist() == want


@pytest.mark.parametrize("dtype", DTYPES if DEVICE.type == "cpu" else [*DTYPES, torch.bfloat16])
def test_a_row_alone_and_inside_a_batch_gives_the_same_bits(dtype):
    rows = 66  # two row tiles of sampling
    hidden, head = make(rows, 72, 300, dtype)
    words = counters(rows)
    tokens = torch.arange(rows) * 4
    drawn, scored = sample(hidden, head, 4.0, 2.5, words), score(hidden, head, tokens, 4.0, 2.5)
    for i in (0, 17, 65):
        one = slice(i, i + 1)
        alone = sample(hidden[one].contiguous(), head, 4.0, 2.5, words[one])
        assert all(torch.equal(alone[k], drawn[k][one]) for k in alone), i
        alone = score(hidden[one].contiguous(), head, tokens[one], 4.0, 2.5)
        assert all(torch.equal(alone[k], scored[k][one]) for k in alone), i


def test_no_rows_launch_nothing():
    hidden, head = make(0, 16, 300)
    assert sample(hidden, head)["token"].tolist() == score(hidden, head, torch.zeros(0).long())["logp"].tolist() == []


def test_launch_constants_do_not_contain_the_number_of_rows():
    """One tile a dtype, use and alignment: the reason that a row's bits do not depend on its batch."""
    for c in lm_head.configurations():
        if c.kernel is lm_head._head_kernel:
            assert c.constexprs["BLOCK_V"] == lm_head.TILE == 256  # what hidden_workspace_size makes room for
    names = [c.name for c in lm_head.configurations()]
    assert len(names) == len(set(names))
    sizes = [c.constexprs["TILES"] for c in lm_head.configurations() if "TILES" in c.constexprs]
    assert {lm_head.tiles_block(v) for v in (1, 151_936, 262_144)} == {min(sizes)}
    assert lm_head.tiles_block(262_145) == max(sizes)


@host_only
def test_products_run_on_tensor_cores_and_weights_come_in_16_byte_copies():
    """On sm_90 half-precision products are wgmma and fp32 ones fused multiply-adds, and the weights of both come in
    asynchronous copies of 16 bytes. On sm_80 and gfx942 the former are mma and mfma."""
    code = """
import json, re
from power_kernels.triton import lm_head
from power_kernels.triton.__main__ import TARGETS, compile_for
for c in lm_head.configurations():
    dtype, width = c.signature.get("hidden_ptr"), c.constexprs.get("VEC")
    if dtype not in ("*bf16", "*fp32") or width == 1 or "sample" not in c.name:
        continue
    for target in ("sm_80", "sm_90", "gfx942"):
        asm = compile_for(c, TARGETS[target]).asm
        text = asm["amdgcn" if target == "gfx942" else "ptx"]
        copies = re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global\\s+\\[[^]]*\\],\\s*\\[[^]]*\\],\\s*(\\w+)", text)
        found = [n for n in ("wgmma.mma_async", "mma.sync", "v_mfma_f32", "fma.rn.f32") if n in text]
        print(json.dumps([target, dtype, found, sorted(set(copies))]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = {(t, d): (set(i), c) for t, d, i, c in map(json.loads, run.stdout.splitlines())}
    assert len(found) == 6
    product = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma_f32"}
    for target, instruction in product.items():
        assert instruction in found[target, "*bf16"][0], (target, found)
        if target != "gfx942":
            assert found[target, "*bf16"][1] == ["0x10"], found
            assert set(found[target, "*fp32"][1]) == {"0x10", "0x8"}, found  # 8 bytes a thread are all 16 rows have
            assert not {"mma.sync", "wgmma.mma_async"} & found[target, "*fp32"][0]
            assert "fma.rn.f32" in found[target, "*fp32"][0]
