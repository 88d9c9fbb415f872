"""Which shapes of examples a network takes besides the one for which it is built."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["check_shape"]


def check_shape(network: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise unless a network can be trained on examples of a shape.

    A network takes the shape for which it is built, its attribute ``shape``. One that takes other
    sides as well has a method ``check_shape(shape)``, which raises an error for those that it does
    not take.

    Args:
        network: The network.
        shape: (C, H, W) of one example; of other data likewise.

    Raises:
        ValueError: If it cannot.

    Example:
        >>> from lit_diffusion.nn import ResidualMLP, UNet
        >>> check_shape(UNet(shape=(1, 8, 8)), (1, 6, 10))
        >>> check_shape(ResidualMLP(shape=(1, 8, 8)), (1, 6, 10))
        Traceback (most recent call last):
            ...
        ValueError: a ResidualMLP takes examples of one shape, (1, 8, 8), got also (1, 6, 10); take
        a network for any size, such as UNet or DiT(positions="resampled").
    """
    built: Any = getattr(network, "shape", None)
    if built is not None and tuple(built) == tuple(shape):
        return
    check: Any = getattr(network, "check_shape", None)
    if check is None:
        known = "" if built is None else f", {tuple(built)}"
        raise ValueError(
            f"a {type(network).__name__} takes examples of one shape{known}, got also "
            f"{tuple(shape)}; take a network for any size, such as UNet or "
            'DiT(positions="resampled").'
        )
    check(tuple(shape))
