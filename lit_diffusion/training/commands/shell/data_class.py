"""The class of data that a command names, by `--data my_plugins.Pictures` or `class_path`.

Without one the data are those of `DataModule`, and the arguments of `data` are its own. It must be
known before the parser is made, which has the arguments of either.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_diffusion.description import allowed_modules
from lit_diffusion.registry import subclasses
from lit_diffusion.training.commands.shell.config_places import config_files
from lit_diffusion.training.commands.shell.errors import UsageError

__all__ = [
    "base_of",
    "find_data_class",
    "named_data_class",
    "names_class",
    "of_another_class",
    "refuse_data_class",
]

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def base_of(cls: type) -> type:
    """Of which kind the data of a class are: a data module of Lightning, or a data set of torch.

    Args:
        cls: As `find_data_class` returns it.
    """
    return next(base for base in _bases() if issubclass(cls, base))


def _bases() -> tuple[type, type]:
    from lightning import LightningDataModule
    from torch.utils.data import Dataset

    return LightningDataModule, Dataset


def named_data_class(words: Sequence[str]) -> type | None:
    """The class of data that the words of a command and its configs name, None if they name none.

    Args:
        words: The command and its arguments.

    Raises:
        UsageError: If there is no such class, or it is another kind of class, or another config
            has the arguments of `DataModule`.
    """
    name, plain = _named(words)
    if name is None:
        return None
    found = find_data_class(name)
    if plain is not None:
        raise UsageError(
            f"the data are {name}, but {plain} has `data:` with arguments of DataModule: leave "
            "that section out of the config."
        )
    return found


def names_class(data: Any) -> bool:
    """Whether a config's section of the data names a class.

    Args:
        data: The section.

    Example:
        >>> names_class({"class_path": "my_plugins.Pictures"}), names_class({"path": "digits8x8"})
        (True, False)
    """
    return isinstance(data, str) or (isinstance(data, dict) and "class_path" in data)


def refuse_data_class(words: Sequence[str], command: str) -> None:
    """Refuse a class of data, for a command that reads examples by their split and number.

    Args:
        words: The arguments of the command.
        command: Its name.

    Raises:
        UsageError: If they name one.
    """
    name, _ = _named(words)
    if name is not None:
        raise UsageError(of_another_class(command, name))


def of_another_class(command: str, name: str) -> str:
    """Why a command cannot use data of a class of one's own, and what to do.

    Args:
        command: Its name, or "this command".
        name: The class.
    """
    return (
        f"the data are {name}, and {command} reads examples by split and number, as only "
        "DataModule gives them: give the same examples as files, by --config with `data: {path: "
        "…}`, or by --data.path where the command has it; `lit-diffusion validate` measures the "
        "loss on any data."
    )


def find_data_class(name: str) -> type:
    """The class of data of a name.

    Args:
        name: Its path, such as my_plugins.Pictures, or its name alone if it is imported.

    Raises:
        UsageError: If there is none, or it is another kind of class.
    """
    module, _, last = name.rpartition(".")
    kinds = "a LightningDataModule, or a Dataset or IterableDataset of torch.utils.data"
    if not module:
        known = {cls.__name__: cls for cls in _known()}
        if last in known:
            return known[last]
        raise UsageError(f"data: no class is named {last!r}.{_meant(last, [*known])} {_PLUGINS}")
    if not any(f"{module}.".startswith(f"{one}.") for one in allowed_modules()):
        near = _meant(name, [f"{cls.__module__}.{cls.__name__}" for cls in _known()])
        raise UsageError(f"data: {name} may not be imported yet.{near} {_PLUGINS}")
    try:
        found = getattr(importlib.import_module(module), last, None)
    except ModuleNotFoundError as error:
        raise UsageError(f"data: there is no module {module!r}. {_PLUGINS}") from error
    if found is None:
        here = [cls.__name__ for cls in _known() if cls.__module__ == module]
        has = f" It has {', '.join(here)}." if here else ""
        raise UsageError(f"data: {module} has no class {last!r}.{_meant(last, here)}{has}")
    if not (isinstance(found, type) and issubclass(found, _bases())):
        raise UsageError(f"data: expected {kinds}, got {name}, which is none.")
    return found


_PLUGINS = "Expected the path of a class, such as my_plugins.Pictures with --plugins my_plugins."


def _known() -> list[type]:
    """The classes of data of modules that may be named."""
    allowed = tuple(f"{one}." for one in allowed_modules())
    found = dict.fromkeys(cls for base in _bases() for cls in subclasses(base))
    return [cls for cls in found if f"{cls.__module__}.".startswith(allowed)]


def _meant(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def _section(path: Path) -> Any:
    """What a config says of the data; None if it cannot be read, which the parser reports."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return config.get("data") if isinstance(config, dict) else None


def _named(words: Sequence[str]) -> tuple[str | None, Path | None]:
    """The class of data that is named last, and a config with the arguments of `DataModule`."""
    name: str | None = None
    plain: Path | None = None
    for path in config_files(words):
        data = _section(path)
        if names_class(data):
            name = data if isinstance(data, str) else str(data["class_path"])
        elif data:
            plain = path
    for value in _values(words):
        if Path(value).is_file():
            continue  # a config of the data alone, which the parser reads
        name = value if _NAME.fullmatch(value) else name
    return name, plain


def _values(words: Sequence[str]) -> Iterator[str]:
    """The values of --data and --data.class_path."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("--data", "--data.class_path"):
            yield from [value] if equals else words[i + 1 : i + 2]
