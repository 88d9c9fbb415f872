"""Collective operations of the processes of one job, its ranks.

Each function is the identity in a job of one process, and a collective in any other: every rank
must call it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["add_up", "collect", "collect_rows", "largest", "place"]


def place() -> tuple[int, int]:
    """This rank, and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(values: Tensor) -> Tensor:
    """The sum over all ranks, in place.

    Args:
        values: Of one shape on every rank.
    """
    if place()[1] > 1:
        dist.all_reduce(values)
    return values


def largest(values: Tensor) -> Tensor:
    """The largest of each value over all ranks, in place.

    Args:
        values: Of one shape on every rank.
    """
    if place()[1] > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def collect(value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks.

    Args:
        value: Small plain data.
    """
    found = [value]
    if (world := place()[1]) > 1:
        found = [None] * world
        dist.all_gather_object(found, value)
    return found


def collect_rows(index: Tensor, rows: Tensor) -> Tensor:
    """The rows of all ranks, sorted by their numbers.

    Args:
        index: Number of each row, unique in the whole job.
        rows: Any number of rows, including none.

    Shapes:
        index (n,), int64; rows (n, F); result (N, F).
    """
    if place()[1] > 1:
        from torchmetrics.utilities.distributed import gather_all_tensors

        # The indices are gathered with the rows; float64 is exact for integers up to 2⁵³.
        wide = torch.cat([index.to(rows.device)[:, None].double(), rows.double()], 1)
        together = torch.cat(gather_all_tensors(wide))
        index, rows = together[:, 0].long(), together[:, 1:].to(rows.dtype)
    return rows[index.argsort().to(rows.device)]
