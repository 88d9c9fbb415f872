"""Configs that say what they seem to: no key twice, and no file that unfolds without end."""

from __future__ import annotations

from pathlib import Path

import yaml

from lit_diffusion.training.commands.shell.errors import UsageError

__all__ = ["check_config"]

LARGEST = 100_000  # values of a config, with its aliases unfolded


def check_config(path: Path) -> None:
    """Refuse a config with a key that occurs twice, or aliases that make it huge.

    Of two equal keys YAML would silently take the later one. A file that does not exist or is not
    YAML is left to the parser.

    Args:
        path: The file.

    Raises:
        UsageError: With the key and its lines, or the number of values.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    if root is not None and (size := _size(path, root, {})) > LARGEST:
        raise UsageError(
            f"{path}: expected a config of at most {LARGEST} values, got {size:.3g} with its "
            "aliases (&, *) unfolded: write out what is needed."
        )


def _size(path: Path, node: yaml.Node, known: dict[int, float]) -> float:
    """The number of values below a node, each alias counted; also checks the keys."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = float("inf")  # what contains itself never ends
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise UsageError(
                    f"{path}, line {line}: expected each key once, got {key.value!r} again (first "
                    f"in line {lines[key.value]}), which would replace the first one: join both."
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
            below.append(value)
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    known[id(node)] = 1 + sum(_size(path, one, known) for one in below)
    return known[id(node)]
