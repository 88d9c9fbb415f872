"""Digests of the content of a data set, to notice that it has changed.

Size and time of a file do not tell: an edited label may keep the one, and copying tools the other.
To read everything is the only proof and costs as much as an epoch. So the digests are taken of
samples: of all bytes where there are few, and else of blocks at equal distances over all files,
of every size, and in parquet files of each short column as a whole, which is where the labels are.
An .npz file states a checksum of each array in it.

A digest depends on neither path nor time, so that data may move. They are taken in several ways,
and two data sets differ if a digest that was taken of both in the same way does:

    content   sizes, 64 MiB of blocks, short columns     files on disk
    sketch    sizes, 1 MiB of blocks                     files on disk and on any server
    blobs     the hub's own digests of the files         files on the hub
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

BLOCK = 1 << 16  # bytes
CONTENT, SKETCH = 1024, 16  # blocks
MOST_FILES = 16384  # that are opened
SHORT = 1 << 16  # bytes of a column in a row group that is read as a whole
THREADS, PART = 16, 64  # threads that ask for sizes, and files that each asks for at a time


def digests(files: Sequence[str], named: bool = False) -> dict[str, str]:
    """Return the digests of some files, by the way they were taken; none if they cannot be read.

    Args:
        files: Absolute paths or URLs, in the order of the data.
        named: Whether the files' names and folders are part of the data, as classes may be.
    """
    try:
        names = repr(_relative(files) if named else len(files)).encode()
        if all(file.startswith("hf://") for file in files):
            return {"blobs": _hash([names, *map(_blob, files)])} if files else {}
        local = all(_is_local(file) for file in files)
        parts = [files[k : k + PART] for k in range(0, len(files), PART)]
        with ThreadPoolExecutor(THREADS) as pool:
            sizes = [size for part in pool.map(_sizes, parts) for size in part]
        head = [names, repr(sizes).encode()]
        found = {"sketch": _hash([*head, *_blocks(files, sizes, SKETCH)])}
        if local:
            columns = (part for file in files[:MOST_FILES] for part in _inner(file))
            found["content"] = _hash([*head, *_blocks(files, sizes, CONTENT), *columns])
        return found
    except Exception:  # a file that is gone or damaged is reported where it is read
        return {}


def differ(one: Mapping[str, str] | None, other: Mapping[str, str] | None) -> bool:
    """Return whether two data sets are known to differ.

    Args:
        one: The digests of one, None if they were not taken.
        other: Those of the other.

    Example:
        >>> differ({"sketch": "a", "content": "b"}, {"sketch": "a"})
        False
        >>> differ({"sketch": "a", "content": "b"}, {"sketch": "a", "content": "c"})
        True
    """
    one, other = one or {}, other or {}
    return any(one[way] != other[way] for way in one.keys() & other.keys())


def _hash(parts: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()


def _is_local(file: str) -> bool:
    return "://" not in file


def _relative(files: Sequence[str]) -> list[str]:
    root = posixpath.commonpath([posixpath.dirname(file) for file in files])
    return [file[len(root) :] for file in files]


def _blob(file: str) -> bytes:
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    storage, path = url_to_fs(file)
    return repr(storage.info(path)["blob_id"]).encode()


def _sizes(files: Sequence[str]) -> list[int]:
    from fsspec.core import url_to_fs

    places = [None if _is_local(file) else url_to_fs(file) for file in files]
    return [
        os.stat(file).st_size if place is None else int(place[0].size(place[1]))
        for file, place in zip(files, places, strict=True)
    ]


def _blocks(files: Sequence[str], sizes: list[int], number: int) -> Iterator[bytes]:
    """Yield blocks at equal distances over all files, or everything if that is no more."""
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)  # file -> begin, length
    if total <= number * BLOCK:
        for k in np.unique(np.linspace(0, len(files) - 1, MOST_FILES).astype(int)):
            wanted[int(k)].append((0, sizes[k]))
    else:
        for place in np.linspace(0, total - BLOCK, number).astype(np.int64):
            k = int(np.searchsorted(ends, place, side="right"))
            begin = int(place - ends[k]) + sizes[k]
            wanted[k].append((begin, min(BLOCK, sizes[k] - begin)))
    for k, spans in wanted.items():
        yield from _spans(files[k], spans)


def _spans(file: str, spans: list[tuple[int, int]]) -> list[bytes]:
    from fsspec.core import url_to_fs

    if _is_local(file):
        with open(file, "rb") as opened:
            return [_span(opened, *span) for span in spans]
    storage, path = url_to_fs(file)
    return [storage.cat_file(path, begin, begin + length) for begin, length in spans if length]


def _span(opened: Any, begin: int, length: int) -> bytes:
    opened.seek(begin)
    return bytes(opened.read(length))


def _inner(file: str) -> list[bytes]:
    """Return the checksums of an .npz file, the short columns of a parquet file, else nothing."""
    if file.endswith(".npz"):
        with zipfile.ZipFile(file) as archive:
            return [repr((one.filename, one.CRC)).encode() for one in archive.infolist()]
    return _short_columns(file)


def _short_columns(file: str) -> list[bytes]:
    """Return the bytes of the short columns of a parquet file; nothing of other files."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    if not file.endswith(".parquet"):
        return []
    try:
        footer = parquet.read_metadata(file)
    except (pa.ArrowException, OSError):
        return []
    spans = []
    for group in range(footer.num_row_groups):
        for number in range(footer.num_columns):
            chunk = footer.row_group(group).column(number)
            if chunk.total_compressed_size <= SHORT:
                begin = chunk.dictionary_page_offset or chunk.data_page_offset
                spans.append((begin, chunk.total_compressed_size))
    return _spans(file, spans)
