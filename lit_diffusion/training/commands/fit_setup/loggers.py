"""The loggers of `--trainer.logger`, which come in addition to those of every run.

They are made when the run folder exists, and write there unless a config gives another `save_dir`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger

from lit_diffusion.training.commands.shell.parsing import instantiate

__all__ = ["RUN_FOLDER", "make_loggers", "takes_run_folder"]

RUN_FOLDER = "<run folder>"  # in a config, so that it can be used for another run


def takes_run_folder(cls: Any) -> bool:
    """Whether a class is a logger to files that has no place of its own for them.

    Args:
        cls: Any.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
        >>> [takes_run_folder(cls) for cls in (CSVLogger, TensorBoardLogger, MLFlowLogger)]
        [True, True, False]
    """
    if not (isinstance(cls, type) and issubclass(cls, Logger)):
        return False
    argument = inspect.signature(cls).parameters.get("save_dir")
    return argument is not None and argument.default in (inspect.Parameter.empty, ".")


def make_loggers(given: Any, folder: Path) -> list[Logger]:
    """Make the loggers that a config describes.

    Args:
        given: None or a boolean for none; one, or a list of them.
        folder: The run folder.

    Raises:
        ValueError: If one of them does not accept its arguments.
        ModuleNotFoundError: If one of them needs a package that is missing.
    """
    if given is None or isinstance(given, bool):
        return []
    described = list(given) if isinstance(given, list | tuple) else [given]
    return [
        one if isinstance(one, Logger) else instantiate(Logger, _placed(one, folder))  # type: ignore[type-abstract]
        for one in described
    ]


def _placed(described: Namespace, folder: Path) -> dict[str, Any]:
    """The description of a logger, with the path of the run folder."""
    plain: dict[str, Any] = described.as_dict()
    arguments = plain.get("init_args") or {}
    if isinstance(place := arguments.get("save_dir"), str):
        plain["init_args"] = arguments | {"save_dir": place.replace(RUN_FOLDER, str(folder))}
    return plain
