"""Files that are written whole or not at all.

The contents go into a temporary file beside the one to be replaced, which takes its name in one
step. Whatever happens in between, a kill, a full disk, a power cut, the name stands for a whole
file: the old one or the new one.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

__all__ = ["orphans", "remove_orphans", "replacing", "sync", "unfinished_path", "write_whole"]

DAY = 86_400.0  # seconds


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
    unfinished = unfinished_path(path)
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
    """Remove what ended processes left of a file.

    Args:
        path: The file.
    """
    for orphan in orphans(path):
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


# Temporary names ---------------------------------------------------------------------------------


def unfinished_path(path: Path) -> Path:
    """A new temporary path beside a file or folder: .name.machine.process.unique.tmp.

    Args:
        path: The file or folder that is to be written.
    """
    unique = uuid.uuid4().hex[:8]
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{unique}.tmp")


def orphans(path: Path) -> Iterator[Path]:
    """The temporary files or folders of a path whose writers have ended.

    Whether a process of another machine still writes cannot be known, so what it left is an orphan
    only after a day without a change.

    Args:
        path: The file or folder that was to be written.
    """
    name = re.compile(re.escape(f".{path.name}.") + r"([0-9a-f]{8})\.([0-9]+)\.[0-9a-f]{8}\.tmp")
    for found in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if (writer := name.fullmatch(found.name)) is None:
            continue  # of another path, whose name begins with this one
        here = writer[1] == _machine() and os.name == "posix"
        if not _lives(int(writer[2])) if here else _age(found) > DAY:
            yield found


@cache
def _machine() -> str:
    """Eight digits for this machine; containers on it, which count processes anew, have others."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _lives(process: int) -> bool:
    """Whether this machine has a process of this id; only for POSIX: Windows would end it."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


def _age(path: Path) -> float:
    """Seconds since a file, or one in a folder, was last changed; 0 if it is gone."""
    try:
        changed = [one.stat().st_mtime for one in (path, *path.rglob("*"))]
    except OSError:
        return 0.0
    return time.time() - max(changed)
