"""Plug-ins: subclassing is registering.

A family is the set of all imported, concrete and public subclasses of a base class. `Registry`
is a read-only view of it, name → class; there is no decorator and no table to maintain. An
installed package adds classes through the entry-point group `lit_diffusion.plugins`, whose entries
name modules (or classes) to import.

A plug-in must keep every argument of `__init__` as an attribute of the same name. `repr`,
checkpoints and reports are derived from these attributes.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, distributions
from typing import Any, Generic, TypeVar

__all__ = ["Registry", "arguments", "load_plugins", "plain_arguments", "subclasses"]

GROUP = "lit_diffusion.plugins"
T = TypeVar("T")


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Import the plug-ins of installed packages; return the names of their modules.

    A package that fails to import is named in a warning and left out; the program goes on.

    Example:
        >>> isinstance(load_plugins(), tuple)
        True
    """
    loaded = []
    for entry in _installed():
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            package = entry.dist.name if entry.dist else entry.value
            warnings.warn(
                f"Plug-in {entry.name!r} ({entry.value}) of package {package!r} could not be "
                f"loaded and is left out: {type(error).__name__}: {error}",
                stacklevel=2,
            )
        else:
            loaded.append(entry.module)
    return tuple(loaded)


def _installed() -> list[EntryPoint]:
    """The entries of installed packages.

    Python also searches the working directory, which may be a folder that somebody else has made,
    such as a downloaded model; it counts only if PYTHONPATH names it.
    """
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    here = {"", os.getcwd()} - {os.path.abspath(path) for path in named}
    found: dict[tuple[str, str], EntryPoint] = {}
    for one in distributions(path=[path for path in sys.path if path not in here]):
        for entry in one.entry_points.select(group=GROUP):
            found.setdefault((entry.name, entry.value), entry)
    return list(found.values())


def subclasses(base: type) -> Iterator[type]:
    """Iterate over all imported subclasses of a class, depth first.

    Args:
        base: The class.

    Example:
        >>> bool in subclasses(int)
        True
    """
    children: list[type] = base.__subclasses__()
    for cls in children:
        yield cls
        yield from subclasses(cls)


class Registry(Mapping[str, type[T]], Generic[T]):
    """The plug-ins of one family by name: a read-only mapping name → class.

    It has the imported subclasses that are concrete, public and defined at the top level of a
    module, including those of installed plug-in packages.

    Args:
        base: The base class of the family.

    Raises:
        KeyError: If no class has the name, with the most similar names; or if two classes have
            it, with both paths.

    Example:
        >>> WEIGHTINGS["SigmoidWeighting"](bias=2.0)
        SigmoidWeighting(bias=2.0)
        >>> WEIGHTINGS["SigmoidWeigting"]
        Traceback (most recent call last):
        KeyError: "Unknown Weighting 'SigmoidWeigting'. Did you mean 'SigmoidWeighting'...
    """

    def __init__(self, base: type[T]) -> None:
        self.base = base

    def classes(self) -> list[type[T]]:
        """Return every class of the family, sorted by name.

        Example:
            >>> SAMPLERS.classes()[0].__name__
            'AncestralSampler'
        """
        load_plugins()
        found = {
            cls
            for cls in subclasses(self.base)
            if not inspect.isabstract(cls)
            and not cls.__name__.startswith("_")
            and "<locals>" not in cls.__qualname__
        }
        return sorted(found, key=lambda cls: (cls.__name__, cls.__module__))

    def __getitem__(self, name: str) -> type[T]:
        classes = self.classes()
        found = [cls for cls in classes if cls.__name__ == name]
        if len(found) == 1:
            return found[0]
        family = self.base.__name__
        if found:
            paths = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in found)
            raise KeyError(f"{family} {name!r} is the name of several classes: {paths}.")
        known = sorted({cls.__name__ for cls in classes})
        near = difflib.get_close_matches(name, known, n=3) or known
        hint = " or ".join(map(repr, near)) if len(near) <= 3 else ", ".join(near)
        raise KeyError(f"Unknown {family} {name!r}. Did you mean {hint}?")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(cls.__name__ for cls in self.classes()))

    def __len__(self) -> int:
        return len({cls.__name__ for cls in self.classes()})

    def __repr__(self) -> str:
        return f"Registry({self.base.__name__}: {', '.join(self)})"


def arguments(instance: object) -> dict[str, Any]:
    """The arguments that an object was made with, read from the attributes of the same names.

    Args:
        instance: An object that keeps each argument of `__init__` under the argument's name.

    Raises:
        TypeError: If an argument was not kept, or cannot be (`*args`, `**kwargs`).

    Example:
        >>> arguments(SCHEDULES["NormalSchedule"](mean=1.0))
        {'mean': 1.0, 'std': 2.4, 'logsnr_min': -20.0, 'logsnr_max': 20.0}
    """
    found = {}
    for name, parameter in inspect.signature(type(instance)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{type(instance).__name__}.__init__ takes *{name}; a plug-in names its arguments."
            )
        if not hasattr(instance, name):
            raise TypeError(
                f"{type(instance).__name__} does not keep its argument {name!r}: "
                f"set self.{name} in __init__."
            )
        value = getattr(instance, name)
        if hasattr(value, "detach"):  # a learned number: its present value, in float32's digits
            value = float(f"{float(value.detach()):.7g}")
        found[name] = value
    return found


def plain_arguments(instance: object) -> str:
    """The arguments as written in code, for `repr`; arguments that are modules are left out.

    Args:
        instance: An object that keeps its arguments.

    Example:
        >>> plain_arguments(WEIGHTINGS["ShiftedWeighting"](shift=-2.0))
        'shift=-2.0'
    """
    try:
        found = arguments(instance)
    except TypeError:
        return ""
    modules = [name for name, value in found.items() if hasattr(value, "named_parameters")]
    return ", ".join(f"{name}={found[name]!r}" for name in found if name not in modules)
