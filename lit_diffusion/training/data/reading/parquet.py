"""Parquet files: the shards are their row groups, whose lengths are known from the footers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lit_diffusion.training.data.reading.bad_examples import Bad, one_line
from lit_diffusion.training.data.reading.columns import Columns, Row
from lit_diffusion.training.data.reading.retry import NetworkError, patiently
from lit_diffusion.training.data.reading.shards import READ_SIZE, ShardSource
from lit_diffusion.training.run.secrets import without_secrets

BUFFER = 1 << 20  # bytes of a column read at a time, so that no row group is in memory as a whole


class Parquet(NamedTuple):
    """Opened parquet files: their footers and columns, and the files that cannot be opened."""

    footers: dict[str, Any]
    columns: list[str]
    lost: tuple[Bad, ...]


def open_parquet(files: list[str], skip: bool) -> Parquet:
    """Read the footers of parquet files, many at a time.

    Args:
        files: Paths or URLs.
        skip: Leave out files that cannot be opened. The number of rows lost with such a file is
            unknown and estimated by the mean of the others.

    Raises:
        ValueError: If a file cannot be opened and skip is false, or if none can be opened.
    """
    import fsspec  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

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
        raise ValueError(
            f"expected a parquet file at {without_secrets(file)}, got {reason}; repair or remove "
            "it"
        )
    rows = round(np.mean([one.num_rows for one in footers.values()])) if footers else 0
    lost = tuple(
        Bad(without_secrets(file), 0, max(1, rows), f"expected a parquet file, got {reason}")
        for file, reason in broken.items()
    )
    columns = next(iter(footers.values())).schema.to_arrow_schema().names if footers else []
    return Parquet(footers, columns, lost)


class ParquetSource(ShardSource):
    """The row groups of parquet files as shards.

    Args:
        files: The opened files.
        columns: The columns to read.
        open_shards: Number of shards that each lane reads at once.
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
    def fingerprint(self) -> str | None:
        """Hash of the content, of the footers, and of what the storage says of each file."""
        import fsspec

        digest = hashlib.sha256(repr(self.content).encode())
        for file, footer in self.footers.items():
            try:
                storage, path = fsspec.core.url_to_fs(file)
                digest.update(f"{storage.checksum(path)} {footer.to_dict()}".encode())
            except (OSError, NotImplementedError):
                return None
        return digest.hexdigest()

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """The digests of the files' content, and one of their footers, which have statistics."""
        footers = [
            {name: value for name, value in footer.to_dict().items() if name != "created_by"}
            for footer in self.footers.values()
        ]
        return super().content | {"footers": hashlib.sha256(repr(footers).encode()).hexdigest()}

    def batches(self, shard: int, row: int) -> Iterator[list[Row]]:
        """Read a row group; rows before the first are skipped without being converted."""
        import fsspec
        import pyarrow.parquet as parquet

        file, group, _ = self.groups[shard]
        with fsspec.open(file, "rb") as opened:
            table = parquet.ParquetFile(
                opened,
                metadata=self.footers[file],
                buffer_size=BUFFER,
                page_checksum_verification=True,  # of the files that have checksums
            )
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
        """Return the file of a row group, for messages, and its first row there."""
        file, _, first = self.groups[shard]
        return without_secrets(file), first


def _stored(column: Any) -> list[Any]:
    """Turn a column into Python objects; of images only the bytes, if all of them have bytes."""
    import pyarrow as pa

    if pa.types.is_struct(column.type) and not column.null_count:
        names = [column.type.field(i).name for i in range(column.type.num_fields)]
        if "bytes" in names:
            data = column.field("bytes")
            if not data.null_count:
                return data.to_pylist()
    return column.to_pylist()
