"""Where a mistake is: in which config of a command, and in which line.

A command may have several configs, each over the one before, and the parser reports an argument
without the file that it comes from. So the files are read once more, after a mistake only, with
the lines of their keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml

__all__ = ["config_files", "located"]

_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs"}


def config_files(words: Sequence[str]) -> list[Path]:
    """The configs that the words of a command name, in their order, as far as they exist.

    Args:
        words: The command and its arguments.

    Example:
        >>> config_files(["fit", "--config=nowhere.yaml"]), config_files([])
        ([], [])
    """
    named = []
    for word, following in pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-c"):
            named.append(Path(value if equals else following))
    return [path for path in named if path.is_file()]


def located(message: str, words: Sequence[str]) -> str:
    """The message of a mistake with its file and line, if it comes from a config.

    Args:
        message: One line; an argument that it concerns comes first or after "is called".
        words: The command and its arguments.
    """
    files = config_files(words)
    keys = []
    for file in files:
        try:
            keys += list(_keys(file))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f", line {mark.line + 1}"
            problem = getattr(error, "problem", None) or "it cannot be read"
            return f"{file}{line} is not YAML: {problem}; check the indentation and the colons."
        except (OSError, ValueError):
            continue
    for key in keys:
        if key.beside:
            parent, _, name = key.path.rpartition(".")
            return (
                f"{parent}: {name} stands beside class_path, expected it below init_args "
                f"({key.file}, line {key.line})."
            )
    found = [key for key in keys if _concerns(message, key.path)]
    if not found or any(word.startswith(f"--{found[-1].path}") for word in words):
        return message
    return f"{message.rstrip('.')} ({found[-1].file}, line {found[-1].line})."


class _Key(NamedTuple):
    """A key of a config: its dotted path, its place, and whether it stands beside class_path."""

    path: str
    file: Path
    line: int
    beside: bool


def _keys(file: Path) -> Iterator[_Key]:
    """Every key of a config."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    yield from _below(node, "", file)


def _below(node: yaml.Node | None, path: str, file: Path) -> Iterator[_Key]:
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            yield from _below(one, path, file)
    elif isinstance(node, yaml.MappingNode):
        names = {key.value for key, _ in node.value}
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            beside = "class_path" in names and key.value not in _OF_A_CLASS
            yield _Key(inner, file, key.start_mark.line + 1, beside)
            yield from _below(value, inner, file)


def _concerns(message: str, path: str) -> bool:
    """Whether a message is about the argument of this path."""
    plain = path.replace(".init_args", "").replace("+", "")
    if named := re.search(r"no argument is called ([\w.+]+)", message):
        return plain == named[1].rstrip(".")
    if not (begin := re.match(r"([\w.]+): ", message)):
        return False
    if refused := re.search(r"takes no argument '(\w+)'", message):
        return plain.startswith(begin[1]) and plain.endswith(f".{refused[1]}")
    return plain == begin[1]
