"""Descriptions: convert an object to plain data and back.

A checkpoint records how its model was constructed but must load without executing code
(`weights_only=True`), so it holds {class_path, init_args} and nothing else. `describe` reads
both from the object, which keeps every argument as an attribute of the same name; `build`
constructs the object again and imports allowed modules only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_diffusion.decoders import Decoder
from lit_diffusion.predictions import Prediction
from lit_diffusion.registry import arguments, load_plugins
from lit_diffusion.samplers import Sampler

__all__ = ["allow", "allowed_modules", "build", "describe", "missing_package", "public_path"]

_ALLOWED = ["lit_diffusion", "torch.optim", "torch.nn", "lightning.pytorch"]
_KINDS = (
    nn.Module,
    Prediction,
    Sampler,
    Decoder,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)


def allow(module: str) -> None:
    """Allow configs and checkpoints to name classes of a module and of its submodules.

    Args:
        module: Its dotted name.

    Example:
        >>> allow("a_package")
        >>> "a_package" in allowed_modules()
        True
    """
    if module not in _ALLOWED:
        _ALLOWED.append(module)


def allowed_modules() -> list[str]:
    """Modules that configs and checkpoints may import.

    Those of this library, of PyTorch, of Lightning and of installed plug-in packages, and those
    that were given to `allow`.

    Example:
        >>> allowed_modules()[:2]
        ['lit_diffusion', 'torch.optim']
    """
    for module in load_plugins():
        allow(module.partition(".")[0])
    return list(_ALLOWED)


def missing_package(path: str) -> str | None:
    """What to do if the package of a class is not installed; None if it is.

    The package is searched for but not imported.

    Args:
        path: The dotted path of the class.

    Example:
        >>> missing_package("torch.optim.Adam") is None
        True
    """
    module = path.rpartition(".")[0]
    package = module.partition(".")[0]
    if not package or package in sys.modules or importlib.util.find_spec(package):
        return None
    return (
        f"{path} needs the package {package}, which is not installed: install it, or, if it is a "
        f"file of yours, go where it is and name it: --plugins {module}."
    )


def public_path(cls: type) -> str:
    """The shortest dotted path from which a class can be imported.

    Checkpoints hold this path and not that of the file, so that a class can move to another file.
    A package that may be named in a checkpoint keeps its class within the allowed modules.

    Args:
        cls: A class.

    Example:
        >>> public_path(torch.optim.AdamW)
        'torch.optim.AdamW'
    """
    parts = cls.__module__.split(".")
    allowed = _is_allowed(cls.__module__)
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if allowed and not _is_allowed(module):
            continue
        if getattr(sys.modules.get(module), cls.__name__, None) is cls:
            return f"{module}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_allowed(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed_modules())


def describe(value: Any) -> Any:
    """Describe an object as plain data: its class and its arguments.

    Args:
        value: A number, a string, None; a list, tuple or dict of such; an object that keeps its
            arguments; a class, or a `functools.partial` of one, with keyword arguments.

    Raises:
        TypeError: If it cannot be described.

    Example:
        >>> from lit_diffusion import SigmoidWeighting
        >>> describe(SigmoidWeighting(bias=1.0))
        {'class_path': 'lit_diffusion.SigmoidWeighting', 'init_args': {'bias': 1.0}}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, type):
        return {"class_path": public_path(value), "init_args": {}}
    if isinstance(value, functools.partial):
        # Partials made by the command line have the class among their arguments.
        classes = [part for part in (value.func, *value.args) if isinstance(part, type)]
        if len(classes) != 1:
            raise TypeError(f"{value!r} is not a class with keyword arguments only.")
        return {"class_path": public_path(classes[0]), "init_args": describe(value.keywords)}
    if not isinstance(value, _KINDS):
        raise TypeError(f"{value!r} is not plain data.")
    return {"class_path": public_path(type(value)), "init_args": describe(arguments(value))}


def _find(path: str) -> type:
    """Find a class by its path; its module is imported only if it is allowed."""
    module, _, name = path.rpartition(".")
    if module not in sys.modules:
        if missing := missing_package(path):
            raise ValueError(f"The checkpoint's {missing}")
        if not _is_allowed(module):
            raise ValueError(
                f"{path} may not be imported from a checkpoint: its module is neither of "
                f"{', '.join(_ALLOWED)} nor imported already. If you trust it, import it first "
                f"(on the command line: --plugins {module or path})."
            )
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"The checkpoint needs {path}, but: {error}.") from error
    found = getattr(sys.modules[module], name, None)
    if not (inspect.isclass(found) and issubclass(found, _KINDS)):
        raise ValueError(f"{path} is not a class that a checkpoint may name, or does not exist.")
    return found


def build(description: Any) -> Any:
    """Construct an object from its description; the inverse of `describe`.

    Optimizers and learning-rate schedulers are returned as `functools.partial`, to be called with
    the parameters or the optimizer.

    Args:
        description: What `describe` returned, or a config of the same form.

    Raises:
        ValueError: If it names a class that is not allowed.

    Example:
        >>> build({"class_path": "lit_diffusion.SigmoidWeighting", "init_args": {"bias": 1.0}})
        SigmoidWeighting(bias=1.0)
    """
    if isinstance(description, Mapping) and "class_path" in description:
        cls = _find(description["class_path"])
        values = {k: build(v) for k, v in (description.get("init_args") or {}).items()}
        if issubclass(cls, _KINDS[-2:]):
            return functools.partial(cls, **values)
        return cls(**values)
    if isinstance(description, Mapping):
        return {key: build(item) for key, item in description.items()}
    if isinstance(description, list):
        return [build(item) for item in description]
    return description
