"""Files that are written whole or not at all.

The contents go into a temporary file beside the one to be replaced, which takes its name in one
step. Whatever happens in between, a kill, a full disk, a power cut, the name stands for a whole
file: the old one or the new one.
"""

from __future__ import annotations

import contextlib
import glob
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["remove_orphans", "replacing", "sync", "write_whole"]


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` unless the block raises.

    Its name is unique, so that several processes may write one file: the last to finish wins.

    Args:
        path: The file; its folder is created if it is missing.
        durable: Whether to force the file onto the disk before it takes the name, so that it
            survives a power cut. Costs some milliseconds.

    Yields:
        The temporary path, in the same folder.

    Raises:
        OSError: If it cannot be written; the file of that name is then as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.bin"
        >>> with replacing(path) as unfinished:
        ...     _ = unfinished.write_bytes(bytes(3))
        >>> [file.name for file in path.parent.iterdir()], path.stat().st_size
        (['numbers.bin'], 3)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # some writers would create it for the owner alone
        yield unfinished
        unfinished.chmod(mode)
        if durable:
            sync(unfinished)
        unfinished.replace(path)
        if durable:
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def write_whole(path: Path, contents: str | bytes, durable: bool = False) -> None:
    """Write a small file so that a reader finds the old contents or the new, never half.

    Args:
        path: The file; its folder is created if it is missing.
        contents: All of it; text is encoded as UTF-8, with its line ends as they are.
        durable: As for `replacing`.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(path, durable) as unfinished:
        unfinished.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def remove_orphans(path: Path) -> None:
    """Remove what killed processes left of a file; only where no other process writes it.

    Args:
        path: The file.
    """
    for orphan in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        orphan.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk.

    Args:
        path: The file, or a folder, which some systems cannot open: there nothing happens.
    """
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
