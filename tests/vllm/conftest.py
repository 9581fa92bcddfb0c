"""What every test of a real vLLM needs before it is imported: no network, no other plugin, one thread."""

import os
from pathlib import Path

import pytest


def pytest_configure(config):
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_PLUGINS="power_kernels",
        VLLM_LOGGING_LEVEL="CRITICAL",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine runs in this process, where it can be looked at
        TORCHDYNAMO_DISABLE="1",
        OMP_NUM_THREADS="1",
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The tiny model, as `from_pretrained` and vLLM take it."""
    from tests.stacks import tiny

    path = tmp_path_factory.mktemp("tiny")
    tiny.save(path)
    return path


@pytest.fixture(scope="session")
def huggingface(folder):
    """The engine that vLLM's chains are compared with."""
    import torch
    from transformers import AutoModelForCausalLM

    from power_kernels.api import HuggingFaceEngine

    return HuggingFaceEngine(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def engine(folder):
    """With a prefix cache and room for everything."""
    from tests.vllm import engines

    yield (made := engines.engine(folder, max_logprobs=-1))
    engines.shut_down(made)
