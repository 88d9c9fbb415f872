"""The data: any Hugging Face data set of images, as batches of uint8 and then as x in [−1, 1].

B examples, C channels, H rows, W columns. An image remains C × H × W bytes until it has reached
the device; there a byte k becomes k / 127.5 − 1. Nothing is resized, cropped or recoloured
unasked, for a silent repair would change what is being modelled: an image that does not fit is a
bad example, which is skipped and reported, or an error. What `mode` and `transform` ask for is
done and recorded, see `transforms`. Floats, such as latents, remain floats.

    training     endless, shuffled, exactly resumable           see `order`, `stream`
                 the same from memory, if the data fit          see `memory`
    validation   in stored order, each example once for any number of ranks, numbered so that its
                 noise can be keyed by its number               see `validation`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning as L
import torch

from lit_diffusion.exact import at_least_float32
from lit_diffusion.normalization import Normalization
from lit_diffusion.training.data.arguments import Kind, check_arguments, check_kind, check_share
from lit_diffusion.training.data.batching.loader import TrainLoader
from lit_diffusion.training.data.batching.memory import MemoryMap, cache_folder, open_map
from lit_diffusion.training.data.batching.validation import FixedBatches, in_order, usable
from lit_diffusion.training.data.decoding.augment import Augment, check_first
from lit_diffusion.training.data.decoding.buckets import Buckets
from lit_diffusion.training.data.decoding.decoder import decoder_of, map_identity
from lit_diffusion.training.data.decoding.images import ImageDecoder
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.decoding.transform_classes import Given
from lit_diffusion.training.data.decoding.transforms import Transforms
from lit_diffusion.training.data.normalizing import settle
from lit_diffusion.training.data.reading.bad_examples import BadExamples, lost_rows
from lit_diffusion.training.data.reading.columns import TEXT_LENGTH, Columns
from lit_diffusion.training.data.reading.held_out import HELD_OUT, part_of, validation_split
from lit_diffusion.training.data.reading.sources import Splits, find_splits, open_source
from lit_diffusion.training.data.training_batches import train_loader

FIRST_LOOK = 100  # if none of so many first examples fits, the configuration is wrong


class DataModule(L.LightningDataModule):
    """Images (and labels) from any Hugging Face data set, streamed or in memory.

    Batches are {"image": (B, C, H, W), "label": (B,), "index": (B,)}. Images are uint8 up to the
    device and from there on float32 in [−1, 1], or float64 with `trainer.precision: 64-true`
    (floats in .npy format, such as latents, are used unchanged); indices are those of the examples
    in the split. Each further condition is an entry of its own name, (B, *), int64 if it is
    integers and float32 otherwise, and captions are "text", their bytes. In validation batches the
    index counts the examples in use, and "total" is their number. The training order is a
    function of the data and the seed alone and continues exactly from a checkpoint.

    Args:
        path: A folder of parquet files or of images, a parquet file, a data set shipped with
            lit_diffusion (digits8x8, digits_text, swirl, toy1d, oscillations, ellipses), or a name
            on the Hugging Face hub; looked up in that order. Or the URL of a parquet file. Or a
            .npy or .npz file of numpy, or a folder of these: of all examples, or one .npy file for
            each.
        data_files: Files of each split, as paths, globs or URLs, one or a list of them; by
            default found from `path`.
        config_name: Configuration of the data set, if it has several.
        kind: What an example is: `image`, `signal` (channels, length), `volume` (channels, depth,
            height, width), `points` (numbers of a point, points), a set stored as a list of
            points, `vector` (numbers,), a row of a table, or `latents`, floats of any shape. All
            but images are numbers in lists or in .npy format.
        normalize: What turns floats into x: `mean_std`, per channel to mean 0 and standard
            deviation 1 over the training split, `min_max`, to [−1, 1], or null for nothing.
            `auto` is mean_std for signal, volume, points and vector, and nothing otherwise.
        shape: Shape of every example, (channels, height, width) of images after the transforms.
        mode: Colour mode to which every picture is converted first, as PIL does: `RGB`, `L` (grey)
            or `RGBA`; null to convert none.
        transform: What is then done to every picture, in order: `Fit`, which resizes and crops or
            pads it to shape, and classes of torchvision.transforms.v2, by name or as
            class_path and init_args; null for nothing. Random ones act in training only.
        buckets: Sizes (height, width); every picture is resized and cropped to the one whose
            aspect ratio is nearest, before the transforms, which must leave the size alone, and
            each batch has one size; null for none. Needs streaming false. ``shape`` is then that
            of samples, and its channels those of all images.
        image_key: Column of the images.
        label_key: Column of the integer labels, null for none.
        condition_keys: Columns of further conditions, each a number or nested lists of numbers of
            the same shape in all examples. Name them in `model.conditions` to use them.
        text_key: Column of captions, strings, null for none. They become the entry `text` of a
            batch: (B, text_length) bytes in UTF-8, int64, 0 for padding.
        text_length: Longest caption in bytes; a longer one is a bad example. None means 256, and
            in a config the length of the network's encoder.
        train_split: Split to train on.
        val_split: Split to validate and test on, null for none; where the data have no split test,
            the default is none.
        val_share: Share of the training examples, between 0 and 1, that is left out of training
            and validated on, in place of val_split, as the split `held_out`; null for none. The
            same examples in each run, also when others are added or removed.
        batch_size: Examples in a batch, on each rank.
        streaming: Read row by row, without a copy of the data set in the cache. Otherwise all
            training images are decoded once, N·C·H·W bytes in the cache, and come from memory.
        cache_dir: Folder of the decoded images, null for ``lit_diffusion`` in the cache of
            ``datasets`` (which HF_DATASETS_CACHE and HF_HOME move).
        shuffle_window: Examples shuffled together when streaming.
        open_shards: Shards that each worker reads at once when streaming, at least 1; a window
            contains equally many examples of each.
        num_workers: Processes that read and decode, on each rank; 0 to do it in the main process.
        steps_per_epoch: Batches in an epoch; by default once through the data, or 1000 if their
            number is unknown.
        val_examples: Validate on the first so many examples only, null for all.
        horizontal_flip: Mirror each training image with probability one half.
        augment: Move training images at random and tell the network how, for small data: an
            `Augment`; null for none. The network needs `augment: 9`, which the command line sets.
        seed: Seed of order and flips; null means 0, in a command that of seed_everything.
        on_bad_example: What to do with an example that cannot be used (a broken or missing image,
            one of another size or mode, a missing label or caption, a shard that cannot be read):
            `skip` it, report it in a warning and in bad_examples.csv in the run folder, and take
            the next; or `raise` an error.
        max_bad_share: Largest share of the examples read that may be bad, from 0 to 1; more, and
            at least ten, end the run.
        on_changed_data: What to do if a run is resumed and the training data are not those of the
            checkpoint: `refuse`, or `continue` with them from the beginning of the next epoch.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        path: str = "digits8x8",
        data_files: dict[str, str | list[str]] | None = None,
        config_name: str | None = None,
        kind: Kind = "image",
        normalize: Literal["auto", "mean_std", "min_max"] | None = "auto",
        shape: tuple[int, ...] = (1, 8, 8),
        mode: Literal["L", "RGB", "RGBA"] | None = None,
        transform: list[Given] | None = None,
        buckets: tuple[tuple[int, int], ...] | None = None,
        image_key: str = "image",
        label_key: str | None = "label",
        condition_keys: tuple[str, ...] = (),
        text_key: str | None = None,
        text_length: int | None = None,
        train_split: str = "train",
        val_split: str | None = "test",
        val_share: float | None = None,
        batch_size: int = 64,
        streaming: bool = True,
        cache_dir: str | None = None,
        shuffle_window: int = 2048,
        open_shards: int = 4,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        val_examples: int | None = 10_000,
        horizontal_flip: bool = False,
        augment: Augment | None = None,
        seed: int | None = None,
        on_bad_example: Literal["skip", "raise"] = "skip",
        max_bad_share: float = 0.01,
        on_changed_data: Literal["refuse", "continue"] = "refuse",
    ) -> None:
        super().__init__()
        self.path, self.data_files, self.config_name = path, data_files, config_name
        self.shape = (*shape,)  # a config gives a list
        self.mode, self.transform, self.buckets = mode, transform, Buckets(buckets or ())
        self.kind, self.normalize = kind, normalize
        self.image_key, self.label_key = image_key, label_key
        self.condition_keys = tuple(condition_keys)
        self.text_key = text_key
        self.text_length = TEXT_LENGTH if text_length is None else text_length
        self.train_split, self.val_share = train_split, val_share
        self.val_split = val_split if val_share is None else HELD_OUT
        self.batch_size = batch_size
        self.streaming, self.cache_dir = streaming, cache_dir
        self.shuffle_window, self.open_shards = shuffle_window, open_shards
        self.num_workers, self.steps_per_epoch = num_workers, steps_per_epoch
        self.val_examples = val_examples
        self.horizontal_flip, self.augment = horizontal_flip, augment
        self.seed = 0 if seed is None else seed
        self.on_bad_example = on_bad_example
        self.max_bad_share, self.on_changed_data = max_bad_share, on_changed_data
        self.normalize = check_kind(self)
        self.transforms = Transforms.of(transform, self.shape, self.seed)
        check_share(val_share, val_split)
        check_arguments(self)
        self._forget()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the images, (C, H, W), where there are several: those of the buckets."""
        return self.buckets.shapes(self.shape[0])

    def _forget(self) -> None:
        self._folder: str | None = None
        self.normalization: Normalization | None = None
        self._train: Split | None = None
        self._memory: MemoryMap | None = None
        self._val: Split | None = None
        self._train_loader: TrainLoader | None = None
        self._val_loader: FixedBatches | None = None
        self._resume: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Open the splits and decode the first example of each, so that mistakes show early."""
        self._forget()
        self._folder = None if self.trainer is None else self.trainer.log_dir  # a collective
        splits = find_splits(self.path, self.data_files, self.config_name, self.streaming)
        if stage == "fit":
            self._train = self._open_split(splits, self.train_split, training=True)
            if not self.streaming:
                self._memory = self._open_map(self._train)
        if (val_split := validation_split(self, [*splits])) is not None:
            like = None if self._train is None else self._train.decoder
            self._val = self._open_split(splits, val_split, like)

    def train_dataloader(self) -> TrainLoader:
        """Return the endless stream, in epochs of a stated length."""
        if self._train_loader is None:
            if self._train is None:
                raise ValueError("expected setup('fit') before train_dataloader(): call it first")
            self._train_loader = train_loader(
                self,
                self._train,
                self._memory,
                *self._place(),
                self._bad_examples(self._train.name),
                self._allowed_share,
            )
            if self._resume is not None:
                self._train_loader.load_state_dict(self._resume)
        return self._train_loader

    def val_dataloader(self) -> FixedBatches | list[Any]:
        """Return this rank's share of the validation examples, each with its index."""
        if self._val is None:
            return []  # Lightning takes this as no validation
        if self._val_loader is None:
            rank, world = self._place()
            examples, shapes = list(self._val.source.head(self.val_examples)), None
            if self._skip or self.buckets:
                bad_examples = self._bad_examples(self._val.name)
                examples, found = usable(
                    self._val, examples, bad_examples, report=rank == 0, skip=self._skip
                )
                shapes = found if self.buckets else None
            self._val_loader = FixedBatches(
                self._val, examples, self.batch_size, rank, world, shapes
            )
        return self._val_loader

    def test_dataloader(self) -> FixedBatches | list[Any]:
        """Return what `val_dataloader` returns: there is one held-out split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> FixedBatches | list[Any]:
        """Return what `val_dataloader` returns: one image is sampled for each of its examples."""
        return self.val_dataloader()

    def examples(self, split: str, batch_size: int) -> Iterator[dict[str, Any]]:
        """Yield the usable examples of a whole split in order, each once, as batches of uint8.

        For statistics of a data set. Of R ranks each gets every R-th batch, whose "batch" entry is
        its global index.

        Args:
            split: Name of the split.
            batch_size: Examples in a batch before the bad ones are left out.

        Raises:
            BadExample: For the first bad one, if `on_bad_example` is `raise`.
            ValueError: If there is no such split, too many examples are bad, or there are buckets
                and so several sizes, unless batch_size is 1.
        """
        if self.buckets and batch_size > 1:
            raise ValueError(
                "expected pictures of one size for statistics of a whole split, such as FID, and "
                "for encoding, got data.buckets; measure with data.buckets null and "
                "data.transform [Fit], which makes all of them the size of data.shape"
            )
        bad_examples = self._bad_examples(split)
        yield from in_order(
            self.open_split(split), batch_size, *self._place(), bad_examples, self._skip
        )

    def open_split(self, name: str) -> Split:
        """Open a split, whether or not `setup` has opened it, and decode its first example.

        Args:
            name: Of the split.

        Raises:
            BadExample: If none of its first examples can be used.
            ValueError: If there is no such split.
        """
        splits = find_splits(self.path, self.data_files, self.config_name, self.streaming)
        return self._open_split(splits, name)

    def splits_in_use(self) -> list[str]:
        """Return the names of the splits to train and to validate on."""
        found = find_splits(self.path, self.data_files, self.config_name, self.streaming)
        return [*filter(None, dict.fromkeys((self.train_split, validation_split(self, [*found]))))]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn bytes into x in [−1, 1], on the device; half-precision images become float32.

        With `trainer.precision: 64-true` x is float64, with the values that it has in float32.
        """
        if not isinstance(batch, dict):
            return batch
        x = batch["image"]
        if x.dtype == torch.uint8:
            x = x.float().div_(127.5).sub_(1.0)
        elif x.is_floating_point():
            x = at_least_float32(x)
            self.settle_normalization(getattr(self.trainer, "lightning_module", None))
            if self.normalization is not None:
                x = self.normalization.normalize(x)
        if self.augment is not None and "augment" in batch:  # in training only
            x = self.augment(x, batch["augment"])
        if self.trainer is not None and self.trainer.precision == "64-true":
            x = x.double()
        return batch if x is batch["image"] else batch | {"image": x}

    def settle_normalization(self, model: Any) -> None:
        """Take the normalisation of a model, or measure it for one that has none; a collective.

        Args:
            model: The model, which then has it, or None.

        Raises:
            ValueError: If the model was trained on data of another kind or normalisation.
        """
        if self.normalization is None:
            place = self._place()
            self.normalization = settle(self, model, self._train, self._memory, *place)

    def state_dict(self) -> dict[str, Any]:
        """Return the place of training in the data.

        Lightning saves the loader's state too, but drops it on resume once somebody has asked for
        `trainer.estimated_stepping_batches`; this copy is always restored.
        """
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the loader, which does not exist yet."""
        self._resume = state_dict

    def teardown(self, stage: str) -> None:
        """Stop the workers."""
        if self._train_loader is not None:
            self._train_loader.close()

    def _place(self) -> tuple[int, int]:
        """Return (rank, number of ranks)."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    @property
    def _skip(self) -> bool:
        return self.on_bad_example == "skip"

    @property
    def _allowed_share(self) -> float | None:
        """Largest share of bad examples that is skipped, None to skip none."""
        return self.max_bad_share if self._skip else None

    def _bad_examples(self, split: str) -> BadExamples:
        rank, world = self._place()
        return BadExamples(split, self.max_bad_share, self._folder, rank if world > 1 else None)

    def _open_split(
        self, splits: Splits, name: str, like: ImageDecoder | None = None, training: bool = False
    ) -> Split:
        """Open a split; its examples must look as another decoder expects, or like its first."""
        columns = Columns(self.image_key, self.label_key, self.condition_keys, self.text_key)
        held_out = self.val_share is not None and name == HELD_OUT
        stored = self.train_split if held_out else name
        source = open_source(splits, stored, columns, self.open_shards, self._skip)
        if self.val_share is not None and stored == self.train_split:
            source = part_of(source, self.val_share, held_out, self.path)
        decoder = decoder_of(self, splits.paths, like, training)
        split = Split(name, source, decoder).like_first(FIRST_LOOK if self._skip else 1)
        check_first(self, split.decoder.like["image"])
        if source.lost:
            bad_examples, lost = self._bad_examples(name), lost_rows(source.lost)
            bad_examples.add(list(source.lost) if self._place()[0] == 0 else [])
            bad_examples.judge((source.total or 0) + lost, lost)
        return split

    def _open_map(self, split: Split) -> MemoryMap:
        identity = map_identity(self, split)
        memory = open_map(split, identity, cache_folder(self.cache_dir), self._allowed_share)
        self._bad_examples(split.name).add(memory.bad if self._place()[0] == 0 else [])
        return memory
