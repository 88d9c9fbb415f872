"""The shape of one example of a model's data, which its network knows or its user states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["Shape", "find_shape"]

Shape = tuple[int, ...]


def find_shape(network: nn.Module | None, given: Sequence[int] | None) -> Shape | None:
    """The shape of one example of a model's data; None if nothing says.

    (C, H, W) for images, (C, L) for series, (C, N) for sets of points, (C, D, H, W) for volumes
    and (C,) for vectors.

    Args:
        network: Its network, whose attribute `shape` counts if it is a sequence of positive
            integers.
        given: What the user states; needed only if the network does not say.

    Raises:
        ValueError: If the two differ, or given has no or other than positive numbers.

    Example:
        >>> from lit_diffusion import UNet
        >>> find_shape(UNet(shape=(3, 16, 16)), None)
        (3, 16, 16)
    """
    built: Any = getattr(network, "shape", None)
    known = _is_shape(built)
    if given is None:
        return tuple(built) if known else None
    if not _is_shape(given):
        raise ValueError(
            "shape must be (channels, height, width) of images, (channels, length) of series and "
            f"so on, all positive, got {given}."
        )
    if known and tuple(built) != tuple(given):
        raise ValueError(
            f"Expected shape={tuple(built)}, for which the {type(network).__name__} is "
            f"built, got {tuple(given)}: leave shape out, or build the network for it."
        )
    return tuple(given)


def _is_shape(numbers: Any) -> bool:
    return (
        isinstance(numbers, Sequence)
        and len(numbers) > 0
        and all(isinstance(number, int) and number > 0 for number in numbers)
    )
