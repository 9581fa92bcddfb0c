"""Every operator: schema, validation, fake, dispatch (DESIGN section 5). One family a file.

The `*_out` functions allocate nothing, never wait for the device, and are safe inside a CUDA graph. The functional
ones check their arguments, allocate and call them. Shapes, dtypes and strides are checked on every device; values
(alpha, beta, ranges) only where the tensors are on the host, since looking at them elsewhere would wait for the device:
there the kernels report bad exponents by row, as Status.NAN, and skip bad ranges.
"""

import importlib

from . import dispatch
from .chain import AcceptOutput, mh_accept, mh_accept_out, mh_advance
from .dispatch import backend_for, use_backend
from .kv_cache import kv_copy_ranges
from .lm_head import (
    hidden_workspace_size,
    sample_from_hidden,
    sample_from_hidden_out,
    score_from_hidden,
    score_from_hidden_out,
)
from .paged_kv import (
    block_table_commit,
    block_table_extend,
    block_table_fork,
    block_table_rollback,
    kv_copy_blocks,
)
from .particles import (
    BranchOutput,
    branch_particles,
    branch_particles_out,
    branch_workspace_size,
    select_candidate,
    select_candidate_out,
)
from .rows import workspace_size
from .sampling import SampleOutput, sample_tokens, sample_tokens_out
from .scoring import ScoreOutput, score_tokens, score_tokens_out
from .shards import sample_from_shards, score_from_shards, shard_record
from .slots import SlotOutput, sample_slots, sample_slots_out

dispatch.load_extension()
dispatch.choose_from_environment()
importlib.import_module("..nvtx", __package__)  # last, as it wraps what is above where the environment asks for ranges
