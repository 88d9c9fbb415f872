"""The data: any Hugging Face data set of images, as batches of uint8 and then as x in [−1, 1].

B examples, C channels, H rows, W columns. An image stays what it is, C × H × W bytes, until it has
reached the device; there a byte k becomes k / 127.5 − 1. Nothing is resized, cropped or recoloured
on the way: an image that does not fit is an error that names it, for a silent repair would change
what is being modelled.

    training     endless, shuffled, exactly resumable           see `lit_diffusion.training.stream`
    validation   in order, each example once, whatever the number of ranks, numbered so that its
                 noise can be keyed by its number
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_diffusion.training.images import ImageDecoder
from lit_diffusion.training.sources import find_splits, open_split
from lit_diffusion.training.stream import ShuffledBatches, TrainLoader

STEPS_IF_UNKNOWN = 1000  # batches in an epoch of data whose length nobody knows


class FixedBatches:
    """Batches that are made once and come in the same order every time."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Shallow copies: who replaces an entry of a batch must not change the next pass.
        return (dict(batch) for batch in self.batches)


class ImageDataModule(L.LightningDataModule):
    """Images (and labels) from any Hugging Face data set, streamed or in memory.

    Batches are {"image": (B, C, H, W), "label": (B,)}, the images uint8 up to the device and
    float32 in [−1, 1] from there on. The training order is a function of the seed alone and
    continues exactly from a checkpoint.

    Args:
        path: A folder of parquet files or of images, a parquet file, a data set shipped with
            lit_diffusion (digits8x8, swirl, toy1d), or a name on the Hugging Face hub; looked up
            in that order.
        data_files: Files of each split, as paths, globs or URLs; by default found from `path`.
        config_name: Which configuration of the data set, if it has several.
        image_shape: (channels, height, width) of every image.
        image_key: Column that holds the images.
        label_key: Column that holds integer labels, null for none.
        train_split: Split to train on.
        val_split: Split to validate and test on, null for none.
        batch_size: Examples in a batch, on each rank.
        streaming: Read row by row, without a copy of the data set in the cache.
        shuffle_window: Examples shuffled together when streaming.
        num_workers: Processes that read and decode, on each rank; 0 does it in the main process.
        steps_per_epoch: Batches that count as an epoch; by default once through the data, or 1000
            where their number is unknown.
        val_examples: Validate on the first so many examples only, null for all.
        horizontal_flip: Mirror each training image with probability one half.
        seed: Seed of the order and of the flips.
    """

    def __init__(
        self,
        path: str = "digits8x8",
        data_files: dict[str, str] | None = None,
        config_name: str | None = None,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        image_key: str = "image",
        label_key: str | None = "label",
        train_split: str = "train",
        val_split: str | None = "test",
        batch_size: int = 64,
        streaming: bool = True,
        shuffle_window: int = 2048,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        val_examples: int | None = 10_000,
        horizontal_flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.data_files = data_files
        self.config_name = config_name
        self.image_shape = tuple(image_shape)
        self.image_key = image_key
        self.label_key = label_key
        self.train_split = train_split
        self.val_split = val_split
        self.batch_size = batch_size
        self.streaming = streaming
        self.shuffle_window = shuffle_window
        self.num_workers = num_workers
        self.steps_per_epoch = steps_per_epoch
        self.val_examples = val_examples
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(
                "data.image_shape must be (channels, height, width), all positive, "
                f"got {self.image_shape}"
            )
        least = {"batch_size": 1, "shuffle_window": 1, "num_workers": 0, "seed": 0}
        least |= {"steps_per_epoch": 1, "val_examples": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"data.{name} must be at least {low}, got {value}")
        self._forget()

    def setup(self, stage: str) -> None:
        """Open the splits and look at the first example of each, so that mistakes show early."""
        self._forget()
        splits = find_splits(self.path, self.data_files, self.config_name, self.streaming)
        if stage == "fit":
            self._train = self._decoder(splits, self.train_split)
        if self.val_split is not None:
            self._val = self._decoder(splits, self.val_split)

    def train_dataloader(self) -> TrainLoader:
        """Return the endless stream, in epochs of a stated length."""
        if self._train_loader is None:
            self._train_loader = self._make_train_loader()
            if self._resume is not None:
                self._train_loader.load_state_dict(self._resume)
        return self._train_loader

    def val_dataloader(self) -> FixedBatches | list:
        """Return this rank's share of the validation examples, each with its index."""
        if self._val is None:
            return []  # Lightning's way to say: no validation
        if self._val_loader is None:
            self._val_loader = self._make_val_loader(self._val)
        return self._val_loader

    def test_dataloader(self) -> FixedBatches | list:
        """Return what `val_dataloader` returns: there is one held-out split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> FixedBatches | list:
        """Return what `val_dataloader` returns: one image is drawn for each of its examples."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn bytes into x in [−1, 1], on the device; images that are floats already pass."""
        if isinstance(batch, dict) and batch["image"].dtype == torch.uint8:
            batch = batch | {"image": batch["image"].float().div_(127.5).sub_(1.0)}
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands in the data.

        Lightning saves the loader's state too, but drops it on resume once somebody has asked for
        `trainer.estimated_stepping_batches`; this copy is always given back.
        """
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the loader, which does not exist yet."""
        self._resume = state_dict

    def teardown(self, stage: str) -> None:
        """Stop the workers."""
        if self._train_loader is not None:
            self._train_loader.close()

    def _forget(self) -> None:
        self._train: ImageDecoder | None = None
        self._val: ImageDecoder | None = None
        self._train_loader: TrainLoader | None = None
        self._val_loader: FixedBatches | None = None
        self._resume: dict[str, Any] | None = None

    def _place(self) -> tuple[int, int]:
        """Return (rank, number of ranks)."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _make_train_loader(self) -> TrainLoader:
        if self._train is None:
            raise ValueError("expected setup('fit') before train_dataloader(): call it first")
        rank, world = self._place()
        source = self._train.source
        lanes = world * max(1, self.num_workers)
        if source.total is not None and source.total < lanes:
            raise ValueError(
                f"expected at least one example for each of {world} ranks × "
                f"{max(1, self.num_workers)} workers, got {source.total} in all; "
                "set data.num_workers lower or use fewer ranks"
            )
        steps = self.steps_per_epoch
        if steps is None and source.total is None:
            steps = STEPS_IF_UNKNOWN
            rank_zero_info(
                f"The length of {self.path!r} is not known without reading it: {steps} batches "
                "count as an epoch; set data.steps_per_epoch to change that."
            )
        elif steps is None:
            steps = max(1, source.total // (self.batch_size * world))
        if source.total is None and source.shards % lanes and source.shards > lanes:
            rank_zero_info(
                f"{source.shards} shards of unknown length are dealt to {lanes} ranks × workers: "
                "each cycles over its own, so some examples come up more often than others."
            )
        batches = ShuffledBatches(
            source,
            self._train,
            batch_size=self.batch_size,
            window=self.shuffle_window,
            seed=self.seed,
            flip=self.horizontal_flip,
            rank=rank,
            world=world,
        )
        pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return TrainLoader(batches, steps, self.num_workers, self._settings(world), pin)

    def _settings(self, world: int) -> dict[str, Any]:
        """Return what must stay as it is from a checkpoint to its resumption.

        The path is not among them: the same data may have moved. Their size and their first image
        stand for them.
        """
        names = ("num_workers", "batch_size", "streaming", "shuffle_window", "seed")
        names += ("horizontal_flip", "train_split", "label_key")
        settings: dict[str, Any] = {"the number of ranks": world}
        settings |= {f"data.{name}": getattr(self, name) for name in names}
        settings["data.image_shape"] = list(self.image_shape)
        settings["the number of training examples"] = self._train.source.total
        settings["the number of shards"] = self._train.source.shards
        first = self._train(list(self._train.source.head(1)))["image"]
        settings["the checksum of the first training image"] = zlib.crc32(first.numpy().tobytes())
        return settings

    def _make_val_loader(self, decode: ImageDecoder) -> FixedBatches:
        rank, world = self._place()
        examples = list(decode.source.head(self.val_examples))
        total = len(examples)
        if total < world:
            raise ValueError(
                f"expected at least one validation example for each of {world} ranks, got "
                f"{total}; use fewer ranks or a larger split than {self.val_split!r}"
            )
        # As many batches on every rank, or a collective call in validation would hang.
        steps = min(-(-total // (world * self.batch_size)), total // world)
        mine = np.array_split(np.arange(total), world)[rank]
        batches = []
        for index in np.array_split(mine, steps):
            batch = decode([examples[i] for i in index])
            batches.append(batch | {"index": torch.from_numpy(index), "total": total})
        return FixedBatches(batches)

    def _decoder(self, splits: dict[str, Any], split: str) -> ImageDecoder:
        source = open_split(splits, split, self.image_key, self.label_key)
        decode = ImageDecoder(source, split, self.image_shape, labels=self.label_key is not None)
        decode(list(source.head(1)))
        return decode
