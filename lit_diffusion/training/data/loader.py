"""The loader that Lightning iterates over: epochs of a stated length from an endless stream."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_diffusion.training.data.bad_examples import BadExamples
from lit_diffusion.training.data.retry import prepare_to_fork
from lit_diffusion.training.data.stream import Position, ShuffledBatches


class TrainLoader:
    """What Lightning iterates over: `steps` batches an epoch of a stream that goes on for ever.

    It has a length, so Lightning neither prefetches a batch nor loses it in a checkpoint, and all
    ranks make the same number of steps. Its state holds the positions of all ranks.
    `wait_seconds` is the time that its user has waited for batches so far, in seconds: it only
    grows, and a difference of two readings is what was lost to the data between them.

    Args:
        batches: The stream.
        steps: Batches in what Lightning calls an epoch.
        num_workers: Processes that read and decode; 0 does it in this one.
        settings: What must not change between a checkpoint and its resumption.
        pin_memory: Put batches where a GPU can fetch them without waiting.
        bad_examples: Is told what was left out, and says when it is too much.
    """

    def __init__(
        self,
        batches: ShuffledBatches,
        steps: int,
        num_workers: int,
        settings: dict[str, Any],
        pin_memory: bool = False,
        bad_examples: BadExamples | None = None,
    ) -> None:
        self.batches = batches
        self.steps = steps
        self.num_workers = num_workers
        self.settings = settings
        self.pin_memory = pin_memory
        self.bad_examples = bad_examples
        self.positions = [Position()] * max(1, num_workers)
        self.turn = 0
        self.wait_seconds = 0.0
        self._stream: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.steps):
            asked = perf_counter()
            if self._stream is None:
                self._stream = self._open()
            batch, position, *found = next(self._stream)
            self.wait_seconds += perf_counter() - asked
            if isinstance(batch, Exception):
                self.close()
                raise batch
            self.positions[self.turn] = position
            self.turn = (self.turn + 1) % len(self.positions)
            if self.bad_examples is not None and any(found):
                self.bad_examples.add(*found)
                self.bad_examples.judge(*self.counts())
            yield batch

    def counts(self) -> tuple[int, int]:
        """Return how many examples this rank has read, and how many of them were bad."""
        return sum(one.read for one in self.positions), sum(one.bad for one in self.positions)

    def state_dict(self) -> dict[str, Any]:
        """Return where every rank stands; a collective operation, so every rank must call it."""
        mine = {"turn": self.turn, "positions": [list(position) for position in self.positions]}
        ranks: list[Any] = [mine]
        if self.batches.world > 1 and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
        return {"settings": self.settings, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state says; refuse if that would not be the same stream."""
        then = state["settings"]
        for key, now in self.settings.items():
            if then.get(key) != now:
                raise ValueError(
                    f"cannot resume the data: {key} was {then.get(key)} in the checkpoint and is "
                    f"{now} now; set it back, or start a new run"
                )
        mine = state["ranks"][self.batches.rank]
        self.close()
        self.positions = [
            Position(*counts, cursors=tuple(map(tuple, cursors)))
            for *counts, cursors in mine["positions"]
        ]
        self.turn = mine["turn"]

    def close(self) -> None:
        """Stop the workers; the next batch would start new ones at the same place."""
        self._stream = None

    def _open(self) -> Iterator[Any]:
        self.batches.begin_at(self.positions, self.turn)
        if self.num_workers:
            prepare_to_fork()
        loader = DataLoader(
            self.batches,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        return iter(loader)


def _as_it_is(item: Any) -> Any:
    return item
