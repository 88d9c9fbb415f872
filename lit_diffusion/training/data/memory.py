"""Data that fit in memory: decoded once for all, and from then on batches at the speed of copying.

To decode an image takes a hundred times as long as to copy it, and every epoch of every run
decodes the same images. So the whole split is decoded once, into a folder:

    images.npy    (N, C, H, W) uint8     mapped into memory, not read: ranks, workers and runs on a
                   or floats             machine share one copy, the operating system's page cache
    labels.npy    (N,) int64             absent where there are no labels
    condition-0.npy  (N, *) float32 or   one file for each condition, in the order of
                     int64               identity.json
    rows.npy      (N,) int64             which row of the split an example is
    bad.json                             the rows that are left out, and why

The folder's name is a hash of all that decides the bytes, so other data or another shape is
another folder and a map is never out of date. (Of the data the hash knows what ``datasets`` does:
the files' names and times, or the commit on the hub.) It is **whole or not there**: it is written
under another name, forced onto the disk, and takes its own name in one step. Under a lock, so that
of many ranks and runs that start at once one decodes and the others wait; the lock belongs to the
operating system and ends with its process, whatever ends that.

The order is the plain one. Each epoch permutes all examples by a key made of (seed, epoch) and
cuts the permutation into one part for each lane (a worker of a rank). A lane stands at (epoch,
examples taken of its part), and can be put anywhere by writing these two numbers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lit_diffusion.training.data.bad_examples import FEW, Bad, BadExample, BadExamples
from lit_diffusion.training.data.images import ImageDecoder
from lit_diffusion.training.data.stream import ORDER, Example, Position, coin, mirror, permutation
from lit_diffusion.training.run.whole_file import sync

# To be raised whenever the folder, or what `ImageDecoder` makes of an image, is another: all maps
# are then made anew.
FORMAT = 1
CHUNK_BYTES, CHUNK_EXAMPLES = 1 << 24, 1024  # decoded before they are written: whichever is less
PATIENCE = 10.0  # seconds of silence before a line says what takes so long

Check = Callable[[int, list[Bad]], None]  # (good ones so far, bad ones so far), to stop early


class MemoryMap:
    """The decoded examples of a split, as they lie on the disk.

    Args:
        folder: What `open_map` wrote.

    Raises:
        ValueError: If it cannot be read: somebody has damaged it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            images = np.load(folder / "images.npy", mmap_mode="r")
            labels = np.load(path) if (path := folder / "labels.npy").exists() else None
            rows = np.load(folder / "rows.npy")
            keys = json.loads((folder / "identity.json").read_text()).get("condition_keys", [])
            conditions = [
                np.load(folder / f"condition-{k}.npy", mmap_mode="r") for k in range(len(keys))
            ]
            self.bad = [Bad(*row) for row in json.loads((folder / "bad.json").read_text())]
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"expected decoded images that can be read in {folder}, got: {error}; remove that "
                "folder to have it made anew, or set data.cache_dir to another place"
            ) from error
        with warnings.catch_warnings():
            # torch says that these bytes cannot be written to. Nobody writes to them.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.images = torch.from_numpy(images)
            arrays = map(torch.from_numpy, conditions)
            self.conditions = dict(zip(keys, arrays, strict=True))
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.rows = torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Tensor) -> dict[str, Tensor]:
        """Return the batch of these examples, copied: (B,) int64 positions in the map."""
        batch = {"image": self.images.index_select(0, chosen)}
        if self.labels is not None:
            batch["label"] = self.labels[chosen]
        for name, values in self.conditions.items():
            batch[name] = values.index_select(0, chosen)
        return batch | {"index": self.rows[chosen]}

    def __reduce__(self) -> Any:
        # To a spawned worker goes the name, not the bytes.
        return MemoryMap, (self.folder,)


def cache_folder(cache_dir: str | None = None) -> Path:
    """Return the folder of all maps.

    Args:
        cache_dir: The folder; None for ``lit_diffusion`` in the cache of ``datasets``, which
            HF_DATASETS_CACHE, HF_HOME and XDG_CACHE_HOME move.
    """
    import datasets

    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "lit_diffusion"


def open_map(
    decode: ImageDecoder,
    identity: dict[str, Any],
    cache_dir: Path,
    max_bad_share: float | None = None,
) -> MemoryMap:
    """Return the map of a split, which is decoded now unless that was done before.

    Args:
        decode: Decodes the split, and knows its source.
        identity: All that decides the bytes: the data, the columns, the shape.
        cache_dir: The folder of all maps.
        max_bad_share: Share of the examples that may be bad and are left out then, from 0 to 1;
            None to raise at the first.

    Raises:
        BadExample: If an image or a label does not fit, and none may be left out.
        OSError: If the map cannot be written there.
        ValueError: If too many examples are bad.
    """
    from filelock import FileLock, Timeout

    def check(good: int, bad: list[Bad]) -> None:
        if bad and (max_bad_share is None or not good):
            raise BadExample(bad[0], decode.split)
        if bad:
            report = BadExamples(decode.split, max_bad_share, folder=None)
            report.first = bad[:FEW]
            report.judge(good + len(bad), len(bad))

    identity = {"format": FORMAT, **identity}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / digest
    if not folder.exists():  # to use what is there takes no lock and no permission to write
        lock = FileLock(cache_dir / f"{digest}.lock")
        with _writing(cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=PATIENCE)
            except Timeout:
                _say(f"waiting for another process that decodes split {decode.split!r}")
                lock.acquire()
        try:
            if not folder.exists():
                _build(folder, identity, decode, check)
        finally:
            lock.release()
    memory = MemoryMap(folder)
    check(len(memory), memory.bad)  # another run may have been content with less
    return memory


def _build(folder: Path, identity: dict[str, Any], decode: ImageDecoder, check: Check) -> None:
    """Write the map under another name, then give it its own; only the lock's holder may."""
    for orphan in folder.parent.glob(f"{folder.name}.*.partial"):  # of a process that was killed
        shutil.rmtree(orphan, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with _writing(folder.parent):
            partial.mkdir()
        _decode_into(partial, decode, check)
        with _writing(folder.parent):
            (partial / "identity.json").write_text(json.dumps(identity, indent=1))
            for path in (*partial.iterdir(), partial):
                sync(path)
            partial.rename(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there if all went well


def _decode_into(partial: Path, decode: ImageDecoder, check: Check) -> None:
    total, looks = decode.source.total, [decode.like[name] for name in decode.conditions]
    image = decode.like["image"].dtype
    example_bytes = math.prod(decode.shape) * image.itemsize + sum(like.nbytes for like in looks)
    chunk = min(CHUNK_EXAMPLES, max(1, CHUNK_BYTES // example_bytes))
    good, bad, rows, labels, spoken = 0, [], [], [], time.monotonic()
    # Written, not mapped: on a full disk a write is an error, and a store into a map is SIGBUS.
    with contextlib.ExitStack() as files:
        with _writing(partial.parent):
            need, free = total * (example_bytes + 16), shutil.disk_usage(partial).free
            if free < need:
                raise OSError(errno.ENOSPC, f"{free:,} bytes of room and not {need:,}")
            images = _Growing(partial / "images.npy", image.str, decode.shape, files)
            conditions = {
                name: _Growing(partial / f"condition-{k}.npy", like.dtype.str, like.shape, files)
                for k, (name, like) in enumerate(zip(decode.conditions, looks, strict=True))
            }
        for examples in _chunks(decode.source.head(None), chunk):
            decoded = decode.sift(examples)
            bad += [one for one in decoded if isinstance(one, Bad)]
            kept = [one for one in decoded if not isinstance(one, Bad)]
            good += len(kept)
            check(good, bad)
            if kept:
                batch = decode.collate(kept)
                with _writing(partial.parent):
                    images.append(batch["image"].numpy())
                    for name, file in conditions.items():
                        file.append(batch[name].numpy())
                rows.append(batch["index"].numpy())
                labels.append(batch["label"].numpy() if decode.labels else None)
            if time.monotonic() - spoken > PATIENCE:
                spoken, done = time.monotonic(), good + len(bad)
                _say(f"decoding split {decode.split!r} for once: {done:,} of {total:,} examples")
        with _writing(partial.parent):
            for file in (images, *conditions.values()):
                file.finish(good)
    with _writing(partial.parent):
        (partial / "bad.json").write_text(json.dumps(bad))
        np.save(partial / "rows.npy", np.concatenate(rows))
        if decode.labels:
            np.save(partial / "labels.npy", np.concatenate(labels))


def _chunks(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while chunk := list(islice(examples, size)):
        yield chunk


class _Growing:
    """A .npy file that is written piece by piece, before anybody knows its length."""

    def __init__(
        self, path: Path, dtype: str, shape: tuple[int, ...], files: contextlib.ExitStack
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.file = files.enter_context(path.open("wb", buffering=0))
        self._write_header(0)

    def append(self, array: np.ndarray) -> None:
        """Write so many rows more."""
        _write(self.file, array)

    def finish(self, length: int) -> None:
        """Say how many there are: numpy pads a header so that this does not change its size."""
        self.file.seek(0)
        self._write_header(length)

    def _write_header(self, length: int) -> None:
        header = {"descr": self.dtype, "fortran_order": False, "shape": (length, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _write(file: io.FileIO, array: np.ndarray) -> None:
    """Write without a buffer, so that what does not fit fails here and not in closing the file."""
    rest = memoryview(np.ascontiguousarray(array)).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def _writing(cache_dir: Path) -> Iterator[None]:
    """Say in one line what to do when the disk is full or the folder closed to us."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"expected to write decoded images in {cache_dir}, got {error.strerror or error}; "
            "make room there, set data.cache_dir to another folder, or data.streaming to true"
        ) from error


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class MemoryBatches(IterableDataset):
    """The endless batches of one rank from a map, as (batch, position after it).

    What `ShuffledBatches` is to a stream: `TrainLoader` runs either. With everything in memory
    there is nothing for workers to do but to copy, which the main process does as well.

    Args:
        memory: The split.
        batch_size: Examples in a batch.
        seed: Of the order and the flips.
        flip: Mirror each image with probability one half.
        rank: This rank.
        world: How many ranks there are.
    """

    def __init__(
        self, memory: MemoryMap, batch_size: int, seed: int, flip: bool, rank: int, world: int
    ) -> None:
        self.memory = memory
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.rank = rank
        self.world = world
        self.positions = [Position()]
        self.turn = 0

    def begin_at(self, positions: list[Position], turn: int) -> None:
        """Set where each worker's lane stands and whose turn is next."""
        self.positions = list(positions)
        self.turn = turn

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Position]]:
        worker = get_worker_info()
        workers = len(self.positions)
        mine = (self.turn + (worker.id if worker else 0)) % workers
        lane, lanes = self.rank * workers + mine, self.world * workers
        epoch, taken = self.positions[mine].epoch, self.positions[mine].taken
        part = self._part(epoch, lane, lanes)
        while True:
            chosen, epochs, room = [], [], self.batch_size
            while room:
                piece = part[taken : taken + room]
                chosen.append(piece)
                epochs.append(np.full(len(piece), epoch))
                room, taken = room - len(piece), taken + len(piece)
                if taken == len(part):
                    epoch, taken = epoch + 1, 0
                    part = self._part(epoch, lane, lanes)
            batch = self._batch(np.concatenate(chosen), np.concatenate(epochs))
            yield batch, Position(epoch=epoch, taken=taken)

    def _part(self, epoch: int, lane: int, lanes: int) -> np.ndarray:
        """Return this lane's part of the epoch's permutation of all examples."""
        total = len(self.memory)
        order = permutation(total, self.seed, ORDER, epoch)
        return order[total * lane // lanes : total * (lane + 1) // lanes].copy()

    def _batch(self, chosen: np.ndarray, epochs: np.ndarray) -> dict[str, Tensor]:
        batch = self.memory[torch.from_numpy(chosen)]
        if self.flip:
            mirror(batch["image"], coin(self.seed, epochs, batch["index"].numpy()))
        return batch
