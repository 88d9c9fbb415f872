"""Conditions of samples that the examples of a data set have: sample i has those of example i.

A checkpoint holds no attributes, sketches or texts, so a model that is conditioned on them is
sampled under those of real examples, in the order in which they are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.module import LitDiffusion

__all__ = ["RowConditions", "check_enough"]


def check_enough(data: DataModule, split: str, num_samples: int) -> None:
    """Refuse more samples than there are examples.

    Args:
        data: The data.
        split: Its split.
        num_samples: Number of samples.

    Raises:
        ValueError: If there are fewer examples, or no such split.
    """
    total = data.open_split(split).source.total
    if total is not None and num_samples > total:
        raise ValueError(
            f"Expected at most {total} samples of a model with conditions, one per example of "
            f"split {split!r}, got num_samples={num_samples}: set it lower."
        )


class RowConditions:
    """The conditions of one batch of samples after another, from the examples of a split.

    Where examples are bad, or lack at the end, the others of their batch are repeated.

    Args:
        model: The model, whose `condition` computes them.
        data: The data.
        split: Its split.
        batch_size: Samples in a batch. Of R ranks each gets every R-th batch.
    """

    def __init__(self, model: LitDiffusion, data: DataModule, split: str, batch_size: int) -> None:
        self._model, self._data = model, data
        data.settle_normalization(model)
        self._batches = data.examples(split, batch_size)
        self._present: dict[str, Any] | None = None

    def __call__(self, number: int, n: int) -> dict[str, Tensor]:
        """The conditions of a batch, with its labels if the model has classes.

        Args:
            number: Of the batch, in increasing order.
            n: Its samples.

        Shapes:
            each (n, *).
        """
        while self._present is None or self._present["batch"] < number:
            following = next(self._batches, None)
            if following is None:
                break
            self._present = following
        if self._present is None:
            raise ValueError("Expected examples to take conditions from, got none.")
        device = self._model.device
        batch = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self._present.items()
        }
        batch = self._model.standard(self._data.on_after_batch_transfer(batch, 0))
        rows = torch.arange(n, device=device) % len(batch["image"])
        return {name: value[rows] for name, value in self._model.condition(batch).items()}
