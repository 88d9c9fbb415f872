"""Folders that are written whole or not at all.

The files go into a folder with a temporary name beside the one to be made, which takes its name
in one step once all of them are on the disk. A program that is killed leaves the name free, and a
reader who finds the folder finds all of it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lit_diffusion.training.run.whole_file import orphans, sync, unfinished_path

__all__ = ["publish", "remove_unfinished", "unfinished_folder"]


@contextlib.contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write to, removed at the end of the block unless it was published.

    Args:
        path: The folder to be made; its parents are created if they are missing.

    Yields:
        The temporary folder, beside it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers"
        >>> with unfinished_folder(path) as unfinished:
        ...     _ = (unfinished / "three.bin").write_bytes(bytes(3))
        ...     path.exists()
        ...     publish(unfinished, path)
        False
        >>> [file.name for file in path.iterdir()], len(list(path.parent.iterdir()))
        (['three.bin'], 1)
    """
    path = Path(path).absolute()
    unfinished = unfinished_path(path)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone if it was published


def publish(unfinished: Path, path: Path) -> None:
    """Give a finished folder its name, after forcing all of its files onto the disk.

    Args:
        unfinished: From `unfinished_folder`, without folders inside.
        path: Its name: of nothing, or of an empty folder, whose place it takes.

    Raises:
        OSError: If it cannot be written, or the name is taken; then nothing has changed.
    """
    for file in (*unfinished.iterdir(), unfinished):
        sync(file)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()  # an error unless it is empty
    unfinished.rename(path)
    sync(path.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what ended processes left of a folder.

    Args:
        path: The folder that was to be made.
    """
    for orphan in orphans(path):
        shutil.rmtree(orphan, ignore_errors=True)
