"""Triton's compiled kernels, executed on a CPU thread by thread, under a checker of memory and races.

Triton's interpreter runs a kernel as whole blocks of values: it shows no thread, no warp, no barrier, no shared memory.
Here a kernel is compiled for sm_80 or sm_90 as its launcher asks (Triton's own binder decides types, alignment and
constants), and the PTX of every block is executed on CPU tensors, under several schedules that CUDA allows. No GPU.

    python -m pytest -p tests.ptx.plugin tests/test_triton_kernels.py   tests with backend "triton", on compiled code
    python -m pytest -p tests.ptx.plugin tests/ptx/selftest.py          the checker finds what was planted

The core is C++ and built when first asked for, into build/ptx (native.py). TRITON_INTERPRET must not be set.

What is checked: every access against the storages and views of the launch's arguments; alignment; values that nothing
has written, followed through registers and memory as MemorySanitizer does; two accesses of a byte, one a write, by
threads that no barrier orders (happens-before by barrier epochs); values read in such a race, followed the same way;
shared memory that a cp.async or wgmma under way uses; barriers that warps or lanes do not reach together. The first
schedule writes the tensors, so that a test's own assertions judge the values; the others must leave the same bytes.
findings.py lists the kinds.

Schedules (machine.SCHEDULES): warps in order, in reverse, or switched at random after memory operations; lanes of a
warp together (reconverging at the lowest instruction) or each by itself between collectives; blocks in order, in
reverse, shuffled; cp.async writing when issued or when waited for.

What is not modelled: time; the memory model beyond barriers (a value is seen as soon as it is written, and no fence is
checked); L1 and L2; what ptxas makes of the PTX; instructions that these kernels do not have (lower.UnsupportedError).
ex2.approx and its like are computed exactly, or with an error of up to --ptx-noise last places.

    parse.py      PTX text -> statements, labels, source lines, inlined calls included
    lower.py      statements -> numbered registers and operations
    core/         executor.hpp (instructions over 32 lanes, spread of undefined and racy values), shadow.hpp (bounds,
                  races), schedule.cpp (warps, barriers, blocks), opcodes.inc
    native.py     builds the core; its structures
    memory.py     the storages of a launch; machine.py  schedules, execution, comparison; findings.py  what was found
    launcher.py   stands in for Triton's launch; plugin.py  the same for pytest
"""
