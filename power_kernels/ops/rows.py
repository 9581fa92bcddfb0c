"""What the operators over rows of logits share: workspace, outputs and their checks."""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from .checks import check_exponents, check_seed, check_vectors

SMALLEST_TILE = 256  # no backend's tile of the vocabulary is narrower, which bounds the workspace
TILE_VALUES = 4  # max, rest at 1, rest at beta, entropy partial


def workspace_size(rows: int, vocab: int) -> int:
    """float32 elements of workspace that the `_out` forms of sampling and scoring need on any backend."""
    return rows * -(-vocab // SMALLEST_TILE) * TILE_VALUES


def check_sampling(like: torch.Tensor, rows: int, alpha, beta, seed, counter, exclude) -> None:
    """What every sampler takes for each of its rows. like: on the device where all must be."""
    check_vectors(
        like,
        alpha=(alpha, torch.float32, (rows,)),
        beta=(beta, torch.float32, (rows,)),
        counter=(counter, torch.int32, (rows, 4)),
    )
    check_seed(like, seed, rows)
    if exclude is not None:
        check_vectors(like, exclude=(exclude, torch.int64, (rows,)))
    check_exponents(alpha=alpha, beta=beta)


def check_scoring(like: torch.Tensor, rows: int, tokens, alpha, beta) -> None:
    """The same for every scorer."""
    check_vectors(
        like,
        tokens=(tokens, torch.int64, (rows,)),
        alpha=(alpha, torch.float32, (rows,)),
        beta=(beta, torch.float32, (rows,)),
    )
    check_exponents(alpha=alpha, beta=beta)


def check_workspace(like: torch.Tensor, workspace, need: int) -> None:
    """need: elements."""
    check_vectors(like, workspace=(workspace, torch.float32, (None,)))
    if workspace.numel() < need:
        raise ArgumentError(f"workspace has {workspace.numel()} elements; it must have at least {need}")


def check_outputs(like: torch.Tensor, need: int, workspace, floats, entropy, status) -> None:
    """like: logits or hidden states, one row a row of the outputs. need: elements of the workspace."""
    rows = (like.shape[0],)
    check_workspace(like, workspace, need)
    check_vectors(like, status=(status, torch.int32, rows))
    check_vectors(like, **{name: (value, torch.float32, rows) for name, value in floats.items()})
    if entropy is not None:
        check_vectors(like, entropy=(entropy, torch.float32, rows))


def row_outputs(logits: torch.Tensor, floats: int, return_entropy: bool):
    rows = logits.shape[0]
    values = [logits.new_empty(rows, dtype=torch.float32) for _ in range(floats)]
    entropy = logits.new_empty(rows if return_entropy else 0, dtype=torch.float32)
    return (*values, entropy, logits.new_empty(rows, dtype=torch.int32))


def new_workspace(logits: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """size: elements; None takes `workspace_size` of the logits."""
    return logits.new_empty(workspace_size(*logits.shape) if size is None else size, dtype=torch.float32)
