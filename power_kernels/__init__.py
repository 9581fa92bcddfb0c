"""Exact, fused power sampling: the operators, on your own tensors. The driver is `power_kernels.api`. See README.md."""

from power_kernels import nvtx
from power_kernels.block_tables import BlockStatus, BlockTables
from power_kernels.errors import ArgumentError, ArgumentTypeError, BackendError
from power_kernels.ops import (
    AcceptOutput,
    SampleOutput,
    ScoreOutput,
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
from power_kernels.state import CUTS, ChainState, Law, Status

__version__ = "0.1.0"

nvtx.enable_from_environment()

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
    "sample_tokens",
    "sample_tokens_out",
    "score_from_hidden",
    "score_from_hidden_out",
    "score_from_shards",
    "score_tokens",
    "score_tokens_out",
    "shard_record",
    "use_backend",
    "workspace_size",
]
