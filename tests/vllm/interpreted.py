"""Imported before vLLM: its V2 model runner on a CPU, whose kernels are run by Triton's interpreter.

V2 asks for a Triton that compiles for CPUs, which is no package. The interpreter needs none; vLLM only has to be told
that there is one.
"""

import os
import sys
from types import SimpleNamespace

assert "vllm" not in sys.modules, "vLLM has chosen its runner already"
os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")

from triton.backends import backends  # noqa: E402, reads the environment

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
