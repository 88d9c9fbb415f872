"""Shuffled batches of a stream: windows read in the order of `order`, decoded and collated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from lit_diffusion.training.data.batching.lane import Delivery, LaneBatches
from lit_diffusion.training.data.decoding.images import Decoded
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.reading.bad_examples import (
    FEW,
    Bad,
    BadExample,
    BadExamples,
    lost_rows,
)
from lit_diffusion.training.data.reading.order import WINDOW, Position, permutation


class Step(NamedTuple):
    """An item of a lane, its epoch, the position after it, and what was unreadable before it."""

    item: Any
    epoch: int
    after: Position
    unread: list[Bad]


def follow(
    split: Split, lane: int, lanes: int, seed: int, window: int, position: Position
) -> Iterator[Step]:
    """Follow a lane through all epochs.

    Args:
        split: The data.
        lane: Index of the lane.
        lanes: Number of lanes.
        seed: Seed of the order.
        window: Examples shuffled together.
        position: Where to begin.

    Raises:
        BadExample: If an epoch has no readable example.
        ValueError: If the lane has no examples.
    """
    unread: list[Bad] = []
    while True:
        epoch, number, taken = position[:3]
        fresh, empty = not position.cursors, True
        for items, cursors, bad in split.source.windows(lane, lanes, seed, window, position):
            if not taken:  # else it was reported before the run was resumed
                unread += [one._replace(epoch=epoch) for one in bad]
            order = permutation(len(items), seed, WINDOW, epoch, lane, number)
            after = Position(epoch, number + 1, cursors=cursors)
            while taken < len(items):
                item = items[order[taken]]
                taken += 1
                inside = position._replace(taken=taken)
                yield Step(item, epoch, inside if taken < len(items) else after, unread)
                empty, unread = False, []
            position, taken, number = after, 0, number + 1
        if fresh and empty:
            if unread:
                raise BadExample(unread[0], split.name)
            raise ValueError(
                f"expected at least one example for each of {lanes} ranks × workers, got none "
                f"for number {lane}: use fewer ranks or set data.num_workers lower"
            )
        position = Position(epoch + 1)


class ShuffledBatches(LaneBatches):
    """The endless batches of one rank from a stream.

    Args:
        split: The data.
        batch_size: Examples in a batch.
        window: Examples shuffled together.
        seed: Seed of the order and of the flips.
        flip: Mirror each image with probability one half.
        rank: This rank.
        world: Number of ranks.
        max_bad_share: Largest share of the examples that may be bad and is then skipped, from 0
            to 1; None to raise an error at the first bad one.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        window: int,
        seed: int,
        flip: bool,
        rank: int,
        world: int,
        max_bad_share: float | None = None,
    ) -> None:
        super().__init__(batch_size, seed, flip, rank, world)
        self.split = split
        self.window = window
        self.max_bad_share = max_bad_share

    def batches(self, lane: int, lanes: int, position: Position) -> Iterator[Delivery]:
        """Yield the batches of one lane for ever."""
        read, bad = position.read, position.bad
        first: list[Bad] = []
        steps = follow(self.split, lane, lanes, self.seed, self.window, position)
        while True:
            kept: list[Decoded] = []
            epochs: list[int] = []
            found: list[Bad] = []
            begun = position.epoch
            while len(kept) < self.batch_size:
                taken = list(islice(steps, self.batch_size - len(kept)))
                examples = self.split.source.fetch([step.item for step in taken])
                decoded = self.split.decode(examples, [step.epoch for step in taken])
                for one, step in zip(decoded, taken, strict=True):
                    position = step.after
                    found += step.unread
                    if isinstance(one, Bad):
                        found.append(one._replace(epoch=step.epoch))
                    else:
                        kept.append(one)
                        epochs.append(step.epoch)
                if found:
                    self._check(first + found, found, read + len(kept), bad)
                if not kept and position.epoch > begun + 1:
                    raise BadExample(found[0], self.split.name)  # none usable in a whole epoch
            first = (first + found)[:FEW]
            lost = lost_rows(found)
            read, bad = read + len(kept) + lost, bad + lost
            batch = self.varied(self.split.decoder.collate(kept), epochs)
            yield Delivery(batch, position._replace(read=read, bad=bad), found)

    def _check(self, first: list[Bad], found: list[Bad], read: int, bad: int) -> None:
        """Raise an error if bad examples are not allowed, or too many for this batch to fill up.

        The loader, which knows the counts of all workers, decides how many are too many; but it
        only hears of them with a full batch. So a lane judges as if all other lanes had read as
        much as itself and found nothing bad.
        """
        if self.max_bad_share is None:
            raise BadExample(found[0], self.split.name)
        lost = lost_rows(found)
        judge = BadExamples(self.split.name, self.max_bad_share, folder=None)
        judge.first = first[:FEW]
        judge.judge((read + lost) * len(self.positions), bad + lost)
