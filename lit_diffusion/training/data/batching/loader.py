"""The loader that Lightning iterates over: epochs of a stated length from an endless stream."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_diffusion.training.data.batching.class_mix import ClassMix
from lit_diffusion.training.data.batching.lane import Delivery, Failure, LaneBatches
from lit_diffusion.training.data.batching.resumption import change_of_data, check_settings
from lit_diffusion.training.data.batching.workers import Workers
from lit_diffusion.training.data.reading.bad_examples import BadExamples
from lit_diffusion.training.data.reading.order import Position
from lit_diffusion.training.data.reading.retry import close_connections
from lit_diffusion.training.run.messages import inform, warn


class TrainLoader:
    """Epochs of `steps` batches each from an endless stream.

    It has a length, so Lightning neither prefetches a batch nor loses one in a checkpoint, and all
    ranks make the same number of steps. Its state contains the positions of all ranks.

    Workers are started as torch's default for the platform says: forked on Linux (with Python 3.14
    by a fork server), spawned elsewhere.

    Args:
        batches: The stream.
        steps: Batches in what Lightning calls an epoch.
        num_workers: Processes that read and decode; 0 reads in this one.
        settings: What must not change between a checkpoint and its resumption.
        pin_memory: Copy batches to page-locked memory, for a faster transfer to a GPU.
        bad_examples: Reports skipped examples, and raises an error if they are too many.
        on_changed_data: `refuse` a state of other data, or `continue` with the next epoch.
        repeat: Repeat the first so many batches in each epoch, from which the trainer takes no
            others; 0 means all of the stream.

    Attributes:
        wait_seconds: Seconds spent so far waiting for batches. It only grows; the difference of
            two readings is the time lost to the data between them.
    """

    def __init__(
        self,
        batches: LaneBatches,
        steps: int,
        num_workers: int,
        settings: dict[str, Any],
        pin_memory: bool = False,
        bad_examples: BadExamples | None = None,
        on_changed_data: str = "refuse",
        repeat: int = 0,
    ) -> None:
        self.batches = batches
        self.steps = steps
        self.num_workers = num_workers
        self.settings = settings
        self.pin_memory = pin_memory
        self.bad_examples = bad_examples
        self.on_changed_data = on_changed_data
        self.repeat = min(repeat, steps)
        self.positions = [Position()] * max(1, num_workers)
        self.turn = 0
        self.wait_seconds = 0.0
        self._stream: Iterator[Delivery | Failure] | None = None
        self._workers: Workers | None = None
        self._change: str | None = None  # of the data, since the checkpoint
        self._mix = ClassMix() if batches.rank == 0 and batches.mixed else None
        self._kept: list[dict[str, Tensor]] = []  # the batches to repeat
        self._next = 0  # which of them

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if not self.repeat:
            for _ in range(self.steps):
                yield self._deliver()
        for i in range(self._next % max(1, self.repeat), self.repeat):
            while len(self._kept) <= i:
                self._kept.append(self._deliver())
            self._next = i + 1
            yield dict(self._kept[i])

    def _deliver(self) -> dict[str, Tensor]:
        """The next batch of the stream."""
        asked = perf_counter()
        if self._stream is None:
            self._stream = self._open()
        delivery = self._next_delivery(self._stream)
        self.wait_seconds += perf_counter() - asked
        if isinstance(delivery, Failure):
            self.close()
            raise delivery.error
        self.positions[self.turn] = delivery.position
        self.turn = (self.turn + 1) % len(self.positions)
        if self.bad_examples is not None and delivery.bad:
            self.bad_examples.add(delivery.bad)
            self.bad_examples.judge(*self.counts())
        if self._mix is not None and "label" in delivery.batch:
            self._warn_of_sorted_data(self._mix, delivery.batch["label"])
        return delivery.batch

    def _warn_of_sorted_data(self, mix: ClassMix, label: Tensor) -> None:
        if (found := mix.add(label)) is not None:
            warn(
                f"The data seem to be sorted by class: {found}. Shuffle them in their files, set "
                "data.shuffle_window to a multiple of a class's examples, or data.streaming to "
                "false."
            )

    def _next_delivery(self, stream: Iterator[Delivery | Failure]) -> Delivery | Failure:
        if self._workers is None:
            return next(stream)
        try:
            found: Delivery | Failure = self._workers.next(stream)
            return found
        except OSError:
            self.close()
            raise

    def counts(self) -> tuple[int, int]:
        """Return how many examples this rank has read, and how many of them were bad."""
        return sum(one.read for one in self.positions), sum(one.bad for one in self.positions)

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all ranks; a collective operation: every rank must call it."""
        mine: dict[str, Any] = {
            "turn": self.turn,
            "positions": [list(position) for position in self.positions],
        }
        if self.repeat:
            mine["next"] = self._next
        ranks: list[Any] = [mine]
        if self.batches.world > 1 and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
        return {"settings": self.settings, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: If a setting has changed, so that the stream would be another; if the data
                have, unless they are to be used as they are now.
        """
        check_settings(state["settings"], self.settings)
        change = change_of_data(state["settings"], self.settings)
        if change and self.on_changed_data == "refuse":
            raise ValueError(
                f"cannot resume the data: {change}; restore the data, start a new run, or set "
                "data.on_changed_data to continue to go on with the next epoch of the data as "
                "they are now"
            )
        if change and change != self._change:  # Lightning may hand over the state twice
            inform(f"Training continues with other data: {change}.")
        self._change = change
        self.close()
        mine = state["ranks"][self.batches.rank]
        if self.repeat:  # the batches are the first ones, wherever the stream was
            self._next = 0 if change else mine.get("next", 0)
            return
        if change:
            epochs = [one[0] for rank in state["ranks"] for one in rank["positions"]]
            self.positions = [Position(max(epochs) + 1)] * len(self.positions)
            self.turn = 0
            return
        self.positions = [
            Position._make((*counts, tuple(map(tuple, cursors))))
            for *counts, cursors in mine["positions"]
        ]
        self.turn = mine["turn"]

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones at the same position."""
        if self._workers is not None:
            self._workers.ask_to_end()
        self._stream = None  # torch tells the workers to end, and waits for them
        if self._workers is not None:
            self._workers.end()
            self._workers = None

    def _open(self) -> Iterator[Delivery | Failure]:
        self.batches.begin_at(self.positions, self.turn)
        arguments: dict[str, Any] = {
            "dataset": self.batches,
            "batch_size": None,  # they are batches already
            "collate_fn": _unchanged,
            "pin_memory": self.pin_memory,
            "generator": torch.Generator(),  # its own, to leave the global one untouched
        }
        if not self.num_workers:
            return iter(DataLoader(**arguments))
        close_connections()
        self._workers = Workers(self.num_workers)
        return self._workers.start(**arguments)


def batches_to_repeat(trainer: L.Trainer | None, steps: int) -> int:
    """How many batches a trainer is to overfit; 0 for none.

    Args:
        trainer: Has `overfit_batches`, a number of batches or a share of them.
        steps: Batches in an epoch.
    """
    asked: int | float = getattr(trainer, "overfit_batches", 0)
    return asked if isinstance(asked, int) else int(asked * steps)


def _unchanged(item: Any) -> Any:  # torch's type is that of a function of a list
    return item
