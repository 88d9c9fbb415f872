"""The order of training: an endless shuffled stream that can be left and taken up again anywhere.

A checkpoint must say where in the data a run stands, and saying it must be cheap: a few integers,
not a buffer of images. So the order is a pure function of (seed, epoch), in four moves.

1. **Deal.** The data come in shards (row groups of parquet files). Every epoch puts the shards in
   a new order and cuts the row of examples that results into equal parts, one for each *lane*, a
   lane being one worker of one rank. So one epoch holds each example exactly once over the whole
   job, whatever the number of ranks, workers and shards.
2. **Mix.** The part of a lane is cut once more, into a few *tracks* of equal length, each of which
   is read from its beginning to its end. A lane reads all its tracks at once, the same number of
   examples from each, and these make up one *window*. So a window holds examples of several
   shards, from distant places of the epoch, though files are read in order; and a file sorted by
   class does not make batches of one class.
3. **Shuffle.** Each window is permuted by a key made of (seed, epoch, lane, window).
4. **Batch.** Lanes never end: after a lane's part of epoch e comes its part of epoch e + 1, and a
   batch that an epoch leaves incomplete is filled up from the next. The place of an example that
   cannot be used goes to the next one of its lane.

Where a lane stands is a `Position`. It travels with each batch, so what workers have prefetched
but nobody has seen counts for nothing. Resuming re-reads one window.

``datasets`` offers a shuffle buffer and ``split_dataset_by_node`` for the same ends. The buffer
loses its content on resume, and the split gives each worker whole shards, so that the examples of
small shards come up more often: hence the few lines here.

Where the shards' lengths are unknown (tar, JSON lines) there is nothing to cut: each track then
cycles over shards of its own, or, when shards are fewer than lanes, reads every lanes-th example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lit_diffusion.training.data.bad_examples import (
    FEW,
    Bad,
    BadExample,
    BadExamples,
)
from lit_diffusion.training.data.retry import begin_after_fork

ORDER, WINDOW, FLIP = 1, 2, 3  # what a permutation is for: three keys that never meet


class Example(NamedTuple):
    """One undecoded row: its index in the split; image, label, conditions as they are stored."""

    index: int
    image: Any
    label: Any
    conditions: tuple[Any, ...] = ()


class Piece(NamedTuple):
    """Rows start, start + step, … below stop (None: to the end) of one shard."""

    shard: int
    start: int
    stop: int | None
    step: int


class Position(NamedTuple):
    """Where a lane stands: `taken` examples into a window that begins at `cursors`.

    A cursor is the number of a piece and how many examples of it are done, for each track. The
    lane has met `read` examples so far, `bad` ones among them.
    """

    epoch: int = 0
    window: int = 0
    taken: int = 0
    read: int = 0
    bad: int = 0
    cursors: tuple[tuple[int, int], ...] = ()


class Window(NamedTuple):
    """What is shuffled together, where the next window begins, and what could not be read."""

    items: list[Any]
    cursors: tuple[tuple[int, int], ...]
    bad: list[Bad]


def permutation(n: int, *key: int) -> np.ndarray:
    """Return the permutation of range(n) that belongs to this key, the same on every machine."""
    return np.random.default_rng(key).permutation(n)


def coin(seed: int, epochs: list[int], indices: list[int]) -> Tensor:
    """Toss one fair coin per example, keyed by (seed, epoch, index), by the splitmix64 hash."""
    x = np.asarray(indices, dtype=np.uint64)
    for key in (np.asarray(epochs, np.uint64), np.asarray([seed], np.uint64), FLIP):
        x = (x ^ np.asarray(key, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x & np.uint64(1)).astype(bool))


def mirror(images: Tensor, chosen: Tensor) -> None:
    """Flip some images left to right, in place.

    Shapes:
        images (B, C, H, W); chosen (B,), bool.
    """
    which = chosen.nonzero().squeeze(1)
    # By numpy, which puts them back several times as fast as torch does.
    images.numpy()[which.numpy()] = images.index_select(0, which).flip(-1).numpy()


def deal(rows: list[int] | None, order: list[int], lane: int, lanes: int) -> list[Piece]:
    """Cut one epoch's order of shards into equal parts and return the part of this lane.

    Args:
        rows: Examples of each shard, None where they are not known.
        order: The shards in this epoch's order.
        lane: Which part.
        lanes: Into how many parts.

    Example:
        >>> deal([3, 2], [1, 0], lane=1, lanes=2)
        [Piece(shard=0, start=0, stop=3, step=1)]
    """
    if rows is None:
        if len(order) >= lanes:
            return [Piece(shard, 0, None, 1) for shard in order[lane::lanes]]
        return [Piece(shard, lane, None, lanes) for shard in order]
    total = sum(rows)
    begin, end = total * lane // lanes, total * (lane + 1) // lanes
    pieces, here = [], 0
    for shard in order:
        start, stop = max(begin - here, 0), min(end - here, rows[shard])
        if start < stop:
            pieces.append(Piece(shard, start, stop, 1))
        here += rows[shard]
    return pieces


class Source(ABC):
    """A split as the stream sees it.

    `total` is its number of examples (None if only reading it would tell), `shards` the number of
    parts it comes in, `lost` what was found to be unreadable when it was opened, `fingerprint` a
    name that its content has to itself (None if only reading it would tell).
    """

    total: int | None
    shards: int
    lost: tuple[Bad, ...] = ()
    fingerprint: str | None = None

    @abstractmethod
    def windows(
        self, lane: int, lanes: int, seed: int, size: int, start: Position
    ) -> Iterator[Window]:
        """Yield each window of the lane's epoch, from the one that begins at start on."""

    @abstractmethod
    def fetch(self, items: list[Any]) -> list[Example]:
        """Return the examples that items of a window stand for."""

    @abstractmethod
    def head(self, n: int | None) -> Iterator[Example | Bad]:
        """Yield the first n examples (None: all) in their own order."""

    def where(self, index: int) -> tuple[str, int]:
        """Return the file of an example and its row there; the file is "" if there is none."""
        return "", index

    def name(self, index: int) -> str:
        """Say which example an index is, for messages."""
        return Bad(*self.where(index), 1, "").name


class ShuffledBatches(IterableDataset):
    """The endless batches of one rank, as (batch, position after it, the bad examples met).

    Runs inside the workers. A failure is yielded in place of a batch, so that its message reaches
    the user without the traceback of another process around it.

    Args:
        source: The split.
        decode: Makes a batch of examples.
        batch_size: Examples in a batch.
        window: Examples shuffled together.
        seed: Of the order and the flips.
        flip: Mirror each image with probability one half.
        rank: This rank.
        world: How many ranks there are.
        max_bad_share: Share of the examples that may be bad and are left out then, from 0 to 1;
            None to raise at the first.
    """

    def __init__(
        self,
        source: Source,
        decode: Any,
        batch_size: int,
        window: int,
        seed: int,
        flip: bool,
        rank: int,
        world: int,
        max_bad_share: float | None = None,
    ) -> None:
        self.source = source
        self.decode = decode
        self.batch_size = batch_size
        self.window = window
        self.seed = seed
        self.flip = flip
        self.rank = rank
        self.world = world
        self.max_bad_share = max_bad_share
        self.positions = [Position()]
        self.turn = 0

    def begin_at(self, positions: list[Position], turn: int) -> None:
        """Set where each worker's lane stands and whose turn is next."""
        self.positions = list(positions)
        self.turn = turn

    def __iter__(self) -> Iterator[tuple[Any, Position | None, list[Bad]]]:
        worker = get_worker_info()
        if worker is not None:
            begin_after_fork()
        mine = (self.turn + (worker.id if worker else 0)) % len(self.positions)
        try:
            yield from self._batches(mine)
        except (OSError, ValueError) as error:
            # A plain copy: not every library's exception survives the way between processes.
            kinds = (FileNotFoundError, ConnectionError, OSError, ValueError)
            yield next(kind for kind in kinds if isinstance(error, kind))(str(error)), None, []

    def _batches(self, mine: int) -> Iterator[tuple[Any, Position, list[Bad]]]:
        workers = len(self.positions)
        position = self.positions[mine]
        read, bad = position.read, position.bad
        first: list[Bad] = []
        items = self._items(self.rank * workers + mine, self.world * workers, position)
        while True:
            kept, epochs, found, begun = [], [], [], position.epoch
            while len(kept) < self.batch_size:
                drawn = list(islice(items, self.batch_size - len(kept)))
                decoded = self.decode.sift(self.source.fetch([item for item, *_ in drawn]))
                for one, (_, epoch, after, unread) in zip(decoded, drawn, strict=True):
                    position = after
                    found += unread
                    if isinstance(one, Bad):
                        found.append(one._replace(epoch=epoch))
                    else:
                        kept.append(one)
                        epochs.append(epoch)
                if found:
                    self._check(first + found, found, read + len(kept), bad)
                if not kept and position.epoch > begun + 1:
                    raise BadExample(found[0], self.decode.split)  # not one good in an epoch
            first = (first + found)[:FEW]
            lost = sum(one.rows for one in found)
            read, bad = read + len(kept) + lost, bad + lost
            batch = self.decode.collate(kept)
            if self.flip:
                mirror(batch["image"], coin(self.seed, epochs, batch["index"].numpy()))
            yield batch, position._replace(read=read, bad=bad), found

    def _check(self, first: list[Bad], found: list[Bad], read: int, bad: int) -> None:
        """Raise if bad examples are not allowed, or so many that this batch may never be full.

        How many are too many is for the loader to judge, which hears of all workers, but only
        with a full batch. So a lane judges itself as if all others had read as much, and nothing
        bad.
        """
        if self.max_bad_share is None:
            raise BadExample(found[0], self.decode.split)
        lost = sum(one.rows for one in found)
        judge = BadExamples(self.decode.split, self.max_bad_share, folder=None)
        judge.first = first[:FEW]
        judge.judge((read + lost) * len(self.positions), bad + lost)

    def _items(
        self, lane: int, lanes: int, position: Position
    ) -> Iterator[tuple[Any, int, Position, list[Bad]]]:
        """Yield (item, epoch, position after it, what could not be read since the last)."""
        unread: list[Bad] = []
        while True:
            epoch, window, taken = position[:3]
            fresh, empty = not position.cursors, True
            for items, cursors, bad in self.source.windows(
                lane, lanes, self.seed, self.window, position
            ):
                if not taken:  # or it has been told before
                    unread += [one._replace(epoch=epoch) for one in bad]
                order = permutation(len(items), self.seed, WINDOW, epoch, lane, window)
                after = Position(epoch, window + 1, cursors=cursors)
                while taken < len(items):
                    item = items[order[taken]]
                    taken += 1
                    inside = position._replace(taken=taken)
                    yield item, epoch, inside if taken < len(items) else after, unread
                    empty, unread = False, []
                position, taken, window = after, 0, window + 1
            if fresh and empty:
                if unread:
                    raise BadExample(unread[0], self.decode.split)
                raise ValueError(
                    f"expected at least one example for each of {lanes} ranks × workers, got none "
                    f"for number {lane}: use fewer ranks or set data.num_workers lower"
                )
            position = Position(epoch + 1)
