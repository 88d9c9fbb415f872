"""The endless batches of one rank, divided among its workers, with a position after each batch."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lit_diffusion.training.data.decoding.augment import Augment
from lit_diffusion.training.data.decoding.images import mirror
from lit_diffusion.training.data.reading.bad_examples import Bad
from lit_diffusion.training.data.reading.order import Position, coin
from lit_diffusion.training.data.reading.retry import begin_after_fork


class Delivery(NamedTuple):
    """A batch, the position of its lane after it, and the bad examples met on the way."""

    batch: dict[str, Tensor]
    position: Position
    bad: Sequence[Bad] = ()


class Failure(NamedTuple):
    """An error that ended a lane.

    It leaves the worker as a value: an error raised there would reach the user with the traceback
    of another process around it.
    """

    error: OSError | ValueError


class LaneBatches(IterableDataset[Delivery | Failure], ABC):
    """The endless batches of one rank; each of its workers iterates over one lane.

    Args:
        batch_size: Examples in a batch.
        seed: Seed of the order and of the flips.
        flip: Mirror each image with probability one half.
        rank: This rank.
        world: Number of ranks.

    Attributes:
        mixed: Whether a batch should have the classes that a random one would have.
        augment: What is to be done to the images on the device, and told the network.
    """

    mixed = True
    augment: Augment | None = None

    def __init__(self, batch_size: int, seed: int, flip: bool, rank: int, world: int) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.rank = rank
        self.world = world
        self.positions = [Position()]
        self.turn = 0

    def begin_at(self, positions: list[Position], turn: int) -> None:
        """Set where the next iteration begins.

        Args:
            positions: Position of each worker's lane.
            turn: Index of the lane whose batch is next.
        """
        self.positions = list(positions)
        self.turn = turn

    def __iter__(self) -> Iterator[Delivery | Failure]:
        worker = get_worker_info()
        if worker is not None:
            begin_after_fork()
            # Ctrl-C reaches every process of a terminal; the trainer ends its workers itself.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        workers = len(self.positions)
        mine = (self.turn + (worker.id if worker else 0)) % workers
        lane, lanes = self.rank * workers + mine, self.world * workers
        try:
            yield from self.batches(lane, lanes, self.positions[mine])
        except (OSError, ValueError) as error:
            # A plain copy, since some libraries' errors cannot be pickled.
            kinds = (FileNotFoundError, ConnectionError, OSError, ValueError)
            yield Failure(next(kind for kind in kinds if isinstance(error, kind))(str(error)))

    def varied(
        self, batch: dict[str, Tensor], epochs: Sequence[int] | npt.NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """Mirror some of the images, and say how each is to be augmented.

        Args:
            batch: The batch, whose images are changed in place.
            epochs: Epoch of each example.
        """
        index = batch["index"].numpy()
        if self.flip:
            mirror(batch["image"], coin(self.seed, epochs, index))
        if self.augment is not None:
            batch["augment"] = self.augment.describe(self.seed, epochs, index)
        return batch

    @abstractmethod
    def batches(self, lane: int, lanes: int, position: Position) -> Iterator[Delivery]:
        """Yield the batches of one lane for ever.

        Args:
            lane: Index of the lane.
            lanes: Number of lanes, over all ranks.
            position: Where to begin.
        """
