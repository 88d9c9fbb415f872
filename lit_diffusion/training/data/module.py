"""The data: any Hugging Face data set of images, as batches of uint8 and then as x in [−1, 1].

B examples, C channels, H rows, W columns. An image stays what it is, C × H × W bytes, until it has
reached the device; there a byte k becomes k / 127.5 − 1. Nothing is resized, cropped or recoloured
on the way, for a silent repair would change what is being modelled: an image that does not fit is
a bad example, which is left out and named, or an error. Floats, such as latents, stay floats.

    training     endless, shuffled, exactly resumable           see `stream`
                 the same from memory, if the data fit          see `memory`
    validation   in order, each example once, whatever the number of ranks, numbered so that its
                 noise can be keyed by its number
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_diffusion.training.data.bad_examples import Bad, BadExample, BadExamples
from lit_diffusion.training.data.columns import BATCH
from lit_diffusion.training.data.images import ImageDecoder
from lit_diffusion.training.data.loader import TrainLoader
from lit_diffusion.training.data.memory import MemoryBatches, MemoryMap, cache_folder, open_map
from lit_diffusion.training.data.sources import find_splits, open_split
from lit_diffusion.training.data.stream import ShuffledBatches
from lit_diffusion.training.data.validation import FixedBatches, usable

ORDER_VERSION = 2  # to be raised whenever the same arguments give another order
STEPS_IF_UNKNOWN = 1000  # batches in an epoch of data whose length nobody knows
FIRST_LOOK = 100  # examples of which one must fit, or the configuration is wrong and not the data


class ImageDataModule(L.LightningDataModule):
    """Images (and labels) from any Hugging Face data set, streamed or in memory.

    Batches are {"image": (B, C, H, W), "label": (B,), "index": (B,)}, the images uint8 up to the
    device and float32 in [−1, 1] from there on (floats in .npy format, such as latents, are taken
    as they are), the indices those of the examples in the split;
    and, by its name, each further condition, (B, *), int64 if it is integers and float32 if not.
    Validation batches count the examples in use instead, and say how many there are ("total").
    The training order is a function of the data and the seed alone and continues exactly from a
    checkpoint.

    Args:
        path: A folder of parquet files or of images, a parquet file, a data set shipped with
            lit_diffusion (digits8x8, swirl, toy1d), or a name on the Hugging Face hub; looked up
            in that order. Or the URL of a parquet file.
        data_files: Files of each split, as paths, globs or URLs, one or a list of them; by
            default found from `path`.
        config_name: Which configuration of the data set, if it has several.
        image_shape: (channels, height, width) of every image.
        image_key: Column that holds the images.
        label_key: Column that holds integer labels, null for none.
        condition_keys: Columns that hold further conditions, each a number or nested lists of
            numbers; as in the first example, so in all. A model is told by `model.conditions`.
        train_split: Split to train on.
        val_split: Split to validate and test on, null for none.
        batch_size: Examples in a batch, on each rank.
        streaming: Read row by row, without a copy of the data set in the cache. Otherwise all
            training images are decoded once, N·C·H·W bytes in the cache, and come from memory.
        cache_dir: Folder of the decoded images, null for ``lit_diffusion`` in the cache of
            ``datasets`` (which HF_DATASETS_CACHE and HF_HOME move).
        shuffle_window: Examples shuffled together when streaming.
        open_shards: Shards that each worker reads at once when streaming, at least 1; a window
            holds as many examples of each.
        num_workers: Processes that read and decode, on each rank; 0 does it in the main process.
        steps_per_epoch: Batches that count as an epoch; by default once through the data, or 1000
            where their number is unknown.
        val_examples: Validate on the first so many examples only, null for all.
        horizontal_flip: Mirror each training image with probability one half.
        seed: Seed of the order and of the flips.
        on_bad_example: What to do with an example that cannot be used (a broken or missing image,
            one of another size or mode, a missing label, a shard that cannot be read): `skip` it,
            name it in a warning and in bad_examples.csv in the run folder, and take the next; or
            `raise`.
        max_bad_share: Share of the examples read that may be bad, from 0 to 1; more, and at least
            ten, end the run.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        path: str = "digits8x8",
        data_files: dict[str, str | list[str]] | None = None,
        config_name: str | None = None,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        image_key: str = "image",
        label_key: str | None = "label",
        condition_keys: tuple[str, ...] = (),
        train_split: str = "train",
        val_split: str | None = "test",
        batch_size: int = 64,
        streaming: bool = True,
        cache_dir: str | None = None,
        shuffle_window: int = 2048,
        open_shards: int = 4,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        val_examples: int | None = 10_000,
        horizontal_flip: bool = False,
        seed: int = 0,
        on_bad_example: Literal["skip", "raise"] = "skip",
        max_bad_share: float = 0.01,
    ) -> None:
        super().__init__()
        self.path = path
        self.data_files = data_files
        self.config_name = config_name
        self.image_shape = tuple(image_shape)
        self.image_key = image_key
        self.label_key = label_key
        self.condition_keys = tuple(condition_keys)
        self.train_split = train_split
        self.val_split = val_split
        self.batch_size = batch_size
        self.streaming = streaming
        self.cache_dir = cache_dir
        self.shuffle_window = shuffle_window
        self.open_shards = open_shards
        self.num_workers = num_workers
        self.steps_per_epoch = steps_per_epoch
        self.val_examples = val_examples
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.on_bad_example = on_bad_example
        self.max_bad_share = max_bad_share
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(
                "data.image_shape must be (channels, height, width), all positive, "
                f"got {self.image_shape}"
            )
        taken = set(BATCH) & set(self.condition_keys)
        if taken or len(set(self.condition_keys)) < len(self.condition_keys):
            raise ValueError(
                f"data.condition_keys must be different columns, none of them called "
                f"{', '.join(BATCH)}, got {', '.join(self.condition_keys)}; a label is named by "
                "data.label_key, any other column may be renamed"
            )
        least = {"batch_size": 1, "shuffle_window": 1, "num_workers": 0, "seed": 0}
        least |= {"open_shards": 1}
        least |= {"steps_per_epoch": 1, "val_examples": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"data.{name} must be at least {low}, got {value}")
        if on_bad_example not in ("skip", "raise"):
            raise ValueError(f"data.on_bad_example must be skip or raise, got {on_bad_example!r}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share must be from 0 to 1, got {max_bad_share}")
        self._forget()

    def setup(self, stage: str) -> None:
        """Open the splits and look at the first examples of each, so that mistakes show early."""
        self._forget()
        self._folder = None if self.trainer is None else self.trainer.log_dir  # a collective
        splits = find_splits(
            self.path, self.data_files, self.config_name, self.streaming, self._skip
        )
        if stage == "fit":
            self._train = self._decoder(splits, self.train_split)
            if not self.streaming:
                self._memory = self._open_map(self._train)
        if self.val_split is not None:
            self._val = self._decoder(splits, self.val_split, self._train)

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
            rank, world = self._place()
            examples: Any = self._val.source.head(self.val_examples)
            if self._skip:
                report = self._bad_examples(self._val.split)
                examples = usable(self._val, examples, report, tell=rank == 0)
            self._val_loader = FixedBatches(
                self._val, list(examples), self.batch_size, rank, world
            )
        return self._val_loader

    def test_dataloader(self) -> FixedBatches | list:
        """Return what `val_dataloader` returns: there is one held-out split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> FixedBatches | list:
        """Return what `val_dataloader` returns: one image is drawn for each of its examples."""
        return self.val_dataloader()

    def examples(self, split: str, batch_size: int) -> Iterator[dict[str, Any]]:
        """Yield the usable examples of a whole split, in order, each once: uint8 batches.

        What a statistic of the data set is made of. Of R ranks each gets every R-th batch, which
        says by "batch" the how-manieth it is; the others are read by it and not decoded.

        Args:
            split: Name of the split.
            batch_size: Examples in a batch before the bad ones are left out.
        """
        rank, world = self._place()
        decode = self.decoder(split)
        examples = decode.source.head(None)
        report, read, lost = self._bad_examples(split), 0, 0
        for number in itertools.count():
            found = list(itertools.islice(examples, batch_size))
            if not found:
                return
            if number % world != rank:
                continue
            decoded = decode.sift(found)
            bad = [one for one in decoded if isinstance(one, Bad)]
            if bad and not self._skip:
                raise BadExample(bad[0], split)
            report.add(bad)
            read, lost = read + len(found), lost + len(bad)
            report.judge(read, lost)
            if kept := [one for one in decoded if not isinstance(one, Bad)]:
                yield decode.collate(kept) | {"batch": number}

    def decoder(self, split: str) -> ImageDecoder:
        """Open a split, whatever `setup` has opened, and look at its first example.

        Args:
            split: Its name.
        """
        splits = find_splits(
            self.path, self.data_files, self.config_name, self.streaming, self._skip
        )
        return self._decoder(splits, split)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn bytes into x in [−1, 1], on the device; images that are floats pass as float32."""
        if isinstance(batch, dict) and batch["image"].dtype == torch.uint8:
            return batch | {"image": batch["image"].float().div_(127.5).sub_(1.0)}
        if isinstance(batch, dict) and batch["image"].dtype == torch.float16:
            return batch | {"image": batch["image"].float()}
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
        self._folder: str | None = None
        self._train: ImageDecoder | None = None
        self._memory: MemoryMap | None = None
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
        total = source.total if self._memory is None else len(self._memory)
        lanes = world * max(1, self.num_workers)
        if total is not None and total < lanes:
            raise ValueError(
                f"expected at least one example for each of {world} ranks × "
                f"{max(1, self.num_workers)} workers, got {total} in all; "
                "set data.num_workers lower or use fewer ranks"
            )
        steps = self.steps_per_epoch
        if steps is None and total is None:
            steps = STEPS_IF_UNKNOWN
            rank_zero_info(
                f"The length of {self.path!r} is not known without reading it: {steps} batches "
                "count as an epoch; set data.steps_per_epoch to change that."
            )
        elif steps is None:
            steps = max(1, total // (self.batch_size * world))
        if total is None and source.shards % lanes and source.shards > lanes:
            rank_zero_info(
                f"{source.shards} shards of unknown length are dealt to {lanes} ranks × workers: "
                "each cycles over its own, so some examples come up more often than others."
            )
        order = {"batch_size": self.batch_size, "seed": self.seed, "flip": self.horizontal_flip}
        order |= {"rank": rank, "world": world}
        if self._memory is not None:
            batches = MemoryBatches(self._memory, **order)
        else:
            share = self.max_bad_share if self._skip else None
            batches = ShuffledBatches(
                source, self._train, window=self.shuffle_window, max_bad_share=share, **order
            )
        pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return TrainLoader(
            batches,
            steps,
            self.num_workers,
            self._settings(world, total),
            pin,
            self._bad_examples(self.train_split),
        )

    def _settings(self, world: int, total: int | None) -> dict[str, Any]:
        """Return what must stay as it is from a checkpoint to its resumption.

        The path is not among them: the same data may have moved. Their size and their first image
        stand for them.
        """
        names = ("num_workers", "batch_size", "streaming", "shuffle_window", "seed")
        names += ("open_shards", "on_bad_example", "horizontal_flip", "train_split", "label_key")
        settings: dict[str, Any] = {"the order of the data": ORDER_VERSION}
        settings["the number of ranks"] = world
        settings |= {f"data.{name}": getattr(self, name) for name in names}
        settings["data.image_shape"] = list(self.image_shape)
        settings["data.condition_keys"] = list(self.condition_keys) or None
        settings["the number of training examples"] = total
        settings["the number of shards"] = self._train.source.shards
        first = self._first(self._train)["image"]
        settings["the checksum of the first training image"] = zlib.crc32(first.numpy().tobytes())
        return settings

    def _open_map(self, decode: ImageDecoder) -> MemoryMap:
        identity = {
            name: getattr(self, name) for name in ("image_shape", "image_key", "label_key")
        }
        if self.condition_keys:
            identity["condition_keys"] = self.condition_keys
        identity["fingerprint"] = decode.source.fingerprint
        share = self.max_bad_share if self._skip else None
        memory = open_map(decode, identity, cache_folder(self.cache_dir), share)
        self._bad_examples(decode.split).add(memory.bad if self._place()[0] == 0 else [])
        return memory

    def _bad_examples(self, split: str) -> BadExamples:
        rank, world = self._place()
        return BadExamples(split, self.max_bad_share, self._folder, rank if world > 1 else None)

    @property
    def _skip(self) -> bool:
        return self.on_bad_example == "skip"

    def _first(self, decode: ImageDecoder) -> dict[str, Any]:
        """Return the first usable example, as a batch.

        Raises:
            BadExample: The first one's, if none of the first can be used.
        """
        problem = None
        for example in decode.source.head(FIRST_LOOK if self._skip else 1):
            try:
                return decode([example])
            except BadExample as error:
                problem = problem or error
        raise problem

    def _decoder(
        self, splits: dict[str, Any], split: str, other: ImageDecoder | None = None
    ) -> ImageDecoder:
        """Open a split; its conditions must look as in the other one, or as in its first."""
        source = open_split(
            splits,
            split,
            self.image_key,
            self.label_key,
            self.open_shards,
            self._skip,
            self.condition_keys,
        )
        decode = ImageDecoder(
            source,
            split,
            self.image_shape,
            labels=self.label_key is not None,
            conditions=self.condition_keys,
            like=None if other is None else other.like,
        )
        first = self._first(decode)
        decode.like = {name: first[name][0].numpy() for name in ("image", *self.condition_keys)}
        if self.horizontal_flip and first["image"].is_floating_point():
            raise ValueError(
                "data.horizontal_flip mirrors images, and these are floats: the mirror image of a "
                "latent is no latent of the mirror image; set it to false"
            )
        if source.lost:
            report = self._bad_examples(split)
            report.add(list(source.lost) if self._place()[0] == 0 else [])
            lost = sum(one.rows for one in source.lost)
            report.judge(source.total + lost, lost)
        return decode
