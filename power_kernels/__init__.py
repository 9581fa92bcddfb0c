"""Exact, fused power sampling: the operators, on your own tensors. The driver is `power_kernels.api`. See README.md.

The names below are imported when they are first used, or all at once where torch is imported already. The operators
are registered with torch (`torch.ops.power_kernels`) when one of them is used or, in any order with torch, by
`import power_kernels.ops`.
"""

import sys
from typing import TYPE_CHECKING

from .lazy import on_demand

if TYPE_CHECKING:  # what editors and type checkers read; the table below says the same to Python
    from . import nvtx
    from .block_tables import BlockStatus, BlockTables
    from .errors import ArgumentError, ArgumentTypeError, BackendError
    from .law import CUTS, Law, ParticleLaw, SweepCut
    from .ops import (
        AcceptOutput,
        BranchOutput,
        SampleOutput,
        ScoreOutput,
        SlotOutput,
        backend_for,
        block_table_commit,
        block_table_extend,
        block_table_fork,
        block_table_rollback,
        branch_particles,
        branch_particles_out,
        branch_workspace_size,
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
        select_candidate,
        select_candidate_out,
        shard_record,
        use_backend,
        workspace_size,
    )
    from .particles import Tally
    from .slots import SlotField, SlotFlag, SlotTable
    from .state import ChainState, Status
    from .stop_strings import stop_automaton

__version__ = "0.1.0"

__all__ = [
    "CUTS",
    "AcceptOutput",
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "BlockStatus",
    "BlockTables",
    "BranchOutput",
    "ChainState",
    "Law",
    "ParticleLaw",
    "SampleOutput",
    "ScoreOutput",
    "SlotField",
    "SlotFlag",
    "SlotOutput",
    "SlotTable",
    "Status",
    "SweepCut",
    "Tally",
    "backend_for",
    "block_table_commit",
    "block_table_extend",
    "block_table_fork",
    "block_table_rollback",
    "branch_particles",
    "branch_particles_out",
    "branch_workspace_size",
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
    "select_candidate",
    "select_candidate_out",
    "shard_record",
    "stop_automaton",
    "use_backend",
    "workspace_size",
]

_MODULES = ("block_tables", "errors", "law", "nvtx", "ops", "particles", "reference", "rng", "slots", "state")
_HOMES = {
    **dict.fromkeys(__all__, f"{__name__}.ops"),  # unless it is said to be elsewhere
    **dict.fromkeys(("BlockStatus", "BlockTables"), f"{__name__}.block_tables"),
    **dict.fromkeys(("ArgumentError", "ArgumentTypeError", "BackendError"), f"{__name__}.errors"),
    **dict.fromkeys(("CUTS", "Law", "ParticleLaw", "SweepCut"), f"{__name__}.law"),
    **dict.fromkeys(("SlotField", "SlotFlag", "SlotTable"), f"{__name__}.slots"),
    **dict.fromkeys(("ChainState", "Status"), f"{__name__}.state"),
    "Tally": f"{__name__}.particles",
    "stop_automaton": f"{__name__}.stop_strings",
    **{module: f"{__name__}.{module}" for module in _MODULES},
}
__getattr__, __dir__ = on_demand(globals(), _HOMES)

if "torch" in sys.modules:
    for _name in __all__:  # all but the modules that need numpy
        __getattr__(_name)
