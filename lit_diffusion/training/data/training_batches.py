"""The loader of training: the order of the batches, from a stream or from memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_diffusion.training.data.batching.buckets import BucketBatches
from lit_diffusion.training.data.batching.epoch_length import steps_per_epoch
from lit_diffusion.training.data.batching.lane import LaneBatches
from lit_diffusion.training.data.batching.loader import TrainLoader, batches_to_repeat
from lit_diffusion.training.data.batching.memory import MemoryBatches, MemoryMap
from lit_diffusion.training.data.batching.resumption import settings_of
from lit_diffusion.training.data.batching.stream import ShuffledBatches
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.reading.bad_examples import BadExamples

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule


def train_loader(
    data: DataModule,
    split: Split,
    memory: MemoryMap | None,
    rank: int,
    world: int,
    bad_examples: BadExamples,
    max_bad_share: float | None,
) -> TrainLoader:
    """Return the endless loader of one rank.

    Args:
        data: Has the arguments.
        split: What is trained on.
        memory: The same in memory, None if it is streamed.
        rank: This rank.
        world: Number of ranks.
        bad_examples: Reports the bad ones.
        max_bad_share: Largest share of them that is skipped, None to skip none.
    """
    total = split.source.total if memory is None else len(memory)
    steps = steps_per_epoch(data, split.source.shards, total, world)
    lanes = (data.seed, data.horizontal_flip, rank, world)
    batches: LaneBatches
    if memory is not None:
        rest = data.transforms.divided()[1]
        kind = BucketBatches if data.buckets else MemoryBatches
        batches = kind(memory, data.batch_size, *lanes, rest, data.shape)
    else:
        batches = ShuffledBatches(
            split, data.batch_size, data.shuffle_window, *lanes, max_bad_share
        )
    batches.augment = data.augment
    return TrainLoader(
        batches,
        steps,
        data.num_workers,
        settings_of(data, split, world, total),
        data.trainer is not None and data.trainer.strategy.root_device.type == "cuda",
        bad_examples,
        data.on_changed_data,
        batches_to_repeat(data.trainer, steps),
    )
