"""How many batches an epoch has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_diffusion.training.run.messages import inform

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule

STEPS_IF_UNKNOWN = 1000  # batches in an epoch of data of unknown length


def steps_per_epoch(data: DataModule, shards: int, total: int | None, world: int) -> int:
    """Return how many batches are an epoch, after checking that every lane gets examples.

    Args:
        data: Has the arguments.
        shards: Number of shards of the data.
        total: Number of examples, None if unknown.
        world: Number of ranks.

    Raises:
        ValueError: If there are fewer examples than lanes.
    """
    workers = max(1, data.num_workers)
    lanes = world * workers
    if total is not None and total < lanes:
        raise ValueError(
            f"expected at least one example for each of {world} ranks × {workers} workers, "
            f"got {total} in all; set data.num_workers lower or use fewer ranks"
        )
    if total is None and shards % lanes and shards > lanes:
        inform(
            f"{shards} shards of unknown length are divided among {lanes} ranks × workers: "
            "each cycles over its own, so some examples come up more often than others."
        )
    if data.steps_per_epoch is not None:
        return data.steps_per_epoch
    if total is not None:
        return max(1, total // (data.batch_size * world))
    inform(
        f"The length of {data.path!r} is not known without reading it: an epoch is "
        f"{STEPS_IF_UNKNOWN} batches; set data.steps_per_epoch to change that."
    )
    return STEPS_IF_UNKNOWN
