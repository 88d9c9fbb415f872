"""Parsing: the parser of a command, and which classes its arguments may name."""

from __future__ import annotations

import importlib
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import jsonargparse

from lit_diffusion.description import allow, allowed_modules
from lit_diffusion.registry import load_plugins
from lit_diffusion.training.commands.shell.errors import UsageError, one_line

__all__ = ["CommandParser", "import_plugins", "instantiate", "join_numbers"]

T = TypeVar("T")
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)[eE][+-]?\d+|-\d+\.|-\.?(inf|nan)", re.IGNORECASE)
INNER = re.compile(r"lit_diffusion\.(?!training\.[A-Z])\w+\.")  # a class with no public name
LIBRARIES = {"torch", "torchvision", "torchmetrics", "torch_fidelity", "lightning", "diffusers"}


class CommandParser(jsonargparse.ArgumentParser):
    """A parser that raises `UsageError`, of one line, instead of printing its usage."""

    subcommands: Any = None

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add the commands, whose parsers know the names that were meant."""
        self.subcommands = super().add_subcommands(*args, **kwargs)
        return self.subcommands

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, in which only our own classes and those of plug-ins are listed."""
        whole = super().format_help(*args, **kwargs)
        return re.sub(r"known\s+subclasses:([^()]+)", _own_classes, whole)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error.

        Args:
            message: The parser's message.
            ex: Its cause.
        """
        if os.environ.get("LIT_DIFFUSION_TRACEBACK"):
            raise ValueError(message) from ex
        owner = next(iter(self.groups or ()), "the class")  # of the parser for one class
        raise UsageError(one_line(str(message), owner, self._known(message))) from ex

    def _known(self, message: str) -> list[str]:
        """The names of all arguments, if the message is about an unknown one."""
        if "accept" not in message and "unrecognized" not in message:
            return []
        parser = self
        if self.subcommands is not None:
            words = set(re.findall(r"'(\w+)'", message))
            chosen = words & set(self.subcommands.choices)
            parser = self.subcommands.choices[chosen.pop()] if chosen else self
        leaves = list(parser.get_defaults().keys())
        return sorted({*leaves, *(".".join(leaf.split(".")[:2]) for leaf in leaves)})


def _own_classes(listed: re.Match[str]) -> str:
    """A list of classes in a help without the hundreds of libraries, if it has any of ours.

    Of ours it has the public ones; parts of networks, say, can be named but are no networks.
    """
    names = re.sub(r"\s+", "", listed[1]).split(",")  # long ones are broken in two
    own = [name for name in names if name.partition(".")[0] not in LIBRARIES]
    own = [name for name in own if not INNER.match(name)] or own
    others = sorted({name.partition(".")[0] for name in names} & LIBRARIES)
    if not own or not others:
        return listed[0]
    text = f"known subclasses: {', '.join(own)}, and those of {' and '.join(others)}"
    return textwrap.fill(text, 55, break_long_words=False).replace("\n", "\n" + 24 * " ")


def join_numbers(words: Iterable[str]) -> list[str]:
    """The words of a command, with `--lr -1e-3` as `--lr=-1e-3`.

    argparse knows -1 and -0.5 as numbers, and takes any other that begins with a minus for an
    option.

    Args:
        words: The command and its arguments.

    Example:
        >>> join_numbers(["fit", "--lr", "-1e-3", "--low", "-inf", "--n", "3"])
        ['fit', '--lr=-1e-3', '--low=-inf', '--n', '3']
    """
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        if before.startswith("--") and "=" not in before and NEGATIVE.fullmatch(word):
            found[-1] = f"{before}={word}"
        else:
            found.append(word)
    return found


def instantiate(cls: type[T], values: Mapping[str, Any] | str) -> T:
    """Make an object from the part of a config that describes it.

    Args:
        cls: Its class, such as `DataModule`, or a base of it.
        values: Its arguments as plain data; or `class_path` and `init_args`, or a class name.

    Raises:
        ValueError: If there is no such class, or it does not take an argument.
    """
    import_plugins(())  # a config may import what the command line may, and nothing else
    parser = CommandParser()
    if isinstance(values, str) or "class_path" in values:
        parser.add_subclass_arguments(cls, "made")
    else:
        parser.add_class_arguments(cls, "made", fail_untyped=False)
        values = dict(values)
    made: T = parser.instantiate(parser.parse_object({"made": values})).made
    return made


def import_plugins(modules: Iterable[str]) -> None:
    """Import a user's modules, so that their classes can be named like ours.

    From then on a parser imports only what is allowed: our own modules, torch.optim, torch.nn,
    lightning.pytorch, installed plug-in packages, and the modules named here.

    Args:
        modules: Their names, such as my_plugins for ./my_plugins.py.

    Raises:
        ValueError: If there is no such module.
    """
    load_plugins()
    modules = list(modules)
    if modules and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # last, so that no file there replaces an installed package
    for name in modules:
        module = name.removesuffix(".py")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise UsageError(
                f"no plug-in module {module!r}: expected {module}.py here, or a package."
            ) from error
        allow(module)  # only now: what cannot be imported has no classes to name
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=allowed_modules()
    )
