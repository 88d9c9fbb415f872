"""Descriptions: convert an object to plain data and back.

A checkpoint records how its model was constructed but must load without executing code
(`weights_only=True`), so it holds {class_path, init_args} and nothing else. `describe` reads
both from the object, which keeps every argument as an attribute of the same name; `build`
constructs the object again.

A file is data, and whoever wrote it chooses the classes and their arguments. So before anything is
constructed, `build` checks every class it names: that the module that *defines* it is allowed,
whether it has been imported or not, and that it is of the kind that the argument asks for.
Otherwise a checkpoint could name any class of the process whose constructor reads or runs a file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lit_diffusion.decoders import Decoder
from lit_diffusion.predictions import Prediction
from lit_diffusion.registry import arguments, load_plugins, subclasses
from lit_diffusion.samplers import Sampler

__all__ = [
    "allow",
    "allowed_modules",
    "build",
    "build_arguments",
    "check_arguments",
    "describe",
    "find_class",
    "missing_package",
    "public_path",
]

# What is defined in `__main__` is the program, script or notebook that loads the file.
_ALLOWED = ["lit_diffusion", "torch.optim", "torch.nn", "lightning.pytorch", "__main__"]
_KINDS = (
    nn.Module,
    Prediction,
    Sampler,
    Decoder,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)

T = TypeVar("T")

_PLAIN = {bool, int, float, str, Path, type(None), ...}  # no part of a model is one of these


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
    """Modules whose classes configs and checkpoints may name.

    Those of this library, of PyTorch, of Lightning, of installed plug-in packages and of the
    program itself, and those that were given to `allow`.

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


def _find(path: Any) -> type:
    """Find a class by its path, if its module is allowed."""
    path = str(path)
    module, _, name = path.rpartition(".")
    if module not in sys.modules:
        if missing := missing_package(path):
            raise ValueError(f"The checkpoint's {missing}")
        _refuse_unless_allowed(module, path)
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"The checkpoint needs {path}, but: {error}.") from error
    found = getattr(sys.modules[module], name, None)
    if not (inspect.isclass(found) and issubclass(found, _KINDS)):
        raise ValueError(f"{path} is not a class that a checkpoint may name, or does not exist.")
    _refuse_unless_allowed(found.__module__, path)  # wherever else it can be imported from
    return found


def find_class(path: str, base: type[T]) -> type[T]:
    """Find a class that a file names, if its module is allowed and it is of the right kind.

    Args:
        path: Its path. A class of `__main__` is one of the program that wrote the file; in another
            program it is the only allowed class of the same name.
        base: The class itself, or a base of it.

    Raises:
        ValueError: If it is not allowed, does not exist, or is of another kind.

    Example:
        >>> from lit_diffusion import DDIMSampler
        >>> find_class("lit_diffusion.DDIMSampler", Sampler) is DDIMSampler
        True
    """
    module, _, name = path.rpartition(".")
    if module == "__main__" and not hasattr(sys.modules["__main__"], name):
        found = [
            cls
            for cls in subclasses(base)
            if cls.__name__ == name
            and _is_allowed(cls.__module__)
            and getattr(sys.modules.get(cls.__module__), name, None) is cls
        ]
        if len(found) != 1:
            raise ValueError(
                f"the checkpoint needs the class {name} of the program that wrote it: name that "
                f"file, with --plugins on the command line, and with `import` and "
                "lit_diffusion.description.allow in Python."
            )
        return found[0]
    cls = _find(path)
    if not issubclass(cls, base):
        raise ValueError(f"expected a {base.__name__}, got the class {path}.")
    return cls


def _refuse_unless_allowed(module: str, path: str) -> None:
    if not _is_allowed(module):
        raise ValueError(
            f"a file may not name {path}: its module is none of {', '.join(_ALLOWED)}. If you "
            f"trust it, allow it first: --plugins {module} on the command line, "
            f"lit_diffusion.description.allow({module!r}) in Python."
        )


def _parts(annotation: Any) -> Iterator[Any]:
    """The types of which a value of an annotation, or a part of it, may be an instance."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Callable:  # of an optimizer: what it returns is meant
        arguments = arguments[-1:]
    elif isinstance(annotation, typing.TypeVar):
        arguments = (annotation.__bound__ or Any,)
    if arguments and typing.get_origin(annotation) is not typing.Literal:
        for argument in arguments:
            yield from _parts(argument)
    elif not arguments:
        yield annotation


def _check(description: Any, wanted: Any, where: str) -> None:
    """Check every class that a description names, before any of them is constructed."""
    if isinstance(description, Mapping) and "class_path" in description:
        cls = _find(description["class_path"])
        parts = set(_parts(wanted)) - _PLAIN
        bases = tuple(
            part for part in parts if isinstance(part, type) and issubclass(part, _KINDS)
        )
        # A protocol, a callable or Any says nothing about the class.
        if len(bases) == len(parts) and not issubclass(cls, bases):
            names = " or ".join(sorted(base.__name__ for base in bases)) or "plain data"
            raise ValueError(
                f"{where} must be {names}, got the class {description['class_path']}."
            )
        check_arguments(cls, description.get("init_args") or {})
    elif isinstance(description, Mapping):
        for key, value in description.items():
            _check(value, wanted, f"{where}[{key!r}]")
    elif isinstance(description, list):
        for i, value in enumerate(description):
            _check(value, wanted, f"{where}[{i}]")


def check_arguments(cls: type, described: Mapping[str, Any]) -> None:
    """Check every class that the described arguments of a class name, constructing nothing.

    Args:
        cls: The class that takes the arguments.
        described: What `describe` returned for each.

    Raises:
        ValueError: If one names a class that is not allowed, or of another kind.

    Example:
        >>> from lit_diffusion import Pretrained
        >>> check_arguments(Pretrained, {"sampler": {"class_path": "lit_diffusion.UNet"}})
        Traceback (most recent call last):
        ValueError: sampler of Pretrained must be Sampler, got the class lit_diffusion.UNet.
    """
    hints = _hints(cls)
    for name, value in described.items():
        _check(value, hints.get(name, Any), f"{name} of {cls.__name__}")


def build_arguments(cls: type, described: Mapping[str, Any]) -> dict[str, Any]:
    """Construct the described arguments of a class, once all of them have been checked.

    Args:
        cls: The class that takes the arguments.
        described: What `describe` returned for each.

    Raises:
        ValueError: If one names a class that is not allowed, or of another kind.

    Example:
        >>> from lit_diffusion import Pretrained
        >>> build_arguments(Pretrained, {"sampler": {"class_path": "lit_diffusion.DDIMSampler"}})
        {'sampler': DDIMSampler(steps=50, schedule=None, eta=0.0)}
    """
    check_arguments(cls, described)
    return {name: _made(value) for name, value in described.items()}


def _hints(cls: type) -> dict[str, Any]:
    """The annotations of the arguments, also of those that are passed on to a base class."""
    hints: dict[str, Any] = {}
    for one in reversed(cls.__mro__):
        try:
            hints |= typing.get_type_hints(vars(one).get("__init__"))
        except (NameError, TypeError):  # some names are imported for type checkers only
            continue
    return hints


def build(description: Any, wanted: Any = Any) -> Any:
    """Construct an object from its description; the inverse of `describe`.

    Optimizers and learning-rate schedulers are returned as `functools.partial`, to be called with
    the parameters or the optimizer. Nothing is constructed unless all classes are allowed and of
    the kinds that the arguments are annotated with.

    Args:
        description: What `describe` returned, or a config of the same form.
        wanted: The base class, or annotation, that the object itself must satisfy.

    Raises:
        ValueError: If it names a class that is not allowed, or of another kind.

    Example:
        >>> build({"class_path": "lit_diffusion.SigmoidWeighting", "init_args": {"bias": 1.0}})
        SigmoidWeighting(bias=1.0)
        >>> build({"class_path": "lit_diffusion.EpsPrediction"}, wanted=Sampler)
        Traceback (most recent call last):
        ValueError: the object must be Sampler, got the class lit_diffusion.EpsPrediction.
    """
    _check(description, wanted, "the object")
    return _made(description)


def _made(description: Any) -> Any:
    """Construct what has been checked."""
    if isinstance(description, Mapping) and "class_path" in description:
        cls = _find(description["class_path"])
        values = {k: _made(v) for k, v in (description.get("init_args") or {}).items()}
        if issubclass(cls, _KINDS[-2:]):
            return functools.partial(cls, **values)
        return cls(**values)
    if isinstance(description, Mapping):
        return {key: _made(item) for key, item in description.items()}
    if isinstance(description, list):
        return [_made(item) for item in description]
    return description
