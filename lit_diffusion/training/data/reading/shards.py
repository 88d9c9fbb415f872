"""Reading shards: several at once, each in order and from any row on, in spite of failures.

A shard can only be read from its beginning. Nothing is decoded here: an `Example` holds the image
as it is stored.

If a shard cannot be read to its end, because it is damaged or gone, the rest of the piece counts
as bad and the track continues with its next piece. A failing network is handled otherwise: the
shard is opened again at the row where reading stopped, see `retry`.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from lit_diffusion.training.data.reading.bad_examples import Bad, one_line
from lit_diffusion.training.data.reading.columns import Columns, Row
from lit_diffusion.training.data.reading.order import (
    ORDER,
    Piece,
    Position,
    Window,
    deal,
    permutation,
)
from lit_diffusion.training.data.reading.retry import NetworkError, patiently
from lit_diffusion.training.data.reading.source import Example, Source

READ_SIZE = 64  # rows turned into Python objects at a time
UNKNOWN_LENGTH = 1 << 32  # index = shard · 2³² + row, where the shards' lengths are unknown
OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}  # faults of this machine


class ShardSource(Source):
    """A split stored in shards.

    Args:
        rows: Number of examples in each shard, None if unknown.
        shards: Number of shards.
        open_shards: Number of shards that each lane reads at once, if it has as many.
    """

    def __init__(self, rows: list[int] | None, shards: int, open_shards: int) -> None:
        self.rows = rows
        self.shards = shards
        self.open_shards = open_shards
        self.total = None if rows is None else sum(rows)
        lengths = [UNKNOWN_LENGTH] * shards if rows is None else rows
        self.offsets = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]

    @abstractmethod
    def batches(self, shard: int, row: int) -> Iterator[list[Row]]:
        """Yield the rows of a shard from one of them on, some at a time.

        Args:
            shard: Index of the shard.
            row: The first row to be yielded.
        """

    @abstractmethod
    def place(self, shard: int) -> tuple[str, int]:
        """Return the file of a shard and the row of the file at which the shard begins.

        Args:
            shard: Index of the shard.
        """

    def windows(
        self, lane: int, lanes: int, seed: int, size: int, start: Position
    ) -> Iterator[Window]:
        """Read the lane's tracks in this epoch's order, equally many rows of each per window."""
        # At most one track per shard: each cut within a shard means reading its head twice.
        tracks = max(1, min(self.open_shards, self.shards // lanes, size))
        order = permutation(self.shards, seed, ORDER, start.epoch).tolist()
        cursors = list(start.cursors or [(0, 0)] * tracks)
        readers = [
            self._track(deal(self.rows, order, lane * tracks + k, lanes * tracks), *cursors[k])
            for k in range(tracks)
        ]
        while True:
            items: list[Example] = []
            bad: list[Bad] = []
            for k, reader in enumerate(readers):
                for found, cursor in islice(reader, size // tracks):
                    cursors[k] = cursor
                    if isinstance(found, Bad):
                        bad.append(found)
                    else:
                        items.append(found)
            if not items and not bad:
                return
            yield Window(items, tuple(cursors), bad)

    def fetch(self, items: list[Any]) -> list[Example]:
        """Return the items, which are the examples themselves."""
        return items

    def head(self, n: int | None) -> Iterator[Example | Bad]:
        """Yield the first n examples (None: all) in stored order."""
        for shard in range(self.shards):
            stop = None if self.rows is None else self.rows[shard]
            if n is not None:
                stop = n if stop is None else min(n, stop)
            for found in self._read(Piece(shard, 0, stop, 1), 0):
                yield found
                if n is not None:
                    n -= found.rows if isinstance(found, Bad) else 1
            if n == 0:
                return

    def where(self, index: int) -> tuple[str, int]:
        """Return the file of an example and its row there."""
        shard = int(np.searchsorted(self.offsets, index, side="right")) - 1
        file, first = self.place(shard)
        return file, first + index - self.offsets[shard]

    def _track(
        self, pieces: list[Piece], number: int, done: int
    ) -> Iterator[tuple[Example | Bad, tuple[int, int]]]:
        """Read pieces one after the other; yield each result with the cursor after it."""
        for here in range(number, len(pieces)):
            for found in self._read(pieces[here], done):
                done += 1
                yield found, (here + 1, 0) if isinstance(found, Bad) else (here, done)
            done = 0

    def _read(self, piece: Piece, done: int) -> Iterator[Example | Bad]:
        """Read a piece from its `done`-th example on; an unreadable rest is one final `Bad`."""
        row = piece.start + done * piece.step
        count = None if piece.stop is None else piece.stop - row
        try:
            for stored in islice(self._rows(piece.shard, row), 0, count, piece.step):
                yield Example(self.offsets[piece.shard] + row, *stored)
                row += piece.step
        except Exception as error:  # readers raise anything on damaged bytes
            if isinstance(error, NetworkError | MemoryError):
                raise
            if isinstance(error, OSError) and error.errno in OURS:
                raise
            file, place = self.where(self.offsets[piece.shard] + row)
            lost = 1 if piece.stop is None else piece.stop - row
            yield Bad(file, place, lost, f"expected to read on, got {one_line(error)}")

    def _rows(self, shard: int, row: int) -> Iterator[Row]:
        """Read a shard from a row on; after a network failure, continue at the row reached."""
        batches: Iterator[list[Row]] | None = None

        def more() -> list[Row] | None:
            nonlocal batches
            if batches is None:
                batches = self.batches(shard, row)
            try:
                return next(batches, None)
            except Exception:
                batches = None
                raise

        while (rows := patiently(self.place(shard)[0], more)) is not None:
            row += len(rows)
            yield from rows


class SequentialSource(ShardSource):
    """Shards of unknown length, in any format that ``datasets`` can stream.

    Args:
        dataset: A streaming ``datasets.IterableDataset``, undecoded.
        columns: The columns to read.
        open_shards: Number of shards that each lane reads at once.
    """

    def __init__(self, dataset: Any, columns: Columns, open_shards: int) -> None:
        self.dataset = dataset
        self.columns = columns
        super().__init__(None, dataset.num_shards, open_shards)

    def batches(self, shard: int, row: int) -> Iterator[list[Row]]:
        """Read a shard from its beginning, since the places of its rows are unknown."""
        for size in (READ_SIZE, 1):  # an error loses all rows that were read together
            try:
                for rows in self._batches(shard, row, size):
                    yield rows
                    row += len(rows)
            except Exception:
                if size == 1:
                    raise
            else:
                return

    def _batches(self, shard: int, row: int, size: int) -> Iterator[list[Row]]:
        # Not `iter(whole)`, which would divide the shard once more among torch's workers.
        whole = self.dataset.shard(num_shards=self.shards, index=shard)
        here = 0
        for table in whole.iter(batch_size=size):
            rows = self.columns.rows(table)
            skip, here = max(row - here, 0), here + len(rows)
            if skip < len(rows):
                yield rows[skip:]

    def place(self, shard: int) -> tuple[str, int]:
        """Return the shard's file, or its number: not every format has one file per shard."""
        if len(self.files) == self.shards:
            return self.files[shard], 0
        return (f"shard {shard}" if self.shards > 1 else ""), 0
