"""The C++ kernels for processors with fewer instructions than this one: the same tests in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import power_kernels as pk

TESTS = Path(__file__).parent
HEADS = "cpp and (values or tanh) or wide or same_bits and not (every_backend or triton or reference)"


# avx512: without the instructions for bfloat16, which only the head uses
@pytest.mark.skipif(pk.backend_for("cpu") != "cpp", reason="the C++ backend is not built")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets_pass_the_same_tests(isa):
    files, chosen = ["test_lm_head.py"], f"test_lm_head and ({HEADS})"
    if isa != "avx512":
        files = [*files, "test_cpp_kernels.py", "test_particles_op.py"]
        chosen = f"{chosen} or test_cpp_kernels and not kv_ or test_particles_op and cpp and not anything"
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(str(TESTS / name) for name in files)]
    environment = {**os.environ, "POWER_KERNELS_CPU": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *command, "-k", chosen], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(run.stdout.split(" passed")[0].split()[-1]) >= (50 if isa == "avx512" else 285), run.stdout
