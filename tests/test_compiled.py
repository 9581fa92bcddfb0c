"""Decoding under torch.compile: the logits of plain forward passes and the chains of plain decoding, from one graph.

Dynamo and AOTAutograd are shown on every kind of decoder ("aot_eager", no code generation, seconds), the default
backend on one.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.engines.huggingface import HuggingFaceEngine, compiled
from power_kernels.api.engines.huggingface.cpu_linear import SmallBatchLinear
from power_kernels.errors import ArgumentError, ArgumentTypeError
from tests import tiny_models
from tests.devices import ON_CUDA
from tests.test_huggingface_engine import Script, prompt_of

FAMILIES = {
    "llama": tiny_models.llama,
    "phi3": tiny_models.phi3,  # frequencies that are chosen for a run
    "gemma2": tiny_models.gemma2,  # windows, soft caps
    "gemma3": lambda: tiny_models.gemma3(  # two rotary bases
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": tiny_models.gpt_oss,  # a mixture of experts, sinks
    "whole": lambda: _without_head(tiny_models.granite()),  # compiled with what comes after the decoder
    "half": lambda: tiny_models.mixed_qwen2().to(torch.bfloat16),  # linear layers inside the graph
}


def _without_head(model):
    """What the engine cannot explain as a decoder and a head: it then runs the model as it is."""
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits + 1))
    return model


@pytest.fixture
def counters():
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def play(script: Script) -> None:
    """Rows go from 6 to 2 and up to 4, lengths up and down."""
    script.admit([prompt_of(1, 1), prompt_of(4, 2), prompt_of(13, 3)])
    for _ in range(5):
        script.play()
    for _ in range(2):
        script.drop(0)
        for _ in range(2):
            script.play()
    script.admit([prompt_of(9, 4)])
    script.play()
    assert script.counts["rollback"] > 0
    assert script.counts["commit"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_rows_have_the_logits_of_plain_forward_passes(family, counters):
    model = FAMILIES[family]()
    engine = HuggingFaceEngine(model, compile="aot_eager")
    assert (engine._head is None) == (family == "whole")
    play(Script(engine, FAMILIES[family](), chains=3, lanes=2, tolerance=0.05 if family == "half" else 1e-4))
    engine.end()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_single_row_is_that_of_plain_forward_passes(counters):
    script = Script(HuggingFaceEngine(tiny_models.llama(), compile="aot_eager"), tiny_models.llama(), chains=1, lanes=1)
    script.admit([prompt_of(4, 2)])
    for _ in range(6):
        script.play()
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_chains_are_those_of_plain_decoding(counters):
    """The default backend. It rounds otherwise, by 1e-7 of a logit or so, which changes a draw once in a million or so;
    with this seed none. Two runs of different sizes, one graph."""
    engine = HuggingFaceEngine(tiny_models.llama(), compile=True, remember=False)
    plain = HuggingFaceEngine(tiny_models.llama(), remember=False)
    for lanes, length in ((2, 16), (1, 30)):
        config = PowerConfig(alpha=2.0, max_new_tokens=length, block_size=8, mcmc_steps=3, lanes=lanes)
        call = {"prompts": [[5, 6, 7], [8], [9] * 20], "config": config, "num_chains": 2, "seed": 11, "max_chains": 4}
        got, want = (PowerSampler(e).generate(**call) for e in (engine, plain))
        assert [r.tokens for r in got] == [r.tokens for r in want]
        assert [r.outcomes for r in got] == [r.outcomes for r in want]
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine.log_weights, other.log_weights, rtol=0, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    play(Script(engine, tiny_models.llama(), chains=3, lanes=2))
    engine.end()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_engines_do_not_share_compiled_code(counters):
    """torch gives up on code that it has compiled a number of times."""
    model = tiny_models.llama(num_hidden_layers=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in range(3):
            engine = HuggingFaceEngine(model, compile="eager", self_check=False)
            engine.end()
            assert counters["stats"]["unique_graphs"] == n + 1


def test_a_run_leaves_the_model_and_the_memory_as_they_were(monkeypatch):
    model = tiny_models.llama(num_hidden_layers=1)
    engine = HuggingFaceEngine(model, compile="eager")
    script = Script(engine, model, chains=1, lanes=1)
    script.admit([prompt_of(4, 1)])
    script.play()
    cache = weakref.ref(engine._cache)

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(compiled, "ragged_attention", fail)
    with pytest.raises(RuntimeError, match="broken"):
        script.feed()
    assert compiled._running.call is None
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation not in (compiled.NAME, "power_kernels")
    engine.end()
    gc.collect()
    assert cache() is None, "what was compiled keeps the KV of a run"


def test_changed_weights_and_hooks_are_followed():
    """Weights at once, hooks from the next run on: Script compares with the model as it is."""
    model = tiny_models.llama(num_hidden_layers=1)
    engine = HuggingFaceEngine(model, compile="eager")

    def doubled(module, args, output):
        return output * 2

    for change in ("none", "hook", "no hook"):
        if change == "hook":
            handle = model.model.layers[0].mlp.register_forward_hook(doubled)
        elif change == "no hook":
            handle.remove()
        script = Script(engine, model, chains=1, lanes=1)
        script.admit([prompt_of(1, 1)])
        script.play()
        engine.end()
    script = Script(engine, model, chains=1, lanes=1)
    script.admit([prompt_of(1, 1)])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    script.play()


@pytest.mark.skipif(ON_CUDA, reason="on a device the linear layers are the compiler's")
def test_the_linear_layers_of_a_cpu_stay_as_they_are(monkeypatch):
    """The same products, so the same bits: compiled and not, hidden states differ by elementwise rounding alone."""
    engine = HuggingFaceEngine(tiny_models.llama(), compile="eager", remember=False)
    script = Script(engine, tiny_models.llama(), chains=2, lanes=2)
    script.admit([prompt_of(4, 1), prompt_of(7, 2)])
    seen = []
    own = SmallBatchLinear.__call__
    monkeypatch.setattr(SmallBatchLinear, "__call__", lambda self, x: seen.append(self.module) or own(self, x))
    script.play()
    linear = [module for module in engine._decoder.modules() if isinstance(module, torch.nn.Linear)]
    assert [id(module) for module in seen[: len(linear)]] == [id(module) for module in linear]


def test_a_model_that_does_not_compile_is_refused_before_any_work():
    model = tiny_models.llama()
    model.model.layers[0].register_forward_pre_hook(lambda *args: torch._dynamo.graph_break())
    HuggingFaceEngine(model)
    for self_check in (False, True):
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot be compiled as one graph"):
            HuggingFaceEngine(model, compile=True, self_check=self_check)


@pytest.mark.parametrize(
    ("value", "error"), [(3, ArgumentTypeError), (None, ArgumentTypeError), ("fast", ArgumentError)]
)
def test_compile_is_checked(value, error):
    with pytest.raises(error, match="compile is"):
        HuggingFaceEngine(tiny_models.llama(), compile=value)
