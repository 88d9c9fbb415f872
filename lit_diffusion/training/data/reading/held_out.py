"""A split of one's own: a share of the training examples is left out and validated on.

Whether an example is held out depends on a hash of what identifies it, and on nothing else, so it
stays on its side when other examples are added or removed, wherever the data lie and in whatever
order they are read:

    image files       the file's name, with its folders below the data set's
    parquet files     the file's name, without "-of-" and the number of files, and the row
    other formats     the content of the image

Either part is a source of its own, in which the examples are numbered from 0.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lit_diffusion.training.data.reading.columns import Row
from lit_diffusion.training.data.reading.parquet import ParquetSource, open_parquet
from lit_diffusion.training.data.reading.shards import ShardSource
from lit_diffusion.training.data.reading.source import Source
from lit_diffusion.training.data.reading.table import TableSource
from lit_diffusion.training.run.messages import warn

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule

HELD_OUT = "held_out"  # name of the split that consists of the share
DEFAULT = "test"  # of data.val_split, which not all data have


def is_held_out(identity: str | bytes, share: float) -> bool:
    """Return whether an example is among those held out.

    Args:
        identity: What identifies it.
        share: Expected share of all examples, from 0 to 1.

    Example:
        >>> sum(is_held_out(f"{k}.png", 0.1) for k in range(1000))
        96
    """
    data = identity.encode() if isinstance(identity, str) else identity
    digest = hashlib.blake2b(data, digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def validation_split(data: DataModule, found: Sequence[str]) -> str | None:
    """Return the name of the split to validate on, None if there is none.

    Args:
        data: Has the arguments.
        found: The names of the splits of the data.
    """
    if data.val_split == DEFAULT and DEFAULT not in found:
        warn(
            f"there is no split {DEFAULT!r} (only {', '.join(found)}), so nothing is validated: "
            "set data.val_share to 0.1 to hold out a tenth of the training examples, or "
            "data.val_split"
        )
        return None
    return data.val_split


def part_of(source: Source, share: float, held_out: bool, folder: str) -> Source:
    """Return one of the two parts of a source.

    Args:
        source: All examples.
        share: Share that is held out, between 0 and 1.
        held_out: Whether the part held out is wanted, or the rest.
        folder: Where the data set lies, if it is a folder on disk.

    Raises:
        ValueError: If the part is empty.
    """
    part: Source
    if isinstance(source, TableSource):
        names = _identities(source, folder)
        chosen = [k for k, name in enumerate(names) if is_held_out(name, share) == held_out]
        part = TablePart(source, chosen)
    elif isinstance(source, ParquetSource):
        rows: list[npt.NDArray[np.int64]] = []
        for (file, _, first), total in zip(source.groups, source.rows or [], strict=True):
            name = _file_name(file, folder)
            wanted = (is_held_out(f"{name} {first + k}", share) == held_out for k in range(total))
            rows.append(np.flatnonzero(np.fromiter(wanted, bool, total)))
        part = ParquetPart(source, rows)
    elif isinstance(source, ShardSource):
        part = StreamPart(source, share, held_out)
    else:
        raise TypeError(f"{type(source).__name__} cannot be divided")
    if part.total == 0:
        raise ValueError(
            f"expected examples on both sides of data.val_share {share:g}, got none "
            f"{'held out' if held_out else 'left to train on'} of {source.total}; set another "
            "share, or data.val_split"
        )
    part.files, part.named = source.files, source.named
    part.divided = f"{share!r} {held_out}"
    return part


class TablePart(TableSource):
    """Some rows of a table.

    Args:
        whole: The table.
        rows: Their numbers.
    """

    def __init__(self, whole: TableSource, rows: list[int]) -> None:
        super().__init__(whole.dataset.select(rows), whole.columns)
        self.numbers = rows

    def where(self, index: int) -> tuple[str, int]:
        """Return the file of an example, or its row in the whole table."""
        file, row = super().where(index)
        return (file, row) if file else ("", self.numbers[index])


class ParquetPart(ShardSource):
    """Some rows of each row group of parquet files.

    Args:
        whole: The files.
        kept: Which rows of each row group.
    """

    def __init__(self, whole: ParquetSource, kept: list[npt.NDArray[np.int64]]) -> None:
        super().__init__([len(rows) for rows in kept], len(kept), whole.open_shards)
        self.whole = whole
        self.kept = kept
        self.lost = whole.lost

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """The digests of the whole."""
        return self.whole.content

    @property
    def fingerprint(self) -> str | None:
        """Name of the content of the whole, and of the part."""
        whole = self.whole.fingerprint
        return None if whole is None else f"{whole} {self.divided}"

    def batches(self, shard: int, row: int) -> Iterator[list[Row]]:
        """Read a row group and leave out the rows that do not belong to the part."""
        kept = self.kept[shard]
        if row >= len(kept):
            return
        here = int(kept[row])
        for rows in self.whole.batches(shard, here):
            begin, end = np.searchsorted(kept, [here, here + len(rows)])
            yield [rows[k - here] for k in kept[begin:end]]
            here += len(rows)

    def place(self, shard: int) -> tuple[str, int]:
        """Return the file of a row group, and its first row there."""
        return self.whole.place(shard)

    def where(self, index: int) -> tuple[str, int]:
        """Return the file of an example, and its row there."""
        shard = int(np.searchsorted(self.offsets, index, side="right")) - 1
        file, first = self.place(shard)
        return file, first + int(self.kept[shard][index - self.offsets[shard]])


class StreamPart(ShardSource):
    """Those rows of a stream of unknown length that belong to a part, by their content.

    Args:
        whole: The stream.
        share: Share that is held out.
        held_out: Whether the part held out is wanted, or the rest.
    """

    def __init__(self, whole: ShardSource, share: float, held_out: bool) -> None:
        super().__init__(None, whole.shards, whole.open_shards)
        self.whole = whole
        self.share = share
        self.held_out = held_out

    def batches(self, shard: int, row: int) -> Iterator[list[Row]]:
        """Read a shard from its beginning, since the rows of the part are not known before."""
        for rows in self.whole.batches(shard, 0):
            wanted = [
                one for one in rows if is_held_out(_content(one[0]), self.share) == self.held_out
            ]
            skip, row = min(row, len(wanted)), max(0, row - len(wanted))
            yield wanted[skip:]

    def place(self, shard: int) -> tuple[str, int]:
        """Return the file of a shard; the rows are counted within the part."""
        file, first = self.whole.place(shard)
        part = "held out" if self.held_out else "not held out"
        return f"{file or 'the data'} (of those {part})", first


def _identities(source: TableSource, folder: str) -> Iterator[str | bytes]:
    """Yield what identifies each row of a table."""
    files, columns = source.files, source.columns
    if not source.named and files and all(_is_parquet(file) for file in files):
        footers = open_parquet(list(files), skip=False).footers
        if sum(one.num_rows for one in footers.values()) == source.rows:
            for file in files:
                name = _file_name(file, folder)
                yield from (f"{name} {row}" for row in range(footers[file].num_rows))
            return
    for number in range(0, source.rows, 256):
        for image in source.dataset[number : number + 256][columns.image]:
            path = image.get("path") if isinstance(image, dict) else None
            listed = source.named or not (isinstance(image, dict) and image.get("bytes"))
            yield _file_name(path, folder) if path and listed else _content(image)


def _is_parquet(file: str) -> bool:
    return file.partition("?")[0].endswith(".parquet")


def _file_name(file: str, folder: str) -> str:
    """The name of a file, with its folders below that of the data set if it is on disk."""
    name = re.sub(r"-of-\d+", "", file.partition("::")[0].partition("?")[0])
    root = Path(folder).expanduser()
    if root.is_dir() and Path(name).is_relative_to(root.resolve()):
        return Path(name).relative_to(root.resolve()).as_posix()
    return "/".join(name.split("/")[-2:])  # any folder above may be that of a cache or a version


def _content(stored: Any) -> bytes:
    """The bytes of an image, as it is stored."""
    if isinstance(stored, dict):
        stored = stored.get("bytes") or str(stored.get("path"))
    if isinstance(stored, bytes):
        return stored
    return str(stored).encode() if isinstance(stored, str) else np.asarray(stored).tobytes()
