"""Write a decoded split to disk, completely or not at all.

See `lit_diffusion.training.data.batching.memory` for what the folder contains.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_diffusion.training.data.decoding.images import Decoded, ImageDecoder
from lit_diffusion.training.data.decoding.split import Split, chunks, sift
from lit_diffusion.training.data.reading.bad_examples import Bad
from lit_diffusion.training.data.reading.columns import TEXT
from lit_diffusion.training.run.messages import logger
from lit_diffusion.training.run.whole_folder import (
    publish,
    remove_unfinished,
    unfinished_folder,
)

CHUNK_BYTES, CHUNK_EXAMPLES = 1 << 24, 1024  # decoded before they are written: the smaller
PATIENCE = 10.0  # seconds of silence before a line reports what is going on

Check = Callable[[int, list[Bad]], None]  # given (usable, bad) so far, raises an error to stop


def write_map(folder: Path, identity: dict[str, Any], split: Split, check: Check) -> None:
    """Decode a split into a folder; only the holder of the folder's lock may do so.

    Args:
        folder: Does not exist yet; its parent does.
        identity: Written beside the arrays.
        split: The data, of known length.
        check: Raises an error if there are too many bad examples.

    Raises:
        OSError: If it cannot be written there.
    """
    remove_unfinished(folder)
    with contextlib.ExitStack() as stack:
        with writing(folder.parent):
            partial = stack.enter_context(unfinished_folder(folder))
        _decode_into(partial, split, check)
        with writing(folder.parent):
            (partial / "identity.json").write_text(json.dumps(identity, indent=1))
            publish(partial, folder)


@contextlib.contextmanager
def writing(cache_dir: Path) -> Iterator[None]:
    """State in one line what to do if the disk is full or the folder cannot be written.

    Args:
        cache_dir: The folder of all maps.

    Raises:
        OSError: In place of an OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"expected to write decoded images in {cache_dir}, got {error.strerror or error}; "
            "make room there, set data.cache_dir to another folder, or data.streaming to true"
        ) from error


def _decode_into(partial: Path, split: Split, check: Check) -> None:
    decoder, total = split.decoder, split.source.total
    assert total is not None  # what is not streamed has a length
    like = decoder.like["image"]
    shapes = decoder.buckets.shapes(len(like)) or [like.shape]
    looks = [decoder.like[name] for name in decoder.conditions]
    example_bytes = like.itemsize * max(map(math.prod, shapes)) + sum(
        look.nbytes for look in looks
    )
    chunk = min(CHUNK_EXAMPLES, max(1, CHUNK_BYTES // example_bytes))
    good, reported = 0, time.monotonic()
    bad: list[Bad] = []
    rows, labels, buckets = [], [], []
    # Written, not mapped: on a full disk a write raises an error, a store into a map SIGBUS.
    with contextlib.ExitStack() as files:
        with writing(partial.parent):
            need, free = total * (example_bytes + 16), shutil.disk_usage(partial).free
            if free < need:
                raise OSError(errno.ENOSPC, f"{free:,} bytes of free space and not {need:,}")
            names, kind = image_files(len(decoder.buckets.sizes)), like.dtype.str
            images = [
                _GrowingArray(partial / name, kind, shape, files)
                for name, shape in zip(names, shapes, strict=True)
            ]
            conditions = {
                name: _GrowingArray(
                    partial / f"condition-{k}.npy", _stored(name, like, decoder), like.shape, files
                )
                for k, (name, like) in enumerate(zip(decoder.conditions, looks, strict=True))
            }
        for examples in chunks(split.source.head(None), chunk):
            kept, found = sift(split.decode(examples))
            bad += found
            good += len(kept)
            check(good, bad)
            for k, some in _by_file(kept, shapes):
                batch = decoder.collate(some)
                buckets.append(np.full(len(some), k))
                with writing(partial.parent):
                    images[k].append(batch["image"].numpy())
                    for name, file in conditions.items():
                        file.append(batch[name].numpy())
                rows.append(batch["index"].numpy())
                if decoder.labels:
                    labels.append(batch["label"].numpy())
            if time.monotonic() - reported > PATIENCE:
                reported, done = time.monotonic(), good + len(bad)
                logger.info(f"decoding split {split.name!r}, once: {done:,} of {total:,} examples")
        with writing(partial.parent):
            for file in (*images, *conditions.values()):
                file.finish()
    with writing(partial.parent):
        (partial / "bad.json").write_text(json.dumps(bad))
        np.save(partial / "rows.npy", np.concatenate(rows))
        if decoder.buckets:
            np.save(partial / "buckets.npy", np.concatenate(buckets))
        if decoder.labels:
            np.save(partial / "labels.npy", np.concatenate(labels))


def image_files(buckets: int) -> list[str]:
    """Return the names of the files of images: one, or one for each bucket.

    Args:
        buckets: Their number, 0 for none.
    """
    return [f"images-{k}.npy" for k in range(buckets)] or ["images.npy"]


def _by_file(
    kept: list[Decoded], shapes: list[tuple[int, ...]]
) -> Iterator[tuple[int, list[Decoded]]]:
    """Divide examples by the file of their images, which is that of their shape."""
    if len(shapes) == 1:
        yield from [(0, kept)] if kept else []
        return
    for k, shape in enumerate(shapes):
        if some := [one for one in kept if one.image.shape == shape]:
            yield k, some


def _stored(name: str, like: npt.NDArray[Any], decoder: ImageDecoder) -> str:
    """The type of a condition on disk: that of the batch, or of captions bytes."""
    # A condition of numbers may have the name of captions, too.
    return np.dtype(np.uint8).str if decoder.text and name == TEXT else like.dtype.str


class _GrowingArray:
    """A .npy file written piece by piece, before its length is known."""

    def __init__(
        self, path: Path, dtype: str, shape: tuple[int, ...], files: contextlib.ExitStack
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.length = 0
        self.file = files.enter_context(path.open("wb", buffering=0))
        self._write_header(0)

    def append(self, array: npt.NDArray[Any]) -> None:
        """Write some more rows."""
        write(self.file, array.astype(self.dtype, copy=False))
        self.length += len(array)

    def finish(self) -> None:
        """Write the length: numpy pads a header so that this does not change its size."""
        self.file.seek(0)
        self._write_header(self.length)

    def _write_header(self, length: int) -> None:
        header = {"descr": self.dtype, "fortran_order": False, "shape": (length, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)


def write(file: io.FileIO, array: npt.NDArray[Any]) -> None:
    """Write an array without a buffer, so that a full disk is an error here and not on closing.

    Args:
        file: Opened for writing.
        array: Written in C order, without a header.
    """
    rest = np.ascontiguousarray(array).data.cast("B")
    while rest:
        rest = rest[file.write(rest) :]
