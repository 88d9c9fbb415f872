"""Configs by their short names: `--config digits --config objective/edm` from any folder.

The configs of the repository are part of the package. A file of that name in the working directory
comes first.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import lit_diffusion
from lit_diffusion.training.commands.shell.errors import UsageError

__all__ = ["shipped_configs", "with_shipped_configs"]


@cache
def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by their short names.

    Example:
        >>> [name in shipped_configs() for name in ("digits", "objective/edm", "mine")]
        [True, True, False]
    """
    package = Path(lit_diffusion.__file__).parent
    # In a checkout, which an editable installation uses as it is, they lie beside the package.
    places = (package / "configs", package.parent / "configs")
    folder = next((place for place in places if place.is_dir()), places[0])
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """The words of a command, with the path of each shipped config in place of its short name.

    Args:
        words: The command and its arguments.

    Raises:
        UsageError: If a short name is neither that of a file nor of a shipped config.
    """
    found = list(words)
    for i, word in enumerate(found):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if equals:
            found[i] = f"{flag}={_path(value)}"
        elif i + 1 < len(found):
            found[i + 1] = _path(found[i + 1])
    return found


def _path(name: str) -> str:
    """The path that a value of --config means."""
    from lit_diffusion.training.run.messages import inform  # imports Lightning: seconds

    shipped = shipped_configs().get(name)
    if Path(name).is_file():
        if shipped is not None:
            inform(f"Config {name}: the file of that name here, not the one of the package.")
        return name
    if shipped is not None:
        inform(f"Config {name}: {shipped}.")
        return str(shipped)
    if Path(name).suffix or name.startswith(("-", ".", "~", "{", "/")) or ":" in name:
        return name  # a path, or a config itself: the parser reports it if it is wrong
    near = difflib.get_close_matches(name, shipped_configs(), n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]}?" if near else ""
    listed = ", ".join(shipped_configs())
    raise UsageError(
        f"--config {name}: there is no such file, and no config of that name comes with the "
        f"package.{meant} It has {listed}."
    )
