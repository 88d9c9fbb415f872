"""Which run is the newest: what `last` means.

The one whose checkpoint was written last, by the time in the checkpoint itself: the time of a file
changes when a run is copied. Only for a checkpoint without that time, its folder's name decides.
It is last.ckpt, or one of Lightning's `ModelCheckpoint` with more steps than that.
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
    """The newest readable checkpoint among the runs of a name; None if there is none.

    Of a run and its copy, the checkpoint is that of the folder it was written to. One with weights
    alone, which `lit-diffusion ema` writes, is left out, since no run can continue from it.

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
    steps: dict[Path, int] = {}
    for changed, path in sorted(found, reverse=True):
        if newest is not None and changed + SLACK < newest[0][0]:
            break  # a file is not older than the time in it
        if path.name != LAST.name and any(path.parent == one.parent for one in steps):
            continue  # an earlier one of the same run
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            warn(f"Skipped a checkpoint: {error}")
            continue
        if path.name != LAST.name and "optimizer_states" not in checkpoint:
            continue
        steps[path] = checkpoint.get("global_step", 0)
        rank = _saved_at(checkpoint, path, changed), _is_original(checkpoint, path)
        if newest is None or rank > newest[0]:
            newest = rank, path
    if newest is None:
        return None
    # Of two of the same step, last.ckpt is the one after its validation.
    last = newest[1].parent / LAST.name
    return last if steps.get(last) == steps[newest[1]] else newest[1]


def _checkpoints(root: Path, name: str | None) -> Iterator[Path]:
    """The checkpoints of the runs, regular files, at any depth if no name is given."""
    if name is not None:
        folder = root / name
        runs = list(folder.iterdir()) if folder.is_dir() else []
        for run in runs:
            yield from _of_run(run)
        return
    seen = set()
    for folder_name, inside, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(folder_name)
        if real in seen:  # a link to a folder above it, or to one that was searched
            inside.clear()
        elif Path(folder_name) != root and (found := _of_run(Path(folder_name))):
            inside.clear()
            yield from found
        seen.add(real)


def _of_run(run: Path) -> list[Path]:
    return [path for path in (run / LAST.parent).glob("*.ckpt") if path.is_file()]


def _saved_at(checkpoint: dict[str, Any], path: Path, changed: float) -> float:
    """When a checkpoint was written; if it does not say so, when its run began."""
    if SAVED_AT in checkpoint:
        return float(checkpoint[SAVED_AT])
    with contextlib.suppress(ValueError):
        return time.mktime(time.strptime(path.parents[1].name[:19], TIME))
    return changed


def _is_original(checkpoint: dict[str, Any], path: Path) -> bool:
    """Whether the checkpoint lies in the run folder that it was written to."""
    states = checkpoint.get("callbacks", {}).values()
    folders = [Path(one["run"], LAST.parent) for one in states if one.get("run")]
    folders += [Path(one["dirpath"]) for one in states if one.get("dirpath")]
    here = path.parent.resolve().parts[-3:]
    return any(folder.parts[-3:] == here for folder in folders)
