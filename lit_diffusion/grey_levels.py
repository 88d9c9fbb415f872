"""Grey levels: the grid of values that discrete data can take.

Images are discrete: each value is one of 256 bytes or of 17 grey levels. A likelihood in bits per
dimension is the number of bits needed to encode *those* values, so whatever turns a density into
bits (a decoder, a dequantiser) needs the grid, and the data must lie on it.

Letters: L number of levels, v_k their values in increasing order, on [−1, 1].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Levels", "level_borders", "level_index", "level_values"]

Levels = int | tuple[float, ...]
"""A number of evenly spaced levels from −1 to 1, or their values."""

_TOLERANCE = 1e-4  # of a value; bytes lie 8e-3 apart, float32 rounds at 6e-8


@lru_cache(maxsize=32)
def level_values(levels: Levels) -> Tensor:
    """The values v_k of the grid.

    A number up to 256 means that many levels, evenly spaced over the bytes 0 … 255 of an image
    file, rounded, and mapped to k/127.5 − 1; above 256, evenly spaced from −1 to 1.

    Args:
        levels: Number of levels, at least 2; or their values, increasing, on [−1, 1].

    Shapes:
        result (L,), float64.

    Raises:
        ValueError: If there are fewer than two, or they do not increase or lie outside [−1, 1].

    Example:
        >>> level_values(3)  # the bytes 0, 128, 255
        tensor([-1.0000,  0.0039,  1.0000], dtype=torch.float64)
    """
    if not isinstance(levels, int | tuple):
        raise ValueError(
            f"Expected a number of levels or a tuple of their values, got {levels!r:.60}."
        )
    if isinstance(levels, int):
        if levels < 2:
            raise ValueError(f"Expected at least 2 levels, got {levels}.")
        if levels > 256:
            return torch.linspace(-1, 1, levels, dtype=torch.float64)
        bytes_ = (torch.arange(levels, dtype=torch.float64) * 255 / (levels - 1)).round()
        return bytes_ / 127.5 - 1
    values = torch.tensor(levels, dtype=torch.float64)
    if len(values) < 2 or not bool((values.diff() > 0).all()) or values.abs().max() > 1:
        raise ValueError(
            f"Expected at least 2 increasing levels on [−1, 1], got {len(values)}: {levels!r:.60}."
        )
    return values


def level_borders(levels: Levels) -> Tensor:
    """The borders halfway between neighbouring levels: (v_k + v_{k+1})/2.

    Args:
        levels: The grid.

    Shapes:
        result (L − 1,), float64.

    Example:
        >>> level_borders((-1.0, 0.0, 1.0))
        tensor([-0.5000,  0.5000], dtype=torch.float64)
    """
    values = level_values(levels)
    return (values[1:] + values[:-1]) / 2


def level_index(x: Tensor, levels: Levels, check: bool = True) -> Tensor:
    """The index of the level of each value.

    Args:
        x: Data on the grid.
        levels: The grid.
        check: Whether to check that they lie on it, which on a GPU synchronises with the device.

    Shapes:
        x any; result the same, int64.

    Raises:
        ValueError: If x lies outside [−1, 1] or not on the grid.

    Example:
        >>> level_index(torch.tensor([-1.0, 1.0, 0.0]), (-1.0, 0.0, 1.0))
        tensor([0, 2, 1])
        >>> level_index(torch.tensor([0.3]), 2)
        Traceback (most recent call last):
        ValueError: The data do not match levels=2: 0.3 is not among the 2 values from -1 to 1...
    """
    index = torch.bucketize(x.detach().contiguous(), level_borders(levels).to(x.device, x.dtype))
    if check:
        worst = float(x.detach().abs().max())
        if not worst <= 1 + _TOLERANCE:
            raise ValueError(
                f"Expected data in [−1, 1], got |x| up to {worst:.6g}: map bytes k to k/127.5 − 1."
            )
        distance = (level_values(levels).to(x.device, x.dtype)[index] - x.detach()).abs()
        if float(distance.max()) > _TOLERANCE:
            count = levels if isinstance(levels, int) else len(levels)
            values = level_values(levels)
            raise ValueError(
                f"The data do not match levels={levels!r:.40}: "
                f"{float(x.flatten()[distance.argmax()]):.6g} is not among the {count} values "
                f"from {float(values[0]):.6g} to {float(values[-1]):.6g} (this batch has "
                f"{len(x.unique())} different values); give the number of levels, or their values."
            )
    return index
