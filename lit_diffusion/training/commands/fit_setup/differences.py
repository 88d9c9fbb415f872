"""How two models differ, by their descriptions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from lit_diffusion.training.commands.shell.errors import UsageError

__all__ = ["another_model", "differences", "naming_differences"]


@contextlib.contextmanager
def naming_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[None]:
    """Explain the failure to load a checkpoint's weights by what differs of the models.

    Args:
        before: The description of the checkpoint's model; empty if nothing is resumed.
        now: That of the present one.

    Raises:
        UsageError: If the weights do not fit.
    """
    try:
        yield
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error) or not before:
            raise
        raise UsageError(another_model(before, now)) from error


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Every argument that differs, with both of its values.

    Args:
        before: Plain data: the description of the model of a checkpoint, or a part of it.
        now: That of the present model.
        name: Of the part.

    Example:
        >>> list(differences({"init_args": {"channels": [32]}}, {"init_args": {}}, "network"))
        ['network.channels: [32] in the checkpoint, not given now']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.get("class_path") != now.get("class_path"):
            before, now = before.get("class_path"), now.get("class_path")
        else:
            for key in dict.fromkeys([*before, *now]):
                inner = name if key == "init_args" else f"{name}.{key}".lstrip(".")
                one, other = (part.get(key, "not given") for part in (before, now))
                yield from differences(one, other, inner)
            return
    if before != now:
        yield f"{name}: {before} in the checkpoint, {now} now"


def another_model(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why the weights of a checkpoint do not fit the model: one line.

    Args:
        before: The description of the checkpoint's model.
        now: That of the present one.
    """
    parts = ("network", "schedule", "weighting", "prediction", "decoder", "shape")
    found = [line for part in parts for line in differences(before.get(part), now.get(part), part)]
    listed = "; ".join(found) or "their descriptions are equal, so the class has changed"
    return (
        f"the weights of the checkpoint do not fit the model: {listed}. Give the model of the "
        "checkpoint, or leave --ckpt_path out to train the new one."
    )
