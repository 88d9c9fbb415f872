"""What a config need not say twice: shape and augmentation of the data, length of captions."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace

from lit_diffusion.nn.text import TextEncoder
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.data.decoding.augment import NUMBERS

__all__ = ["set_augment", "set_shape", "set_text_length"]


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


def set_augment(network: Any, data: Any) -> None:
    """Set augment in a network's config unless it is set, and in those of the networks it wraps.

    Args:
        network: The config of the network, which is changed; None for none.
        data: The config of the data.
    """
    if network is None or data.get("augment") is None:
        return
    cls = _class(network)
    given = network.get("init_args") or Namespace()
    if "augment" in inspect.signature(cls).parameters and given.get("augment") is None:
        network.init_args = given
        network.init_args.augment = NUMBERS
    if hasattr(cls, "inner_shapes"):
        for argument in cls.inner_shapes(**vars(given)):
            set_augment(given.get(argument), data)


def set_text_length(network: Any, data: Any) -> None:
    """Set the number of bytes of a caption where it is not given: in the data, or an encoder.

    Args:
        network: The config of the network, which is changed; None for none.
        data: The config of the data, which is changed.

    Raises:
        UsageError: If the data have longer captions than an encoder takes.
    """
    if data.get("text_key") is None:
        return
    for encoder in _encoders(network):
        cls = _class(encoder)
        if "length" not in inspect.signature(cls).parameters:
            continue
        encoder.init_args = encoder.get("init_args") or Namespace()
        theirs = encoder.init_args.get("length")
        if data.get("text_length") is None:
            data.text_length = theirs
        elif theirs is None:
            encoder.init_args.length = data.text_length
        elif data.text_length > theirs:
            raise UsageError(
                f"data.text_length is {data.text_length}, and the network's {cls.__name__} takes "
                f"captions of at most {theirs} bytes: set one of them, and the other follows."
            )


def _encoders(config: Any) -> Iterator[Any]:
    """The configs of the encoders of texts in that of a network, however deep."""
    if not isinstance(config, Namespace):
        return
    if config.get("class_path") and issubclass(_class(config), TextEncoder):
        yield config
    for inner in vars(config).values():
        yield from _encoders(inner)


def _class(config: Any) -> Any:
    module, _, name = config.class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)
