"""The order of training as a pure function of the seed, so that it can be resumed anywhere.

A checkpoint has to record how far a run has got in the data, and cheaply: a few integers, not a
buffer of images. The order is therefore a pure function of (seed, epoch), built in four steps.

1. **Deal.** The data come in shards (row groups of parquet files). Each epoch permutes the shards,
   lines up their examples in that order, and cuts the line into equal parts, one for each *lane*;
   a lane is one worker of one rank. An epoch thus holds each example exactly once over the whole
   job, for any number of ranks, workers and shards.
2. **Mix.** A lane's part is cut again, into a few *tracks* of equal length, each read from its
   beginning to its end. A lane reads all its tracks at once, the same number of examples from
   each, and these form one *window*. A window thus mixes examples from distant places of the
   epoch although files are read sequentially, and a file sorted by class does not give batches of
   one class.
3. **Shuffle.** Each window is permuted by a key made of (seed, epoch, lane, window).
4. **Batch.** Lanes are endless: a lane's part of epoch e is followed by its part of epoch e + 1,
   and a batch that an epoch leaves incomplete is filled from the next. An example that cannot be
   used is replaced by the next one of its lane.

The place of a lane is a `Position`. It travels with each batch, so batches that workers have
prefetched and nobody has used do not count. Resuming reads one window again.

``datasets`` offers a shuffle buffer and ``split_dataset_by_node`` for the same purposes. The
buffer loses its content on resume, and the split gives each worker whole shards, so that examples
of small shards come up more often: hence the few lines here.

Where the lengths of the shards are unknown (tar, JSON lines) there is no line to cut: each track
then cycles over shards of its own or, with fewer shards than lanes, reads every lanes-th example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_diffusion.training.data.reading.bad_examples import Bad

ORDER_VERSION = 2  # to be raised whenever the same arguments give another order
# Purposes of a random key: no two of them share a key.
ORDER, WINDOW, FLIP, BUCKET, PIECES, AUGMENT = 1, 2, 3, 4, 5, 6


class Piece(NamedTuple):
    """Rows start, start + step, … below stop (None: to the end) of one shard."""

    shard: int
    start: int
    stop: int | None
    step: int


class Position(NamedTuple):
    """The place of a lane: `taken` examples into a window that begins at `cursors`.

    A cursor is, for one track, the number of a piece and how many of its examples are done. The
    lane has read `read` examples so far, `bad` of which could not be used.
    """

    epoch: int = 0
    window: int = 0
    taken: int = 0
    read: int = 0
    bad: int = 0
    cursors: tuple[tuple[int, int], ...] = ()


class Window(NamedTuple):
    """Items shuffled together, where the next window begins, and what could not be read."""

    items: list[Any]
    cursors: tuple[tuple[int, int], ...]
    bad: list[Bad]


def permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """Return the permutation of range(n) that belongs to a key, the same on every machine.

    Args:
        n: Number of items.
        key: Integers, at least 0.

    Example:
        >>> permutation(5, 0, 1).tolist()
        [1, 4, 3, 0, 2]
    """
    return np.random.default_rng(key).permutation(n)


def coin(seed: int, epochs: Sequence[int] | npt.NDArray[Any], indices: npt.ArrayLike) -> Tensor:
    """Toss one fair coin per example, keyed by (seed, epoch, index), with the splitmix64 hash.

    Args:
        seed: Of the run.
        epochs: Epoch of each example.
        indices: Index of each example.

    Shapes:
        epochs (B,); indices (B,); the coins (B,), bool.

    Example:
        >>> coin(0, [0, 0, 0, 1], [0, 1, 2, 0])
        tensor([ True, False,  True, False])
    """
    x = _hash(indices, epochs, [seed], FLIP)
    return torch.from_numpy((x & np.uint64(1)).astype(bool))


def uniform(
    seed: int,
    epochs: Sequence[int] | npt.NDArray[Any],
    indices: npt.ArrayLike,
    purpose: int,
    count: int,
) -> Tensor:
    """Numbers uniform in (0, 1) for each example, keyed by (seed, epoch, index) and a purpose.

    Args:
        seed: Of the run.
        epochs: Epoch of each example.
        indices: Index of each example.
        purpose: What they are for, which no other random key has.
        count: How many for each example.

    Shapes:
        epochs (B,); indices (B,); result (B, count), float64.
    """
    keys = np.asarray(epochs)[:, None], [seed], purpose, np.arange(count)
    x = _hash(np.asarray(indices)[:, None], *keys)
    return torch.from_numpy(((x >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53)


def _hash(x: npt.ArrayLike, *keys: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Mix integers with keys, one after another."""
    mixed = np.asarray(x, dtype=np.uint64)
    for key in keys:
        mixed = (mixed ^ np.asarray(key, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def deal(rows: list[int] | None, order: list[int], lane: int, lanes: int) -> list[Piece]:
    """Cut one epoch's order of shards into equal parts and return the part of one lane.

    Args:
        rows: Number of examples in each shard, None if unknown.
        order: The shards in this epoch's order.
        lane: Index of the part.
        lanes: Number of parts.

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
