"""A model and its checkpoint: how it was made, as plain data, and the model made from that again.

    checkpoint["hyper_parameters"]   the arguments of its class, as `describe` returns them
    checkpoint["model_class"]        the path of its class: LitDiffusion, or a class of the user's

The class is imported only if its module is allowed; see `lit_diffusion.description`.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any, TypeVar

import lightning as L

from lit_diffusion.description import build_arguments, describe, public_path
from lit_diffusion.training.run.checkpoints import ABOUT_DATA, CLASS_NAMES
from lit_diffusion.training.run.weights import weights_name

__all__ = ["own_arguments", "rebuild", "refuse_other_class", "remember"]

M = TypeVar("M", bound=L.LightningModule)


def remember(model: L.LightningModule, arguments: dict[str, Any]) -> None:
    """Keep, as plain data in `hparams`, how a model was made.

    What cannot be described is left out, with a warning.

    Args:
        model: The model.
        arguments: The arguments of its `__init__`, as objects or as configs.
    """
    described = {}
    for name, value in arguments.items():
        try:
            described[name] = describe(value)
        except TypeError as error:
            _not_kept(name, error)
    model.save_hyperparameters(described)


def _not_kept(name: str, why: object) -> None:
    warnings.warn(
        f"{name} cannot be kept in checkpoints, load_from_checkpoint will need {name}=…: {why}",
        stacklevel=5,
    )


def own_arguments(model: L.LightningModule, base: type) -> dict[str, Any]:
    """The arguments that a user's subclass adds, read from the attributes of the same names.

    Args:
        model: The model, whose `hparams` lack them.
        base: The class that remembers its arguments by itself.
    """
    found: dict[str, Any] = {}
    known = {*model.hparams, *inspect.signature(base).parameters}
    for name, value in inspect.signature(type(model)).parameters.items():
        if name in known or value.kind in (value.VAR_POSITIONAL, value.VAR_KEYWORD):
            continue
        if hasattr(model, name):
            found[name] = getattr(model, name)
        else:
            _not_kept(name, f"{type(model).__name__} does not keep it; set self.{name}.")
    return found


def refuse_other_class(cls: type, named: str) -> None:
    """Refuse to continue or to evaluate the model of a checkpoint as another class.

    Args:
        cls: The class; it may be derived from that of the checkpoint.
        named: The path of the checkpoint's class.

    Raises:
        ValueError: If it is another class.
    """
    if named not in map(public_path, cls.__mro__):
        raise ValueError(
            f"Expected a checkpoint of {public_path(cls)}, got one that was trained as {named}: "
            f"run the program that calls lit_diffusion.training.cli.main with that class."
        )


def _accepted(cls: type, described: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a class takes: a user's may set those of its base by itself."""
    parameters = inspect.signature(cls).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return described
    return {name: value for name, value in described.items() if name in parameters}


def rebuild(
    cls: type[M],
    checkpoint: dict[str, Any],
    path: str | Path,
    strict: bool,
    arguments: dict[str, Any],
) -> M:
    """The model of a checkpoint, in evaluation mode.

    Args:
        cls: Its class.
        checkpoint: As `load_checkpoint` returns it.
        path: Its file, for messages.
        strict: Whether every weight must be found.
        arguments: Replace what the checkpoint says, or supply what it could not keep.

    Raises:
        ValueError: If it lacks an argument, or names a class that is not allowed.
    """
    described = _accepted(cls, checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY])
    needed = {"network", "optimizer"} & set(inspect.signature(cls).parameters)
    if missing := needed - described.keys() - arguments.keys():
        if "network" in missing:
            raise ValueError(f"{path} does not say how its network was made: pass network=….")
        arguments = arguments | {"optimizer": _unknown_optimizer}
    kept = {name: value for name, value in described.items() if name not in arguments}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be kept in checkpoints")
        model = cls(**build_arguments(cls, kept), **arguments)
    model.load_state_dict(checkpoint["state_dict"], strict=strict)
    model.class_names = checkpoint.get(CLASS_NAMES)  # type: ignore[assignment]
    model.set_about_data(checkpoint.get(ABOUT_DATA))  # type: ignore[operator]
    model.weights = weights_name(checkpoint)  # type: ignore[assignment]
    return model.eval()


def _unknown_optimizer(parameters: Any) -> Any:
    raise ValueError("The checkpoint does not say how its optimizer was made: pass optimizer=….")
