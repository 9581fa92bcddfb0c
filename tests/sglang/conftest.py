"""What every test of a real SGLang on a CPU needs before it is imported, here and in the processes that it starts."""

import os
import sys
from pathlib import Path

import pytest

STANDINS = Path(__file__).parent / "standins"


def pytest_configure(config):
    os.environ.update(
        HF_HUB_OFFLINE="1",
        SGLANG_USE_CPU_ENGINE="1",
        SGLANG_PLUGINS="power_kernels",
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(filter(None, (str(STANDINS), os.environ.get("PYTHONPATH")))),
        PYTHONWARNINGS="ignore",
    )
    sys.path.insert(0, str(STANDINS))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The tiny model, as `from_pretrained` and SGLang take it."""
    from tests.stacks import tiny

    path = tmp_path_factory.mktemp("tiny")
    tiny.save(path)
    return path


@pytest.fixture(scope="session")
def huggingface(folder):
    """The engine that SGLang's chains are compared with."""
    import torch
    from transformers import AutoModelForCausalLM

    from power_kernels.api import HuggingFaceEngine

    return HuggingFaceEngine(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def engine(folder):
    """With overlapping scheduling, a prefix cache and room for everything."""
    from tests.sglang import engines

    yield (made := engines.engine(folder))
    made.close()
