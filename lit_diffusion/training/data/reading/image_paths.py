"""Images that a row names by a path instead of containing them.

A folder of images is such a data set: ``datasets`` lists its files. But a row of a downloaded file
may name anything: a device that never ends, a pipe that never begins, an address inside the
reader's own network. So only regular files of limited size below the data set's folder are opened,
and everything else is judged by its name and its kind alone.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from lit_diffusion.training.data.reading.columns import MisfitError
from lit_diffusion.training.data.reading.retry import patiently

LARGEST = 1 << 28  # bytes; no image that is trained on takes as many
ARCHIVES = ("zip://", "tar://")


@dataclass(frozen=True)
class ImagePaths:
    """Reads the images that rows name, from some folders and nowhere else.

    A path must lie below one of the folders as it is written, after ".." is resolved. Symbolic
    links inside them are followed: who made the folder made them, and caches consist of them.
    What they lead to must be a regular file like any other. A relative path is relative to one of
    the folders or, if there is nothing, to the current one.

    Args:
        folders: Absolute local paths, and URLs.
    """

    folders: tuple[str, ...] = ()

    def read(self, path: str | None) -> bytes:
        """Return the content of an image file.

        Args:
            path: As it is stored: a local path, a URL, or a member of an archive at one of these
                ("zip://member::archive").

        Raises:
            MisfitError: If it may not be read, does not exist, or is not a regular file.
            NetworkError: If the network keeps failing.
        """
        if not path:
            raise MisfitError("an image, got none; remove the row")
        members, _, place = path.rpartition("::")
        if members and not all(one.startswith(ARCHIVES) for one in members.split("::")):
            raise self._elsewhere(path)
        if "://" in place:
            if not self._covers(place):
                raise self._elsewhere(path)
        else:
            place = self._local(path, place)
            _check_regular(path, place)
        return _read(f"{members}::{place}" if members else place)

    def _local(self, path: str, place: str) -> str:
        """Return the absolute local path that is meant, if it is below one of the folders."""
        local = [folder for folder in self.folders if "://" not in folder]
        with contextlib.suppress(FileNotFoundError):  # if that folder was removed meanwhile
            local.append(os.getcwd())
        tried = [os.path.normpath(os.path.join(base, place)) for base in local]
        allowed = [one for one in tried if self._covers(one)]
        if not allowed:
            raise self._elsewhere(path)
        return next((one for one in allowed if os.path.exists(one)), allowed[0])

    def _covers(self, place: str) -> bool:
        scheme, found, rest = place.rpartition("://")
        place = scheme + found + (posixpath.normpath(rest) if found else os.path.normpath(rest))
        return any(place.startswith(folder.rstrip("/") + "/") for folder in self.folders)

    def _elsewhere(self, path: str) -> MisfitError:
        return MisfitError(
            f"an image, or the path of one in the folder of the data set, got {_short(path)}, "
            "which is not in that folder; store the image's bytes in the row, or move the file"
        )


def folders_of(files: Iterable[str]) -> tuple[str, ...]:
    """Return the folders in which some files lie, each once.

    Args:
        files: Absolute local paths, or URLs.

    Example:
        >>> folders_of(["/data/train/0.png", "zip://1.png::https://example.org/set/x.zip?v=1"])
        ('/data/train', 'https://example.org/set')
    """
    places = [file.rpartition("::")[2].partition("?")[0] for file in files]
    return tuple({os.path.dirname(one): 0 for one in places if os.path.dirname(one)})


def _check_regular(path: str, place: str) -> None:
    try:
        found = os.stat(place)
    except OSError as error:
        raise MisfitError(
            f"an image file at {_short(path)}, got {error.strerror}; restore it, or remove the row"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise MisfitError(f"an image file at {_short(path)}, got no regular file; remove the row")
    if found.st_size > LARGEST:
        raise _too_large(path, found.st_size)


def _read(path: str) -> bytes:
    import fsspec  # type: ignore[import-untyped]

    def read() -> bytes:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read(LARGEST + 1))

    if len(data := patiently(path, read)) > LARGEST:
        raise _too_large(path, len(data))
    return data


def _too_large(path: str, size: int) -> MisfitError:
    return MisfitError(
        f"an image file of at most {LARGEST:,} bytes, got {size:,} at {_short(path)}; remove the "
        "row"
    )


def _short(path: str) -> str:
    return repr(path if len(path) <= 120 else f"{path[:60]}…{path[-59:]}")
