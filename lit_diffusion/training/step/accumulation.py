"""An optimizer step whose gradient is accumulated over several micro-batches.

    gradient of a step = ∇ (1/N) Σ_i L_i      over its N examples, of all its micro-batches

Lightning divides the loss of each micro-batch by `accumulate_grad_batches`. This is the mean above
if a step has so many micro-batches, all of one size. The last step of an epoch may have fewer, and
the last batch may be smaller: each loss is therefore weighted by its number of examples, and the
gradient of such a step is scaled once it is complete. Ranks count equally, as in the mean over the
ranks that DDP computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

__all__ = ["MicroBatch", "StepMean", "micro_batch", "scale_gradients"]


class MicroBatch(NamedTuple):
    """The place of a micro-batch in its optimizer step.

    Args:
        index: Its index in the step, from 0.
        count: Micro-batches of the step. In a stream of unknown length the last step of an epoch
            may turn out to have fewer.
        last: Whether the optimizer step follows it.
    """

    index: int  # type: ignore[assignment]
    count: int  # type: ignore[assignment]
    last: bool


def micro_batch(trainer: L.Trainer, batch_idx: int) -> MicroBatch:
    """The place of a batch in its optimizer step.

    Args:
        trainer: In training.
        batch_idx: Index of the batch in its epoch.
    """
    nominal, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    index = batch_idx % nominal
    count = int(min(nominal, max(1, batches - (batch_idx - index))))  # of inf batches: nominal
    return MicroBatch(index, count, index == count - 1 or trainer.is_last_batch)


class StepMean:
    """Means over the examples of an optimizer step, and the scale of its gradient.

    Args:
        step: Number of the optimizer step.

    Example:
        >>> import torch
        >>> mean = StepMean(step=0)
        >>> for examples, loss in ((2, 1.0), (1, 4.0)):
        ...     mean.add(examples, torch.tensor([loss]))
        >>> mean.means, round(mean.scale(nominal=2), 3)
        (tensor([2.]), 1.333)
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.means = torch.zeros(0)  # empty before the first micro-batch
        self._examples = self._first = 0

    def add(self, examples: int, means: Tensor) -> None:
        """Add the means of a micro-batch.

        Args:
            examples: Their number in the micro-batch.
            means: The means over them, detached.
        """
        first = self._examples == 0
        self._examples += examples
        if first:
            self._first, self.means = examples, means
        else:
            self.means = self.means + (means - self.means) * (examples / self._examples)

    def weight(self, examples: int) -> float:
        """The factor of a micro-batch's loss: its size over that of the first one of the step.

        Args:
            examples: Their number in the micro-batch.
        """
        return examples / self._first

    def scale(self, nominal: int) -> float:
        """The factor that makes the accumulated gradient that of the mean over all examples.

        Args:
            nominal: The number that Lightning has divided the loss of each micro-batch by.
        """
        return nominal * self._first / self._examples


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply the gradients in place.

    Args:
        parameters: Those without a gradient are left out.
        factor: Where it is 1, nothing is done.
    """
    if factor != 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
