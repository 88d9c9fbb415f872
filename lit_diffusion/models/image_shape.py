"""The shape of a model's images, which its network knows or its user states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["Shape", "find_image_shape"]

Shape = tuple[int, int, int]


def find_image_shape(network: nn.Module | None, given: Sequence[int] | None) -> Shape | None:
    """Channels, height and width of the images of a model; None if nothing says.

    Args:
        network: Its network, whose attribute `image_shape` counts if it has three numbers.
        given: What the user states; needed only if the network does not say.

    Raises:
        ValueError: If the two differ, or given has not three positive numbers.

    Example:
        >>> from lit_diffusion import UNet
        >>> find_image_shape(UNet(image_shape=(3, 16, 16)), None)
        (3, 16, 16)
    """
    built: Any = getattr(network, "image_shape", None)
    known = isinstance(built, Sequence) and len(built) == 3
    if given is None:
        return (built[0], built[1], built[2]) if known else None
    if len(given) != 3 or min(given) < 1:
        raise ValueError(
            f"image_shape must be (channels, height, width), all positive, got {given}."
        )
    if known and tuple(built) != tuple(given):
        raise ValueError(
            f"Expected image_shape={tuple(built)}, for which the {type(network).__name__} is "
            f"built, got {tuple(given)}: leave image_shape out, or build the network for it."
        )
    return given[0], given[1], given[2]
