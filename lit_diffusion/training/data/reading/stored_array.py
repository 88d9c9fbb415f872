"""An array in numpy's files, .npy or a member of .npz, and a table of such arrays.

Only the header is read at first. The values stay on disk, memory-mapped, unless a member of an
.npz file is compressed. Pickled objects are never loaded, for to load one is to run its code.
"""

from __future__ import annotations

import functools
import math
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ArrayTable", "StoredArray"]


class StoredArray:
    """An array in a file, whose values are read when they are needed.

    Args:
        file: An absolute path to a .npy or .npz file.
        member: Name of the array in an .npz file.

    Raises:
        ValueError: If the file is damaged, or its elements are not numbers.

    Attributes:
        shape: Of the whole array.
        dtype: Of its elements.
    """

    def __init__(self, file: str, member: str | None = None) -> None:
        self.file, self.member = file, member
        self.compressed = False
        with open(file, "rb") as opened:
            begin, size = 0, opened.seek(0, 2)
            if member is not None:
                begin, size = self._place(opened, member)
            if self.compressed:
                with zipfile.ZipFile(file) as archive, archive.open(member or "") as inner:
                    self._read_header(inner, 0, size)
            else:
                opened.seek(begin)
                self._read_header(opened, begin, size)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.file if self.member is None else f"{self.member.removesuffix('.npy')!r}"

    @functools.cached_property
    def values(self) -> npt.NDArray[Any]:
        """The whole array, memory-mapped where the file allows it."""
        if self.compressed:
            with zipfile.ZipFile(self.file) as archive, archive.open(self.member or "") as inner:
                return np.lib.format.read_array(inner, allow_pickle=False)
        order: Any = "F" if self.by_column else "C"
        return np.asarray(np.memmap(self.file, self.dtype, "r", self.begin, self.shape, order))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "values"}

    def _place(self, opened: Any, member: str) -> tuple[int, int]:
        """Return where a member begins in its archive, and how many bytes it has."""
        with zipfile.ZipFile(opened) as archive:
            entry = archive.getinfo(member)
        self.compressed = entry.compress_type != zipfile.ZIP_STORED
        opened.seek(entry.header_offset + 26)
        name, extra = np.frombuffer(opened.read(4), "<u2").tolist()
        return entry.header_offset + 30 + name + extra, entry.file_size

    def _read_header(self, opened: Any, begin: int, size: int) -> None:
        form = np.lib.format
        version = form.read_magic(opened)
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        self.shape, self.by_column, self.dtype = read(opened)
        if self.dtype.kind not in "biuf":
            raise ValueError(
                f"expected an array of numbers in {self.name}, got {self.dtype}; save it as "
                "integers or floats"
            )
        if not self.shape:
            raise ValueError(
                f"expected an array whose first axis counts the examples in {self.name}, got a "
                "single number"
            )
        self.begin = opened.tell()
        held = size - (self.begin - begin)
        if (claimed := math.prod(self.shape) * self.dtype.itemsize) != held:
            raise ValueError(
                f"expected a whole array in {self.name}, got {held:,} bytes where its header says "
                f"{claimed:,} (shape {self.shape}); restore the file"
            )


class ArrayTable:
    """Arrays of equal length as a table, with the part of a `datasets.Dataset` that is in use.

    A row of a column of numbers is a number, and else an array.

    Args:
        columns: The arrays, by the names of the columns.
        rows: The rows in use, None for all of them.
    """

    def __init__(
        self, columns: Mapping[str, StoredArray], rows: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.columns = dict(columns)
        self.rows = rows

    @functools.cached_property
    def features(self) -> dict[str, Any]:
        """The types of the columns, as ``datasets`` names them."""
        import datasets  # type: ignore[import-untyped]

        found: dict[str, Any] = {}
        for name, column in self.columns.items():
            feature: Any = datasets.Value(column.dtype.newbyteorder("=").name)
            for length in _row_shape(name, column)[::-1]:
                feature = datasets.List(feature, length=length)
            found[name] = feature
        return found

    def __len__(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        return next(iter(self.columns.values())).shape[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, place: Any) -> Any:
        """The values of a column, one row, or the columns of some rows."""
        if isinstance(place, str):
            column = self._column(place)
            return (column if self.rows is None else column[self.rows]).tolist()
        if self.rows is not None:
            place = self.rows[place]
        return {name: self._column(name)[place] for name in self.columns}

    def select(self, rows: list[int]) -> ArrayTable:
        """Return some rows.

        Args:
            rows: Their numbers.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        return ArrayTable(self.columns, chosen if self.rows is None else self.rows[chosen])

    def select_columns(self, names: list[str]) -> ArrayTable:
        """Return some columns.

        Args:
            names: Of the columns.
        """
        return ArrayTable({name: self.columns[name] for name in names}, self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"columns": self.columns, "rows": self.rows}

    def _column(self, name: str) -> npt.NDArray[Any]:
        column = self.columns[name]
        return column.values.reshape(-1, *_row_shape(name, column))


def _row_shape(name: str, column: StoredArray) -> tuple[int, ...]:
    """The shape of a row: an image has an axis at least, and a label none if it can."""
    shape = column.shape[1:]
    if name == "image" and not shape:
        return (1,)
    return () if name == "label" and shape == (1,) else shape
