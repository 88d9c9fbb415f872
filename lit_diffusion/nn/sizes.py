"""Which shapes of examples a network takes besides the one that it was built for.

Convolutions take any number of pixels, a perceptron takes one. A network says so by a method
`check_shape(shape)`, which raises ValueError, with a sentence for the user, unless the network can
be trained on examples of this shape and sample them. Without the method it takes its own shape.
"""

from collections.abc import Sequence

from torch import nn

__all__ = ["check_shape", "takes_shape"]


def check_shape(network: nn.Module, shape: Sequence[int]) -> None:
    """Raise unless a network takes examples of this shape.

    Args:
        network: The network; one without a method `check_shape` takes only its `shape`.
        shape: (C, H, W), or (C, L) and so on.

    Raises:
        ValueError: If it does not take them.
    """
    check = getattr(network, "check_shape", None)
    if callable(check):
        check(tuple(shape))
        return
    built = getattr(network, "shape", None)
    if built is None or tuple(built) != tuple(shape):
        known = "only those it is trained on" if built is None else f"only {tuple(built)}"
        raise ValueError(
            f"Expected a shape that the {type(network).__name__} takes, {known}, got "
            f"{tuple(shape)}: a network of any size says so by a method check_shape(shape)."
        )


def takes_shape(network: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a network takes examples of this shape, in training and in sampling.

    Args:
        network: The network.
        shape: (C, H, W), or (C, L) and so on.

    Example:
        >>> from lit_diffusion.nn import ResidualMLP, UNet
        >>> takes_shape(UNet(shape=(3, 16, 16)), (3, 48, 20))
        True
        >>> takes_shape(ResidualMLP(shape=(3, 16, 16)), (3, 48, 20))
        False
    """
    try:
        check_shape(network, shape)
    except ValueError:
        return False
    return True
