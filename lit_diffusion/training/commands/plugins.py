"""The command `plugins`: list the classes and configs that a run can be made of."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from torch import nn

import lit_diffusion
from lit_diffusion import DECODERS, PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS, DiffusersNetwork
from lit_diffusion import nn as networks
from lit_diffusion.registry import subclasses
from lit_diffusion.training.commands.shell.parsing import LIBRARIES
from lit_diffusion.training.commands.shell.shipped_configs import shipped_configs

__all__ = ["Plugins", "plugins"]


class Plugins(dict[str, list[type]]):
    """The classes of each family, by the name of its base; as text, one line per class.

    The text also lists our callbacks, which are read from their files, since importing them takes
    seconds, and the configs of the package.
    """

    def __str__(self) -> str:
        lines = []
        for base, classes in self.items():
            listed = [(cls.__name__, _package(cls), _summary(cls.__doc__)) for cls in classes]
            if base == "Callback":
                listed = sorted({*listed, *self.own_callbacks})
            if listed:
                lines += [base, *_columns(listed), ""]
        configs = [(name, "", _first_sentence(file)) for name, file in shipped_configs().items()]
        return "\n".join([*lines, "Config", *_columns(configs), ""])

    @cached_property
    def own_callbacks(self) -> list[tuple[str, str, str]]:
        """Name, package and summary of each callback of the package, read from its file."""
        folder = Path(lit_diffusion.__file__).parent / "training" / "callbacks"
        found = []
        for one in _parsed(folder / "__init__.py"):
            if isinstance(one, ast.ImportFrom):  # from … import *
                found += _classes(folder / f"{str(one.module).rpartition('.')[2]}.py")
        return sorted(found)


def _parsed(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body


def _classes(file: Path) -> list[tuple[str, str, str]]:
    """Name, package and summary of the callbacks that a file makes public."""
    body = _parsed(file)
    public = next(
        ast.literal_eval(one.value)
        for one in body
        if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "__all__"
    )
    return [
        (one.name, "lit_diffusion", _summary(ast.get_docstring(one)))
        for one in body
        if isinstance(one, ast.ClassDef) and one.name in public and one.bases
    ]


def plugins() -> Plugins:
    """List the plug-ins of every family, the networks, callbacks and configs.

    This includes those of installed plug-in packages and of the modules imported so far; of
    callbacks, ours are in the text alone.

    Example:
        >>> [cls.__name__ for cls in plugins()["Prediction"]][:2]
        ['EDMPrediction', 'EpsPrediction']
    """
    families = (SCHEDULES, WEIGHTINGS, PREDICTIONS, SAMPLERS, DECODERS)
    found = Plugins({family.base.__name__: family.classes() for family in families})
    own = [getattr(networks, name) for name in networks.__all__]
    found["Network"] = _sorted({*own, DiffusersNetwork, *_others(nn.Module, _is_network)})
    lightning = sys.modules.get("lightning")  # a module with callbacks has imported it
    found["Callback"] = [] if lightning is None else _sorted(set(_others(lightning.Callback)))
    return found


def _sorted(classes: set[type]) -> list[type]:
    return sorted(classes, key=lambda cls: (cls.__name__, cls.__module__))


def _others(base: type, keep: Callable[[type], bool] | None = None) -> Iterator[type]:
    """Classes of plug-ins: public, at the top level of a module that is not of a library."""
    for cls in subclasses(base):
        public = not cls.__name__.startswith("_") and "<locals>" not in cls.__qualname__
        own = _package(cls) not in {*LIBRARIES, "lit_diffusion", "lightning_fabric"}
        if public and own and (keep is None or keep(cls)):
            yield cls


def _is_network(cls: type) -> bool:
    """Whether it is called as a network is: with z and λ first."""
    names = list(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]
    return names[1:3] == ["z", "logsnr"]


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _summary(documentation: str | None) -> str:
    return (documentation or "").strip().partition("\n")[0]


def _first_sentence(file: Path) -> str:
    """The first sentence of the comment at the head of a config."""
    head = re.match(r"(?:#.*\n)+", file.read_text(encoding="utf-8"))
    lines = [line.lstrip("#").removeprefix(" ") for line in (head[0] if head else "").splitlines()]
    text = " ".join(line for line in lines if not line.startswith(" "))  # without commands
    return re.split(r"(?<=[.;]) (?=[A-Z])", text)[0].rstrip(":;")


def _columns(rows: list[tuple[str, str, str]]) -> list[str]:
    """A line for each row, indented, with the first two columns aligned."""
    first = max(22, *(len(name) for name, _, _ in rows))
    second = max(len(package) for _, package, _ in rows)
    return [f"  {a:{first}} {b:{second}}{' ' * bool(second)}{c}".rstrip() for a, b, c in rows]
