"""Data of one's own on the command line: its arguments, and making it before the model.

A data set has no batches, so that a group `loader` says how they are made of it. The data are made
first, because only they know the shape for which the network is built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser
from torch.utils.data import Dataset

from lit_diffusion.training.commands.fit_setup.network_shape import (
    set_augment,
    set_shape,
    set_text_length,
)
from lit_diffusion.training.commands.shell.parsing import instantiate
from lit_diffusion.training.data.own import DatasetModule, shape_of

__all__ = ["link_data", "prepare_data", "without_data"]


def link_data(parser: ArgumentParser, cls: type | None) -> None:
    """Link the shape of `DataModule` to the model's, or add what makes batches of a data set.

    Args:
        parser: Of a command.
        cls: The class of data that the command names; None for those of `DataModule`.
    """
    if cls is None:
        parser.link_arguments("data.shape", "model.shape")
    elif issubclass(cls, Dataset):
        parser.add_class_arguments(
            DatasetModule, "loader", fail_untyped=False, skip={"train"}, instantiate=False
        )


def prepare_data(config: Any, cls: type | None) -> L.LightningDataModule | None:
    """Set the shape of the data in the model's config, and make the data if they name a class.

    Args:
        config: That of a command, changed in place; a shape of the model that is given stays.
        cls: The class of data that the command names; None for those of `DataModule`.

    Raises:
        UsageError: If an argument is wrong.
    """
    if cls is None:
        set_shape(config.model.get("network"), tuple(config.data.shape))
        set_text_length(config.model.get("network"), config.data)
        set_augment(config.model.get("network"), config.data)
        return None
    described = config.data.as_dict()
    data: L.LightningDataModule
    if "loader" in config:
        data = instantiate(DatasetModule, {"train": described, **config.loader.as_dict()})
    else:
        data = instantiate(L.LightningDataModule, described)
    shape = config.model.get("shape") or shape_of(data, config.model.get("keys"))
    if shape is not None:
        config.model.shape = (*shape,)
        set_shape(config.model.get("network"), (*shape,))
    return data


@contextlib.contextmanager
def without_data(config: Any, made: bool) -> Iterator[None]:
    """Take the data out of the config of a command while all else that it describes is made.

    Args:
        config: Changed until the end of the context.
        made: Whether the data are made already; otherwise nothing is changed.
    """
    named = ("data", "loader") if made else ()
    described = {name: config.pop(name) for name in named if name in config}
    try:
        yield
    finally:
        for name, value in described.items():
            config[name] = value
