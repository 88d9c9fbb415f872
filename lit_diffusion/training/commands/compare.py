"""The command `compare`: the ε-errors of several runs at each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_diffusion.training.commands.errors import UsageError
from lit_diffusion.training.run.figures import save_figure
from lit_diffusion.training.run.noise_levels import NoiseLevels, read_table

__all__ = ["Comparison", "compare"]

FORMATS = (".png", ".pdf", ".svg")
COLUMNS = 7  # noise levels of the table


class Comparison(NamedTuple):
    """The last ε-errors of several runs, and the path of the figure."""

    runs: dict[str, dict[str, NoiseLevels]]  # of each run, the last record of each stage
    figure: Path

    def __str__(self) -> str:
        return f"{_table(self.runs)}\nFigure: {self.figure}"


def compare(runs: Sequence[str | Path], out: str | Path = "compare.png") -> Comparison:
    """Plot the ε-errors of runs over λ in one figure, and tabulate them.

    Args:
        runs: Folders of runs with the callback NoiseLevelLoss.
        out: The figure: a .png, .pdf or .svg.

    Raises:
        ValueError: If a folder has no noise levels, or out has another suffix.
    """
    out, folders = Path(out), [Path(run) for run in runs]
    if not folders:
        raise UsageError(
            "expected at least 1 run, got none: lit-diffusion compare RUN1 RUN2 --out FILE."
        )
    if out.suffix not in FORMATS:
        raise UsageError(f"--out must end in {', '.join(FORMATS)}, got {out}.")
    found = dict(zip(_names(folders), map(_last, folders), strict=True))
    save_figure(_plot(found), out)
    return Comparison(found, out)


def _names(folders: list[Path]) -> list[str]:
    """<name>/<time> of each run, or the whole paths where that is ambiguous."""
    short = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UsageError(f"expected each run once, got {' '.join(names)}.")
    return names


def _last(folder: Path) -> dict[str, NoiseLevels]:
    """The last record of each stage of a run."""
    path = folder / "noise_levels.csv"
    if not path.is_file():
        raise UsageError(
            f"{folder} has no noise_levels.csv: expected the folder of a run with the callback "
            "NoiseLevelLoss (added by --config configs/with/noise-levels.yaml) after its first "
            "validation."
        )
    last = {record.stage: record for record in read_table(path)}
    if not last:
        raise UsageError(f"{path} has no record yet: wait for the first validation of the run.")
    return last


def _curve(record: NoiseLevels) -> tuple[Tensor, Tensor]:
    """λ and the ε-error of the bins that have one."""
    seen = (record.count > 0) & (record.eps_mse > 0)
    return record.centres[seen], record.eps_mse[seen]


def _main(run: dict[str, NoiseLevels]) -> NoiseLevels:
    """The record used to compare a run: of validation, or of training if there is none."""
    return run.get("val", next(iter(run.values())))


def _at(record: NoiseLevels, logsnr: Tensor) -> Tensor:
    """The ε-error at any λ between the bins, by linear interpolation of its logarithm."""
    centres, error = _curve(record)
    right = torch.searchsorted(centres, logsnr).clamp(1, len(centres) - 1)
    share = (logsnr - centres[right - 1]) / (centres[right] - centres[right - 1])
    return torch.exp(torch.lerp(error[right - 1].log(), error[right].log(), share))


def _table(runs: dict[str, dict[str, NoiseLevels]]) -> str:
    """The ε-errors at noise levels common to all runs, and half their integral."""
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


def _plot(runs: dict[str, dict[str, NoiseLevels]]) -> Any:
    from matplotlib.figure import Figure

    def curve(record: NoiseLevels) -> list[Any]:
        return [values.numpy() for values in _curve(record)]

    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for i, (name, run) in enumerate(runs.items()):
        record = _main(run)
        label = f"{name}, {record.stage} at step {record.step}"
        axes.plot(*curve(record), color=f"C{i % 10}", label=label, marker=".", linewidth=1.8)
        if "train" in run and record.stage != "train":
            axes.plot(*curve(run["train"]), color=f"C{i % 10}", linewidth=0.7, alpha=0.8)
    axes.set(
        title="ε-error at each noise level (thin: in training)",
        xlabel="λ, from noise on the left to data on the right",
        ylabel="mean (ε̂ − ε)²",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
