"""What the data say of the config of a network: their shape, and that they are augmented."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from jsonargparse import Namespace

__all__ = ["set_augment", "set_shape"]


def set_shape(network: Any, shape: tuple[int, ...]) -> None:
    """Set shape in a network's config, and in those of the networks that it wraps.

    A wrapper declares by `inner_shapes` the shapes that its arguments must be built for.

    Args:
        network: The config of the network, which is changed; None for none.
        shape: Channels, height and width.
    """
    if network is None:
        return
    cls = _class(network)
    if "shape" in inspect.signature(cls).parameters:
        network.init_args = network.get("init_args") or Namespace()
        network.init_args.shape = shape
    if hasattr(cls, "inner_shapes"):
        given = dict(vars(network.get("init_args") or Namespace()))
        given["shape"] = shape
        for argument, inner in cls.inner_shapes(**given).items():
            set_shape(given.get(argument), inner)


def set_augment(network: Any, numbers: int) -> None:
    """Set augment in a network's config unless it is set, and in those of the networks it wraps.

    Args:
        network: The config of the network, which is changed; None for none.
        numbers: How many numbers describe an augmentation.
    """
    if network is None:
        return
    cls = _class(network)
    given = network.get("init_args") or Namespace()
    if "augment" in inspect.signature(cls).parameters and given.get("augment") is None:
        network.init_args = given
        network.init_args.augment = numbers
    if hasattr(cls, "inner_shapes"):
        for argument in cls.inner_shapes(**vars(given)):
            set_augment(given.get(argument), numbers)


def _class(network: Any) -> Any:
    """The class that a config names."""
    module, _, name = network.class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)
