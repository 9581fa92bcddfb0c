"""The executable specification: DESIGN sections 2-5 in float64 on the host, one row and one chain at a time.

`rows.py` is the mathematics of one row of logits, `law.py` one chain; the other files are the operators of section 5 on
top of them. Nothing here is fast. The operators serve devices without kernels of their own, and they are the
specification of what the C++ and Triton implementations write, field by field.
"""

from .chain import mh_accept_out, mh_advance
from .kv_cache import kv_copy_ranges
from .law import Answer, ReferenceChain, leave_probability, length_table
from .lm_head import sample_from_hidden_out, score_from_hidden_out
from .paged_kv import (
    block_table_commit,
    block_table_extend,
    block_table_fork,
    block_table_rollback,
    kv_copy_blocks,
)
from .rows import TokenQuantities, draw_token, entropy, row_status, token_quantities
from .sampling import sample_tokens_out
from .scoring import score_tokens_out
from .slots import sample_slots_out

__all__ = [
    "Answer",
    "ReferenceChain",
    "TokenQuantities",
    "block_table_commit",
    "block_table_extend",
    "block_table_fork",
    "block_table_rollback",
    "draw_token",
    "entropy",
    "kv_copy_blocks",
    "kv_copy_ranges",
    "leave_probability",
    "length_table",
    "mh_accept_out",
    "mh_advance",
    "row_status",
    "sample_from_hidden_out",
    "sample_slots_out",
    "sample_tokens_out",
    "score_from_hidden_out",
    "score_tokens_out",
    "token_quantities",
]
