"""The environment of a run: environment.json, with one session for each time it was started.

    {"started": …, "ended": …, "outcome": "finished", "steps": 2500, "python": "3.11.2", …}

The report is often written on another machine, so the machine that trains records this. It names
no host, no user and no folder, so that a run can be shown to anybody.
"""

from __future__ import annotations

import json
import os
import platform
import signal
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lit_diffusion
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["FILE", "begin_session", "device_name", "end_session", "outcome", "read_sessions"]

FILE = "environment.json"
PACKAGES = ("torch", "lightning", "datasets", "torchmetrics", "wandb")


def device_name(device: torch.device) -> str:
    """The name of a device: NVIDIA H200, or just cpu.

    Args:
        device: Any.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def begin_session(folder: Path, device: torch.device, ranks: int, precision: str) -> None:
    """Record that a run begins or continues, and its environment.

    Args:
        folder: The run folder; it is created if it is missing.
        device: Of rank 0.
        ranks: Number of processes that train.
        precision: As the trainer names it.

    Raises:
        OSError: If it cannot be written.
    """
    session = {
        "started": _now(),
        "ended": None,
        "outcome": None,
        "steps": None,
        "device": f"cuda, {device_name(device)}" if device.type == "cuda" else device.type,
        "ranks": ranks,
        "precision": precision,
        "cpu_threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "lit_diffusion": lit_diffusion.__version__,
        **{name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        session["cuda"] = torch.version.cuda
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, [*read_sessions(folder), session])


def end_session(folder: Path, how: str, steps: int) -> None:
    """Record how and when the last session ended; one that was killed has no end.

    Args:
        folder: The run folder.
        how: finished, or the `outcome`.
        steps: Optimizer steps of the whole run so far.

    Raises:
        OSError: If it cannot be written.
    """
    sessions = read_sessions(folder)
    if sessions:
        sessions[-1] |= {"ended": _now(), "outcome": how, "steps": steps}
        _write(folder, sessions)


def outcome(error: BaseException) -> str:
    """What ended a session, in words.

    Args:
        error: The error that ended the training.

    Example:
        >>> outcome(SystemExit(128 + 15)), outcome(ValueError("expected"))
        ('stopped by SIGTERM', 'ended by ValueError')
    """
    if isinstance(error, SystemExit):
        if error.code == 128 + signal.SIGINT:
            return "stopped by Ctrl-C"
        if isinstance(error.code, int) and error.code > 128:
            return f"stopped by {signal.Signals(error.code - 128).name}"
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning handles
            return "stopped by Ctrl-C"
    return f"ended by {type(error).__name__}"


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions of a run, in their order; empty if nothing readable is there.

    Args:
        folder: The run folder.
    """
    try:
        sessions = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    whole = isinstance(sessions, list) and all(isinstance(one, dict) for one in sessions)
    return sessions if whole else []


def _write(folder: Path, sessions: list[dict[str, Any]]) -> None:
    write_whole(folder / FILE, json.dumps(sessions, indent=1) + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
