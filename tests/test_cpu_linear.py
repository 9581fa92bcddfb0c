"""Linear layers of small batches on a CPU: the same function, the caller's model untouched, weights never stale."""

import pytest
import torch
from torch import nn

from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.api.engines.huggingface.cpu_linear import DOUBLED_ROWS, PACKED_ROWS, speed_up
from power_kernels.api.engines.huggingface.patches import Patches
from tests.tiny_models import llama

# Both sides of each switch, and an empty batch.
ROWS = (0, 1, DOUBLED_ROWS, DOUBLED_ROWS + 1, 16, PACKED_ROWS, PACKED_ROWS + 1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (33, 1000), (1, 1)])  # odd sizes: the blocked layout pads them
def test_every_path_is_the_linear_map(rows, bias, shape):
    torch.manual_seed(0)
    layer = nn.Linear(*shape, bias=bias)
    x = torch.randn(rows, 1, shape[0])
    exact = x.double() @ layer.weight.double().t() + (layer.bias.double() if bias else 0)
    with torch.inference_mode():
        plain = layer(x)
        patches = Patches()
        speed_up(layer, patches)
        with patches:
            out = layer(x)
            assert torch.equal(out, layer(x))
    assert out.shape == plain.shape
    assert out.is_contiguous()
    if rows:
        allowed = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (out - exact).abs().max() <= allowed


def test_the_layer_is_as_before_after_the_pass():
    layer = nn.Linear(8, 8)
    patches = Patches()
    speed_up(layer, patches)
    with patches:
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)


def test_other_layers_are_left_alone():
    class Special(nn.Linear):
        pass

    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    for layer in (Special(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), replaced):
        before = vars(layer).get("forward")
        patches = Patches()
        speed_up(layer, patches)
        with patches:
            assert vars(layer).get("forward") is before


def test_a_run_sees_weights_that_changed_since_the_last_one():
    """The reordered weights live as long as a run, however the originals are written to."""
    model = llama()
    engine = HuggingFaceEngine(model, self_check=False)
    config = PowerConfig(max_new_tokens=8, block_size=8, mcmc_steps=0)
    arguments = {"num_chains": 4, "eos_token_id": [], "seed": 1}  # four rows: the reordered path
    first = PowerSampler(engine).generate([[1, 2]], config, **arguments)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # does not count as a new version of the parameter
    changed = PowerSampler(engine).generate([[1, 2]], config, **arguments)
    fresh = PowerSampler(HuggingFaceEngine(model, self_check=False)).generate([[1, 2]], config, **arguments)
    assert [r.tokens for r in changed] == [r.tokens for r in fresh]
    assert [r.logp for r in changed] != [r.logp for r in first]
