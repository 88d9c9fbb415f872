"""The shape of the data in the config of a network, which no config needs to repeat."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from jsonargparse import Namespace

__all__ = ["set_shape"]


def set_shape(network: Any, shape: tuple[int, ...]) -> None:
    """Set shape in a network's config, and in those of the networks that it wraps.

    A wrapper declares by `inner_shapes` the shapes that its arguments must be built for.

    Args:
        network: The config of the network, which is changed; None for none.
        shape: Channels, height and width.
    """
    if network is None:
        return
    module, _, name = network.class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if "shape" in inspect.signature(cls).parameters:
        network.init_args = network.get("init_args") or Namespace()
        network.init_args.shape = shape
    if hasattr(cls, "inner_shapes"):
        given = dict(vars(network.get("init_args") or Namespace()))
        given["shape"] = shape
        for argument, inner in cls.inner_shapes(**given).items():
            set_shape(given.get(argument), inner)
