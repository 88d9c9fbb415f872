"""Reading shards: several at once, in order, from any row on, whatever breaks on the way.

A shard can only be read from its beginning; for parquet it is a row group, so that its beginning
is never far. Nothing is decoded here: an `Example` holds the image as it is stored.

When a shard cannot be read on, because it is damaged or gone, the rest of the piece counts as bad
and the track goes on with its next piece. A network that fails is another matter: see
`lit_diffusion.training.data.retry`. The shard is then opened again at the row where it stopped.
"""

from __future__ import annotations

import errno
import functools
import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from lit_diffusion.training.data.bad_examples import Bad, one_line
from lit_diffusion.training.data.columns import Columns, Row
from lit_diffusion.training.data.retry import NetworkError, patiently
from lit_diffusion.training.data.stream import (
    ORDER,
    Example,
    Piece,
    Position,
    Source,
    Window,
    deal,
    permutation,
)

READ_SIZE = 64  # rows turned into Python objects at a time
BUFFER = 1 << 20  # bytes of a column read at a time: no row group is in memory as a whole
UNKNOWN_SHARD = 1 << 32  # index = shard · 2³² + row, where row counts cannot say better
OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}  # this machine's fault


class ShardSource(Source):
    """A split that comes in shards.

    Args:
        rows: Examples in each shard, None where they are not known.
        shards: How many shards there are.
        open_shards: How many shards each lane reads at once, if it has as many.
    """

    def __init__(self, rows: list[int] | None, shards: int, open_shards: int) -> None:
        self.rows = rows
        self.shards = shards
        self.open_shards = open_shards
        self.total = None if rows is None else sum(rows)
        lengths = [UNKNOWN_SHARD] * shards if rows is None else rows
        self.offsets = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]

    @abstractmethod
    def batches(self, shard: int, row: int) -> Iterator[list[Row]]:
        """Yield the rows of a shard from this one on, some at a time."""

    @abstractmethod
    def place(self, shard: int) -> tuple[str, int]:
        """Return the file of a shard and at which of its rows the shard begins."""

    def windows(
        self, lane: int, lanes: int, seed: int, size: int, start: Position
    ) -> Iterator[Window]:
        """Read the lane's tracks in this epoch's order, as many examples of each to a window."""
        # No more tracks than the lane has shards: each cut within a shard reads its head twice.
        tracks = max(1, min(self.open_shards, self.shards // lanes, size))
        order = permutation(self.shards, seed, ORDER, start.epoch).tolist()
        cursors = list(start.cursors or [(0, 0)] * tracks)
        readers = [
            self._track(deal(self.rows, order, lane * tracks + k, lanes * tracks), *cursors[k])
            for k in range(tracks)
        ]
        while True:
            items, bad = [], []
            for k, reader in enumerate(readers):
                for found, cursor in islice(reader, size // tracks):
                    cursors[k] = cursor
                    (bad if isinstance(found, Bad) else items).append(found)
            if not items and not bad:
                return
            yield Window(items, tuple(cursors), bad)

    def fetch(self, items: list[Any]) -> list[Example]:
        """Return the items: they are the examples."""
        return items

    def head(self, n: int | None) -> Iterator[Example | Bad]:
        """Yield the first n examples (None: all) in their own order."""
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
        """Read pieces one after the other, each result with the cursor behind it."""
        for here in range(number, len(pieces)):
            for found in self._read(pieces[here], done):
                done += 1
                yield found, (here + 1, 0) if isinstance(found, Bad) else (here, done)
            done = 0

    def _read(self, piece: Piece, done: int) -> Iterator[Example | Bad]:
        """Read a piece but for its first examples; what cannot be read is one `Bad` at its end."""
        row = piece.start + done * piece.step
        count = None if piece.stop is None else piece.stop - row
        try:
            for stored in islice(self._rows(piece.shard, row), 0, count, piece.step):
                yield Example(self.offsets[piece.shard] + row, *stored)
                row += piece.step
        except Exception as error:  # damaged bytes make readers raise whatever they like
            if isinstance(error, NetworkError | MemoryError):
                raise
            if isinstance(error, OSError) and error.errno in OURS:
                raise
            file, first = self.place(piece.shard)
            lost = 1 if piece.stop is None else piece.stop - row
            yield Bad(file, first + row, lost, f"expected to read on, got {one_line(error)}")

    def _rows(self, shard: int, row: int) -> Iterator[Row]:
        """Read a shard from a row on, and go on behind what came when the network fails."""
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


class Parquet(NamedTuple):
    """Parquet files that could be opened: their footers, their columns, and the others."""

    footers: dict[str, Any]
    columns: list[str]
    lost: tuple[Bad, ...]


def open_parquet(files: list[str], skip: bool) -> Parquet:
    """Read the footers of parquet files, many at a time.

    Args:
        files: Paths or URLs.
        skip: Leave out what cannot be opened. How many rows are lost with it nobody knows: it is
            counted with the mean of the others.

    Raises:
        ValueError: If a file cannot be opened and skip is false, or none can.
    """
    import fsspec
    import pyarrow.parquet as parquet

    def footer(file: str) -> Any:
        def read() -> Any:
            with fsspec.open(file, "rb") as opened:
                return parquet.read_metadata(opened)

        try:
            return patiently(file, read)
        except NetworkError:
            raise
        except Exception as error:
            return one_line(error)

    with ThreadPoolExecutor(max_workers=16) as pool:
        found = dict(zip(files, pool.map(footer, files), strict=True))
    footers = {file: one for file, one in found.items() if not isinstance(one, str)}
    broken = {file: one for file, one in found.items() if isinstance(one, str)}
    if broken and not (skip and footers):
        file, reason = next(iter(broken.items()))
        raise ValueError(f"expected a parquet file at {file}, got {reason}; mend or remove it")
    rows = round(np.mean([one.num_rows for one in footers.values()])) if footers else 0
    lost = tuple(
        Bad(file, 0, max(1, rows), f"expected a parquet file, got {reason}")
        for file, reason in broken.items()
    )
    columns = next(iter(footers.values())).schema.to_arrow_schema().names if footers else []
    return Parquet(footers, columns, lost)


class ParquetSource(ShardSource):
    """Parquet files: the shards are their row groups, whose lengths their footers tell.

    Args:
        files: The opened files.
        columns: What is read of them.
        open_shards: How many shards each lane reads at once.
    """

    def __init__(self, files: Parquet, columns: Columns, open_shards: int) -> None:
        self.footers = files.footers
        self.lost = files.lost
        self.columns = columns
        self.groups: list[tuple[str, int, int]] = []  # file, number of the group, its first row
        rows = []
        for file, footer in files.footers.items():
            first = 0
            for number in range(footer.num_row_groups):
                self.groups.append((file, number, first))
                rows.append(footer.row_group(number).num_rows)
                first += rows[-1]
        super().__init__(rows, len(rows), open_shards)

    @functools.cached_property
    def fingerprint(self) -> str | None:  # type: ignore[override]
        """Made from the footers, and what the storage says of each file: its size, time or tag."""
        import fsspec

        digest = hashlib.sha256()
        for file, footer in self.footers.items():
            try:
                storage, path = fsspec.core.url_to_fs(file)
                digest.update(f"{storage.checksum(path)} {footer.to_dict()}".encode())
            except (OSError, NotImplementedError):
                return None
        return digest.hexdigest()

    def batches(self, shard: int, row: int) -> Iterator[list[Row]]:
        """Read a row group; the rows before the first are passed over as they are stored."""
        import fsspec
        import pyarrow.parquet as parquet

        file, group, _ = self.groups[shard]
        with fsspec.open(file, "rb") as opened:
            table = parquet.ParquetFile(opened, metadata=self.footers[file], buffer_size=BUFFER)
            here = 0
            for part in table.iter_batches(
                READ_SIZE,
                row_groups=[group],
                columns=self.columns.names,
                use_threads=False,
            ):
                skip, here = max(row - here, 0), here + len(part)
                if skip >= len(part):
                    continue
                found = {name: _stored(part.column(name)) for name in self.columns.names}
                yield self.columns.rows(found)[skip:]

    def place(self, shard: int) -> tuple[str, int]:
        """Return the file of a row group and its first row there."""
        file, _, first = self.groups[shard]
        return file, first


class SequentialSource(ShardSource):
    """Shards of any other format that ``datasets`` can stream, of unknown length.

    Args:
        dataset: A streaming ``datasets.IterableDataset``, undecoded.
        columns: What is read of it.
        open_shards: How many shards each lane reads at once.
    """

    def __init__(self, dataset: Any, columns: Columns, open_shards: int) -> None:
        self.dataset = dataset
        self.columns = columns
        super().__init__(None, dataset.num_shards, open_shards)

    def batches(self, shard: int, row: int) -> Iterator[list[Row]]:
        """Read a shard from its beginning, since nothing says where its rows lie."""
        for size in (READ_SIZE, 1):  # an error takes with it all that was read together
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
        # `iter(batch_size)` leaves torch's workers alone; plain iteration would deal shards again.
        whole = self.dataset.shard(num_shards=self.shards, index=shard)
        here = 0
        for table in whole.iter(batch_size=size):
            rows = self.columns.rows(table)
            skip, here = max(row - here, 0), here + len(rows)
            if skip < len(rows):
                yield rows[skip:]

    def place(self, shard: int) -> tuple[str, int]:
        """Name the shard by its number: not every format has one file to a shard."""
        return (f"shard {shard}" if self.shards > 1 else ""), 0


def _stored(column: Any) -> list[Any]:
    """Turn a column into Python objects: of images the bytes alone, if all of them have any."""
    import pyarrow as pa

    if pa.types.is_struct(column.type) and not column.null_count:
        names = [column.type.field(i).name for i in range(column.type.num_fields)]
        if "bytes" in names:
            data = column.field("bytes")
            if not data.null_count:
                return data.to_pylist()
    return column.to_pylist()
