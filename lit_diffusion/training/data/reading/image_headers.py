"""The first bytes of image files: how large an image claims to be, and whether it is whole.

They are read before anything is decoded, so that no memory is allocated for a claim.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_diffusion.training.data.reading.columns import MisfitError

PNG, JPEG, NPY = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\x93NUMPY"
# JPEG's "start of frame" segments contain the size; the others between C0 and CF are tables.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers without a segment: a decoder goes on right behind them, and so must we.
BARE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) from the header of a JPEG file.

    Args:
        data: The file.

    Raises:
        MisfitError: If it has none.
    """
    here = 2
    while (here := data.find(0xFF, here)) >= 0 and here + 9 <= len(data):
        marker, length = struct.unpack_from(">xBH", data, here)
        if marker in FRAMES:
            height, width = struct.unpack_from(">HH", data, here + 5)
            return width, height
        if marker == 0xFF:  # a marker may be padded with FF
            here += 1
        else:
            here += 2 if marker in BARE else 2 + length
    raise MisfitError(f"an image that can be decoded, got {len(data)} bytes: it has no frame")


def png_chunks(data: bytes) -> set[bytes]:
    """Return the kinds of chunks in a PNG file, after verifying their checksums.

    PIL ignores the checksums of the pixels' chunks and would return a damaged image.

    Args:
        data: The file.

    Raises:
        MisfitError: If it is cut short or damaged.
    """
    kinds: set[bytes] = set()
    here = len(PNG)
    while b"IEND" not in kinds:
        if here + 12 > len(data):
            raise MisfitError(
                f"an image that can be decoded, got {len(data)} bytes: PNG cut short"
            )
        end = here + 8 + int.from_bytes(data[here : here + 4])
        kinds.add(data[here + 4 : here + 8])
        if zlib.crc32(data[here + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise MisfitError(f"an image that can be decoded, got {len(data)} bytes: PNG damaged")
        here = end + 4
    return kinds


def opened(stored: Any) -> Any:
    """The array of a .npy file; anything else as it is.

    Args:
        stored: A value of a column of numbers.

    Raises:
        MisfitError: If it begins like such a file and is none.
    """
    if not (isinstance(stored, bytes) and stored.startswith(NPY)):
        return stored
    try:
        return read_npy(stored)
    except ValueError as error:
        raise MisfitError(f"numbers in a .npy file: {error}") from error


def read_npy(data: bytes) -> npt.NDArray[Any]:
    """Return the array of a .npy file, which must contain as many bytes as its header claims.

    Args:
        data: The file.

    Raises:
        MisfitError: If it does not, or its elements are not numbers.
        ValueError: If the header cannot be read.
    """
    file, form = io.BytesIO(data), np.lib.format
    version = form.read_magic(file)
    read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, by_column, dtype = read(file)
    if dtype.kind not in "biuf":
        raise MisfitError(f"a .npy array of numbers, got {dtype}; convert the data")
    begin, claimed = file.tell(), math.prod(shape) * dtype.itemsize
    if claimed != len(data) - begin:
        raise MisfitError(
            f"a whole .npy array, got {len(data) - begin:,} bytes where its header says "
            f"{claimed:,} (shape {' × '.join(map(str, shape))}); restore it, or remove the row"
        )
    array = np.frombuffer(data, dtype, offset=begin)
    return array.reshape(shape, order="F" if by_column else "C")
