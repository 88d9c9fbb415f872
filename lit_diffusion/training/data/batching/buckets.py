"""Batches of one shape each, from data of several: the order of training with buckets.

The examples of a bucket, permuted anew in each pass over the data, form an endless line: the n of
pass 0, the n of pass 1, … It is cut into pieces of G examples, one batch for each rank. Piece k
belongs to the pass in which it becomes full, so what a bucket has left at the end of a pass is the
beginning of its first piece in the next, and a bucket of less than G examples has a piece in some
of the passes only. The pieces of a pass, those of all buckets, are permuted.

    line of a bucket      3 1 0 2 4 │ 0 4 2 1 3 │ 2 …      n = 5 examples, passes 0, 1, …
    cut by G = 4          3 1 0 2 ┃ 4   0 4 2 ┃ 1 3   2 …  one piece in each of the passes 0, 1

All of this is arithmetic on (seed, pass, bucket): no picture and no earlier pass is looked at. The
line has each example exactly once a pass, and a place in the order is (pass, pieces done). All
ranks make the same step from the same bucket: none waits for another that has larger images. Of
W workers of a rank each makes every W-th batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_diffusion.training.data.batching.lane import Delivery
from lit_diffusion.training.data.batching.memory import MemoryBatches
from lit_diffusion.training.data.reading.order import BUCKET, PIECES, Position, permutation

__all__ = ["BucketBatches", "BucketOrder"]

Integers = npt.NDArray[np.int64]


class BucketOrder:
    """The order of the pieces, a pure function of the seed.

    Args:
        bucket: Bucket of each example.
        size: Number G of examples in a piece.
        seed: Of the order.

    Shapes:
        bucket (N,), integers.

    Example:
        >>> order = BucketOrder(np.array([0, 1, 0, 0, 1]), size=2, seed=0)
        >>> order.pieces(0), order.pieces(1)
        ([(1, 0), (0, 0)], [(1, 1), (0, 2), (0, 1)])
        >>> examples, passes = order.piece(0, 1)  # the last of pass 0, and the first of pass 1
        >>> passes.tolist()
        [0, 1]
    """

    def __init__(self, bucket: npt.NDArray[Any], size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.members = {int(k): np.flatnonzero(bucket == k) for k in np.unique(bucket)}
        self._lines: dict[tuple[int, int], Integers] = {}
        self._pieces: dict[int, list[tuple[int, int]]] = {}

    def pieces(self, epoch: int) -> list[tuple[int, int]]:
        """Return the pieces of a pass in order, each as (bucket, number of the piece).

        Args:
            epoch: Number of the pass.
        """
        if epoch in self._pieces:
            return self._pieces[epoch]
        found = [
            (k, number)
            for k, members in self.members.items()
            for number in range(
                epoch * len(members) // self.size, (epoch + 1) * len(members) // self.size
            )
        ]
        kept = {old: pieces for old, pieces in self._pieces.items() if abs(old - epoch) == 1}
        order = permutation(len(found), self.seed, PIECES, epoch)
        self._pieces = kept | {epoch: [found[i] for i in order]}
        return self._pieces[epoch]

    def piece(self, bucket: int, number: int) -> tuple[Integers, Integers]:
        """Return the examples of a piece, and the pass to which each belongs.

        Args:
            bucket: Of the piece.
            number: Of the piece in the line of its bucket.
        """
        members = self.members[bucket]
        passes, places = np.divmod(number * self.size + np.arange(self.size), len(members))
        chosen = np.empty(self.size, dtype=np.int64)
        for epoch in range(int(passes[0]), int(passes[-1]) + 1):
            mine = passes == epoch
            chosen[mine] = members[self._line(bucket, epoch)[places[mine]]]
        return chosen, passes

    def _line(self, bucket: int, epoch: int) -> Integers:
        """Return the permutation of a bucket in a pass; some are kept, for the next piece."""
        key = bucket, epoch
        if key not in self._lines:
            for old in [k for k in self._lines if k[0] == bucket and abs(k[1] - epoch) > 1]:
                del self._lines[old]
            n = len(self.members[bucket])
            self._lines[key] = permutation(n, self.seed, BUCKET, epoch, bucket)
        return self._lines[key]


class BucketBatches(MemoryBatches):
    """The endless batches of one rank from a map with buckets; the arguments are those above."""

    mixed = False  # the classes of a bucket need not be those of all examples

    def batches(self, lane: int, lanes: int, position: Position) -> Iterator[Delivery]:
        """Yield the batches of one lane for ever.

        A lane's place is (epoch, taken): worker w of W makes batch taken + w, counted from the
        beginning of that pass, so that all workers are at the same place after as many batches.
        """
        assert self.memory.bucket is not None
        order = BucketOrder(self.memory.bucket.numpy(), self.batch_size * self.world, self.seed)
        workers = lanes // self.world
        worker, mine = lane % workers, slice(self.rank, None, self.world)
        epoch, taken = position.epoch, position.taken
        while True:
            while taken >= (done := len(order.pieces(epoch))):
                epoch, taken = epoch + 1, taken - done
            at, ahead = epoch, taken + worker
            while ahead >= len(pieces := order.pieces(at)):
                at, ahead = at + 1, ahead - len(pieces)
            chosen, epochs = order.piece(*pieces[ahead])
            taken += workers
            yield Delivery(self._batch(chosen[mine], epochs[mine]), Position(epoch, taken=taken))
