"""Snapshots of averages: the files averages/step-….safetensors of a run, and how they are used.

A file has the power averages of one step in float16, two bytes per weight, with their widths and
numbers of updates in its header. bfloat16 would be as large and eight times coarser, which shows
in reconstructions. Snapshots are `every` steps apart at first and a tenth of their step apart
later: the window of a power average grows with the run, so this is dense enough, and a run that is
ten times longer has 24 snapshots more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffusion.averaging import PowerProfile, RunningAverage, Snapshot, overlaps
from lit_diffusion.training.run.tensor_file import open_tensors, write_tensors

__all__ = [
    "Magnitudes",
    "Stored",
    "folder_of",
    "magnitudes",
    "mix",
    "next_step",
    "read_snapshots",
    "write_snapshot",
]


class Stored(NamedTuple):
    """One average in a file.

    Args:
        path: The file.
        step: Optimizer steps of the run.
        snapshot: Which average.
    """

    path: Path
    step: int
    snapshot: Snapshot

    @property
    def begin(self) -> int:
        """The step at which the average began; 0 unless it was added later."""
        return self.step - self.snapshot.updates


def folder_of(run: Path) -> Path:
    """Where the snapshots of a run are.

    Args:
        run: The run folder.
    """
    return run / "averages"


def next_step(step: int, every: int) -> int:
    """The first step after this one at which a snapshot is due.

    Args:
        step: A step.
        every: Steps between the first ones.

    Example:
        >>> step, due = 0, []
        >>> while step < 3000:
        ...     step = next_step(step, 100)
        ...     due.append(step)
        >>> print(len(due), *due[:3], "…", *due[8:13], "…", due[-1])
        19 100 200 300 … 900 1000 1100 1300 1500 … 3000
    """
    due = every
    while due <= step:
        due = -(-11 * due // (10 * every)) * every  # a tenth later, rounded up
    return due


def write_snapshot(
    run: Path, step: int, names: Sequence[str], averages: Sequence[RunningAverage]
) -> Path | None:
    """Write the power averages of a step, whole or not at all; None if they are not finite.

    Args:
        run: The run folder.
        step: Optimizer steps so far.
        names: The names of the weights.
        averages: Their averages by power profiles.

    Raises:
        OSError: If it cannot be written.
    """
    tensors, described = {}, []
    for average in averages:
        sigma_rel = average.profile.sigma_rel  # type: ignore[attr-defined]
        described.append({"sigma_rel": sigma_rel, "updates": average.updates})
        for name, value in zip(names, average.values, strict=True):
            half = value.half().cpu().contiguous()
            if not half.isfinite().all():  # beyond 65504, or NaN
                half = value.float().cpu().contiguous()
                if not half.isfinite().all():
                    return None
            tensors[f"{sigma_rel}/{name}"] = half
    path = folder_of(run) / f"step-{step:07d}.safetensors"
    try:
        write_tensors(path, tensors, {"step": step, "averages": described}, durable=True)
    except OSError as error:
        raise OSError(f"The snapshot {path} cannot be written: {error}.") from error
    return path


def read_snapshots(run: Path) -> list[Stored]:
    """What averages the files of a run have, by step and width.

    Args:
        run: The run folder.

    Raises:
        ValueError: If a file is not one of ours, or is damaged.
    """
    found = []
    for path in folder_of(run).glob("step-*.safetensors"):
        try:
            with open_tensors(path) as file:
                header = file.about
            for one in header["averages"]:
                snapshot = Snapshot(PowerProfile(one["sigma_rel"]), one["updates"])
                found.append(Stored(path, header["step"], snapshot))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{error}. Remove {path} to do without it.") from error
    return sorted(found, key=lambda one: (one.step, one.snapshot.profile.sigma_rel))


def mix(stored: Sequence[Stored], weights: Sequence[float]) -> dict[str, Tensor]:
    """The sum Σ c_i θ̄_i over averages in files, added up in float64; float32.

    Args:
        stored: The averages.
        weights: c_i.

    Raises:
        ValueError: If a file is damaged.
    """
    total: dict[str, Tensor] = {}
    for one, weight in zip(stored, weights, strict=True):
        prefix = f"{one.snapshot.profile.sigma_rel}/"
        with open_tensors(one.path) as file:
            for key in sorted(file.names):
                if key.startswith(prefix):
                    value = file.read(key).double()
                    name = key.removeprefix(prefix)
                    if name in total:
                        total[name].add_(value, alpha=weight)
                    else:
                        total[name] = value.mul_(weight)
    return {name: value.float() for name, value in total.items()}


class Magnitudes(NamedTuple):
    """What decides how exactly an average is reconstructed, as sums of squares over the weights.

    Args:
        weights: The weights themselves.
        step: One step of the raw weights, were each independent of the others.
        rounding: The error of one average in a file.
    """

    weights: float
    step: float
    rounding: float

    @property
    def noise(self) -> float:
        """What `reconstruct` calls so."""
        return self.rounding / self.step if self.step > 0 else 0.0


def magnitudes(stored: Sequence[Stored]) -> Magnitudes:
    """Estimate them from the last two averages, whose distance gives the size of one step.

    Rounding to a mantissa whose last digit is eps has the variance value²·eps²/24 in the mean.

    Args:
        stored: The averages, by step and width.
    """
    last = stored[-2:]
    weights, step = _square(mix(last[-1:], [1.0])), 0.0
    if len(last) == 2:
        whole = overlaps([one.snapshot for one in last])
        apart = float(whole[0, 0] + whole[1, 1] - 2 * whole[0, 1])
        step = _square(mix(last, [1.0, -1.0])) / apart
    return Magnitudes(weights, step, torch.finfo(torch.float16).eps ** 2 / 24 * weights)


def _square(tensors: dict[str, Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in tensors.values())
