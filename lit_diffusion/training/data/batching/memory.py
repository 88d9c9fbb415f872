"""Data that fit in memory: decoded once, and from then on copied.

Decoding an image takes a hundred times as long as copying it, and every epoch of every run decodes
the same images. So the whole split is decoded once, into a folder:

    images.npy    (N, C, H, W) uint8     memory-mapped, not read: ranks, workers and runs on a
                   or floats             machine share one copy, the operating system's page cache
    labels.npy    (N,) int64             absent if there are no labels
    condition-0.npy  (N, *) float32 or   one file per condition, in the order of identity.json;
                     int64, or uint8     bytes of captions, after all others
    rows.npy      (N,) int64             row of each example in the split
    buckets.npy   (N,) int64             bucket of each example, if there are several sizes; their
                                         images are in images-0.npy, images-1.npy, …
    bad.json                             the rows that are left out, and why

The folder's name is a hash of everything that determines the bytes, so other data or another shape
have another folder and a map is never out of date. (The data enter by what ``datasets`` uses: the
files' names and times, or the commit on the hub.) The folder is complete or absent: see
`map_writer`. A lock makes one process decode while other ranks and runs that start at the same
time wait; the operating system releases it when its process ends, however it ends.

Each epoch permutes all examples by a key made of (seed, epoch) and divides the permutation into
one part for each lane (a worker of a rank). The place of a lane is (epoch, examples taken of its
part), and a lane can begin anywhere by these two numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lit_diffusion.training.data.batching import map_writer
from lit_diffusion.training.data.batching.lane import Delivery, LaneBatches
from lit_diffusion.training.data.batching.map_writer import image_files
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.decoding.transforms import Transforms
from lit_diffusion.training.data.reading.bad_examples import FEW, Bad, BadExample, BadExamples
from lit_diffusion.training.data.reading.columns import TEXT
from lit_diffusion.training.data.reading.order import ORDER, Position, permutation
from lit_diffusion.training.run.messages import logger

# To be raised whenever the folder, or what `ImageDecoder` makes of an image, changes: all maps are
# then written anew.
FORMAT = 3


class MemoryMap:
    """The decoded examples of a split, mapped from disk.

    Args:
        folder: Written by `open_map`.

    Raises:
        ValueError: If it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            labels = np.load(path) if (path := folder / "labels.npy").exists() else None
            rows = np.load(folder / "rows.npy")
            identity = json.loads((folder / "identity.json").read_text())
            names = image_files(len(identity.get("buckets", [])))
            images = [np.load(folder / name, mmap_mode="r") for name in names]
            bucket = np.load(path) if (path := folder / "buckets.npy").exists() else None
            keys = identity.get("condition_keys", []) + [TEXT] * ("text_key" in identity)
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
            # torch warns that these bytes must not be written to. Nobody writes to them.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.images = [torch.from_numpy(array) for array in images]
            arrays = map(torch.from_numpy, conditions)
            self.conditions = dict(zip(keys, arrays, strict=True))
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.rows = torch.from_numpy(rows)
        self.bucket = None if bucket is None else torch.from_numpy(bucket)
        self._places = None if bucket is None else torch.from_numpy(_ranks_within(bucket))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Tensor) -> dict[str, Tensor]:
        """Return the batch of some examples, copied.

        Args:
            chosen: Positions in the map, all of one bucket.

        Shapes:
            chosen (B,), int64.
        """
        if self.bucket is None or self._places is None:
            batch = {"image": self.images[0].index_select(0, chosen)}
        else:
            images = self.images[int(self.bucket[chosen[0]])]
            batch = {"image": images.index_select(0, self._places[chosen])}
        if self.labels is not None:
            batch["label"] = self.labels[chosen]
        for name, values in self.conditions.items():
            batch[name] = values.index_select(0, chosen)
            if name == TEXT and values.dtype == torch.uint8:
                batch[name] = batch[name].long()
        return batch | {"index": self.rows[chosen]}

    def __reduce__(self) -> tuple[type[MemoryMap], tuple[Path]]:
        # A spawned worker gets the folder and not the bytes.
        return MemoryMap, (self.folder,)


def _ranks_within(bucket: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return of each example how many of its bucket precede it: its row in the bucket's file."""
    places = np.empty_like(bucket)
    for k in np.unique(bucket):
        mine = bucket == k
        places[mine] = np.arange(mine.sum())
    return places


def cache_folder(cache_dir: str | None = None) -> Path:
    """Return the folder of all maps.

    Args:
        cache_dir: The folder; None for ``lit_diffusion`` in the cache of ``datasets``, which
            HF_DATASETS_CACHE, HF_HOME and XDG_CACHE_HOME move.
    """
    import datasets  # type: ignore[import-untyped]

    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "lit_diffusion"


def open_map(
    split: Split,
    identity: dict[str, Any],
    cache_dir: Path,
    max_bad_share: float | None = None,
) -> MemoryMap:
    """Return the map of a split, after decoding the split unless that has been done before.

    Args:
        split: The data.
        identity: Everything that determines the bytes: the data, the columns, the shape.
        cache_dir: The folder of all maps.
        max_bad_share: Largest share of the examples that may be bad and is then skipped, from 0
            to 1; None to raise an error at the first bad one.

    Raises:
        BadExample: If an example does not fit, and none may be skipped.
        OSError: If the map cannot be written there.
        ValueError: If too many examples are bad.
    """

    def check(good: int, bad: list[Bad]) -> None:
        if bad and (max_bad_share is None or not good):
            raise BadExample(bad[0], split.name)
        if bad and max_bad_share is not None:
            judge = BadExamples(split.name, max_bad_share, folder=None)
            judge.first = bad[:FEW]
            judge.judge(good + len(bad), len(bad))

    identity = {"format": FORMAT, **identity}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / digest
    if not folder.exists():  # an existing map needs neither a lock nor permission to write
        with _locked(cache_dir / f"{digest}.lock", split.name):
            if not folder.exists():
                map_writer.write_map(folder, identity, split, check)
    memory = MemoryMap(folder)
    check(len(memory), memory.bad)  # an earlier run may have allowed more
    return memory


@contextlib.contextmanager
def _locked(path: Path, split: str) -> Iterator[None]:
    """Hold a lock; report it if another process holds the lock for long."""
    lock = FileLock(path)
    with map_writer.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=map_writer.PATIENCE)
        except Timeout:
            logger.info(f"waiting for another process that decodes split {split!r}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class MemoryBatches(LaneBatches):
    """The endless batches of one rank from a map.

    With everything in memory workers have nothing to do but copy, which the main process does as
    well: `num_workers` 0 is the fastest.

    Args:
        memory: The data.
        batch_size: Examples in a batch.
        seed: Seed of the order and of the flips.
        flip: Mirror each image with probability one half.
        rank: This rank.
        world: Number of ranks.
        transforms: What is done to an image at each access; by default nothing.
        shape: (C, H, W) of the images after that; with buckets only C counts.
    """

    def __init__(
        self,
        memory: MemoryMap,
        batch_size: int,
        seed: int,
        flip: bool,
        rank: int,
        world: int,
        transforms: Transforms | None = None,
        shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__(batch_size, seed, flip, rank, world)
        self.memory = memory
        self.shape = shape
        self.transforms = transforms or Transforms()
        if self.transforms:  # once here, so that mistakes show before a worker meets them
            few = np.arange(min(FEW, len(memory)))
            self._batch(few, np.zeros_like(few))

    def batches(self, lane: int, lanes: int, position: Position) -> Iterator[Delivery]:
        """Yield the batches of one lane for ever."""
        epoch, taken = position.epoch, position.taken
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
            yield Delivery(batch, Position(epoch=epoch, taken=taken))

    def _part(self, epoch: int, lane: int, lanes: int) -> npt.NDArray[np.int64]:
        """Return this lane's part of the epoch's permutation of all examples."""
        total = len(self.memory)
        order = permutation(total, self.seed, ORDER, epoch)
        return order[total * lane // lanes : total * (lane + 1) // lanes].copy()

    def _batch(
        self, chosen: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]
    ) -> dict[str, Tensor]:
        batch = self.memory[torch.from_numpy(chosen)]
        if self.transforms:
            keys = epochs.tolist(), batch["index"].tolist()
            shape = self.shape
            if self.memory.bucket is not None:
                shape = (shape[0], *batch["image"].shape[2:])
            batch["image"] = self.transforms.batch(batch["image"], *keys, shape)
        return self.varied(batch, epochs)
