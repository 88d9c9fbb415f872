"""The ε-errors of several runs over λ: as a table, as a figure, and as curves of a page.

The ε-error at λ does not depend on prediction, schedule or weighting, so it can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.training.reporting.chart import Line
from lit_diffusion.training.run.figures import PALETTE, figure_style, new_figure
from lit_diffusion.training.run.noise_levels import NoiseLevels, read_table

__all__ = ["LastRecords", "error_lines", "error_table", "last_records", "plot_errors"]

COLUMNS = 7  # noise levels of the table

LastRecords = dict[str, NoiseLevels]  # of a run, the last record of each stage


def last_records(folder: Path) -> LastRecords:
    """The last record of each stage of a run.

    Args:
        folder: The run folder.

    Raises:
        ValueError: If the run has no records, or they cannot be read.
    """
    path = folder / "noise_levels.csv"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no noise_levels.csv: expected the folder of a run with the callback "
            "NoiseLevelLoss (added by --config with/noise-levels) after its first "
            "validation."
        )
    last = {record.stage: record for record in read_table(path)}
    if not last:
        raise ValueError(f"{path} has no record yet: wait for the first validation of the run.")
    return last


def _curve(record: NoiseLevels) -> tuple[Tensor, Tensor]:
    """λ and the ε-error of the bins that have one."""
    seen = (record.count > 0) & (record.eps_mse > 0)
    return record.centres[seen], record.eps_mse[seen]


def _main(run: LastRecords) -> NoiseLevels:
    """The record used to compare a run: of validation, or of training if there is none."""
    return run.get("val", next(iter(run.values())))


def _at(record: NoiseLevels, logsnr: Tensor) -> Tensor:
    """The ε-error at any λ between the bins, by linear interpolation of its logarithm."""
    centres, error = _curve(record)
    right = torch.searchsorted(centres, logsnr).clamp(1, len(centres) - 1)
    share = (logsnr - centres[right - 1]) / (centres[right] - centres[right - 1])
    return torch.exp(torch.lerp(error[right - 1].log(), error[right].log(), share))


def error_lines(runs: dict[str, LastRecords]) -> list[Line]:
    """The ε-errors of runs over λ.

    Args:
        runs: The records of each run by its name.
    """
    curves = {name: _curve(_main(run)) for name, run in runs.items()}
    return [
        Line(name, list(zip(logsnr.tolist(), error.tolist(), strict=True)))
        for name, (logsnr, error) in curves.items()
    ]


def error_table(runs: dict[str, LastRecords]) -> str:
    """The ε-errors at noise levels common to all runs, and half their integral, as lines of text.

    Args:
        runs: The records of each run by its name.
    """
    records = {name: _main(run) for name, run in runs.items()}
    curves = [_curve(record)[0] for record in records.values()]
    low = max((float(c[0]) for c in curves if len(c)), default=0.0)
    high = min((float(c[-1]) for c in curves if len(c)), default=0.0)
    if low >= high or min(map(len, curves)) < 2:
        return "The runs have no noise levels in common, so there is no table."
    logsnr = torch.linspace(low, high, COLUMNS, dtype=torch.float64)
    fine = torch.linspace(low, high, 1000, dtype=torch.float64)
    wide = max(map(len, [*records, "ε-error at λ ="]))
    heads = [*(f"{x:.1f}" for x in logsnr.tolist()), "½∫dλ", "stage", "step"]
    lines = ["ε-error at λ =".ljust(wide) + "".join(f"{head:>10}" for head in heads)]
    for name, record in records.items():
        half = 0.5 * torch.trapezoid(_at(record, fine), fine)
        numbers = [f"{x:.4g}" for x in [*_at(record, logsnr).tolist(), float(half)]]
        cells = [*numbers, record.stage, str(record.step)]
        lines.append(name.ljust(wide) + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def plot_errors(runs: dict[str, LastRecords]) -> Any:
    """Plot the ε-errors of runs over λ in one figure.

    Args:
        runs: The records of each run by its name.
    """
    with figure_style():
        figure = new_figure(9, 5.5)
        axes = figure.subplots()
        for i, (name, run) in enumerate(runs.items()):
            record, colour = _main(run), PALETTE[i % len(PALETTE)]
            label = f"{name}, {record.stage} at step {record.step}"
            axes.plot(*_arrays(record), color=colour, label=label, marker=".", linewidth=1.8)
            if "train" in run and record.stage != "train":
                axes.plot(*_arrays(run["train"]), color=colour, linewidth=0.7, alpha=0.8)
        axes.set(
            title="ε-error at each noise level (thin: in training)",
            xlabel="λ, from noise (left) to data (right)",
            ylabel="mean (ε̂ − ε)²",
            yscale="log",
        )
        axes.legend()
    return figure


def _arrays(record: NoiseLevels) -> list[Any]:
    """λ and ε-error as NumPy arrays, which matplotlib takes."""
    return [values.numpy() for values in _curve(record)]
