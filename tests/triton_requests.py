"""`python -m tests.triton_requests`: what launchers ask of Triton, as JSON lines; must run without TRITON_INTERPRET.

Triton's own binder says what each launch would be compiled for (types, alignment, constants, options), with a driver in
place of a GPU's that names the target; nothing is compiled or run. Every launcher is called through its operator for a
spread of shapes, dtypes, strides and alignments.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import power_kernels as pk
from power_kernels.law import Law
from power_kernels.state import ChainState
from power_kernels.triton import chain, configurations, kv_cache, lm_head, paged_kv, particles, sampling, scoring, slots

SEEN: set[str] = set()


class Driver:
    """In place of a GPU's: it only names the target that launches are compiled for. Each is a device of its own, so
    that binders, which Triton keeps by device, are not another target's."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, _device):
        return 0


def bind(function: JITFunction, args, kwargs):
    """What Triton's binder makes of a launch: arguments by name, options, types, constants, attributes."""
    _, _, _, backend, binder = function.device_caches[triton.runtime.driver.active.get_current_device()]
    kwargs = {**kwargs, "debug": False}
    bound, specialization, _ = binder(*args, **kwargs)
    return bound, *function._pack_args(backend, kwargs, bound, specialization, None)


def request(function: JITFunction, options, signature, constexprs, attributes) -> str:
    """A launch, as `bind` has it, as a line."""
    names = [parameter.name for parameter in function.params]
    return line(
        "request",
        function.fn.__name__,
        {k: v for k, v in signature.items() if v != "constexpr"},
        {names[path[0]]: value for path, value in constexprs.items()},
        [names[path[0]] for path, found in attributes.items() if found],
        options.num_warps,
        options.num_stages,
        options.maxnreg,
    )


def record(self, *args, grid, warmup, **kwargs):
    _, *asked = bind(self, args, kwargs)
    SEEN.add(request(self, *asked))


def line(kind, kernel, signature, constexprs, aligned, num_warps, num_stages, maxnreg) -> str:
    asked = {"signature": signature, "constexprs": constexprs, "aligned": sorted(aligned)}
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    return json.dumps({"kind": kind, "kernel": kernel, **asked, **options}, sort_keys=True)


def key(asked: dict) -> str:
    """What two lines have in common that are compiled to the same code.

    Where entries are read singly the alignment of the base changes nothing
    (test_single_entry_loads_do_not_depend_on_the_alignment_of_the_base).
    """
    constants = asked["constexprs"]
    if constants.get("VEC", 4) < 4 or constants.get("UNIT", 4) < 4 or asked["kernel"] == "_score_kernel":
        data = ("logits_ptr", "hidden_ptr", "head_ptr", "dst_ptr", "src_ptr")
        asked = {**asked, "aligned": [name for name in asked["aligned"] if name not in data]}
    return json.dumps({k: v for k, v in asked.items() if k != "kind"}, sort_keys=True)


def listed(capability: int) -> dict[str, str]:
    """Every configuration for a target: its line -> its name."""
    default = triton.compiler.make_backend(GPUTarget("cuda", capability, 32)).parse_options({}).num_stages
    return {
        line(
            "listed",
            c.kernel.fn.__name__,
            dict(c.signature),
            dict(c.constexprs),
            c.aligned,
            c.num_warps,
            c.num_stages or default,
            c.maxnreg,
        ): c.name
        for c in configurations()
        if c.targets is None or f"sm_{capability}" in c.targets
    }


def logits_launches() -> None:
    """Rows that begin at multiples of 16 bytes and rows that do not, one row and many, both widths over tiles."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows, vocabulary, pad, skip in [
            (1, 1, 0, 0),  # a stride of 1, which Triton would make a constant
            (2, 1000, 0, 0),
            (3, 1001, 0, 0),
            (3, 1000, 3, 0),  # an odd row stride
            (2, 1000, 0, 1),  # a base off by one entry
            (1, 151_936, 0, 0),
            (2, 262_208, 0, 0),  # Gemma 3: more tiles than 256
        ]:
            storage = torch.zeros(skip + rows * (vocabulary + pad), dtype=dtype)
            logits = storage[skip:].view(rows, vocabulary + pad)[:, :vocabulary]
            f32 = torch.ones(rows + 1)[1:]  # off 16 bytes
            i64, i32 = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
            counter, seed = torch.zeros(rows, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
            workspace = torch.zeros(pk.workspace_size(rows, vocabulary))
            for exclude in (None, i64):
                for entropy in (None, f32):
                    sampling.sample_tokens_out(
                        logits, f32, f32, seed, counter, exclude, workspace, i64, f32, f32, f32, entropy, i32
                    )
                    scoring.score_tokens_out(logits, i64, f32, f32, workspace, f32, f32, f32, entropy, i32)
            table = pk.SlotTable.allocate(1)
            live, values = i64.bool(), torch.zeros(rows, 3)
            for entropy in (False, True):
                slots.sample_slots_out(
                    *table.tensors(), logits, i64, i64, live, workspace, i64.clone(), values, i64.clone(), entropy
                )


def particle_launches() -> None:
    """Every dtype, aligned or not, with and without a stop table, few and many particles, and many tiles."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for groups, rows, vocabulary, pad in [
            (1, 3, 1, 0),
            (2, 17, 1000, 3),  # an odd row stride
            (1, 32, 1000, 0),
            (1, 129, 1000, 0),
            (1, 3, 262_208, 0),  # more tiles than 256
        ]:
            logits = torch.zeros(groups * rows, vocabulary + pad, dtype=dtype)[:, :vocabulary]
            f64, i64 = torch.zeros(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.int64)
            pair, tally, weight = f64.new_zeros(groups, 2), f64.new_zeros(groups, 4), f64.new_zeros(groups, rows)
            order, wide = weight.int(), weight.long()
            workspace = torch.zeros(pk.branch_workspace_size(groups * rows, vocabulary))
            stops = weight.short(), torch.zeros(3, vocabulary, dtype=torch.int16)
            for state, table in ((None, None), stops):
                particles.branch_particles_out(
                    logits, f64.float(), weight, order, state, i64, i64.bool(), f64, pair, i64, table, 0.0, 0.1,
                    workspace, tally, order, wide, weight, weight, order, pair.long(), f64, f64, order,
                )  # fmt: skip
            particles.select_candidate_out(tally, f64, i64.bool())


def lm_head_launches() -> None:
    """Every dtype, aligned or not, a bias of either dtype or none, both widths over tiles, one row and two tiles."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows, vocabulary, width, pad in [
            (1, 1, 1, 0),
            (2, 300, 64, 0),
            (130, 1000, 64, 8),
            (3, 300, 64, 3),  # an odd row stride
            (2, 262_400, 16, 0),  # more tiles than 1,024
        ]:
            hidden = torch.zeros(rows, width + pad, dtype=dtype)[:, :width]
            head = torch.zeros(vocabulary, width + pad, dtype=dtype)[:, :width]
            f32 = torch.ones(rows + 1)[1:]  # off 16 bytes
            i64, i32 = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
            counter, seed = torch.zeros(rows, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
            workspace = torch.zeros(pk.hidden_workspace_size(rows, vocabulary))
            logits = torch.zeros(rows, vocabulary)
            for bias in (None, torch.zeros(vocabulary, dtype=dtype), torch.zeros(vocabulary)):
                columns = (f32, f32, f32, f32, i32)
                lm_head.sample_from_hidden_out(
                    hidden, head, bias, f32, f32, seed, counter, None, 0.0, 1.0, logits, workspace, i64, *columns
                )
                lm_head.score_from_hidden_out(hidden, head, bias, i64, f32, f32, 30.0, 0.5, workspace, *columns)


def chain_launches() -> None:
    for rows, longest in ((1, 1), (33, 48), (32, 3072)):
        f32, i32 = torch.zeros(rows, longest), torch.ones(rows, dtype=torch.int32)
        f64 = torch.zeros(rows, dtype=torch.float64)
        chain.mh_accept_out(f32, f32, i32, i32, f64, torch.zeros(rows, dtype=torch.bool), f64.clone(), i32.clone())
    for lanes in range(1, chain.MAX_LANES + 1):
        for law in (
            Law(max_new_tokens=16, block_size=16, mcmc_steps=1),
            Law(max_new_tokens=48, block_size=16, mcmc_steps=10, final_steps=1, early_rejection=False),
            Law(
                max_new_tokens=47, block_size=1, mcmc_steps=16, free_prefix=False, early_rejection=False, karan_du=True
            ),
            Law(max_new_tokens=33, block_size=16, mcmc_steps=2, cut="divergence"),
            Law(max_new_tokens=16, block_size=16, mcmc_steps=1, cut="divergence-entropy", stops=True),
        ):
            state = ChainState.allocate(2, lanes, law)
            wide = torch.zeros(2 * lanes, dtype=torch.int64)
            sampled = (wide, torch.zeros(2 * lanes), torch.zeros(2 * lanes), torch.zeros(2 * lanes, dtype=torch.int32))
            length_term = torch.zeros(law.max_new_tokens + 2, dtype=torch.float64)
            stop_next = torch.zeros(2, 9, dtype=torch.int16)
            entropy = torch.zeros(2 * lanes if law.needs_entropy else 0)
            chain.mh_advance(
                *state.tensors(), length_term, wide[:1], wide[:0], stop_next, *sampled, entropy, *law.constants()
            )


def kv_launches() -> None:
    ranges = torch.zeros(3, 4, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for head in (1, 5, 33, 40, 64, 80, 96, 128, 256, 576):
            slab = torch.zeros(2, 3, 2, 4, head + 1, dtype=dtype)
            for view in (slab[..., :head].contiguous(), slab[..., :head], slab[..., 1:]):
                kv_cache.kv_copy_ranges(view, view.clone(), ranges)


def block_table_launches() -> None:
    for rows, blocks, off in ((1, 1, 0), (33, 17, 0), (16, 16, 1)):  # the last: tables that begin off 16 bytes
        table = torch.zeros(off + rows * blocks, dtype=torch.int32)[off:].view(rows, blocks)
        length, refcount, free_list = (torch.zeros(n + off, dtype=torch.int32)[off:] for n in (rows, 64, 64))
        free_count, copies = length[:1], torch.zeros(rows, 4, dtype=torch.int32)
        held = (table, length, refcount, free_list, free_count, copies, length.clone())
        paged_kv.block_table_fork(*held, length.clone(), length.clone(), 16)
        paged_kv.block_table_extend(*held, length.clone(), 16)
        paged_kv.block_table_commit(*held, length.clone(), 1)
        paged_kv.block_table_rollback(*held, length.clone(), 7)


def main() -> int:
    triton.runtime.driver.set_active(Driver(90))
    JITFunction.run = record
    logits_launches()
    particle_launches()
    lm_head_launches()
    chain_launches()
    kv_launches()
    block_table_launches()
    print("\n".join(sorted(SEEN | set(listed(90)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
