"""The operators of DESIGN section 5 on top of `reference.py`: any device, any dtype, no speed.

They serve devices without kernels of their own, and they are the specification of what the C++ and Triton
implementations write, field by field.
"""

from power_kernels.reference_ops.chain import mh_accept_out, mh_advance
from power_kernels.reference_ops.kv_cache import kv_copy_ranges
from power_kernels.reference_ops.lm_head import sample_from_hidden_out, score_from_hidden_out
from power_kernels.reference_ops.paged_kv import (
    block_table_commit,
    block_table_extend,
    block_table_fork,
    block_table_rollback,
    kv_copy_blocks,
)
from power_kernels.reference_ops.sampling import sample_tokens_out
from power_kernels.reference_ops.scoring import score_tokens_out

__all__ = [
    "block_table_commit",
    "block_table_extend",
    "block_table_fork",
    "block_table_rollback",
    "kv_copy_blocks",
    "kv_copy_ranges",
    "mh_accept_out",
    "mh_advance",
    "sample_from_hidden_out",
    "sample_tokens_out",
    "score_from_hidden_out",
    "score_tokens_out",
]
