"""Which run is the newest: what `last` means.

The one whose last.ckpt was written last, by the time in the checkpoint itself: the time of a file
changes when a run is copied. Only for a checkpoint without that time, its folder's name decides.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_diffusion.training.run.checkpoints import SAVED_AT, load_checkpoint
from lit_diffusion.training.run.folder import TIME, check_name
from lit_diffusion.training.run.messages import warn

__all__ = ["last_checkpoint"]

LAST = Path("checkpoints") / "last.ckpt"  # in a run folder
SLACK = 60.0  # seconds by which the clocks of a machine and its file server may differ


def last_checkpoint(root: Path, name: str | None = None) -> Path | None:
    """The newest readable last.ckpt among the runs of a name; None if there is none.

    Of a run and its copy, the checkpoint is that of the folder it was written to.

    Args:
        root: The folder of all runs.
        name: Name of the runs, such as digits or sweep/a; None for any.

    Raises:
        ValueError: If the name is not one of runs.
    """
    if name is not None:
        check_name(name)
    found = [(path.stat().st_mtime, path) for path in _checkpoints(root, name)]
    newest: tuple[tuple[float, bool], Path] | None = None
    for changed, path in sorted(found, reverse=True):
        if newest is not None and changed + SLACK < newest[0][0]:
            break  # a file is not older than the time in it
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            warn(f"Skipped a checkpoint: {error}")
            continue
        rank = _saved_at(checkpoint, path, changed), _is_original(checkpoint, path)
        if newest is None or rank > newest[0]:
            newest = rank, path
    return None if newest is None else newest[1]


def _checkpoints(root: Path, name: str | None) -> Iterator[Path]:
    """The regular files last.ckpt of the runs, at any depth if no name is given."""
    if name is not None:
        folder = root / name
        runs = list(folder.iterdir()) if folder.is_dir() else []
        yield from (run / LAST for run in runs if (run / LAST).is_file())
        return
    seen = set()
    for folder_name, inside, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(folder_name)
        path = Path(folder_name) / LAST
        if real in seen:  # a link to a folder above it, or to one that was searched
            inside.clear()
        elif path.is_file() and path.parents[1] != root:
            inside.clear()
            yield path
        seen.add(real)


def _saved_at(checkpoint: dict[str, Any], path: Path, changed: float) -> float:
    """When a checkpoint was written; if it does not say so, when its run began."""
    if SAVED_AT in checkpoint:
        return float(checkpoint[SAVED_AT])
    with contextlib.suppress(ValueError):
        return time.mktime(time.strptime(path.parents[1].name[:19], TIME))
    return changed


def _is_original(checkpoint: dict[str, Any], path: Path) -> bool:
    """Whether the checkpoint lies in the run folder that it was written to."""
    run = checkpoint.get("callbacks", {}).get("LastCheckpoint", {}).get("run", "")
    return Path(run).parts[-2:] == path.parents[1].resolve().parts[-2:]
