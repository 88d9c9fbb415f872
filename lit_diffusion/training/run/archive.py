"""The archive that a checkpoint is: checked against its own checksums before it is read.

torch writes a checkpoint as a zip file whose entries are stored as they are, each with a CRC-32:
one with the structure, a pickle, and one for the numbers of each tensor. torch.load compares no
checksum of a tensor, so a flipped bit would change a weight without a word; it unpacks compressed
entries, which may be a thousand times the size of the file; and it takes the size of a tensor from
the structure. Reading the file once beforehand settles all three: 0.2 s per gigabyte on one core,
where loading takes 0.5 s.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from typing import IO, Any

__all__ = ["check_archive"]

READ = 1 << 20  # bytes at a time
#: Bytes per element of the types of storage that torch writes.
ELEMENT = {
    **dict.fromkeys(("UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("QUInt8Storage", "QInt8Storage"), 1),
    **dict.fromkeys(("QUInt4x2Storage", "QUInt2x4Storage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


def check_archive(file: IO[bytes]) -> None:
    """Check sizes and checksums of a checkpoint, before anything in it is made.

    Args:
        file: The checkpoint, opened for reading; it is read from its beginning to its end.

    Raises:
        ValueError: If it is not such an archive, an entry does not have its checksum, or it would
            need more memory than its own length.
    """
    length = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = _entry_sizes(archive, length)
            for name in sizes:
                with archive.open(name) as entry:
                    while entry.read(READ):  # compares the checksum at the end
                        pass
            folder = next(iter(sizes), "").partition("/")[0]
            structure = archive.read(f"{folder}/data.pkl")
            _Sizes(structure, f"{folder}/data/", sizes, length).load()
    except (ValueError, OSError):
        raise
    except Exception as error:  # damaged bytes make the readers raise anything
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        file.seek(0)


def _entry_sizes(archive: zipfile.ZipFile, length: int) -> dict[str, int]:
    """The size of each entry by its name, all of them stored as they are within the file."""
    entries = archive.infolist()
    sizes = {entry.filename: entry.file_size for entry in entries}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("expected entries stored as they are, got compressed ones")
    if sum(entry.file_size for entry in entries) > length or len(sizes) < len(entries):
        raise ValueError("expected entries that fill the file, got entries larger than it")
    return sizes


class _Made:
    """Stands for whatever the structure names: made, called and filled without any effect."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an item."""

    def extend(self, values: Any) -> None:
        """Take items."""

    def add(self, value: Any) -> None:
        """Take an item."""


class _Sizes(pickle.Unpickler):
    """Reads the structure of a checkpoint for the sizes it claims; no class in it is imported.

    Args:
        structure: The pickle.
        folder: Where the numbers of the tensors are.
        sizes: The size of each entry by its name.
        length: Of the whole file.
    """

    def __init__(self, structure: bytes, folder: str, sizes: dict[str, int], length: int) -> None:
        super().__init__(io.BytesIO(structure))
        self._folder, self._sizes, self._length = folder, sizes, length
        for code, argument, _ in pickletools.genops(structure):
            # Python makes room for as many objects as such an index names.
            if code.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(structure):
                raise ValueError("the structure names more objects than it holds")

    def find_class(self, module: str, name: str) -> Any:
        """A class without effect for whatever is named, which refuses sizes beyond the file."""
        length = self._length

        def make(made: _Made, *arguments: Any) -> None:
            if name.startswith("_rebuild_tensor"):
                count = math.prod(arguments[2])  # its shape
            elif name in ("bytearray", "Tensor"):
                count = max((n for n in arguments if isinstance(n, int)), default=0)
            else:
                return
            if count > length:
                raise ValueError(f"{count} numbers are made of a file of {length} bytes")

        return type(name, (_Made,), {"__init__": make})

    def persistent_load(self, pid: Any) -> Any:
        """The numbers of a tensor, as many as their entry has."""
        _, kind, key, _, count = pid
        claimed = count * ELEMENT[kind.__name__]
        stored = self._sizes[f"{self._folder}{key}"]
        if claimed != stored:
            raise ValueError(f"numbers of {claimed} bytes are stored in {stored} bytes")
        return _Made()
