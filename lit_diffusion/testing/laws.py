"""The law of all plug-ins: they can be constructed, printed and described; and shared helpers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.registry import arguments

__all__ = ["FAR", "check_plugin", "close", "is_frozen", "law"]

FAR = 20.0
"""Laws on weightings and predictions hold for |λ| up to this."""


def law(holds: bool, who: object, sentence: str) -> None:
    """Raise `AssertionError` with the plug-in and the sentence unless the law holds.

    Args:
        holds: Whether the law holds.
        who: The plug-in.
        sentence: The law and what was found instead.
    """
    if not holds:
        raise AssertionError(f"{who!r}: {sentence}")


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree, compared in float64.

    Args:
        a: One tensor.
        b: The other one.
        tolerance: Relative and absolute tolerance.
    """
    return bool(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance))


def is_frozen(instance: object) -> bool:
    """Whether an object is a frozen dataclass.

    Args:
        instance: The object.
    """
    parameters: Any = getattr(instance, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def check_plugin(cls: type) -> None:
    """Check what holds for a plug-in of any family: it can be made, printed and described.

    It can be constructed without arguments; every argument has a type, a default, a line under
    Args and an attribute of the same name; `repr` shows the arguments; its module is public.

    Args:
        cls: The class.

    Raises:
        AssertionError: If a law is violated, with its name.

    Example:
        >>> check_plugin(CosineSchedule)
    """
    public = not any(part.startswith("_") for part in cls.__module__.split("."))
    law(public, cls, "a plug-in is in a public module.")
    documentation = inspect.getdoc(cls) or ""
    law(bool(documentation), cls, "a plug-in has a docstring.")
    for name, parameter in inspect.signature(cls).parameters.items():
        typed = parameter.annotation is not parameter.empty
        law(typed, cls, f"argument {name!r} has no type.")
        law(parameter.default is not parameter.empty, cls, f"argument {name!r} has no default.")
        law(f"\n    {name}: " in documentation, cls, f"argument {name!r} has no line under Args.")
    instance = cls()
    try:
        values = arguments(instance)
    except TypeError as error:
        raise AssertionError(str(error)) from error
    shown = repr(instance)
    if isinstance(instance, nn.Module) and type(instance).extra_repr is nn.Module.extra_repr:
        return  # a network: its repr is torch's
    law(cls.__name__ in shown, cls, "repr shows the name of the class.")
    for name, value in values.items():
        if not isinstance(value, nn.Module):
            law(f"{name}={value!r}" in shown, cls, f"repr shows the argument {name!r}.")
    law(repr(cls(**values)) == shown, cls, "an equal object can be made from its arguments.")
