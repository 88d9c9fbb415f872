"""Data of one's own in a run: a data set with its loader, and which promises are then whose.

    Dataset, Dataset | None  →  DatasetModule  →  batches, as torch's DataLoader makes them
    epoch e, seed s          →  EpochOrder     →  a permutation of the examples

The order of a data set with numbered examples is a function of the seed and the epoch alone, so
that a resumed run finds its place by counting. An iterable data set has no numbers: its order, and
its division among ranks, are its own affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lit_diffusion.training.data.batching.resumption import check_settings
from lit_diffusion.training.data.module import DataModule

__all__ = ["DatasetModule", "EpochOrder", "promises", "shape_of"]


class EpochOrder(DistributedSampler[Any]):
    """The numbers of this rank's examples, in an order that is a function of seed and epoch.

    It is a `DistributedSampler`, so that Lightning tells it the epoch and adds no other. If the
    examples cannot be divided equally among the ranks, the first few of the order come twice.

    Args:
        data: The data set, with a length.
        world: Number of ranks.
        rank: This rank.
        shuffle: Whether each epoch has another order.
        seed: Seed of the orders.
    """

    def __init__(
        self,
        data: Dataset[Any],
        world: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(data, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self._resumed = (0, 0)

    def continue_at(self, epoch: int, examples: int) -> None:
        """Leave out the first examples of an epoch, which are trained on already.

        Args:
            epoch: The epoch.
            examples: Their number on this rank.
        """
        self._resumed = (epoch, examples)

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self._resumed
        yield from [*super().__iter__()][done if epoch == self.epoch else 0 :]


class DatasetModule(L.LightningDataModule):
    """Data sets of torch as the data of a run, exactly resumable if they have numbers.

    Of a data set with `__getitem__` and `__len__` every example comes once an epoch, over all
    ranks (the first few twice, if the ranks cannot share them equally), and a resumed run
    continues with the next batch. An `IterableDataset` has neither promise: it is read from its
    beginning in each epoch, by each rank and worker, and after resuming.

    Args:
        train: Training examples: dicts of tensors, pairs (image, label), or images.
        val: Examples to validate and test on, null for none.
        batch_size: Examples in a batch, on each rank.
        num_workers: Processes that make examples, on each rank; 0 to do it in the main process.
        shuffle: Whether each epoch has another order; an iterable data set has its own.
        seed: Seed of the order; null means 0, in a command that of seed_everything.

    Raises:
        TypeError: If train or val is not a data set.
        ValueError: If batch_size or num_workers is out of its range.

    Example:
        >>> images = torch.utils.data.TensorDataset(torch.zeros(6, 1, 8, 8))
        >>> data = DatasetModule(images, batch_size=4)
        >>> [len(batch[0]) for batch in data.train_dataloader()]
        [4, 2]
    """

    def __init__(
        self,
        train: Dataset,
        val: Dataset | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, data in (("train", train), ("val", val)):
            if not isinstance(data, Dataset | None) or (data is None and name == "train"):
                raise TypeError(f"{name} must be a torch.utils.data.Dataset, got {data!r}.")
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                "batch_size must be at least 1 and num_workers at least 0, got "
                f"{batch_size} and {num_workers}."
            )
        self.train, self.val = train, val
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.seed = 0 if seed is None else seed
        self._order: EpochOrder | None = None
        self._resume: dict[str, Any] | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches of an epoch, of this rank."""
        if isinstance(self.train, IterableDataset):
            return self._loader(self.train)
        world, rank = self._place()
        self._order = EpochOrder(self.train, world, rank, self.shuffle, self.seed)
        if self._resume is not None:
            examples = self._resume["batches"] * self.batch_size
            self._order.continue_at(self._resume["epoch"], examples)
        return self._loader(self.train, self._order)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches, in their order; an empty list if there are none."""
        return [] if self.val is None else self._loader(self.val)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return what `val_dataloader` returns."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return what `val_dataloader` returns."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the place of training in the data: the epoch, and the batches done of it."""
        if self._order is None or self.trainer is None:
            return {}
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        settings = self._settings(self._order.num_replicas)
        return {"settings": settings, "epoch": self._order.epoch, "batches": batches.processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for the loader, which does not exist yet.

        Args:
            state_dict: From `state_dict`.

        Raises:
            ValueError: If training would continue in another order.
        """
        if self.trainer is None or self.trainer.state.fn != "fit" or not state_dict:
            return  # an evaluation has no place
        # Here, since Lightning leaves DataLoader patched after an error in `train_dataloader`.
        check_settings(state_dict["settings"], self._settings(self._place()[0]))
        self._resume = state_dict

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)

    def _settings(self, world: int) -> dict[str, Any]:
        """What the order depends on, by the names of the command line."""
        return {
            "loader.batch_size": self.batch_size,
            "loader.shuffle": self.shuffle,
            "loader.seed": self.seed,
            "number of ranks": world,
            "number of training examples": len(self.train),  # type: ignore[arg-type]
        }

    def _loader(self, data: Dataset[Any], order: EpochOrder | None = None) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.batch_size,  # by its name, or Lightning cannot predict with it
            sampler=order,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one untouched
        )


def promises(data: Any) -> str | None:
    """What a run on data of one's own does not promise, in a sentence; None if nothing.

    Args:
        data: The data of the run.
    """
    if isinstance(data, DataModule):
        return None
    if not isinstance(data, DatasetModule):
        return (
            f"The order of the examples is that of {type(data).__name__}: that a resumed run "
            "continues with the same batches, and that each example comes once an epoch over all "
            "ranks, is up to it."
        )
    if not isinstance(data.train, IterableDataset):
        return None
    return (
        f"{type(data.train).__name__} is iterable and has no numbered examples: that a resumed "
        "run continues with the same batches (it is read from its beginning), and that each "
        "example comes once an epoch over all ranks and workers (each reads all of it), is up "
        "to it."
    )


def shape_of(data: Any, keys: Mapping[str, Any] | None = None) -> tuple[int, ...] | None:
    """The shape of an example, by the attribute `shape` or the first example; None if unknown.

    Args:
        data: The data of the run.
        keys: As `LitDiffusion(keys=…)`.
    """
    found = getattr(data, "shape", None)
    if isinstance(found, (tuple, list, torch.Size)):
        return (*found,)
    if not isinstance(data, DatasetModule) or isinstance(data.train, IterableDataset):
        return None
    first: Any = data.train[0]
    if not isinstance(first, Tensor):
        place = (keys or {}).get("image", "image" if isinstance(first, Mapping) else 0)
        try:
            first = first[place]
        except (KeyError, IndexError, TypeError):
            return None  # the first batch will say what is wrong
    return (*first.shape,) if isinstance(first, Tensor) else None
