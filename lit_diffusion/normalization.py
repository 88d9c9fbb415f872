"""Normalisation: data of any unit, as x of about the size that a diffusion model expects.

The noise process compares the data with noise of variance 1, and schedules are made for data whose
size is about that. So each channel c of continuous data is shifted and scaled,

    x_c = (y_c − shift_c) / scale_c,

and samples are put back into the unit of the data. A density changes with the unit: per dimension,
−log p(y) = −log p(x) + mean_c log scale_c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Normalization"]


class Normalization:
    """A shift and a scale for each channel, as measured on the training data.

    Both are constants of the model, in float64 on the CPU whatever the type and the device of the
    network; they are kept beside the weights, not among them.

    Args:
        shift: What is subtracted from each channel, in the unit of the data.
        scale: By what each channel is then divided, above 0, in the same unit.

    Raises:
        ValueError: If they have different lengths, or a number is not finite, or a scale not
            above 0.

    Example:
        >>> normalization = Normalization(shift=[10.0], scale=[2.0])
        >>> normalization.normalize(torch.tensor([[[8.0, 10.0, 14.0]]]))
        tensor([[[-1.,  0.,  2.]]])
        >>> normalization.restore(torch.tensor([[[-1.0, 0.0, 2.0]]]))
        tensor([[[ 8., 10., 14.]]])
    """

    def __init__(self, shift: Sequence[float], scale: Sequence[float]) -> None:
        self.shift = torch.tensor([float(one) for one in shift], dtype=torch.float64)
        self.scale = torch.tensor([float(one) for one in scale], dtype=torch.float64)
        numbers = [*self.shift.tolist(), *self.scale.tolist()]
        if len(self.shift) != len(self.scale) or not all(map(math.isfinite, numbers)):
            raise ValueError(
                "Normalization: expected a finite shift and scale for each channel, got "
                f"{self.shift.tolist()} and {self.scale.tolist()}."
            )
        if not bool((self.scale > 0).all()):
            raise ValueError(f"Normalization: scale must be above 0, got {self.scale.tolist()}.")

    def normalize(self, x: Tensor) -> Tensor:
        """Compute (x − shift) / scale, for each channel.

        Args:
            x: Data in their unit.

        Shapes:
            x and result (B, C, *).
        """
        return (x - self._like(self.shift, x)) / self._like(self.scale, x)

    def restore(self, x: Tensor) -> Tensor:
        """Put x back into the unit of the data, x · scale + shift, for each channel.

        Args:
            x: Normalised data, such as samples.

        Shapes:
            x and result (B, C, *).
        """
        return x * self._like(self.scale, x) + self._like(self.shift, x)

    @property
    def mean_log_scale(self) -> float:
        """What one dimension of the data costs more, in nats, than one of the normalised data."""
        return float(self.scale.log().mean())

    @property
    def description(self) -> dict[str, Any]:
        """The arguments, as plain data."""
        return {"shift": self.shift.tolist(), "scale": self.scale.tolist()}

    def _like(self, values: Tensor, x: Tensor) -> Tensor:
        values = values.to(x.device, x.dtype, non_blocking=True)
        return values.reshape(-1, *[1] * (x.ndim - 2))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normalization) and self.description == other.description

    def __hash__(self) -> int:
        return hash(repr(self.description))

    def __repr__(self) -> str:
        found = self.description
        return f"Normalization(shift={found['shift']}, scale={found['scale']})"
