"""The measurements of a run: metrics.json, in which each number has its protocol.

    {"name": "fid", "value": 2.31, "error": null, "step": 2500, "stage": "val", "protocol": {…}}

Two numbers of one name may be compared if their protocols agree. A protocol contains everything
that a value depends on beside the weights: the reference and its hash, the number of samples, the
sampler and its steps, guidance, which average of the weights, seeds, versions.

Of the validations of a long run the file keeps at most `MOST` records of each name: when there are
more, every second of the older half is left out, except for the smallest and the largest value. So
adding one stays fast. Other measurements, such as those of `lit-diffusion evaluate`, are all kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from lit_diffusion.training.run.tolerance import thinned
from lit_diffusion.training.run.whole_file import write_whole

__all__ = [
    "FILE",
    "Measurement",
    "add_measurements",
    "read_measurements",
    "versions",
]

FILE = "metrics.json"
MOST = 200  # records of one name from validations


class Measurement(NamedTuple):
    """A number, its uncertainty if that is known, and what is needed to measure it again.

    Args:
        name: What it is, such as fid or bpd.
        value: The number.
        error: Its standard error or deviation, as the protocol says; None if unknown.
        step: Optimizer steps of the model.
        stage: val, test or evaluate.
        protocol: Plain data.
    """

    name: str
    value: float
    error: float | None
    step: int
    stage: str
    protocol: dict[str, Any]


def read_measurements(folder: Path) -> list[Measurement]:
    """All measurements of a run in the order in which they were made; empty if there are none.

    Args:
        folder: The run folder.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return [Measurement(**record) for record in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected the measurements of a run in {path}, got: {error}; remove the file, and "
            "`lit-diffusion evaluate` measures again"
        ) from error


def add_measurements(folder: Path, new: Iterable[Measurement]) -> None:
    """Add measurements to a run; a repeated one replaces the earlier one.

    Several processes may add to the same run at the same time.

    Args:
        folder: The run folder; it is created if it is missing.
        new: The measurements.
    """
    new = list(new)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{FILE}.lock"):
        kept = [
            one
            for one in read_measurements(folder)
            if not any(one._replace(value=0, error=None) == again for again in map(_settings, new))
        ]
        lines = [
            json.dumps(one._asdict(), ensure_ascii=False) for one in _without_some(kept + new)
        ]
        write_whole(folder / FILE, "[\n" + ",\n".join(lines) + "\n]\n")


def _settings(one: Measurement) -> Measurement:
    """A measurement without its result, as it is read from the file."""
    return one._replace(value=0, error=None, protocol=json.loads(json.dumps(one.protocol)))


def _without_some(records: list[Measurement]) -> list[Measurement]:
    """Thin out the validations of each name."""
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(records):
        if one.stage == "val":
            groups.setdefault(one.name, []).append(i)
    left_out: set[int] = set()
    for members in groups.values():
        values = [records[i].value for i in members]
        extremes = {members[values.index(min(values))], members[values.index(max(values))]}
        left_out |= {*members} - {*thinned(members, MOST)} - extremes
    return [one for i, one in enumerate(records) if i not in left_out]


def versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers."""
    names = ("lit-diffusion", "torch", "torchmetrics", "torch-fidelity")
    return {name: version(name) for name in names}
