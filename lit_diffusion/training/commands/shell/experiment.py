"""The experiment of a run: its config and its callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_diffusion.training.commands.shell.data_class import names_class, of_another_class
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.parsing import instantiate
from lit_diffusion.training.data.module import DataModule

__all__ = ["callback_arguments", "evaluation_defaults", "own_data", "read_experiment"]


def read_experiment(config: str | Path | None, run: Path | None) -> dict[str, Any]:
    """The config of an experiment: the given one, or that of the run, or an empty one.

    Args:
        config: The path of a config.
        run: A run folder.

    Raises:
        ValueError: If the given config cannot be read.
    """
    path = Path(config) if config else None if run is None else run / "config.yaml"
    if path is None or (not config and not path.is_file()):
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--config {path} contains no config.")
    return found


def callback_arguments(experiment: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments of one of the experiment's callbacks; empty if it has none of that name.

    Args:
        experiment: The config.
        name: The name of the callback's class.

    Example:
        >>> callbacks = ["EMA", {"class_path": "FID", "init_args": {"num_samples": 100}}]
        >>> callback_arguments({"trainer": {"callbacks": callbacks}}, "FID")
        {'num_samples': 100}
    """
    trainer = experiment.get("trainer") or {}
    for entry in [*(trainer.get("callbacks") or []), *(trainer.get("callbacks+") or [])]:
        entry = {"class_path": entry} if isinstance(entry, str) else entry
        if entry["class_path"].rpartition(".")[2] == name:
            return dict(entry.get("init_args") or {})
    return {}


def evaluation_defaults(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `evaluate` that repeat what the experiment's own FID measures.

    Args:
        experiment: The config.
    """
    fid = callback_arguments(experiment, "FID")
    return {
        "num_samples": fid.get("num_samples", 50_000),
        "features": fid.get("features"),
        "split": fid.get("split", "train"),
        "baseline_split": fid.get("baseline_split"),
        "reference_hash": fid.get("reference_hash"),
        "seeds": [fid.get("seed", 0)],
        "guidance": fid.get("guidance", 1.0),
        "guidance_interval": fid.get("guidance_interval"),
        "batch_size": fid.get("batch_size", 256),
    }


def own_data(experiment: dict[str, Any], path: Path) -> DataModule:
    """The data of an experiment, which a checkpoint alone does not record.

    Args:
        experiment: The config.
        path: The checkpoint.

    Raises:
        ValueError: If there is no config, or it names a class of data of its own.
    """
    if path.is_file() and not experiment:
        raise UsageError(
            f"{path} is not in a run folder and does not record its data: give the config of its "
            "run as --config, or --data.path."
        )
    data = experiment.get("data") or {}
    if names_class(data):
        name = data if isinstance(data, str) else data["class_path"]
        raise UsageError(of_another_class("this command", name))
    return instantiate(DataModule, data)
