"""Exact, fused power sampling: the operators, on your own tensors. The driver is `power_kernels.api`. See README.md.

The names below are imported when they are first used, or all at once where torch is imported already. The operators
are registered with torch (`torch.ops.power_kernels`) when one of them is used or, in any order with torch, by
`import power_kernels.ops`.
"""

import sys
from typing import TYPE_CHECKING

from power_kernels.lazy import on_demand

if TYPE_CHECKING:  # what editors and type checkers read; the table below says the same to Python
    from power_kernels import nvtx
    from power_kernels.block_tables import BlockStatus, BlockTables
    from power_kernels.errors import ArgumentError, ArgumentTypeError, BackendError
    from power_kernels.law import CUTS, Law
    from power_kernels.ops import (
        AcceptOutput,
        SampleOutput,
        ScoreOutput,
        SlotOutput,
        backend_for,
        block_table_commit,
        block_table_extend,
        block_table_fork,
        block_table_rollback,
        hidden_workspace_size,
        kv_copy_blocks,
        kv_copy_ranges,
        mh_accept,
        mh_accept_out,
        mh_advance,
        sample_from_hidden,
        sample_from_hidden_out,
        sample_from_shards,
        sample_slots,
        sample_slots_out,
        sample_tokens,
        sample_tokens_out,
        score_from_hidden,
        score_from_hidden_out,
        score_from_shards,
        score_tokens,
        score_tokens_out,
        shard_record,
        use_backend,
        workspace_size,
    )
    from power_kernels.slots import SlotField, SlotFlag, SlotTable
    from power_kernels.state import ChainState, Status
    from power_kernels.stop_strings import stop_automaton

__version__ = "0.1.0"

__all__ = [
    "CUTS",
    "AcceptOutput",
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "BlockStatus",
    "BlockTables",
    "ChainState",
    "Law",
    "SampleOutput",
    "ScoreOutput",
    "SlotField",
    "SlotFlag",
    "SlotOutput",
    "SlotTable",
    "Status",
    "backend_for",
    "block_table_commit",
    "block_table_extend",
    "block_table_fork",
    "block_table_rollback",
    "hidden_workspace_size",
    "kv_copy_blocks",
    "kv_copy_ranges",
    "mh_accept",
    "mh_accept_out",
    "mh_advance",
    "nvtx",
    "sample_from_hidden",
    "sample_from_hidden_out",
    "sample_from_shards",
    "sample_slots",
    "sample_slots_out",
    "sample_tokens",
    "sample_tokens_out",
    "score_from_hidden",
    "score_from_hidden_out",
    "score_from_shards",
    "score_tokens",
    "score_tokens_out",
    "shard_record",
    "stop_automaton",
    "use_backend",
    "workspace_size",
]

_MODULES = ("block_tables", "errors", "law", "nvtx", "ops", "reference", "rng", "slots", "state")
_HOMES = {
    **dict.fromkeys(__all__, "power_kernels.ops"),  # unless it is said to be elsewhere
    **dict.fromkeys(("BlockStatus", "BlockTables"), "power_kernels.block_tables"),
    **dict.fromkeys(("ArgumentError", "ArgumentTypeError", "BackendError"), "power_kernels.errors"),
    **dict.fromkeys(("CUTS", "Law"), "power_kernels.law"),
    **dict.fromkeys(("SlotField", "SlotFlag", "SlotTable"), "power_kernels.slots"),
    **dict.fromkeys(("ChainState", "Status"), "power_kernels.state"),
    "stop_automaton": "power_kernels.stop_strings",
    **{module: f"power_kernels.{module}" for module in _MODULES},
}
__getattr__, __dir__ = on_demand(globals(), _HOMES)

if "torch" in sys.modules:
    for _name in _HOMES:
        __getattr__(_name)
