"""Statistics by noise level: the table noise_levels.csv of a run, and its figure.

    step, stage          optimizer step, and train or val
    logsnr_min, _max     the bin of λ, one row each
    count, not_finite    examples in the bin, and those whose loss was NaN or infinite
    density              of the sampled λ: the fraction of examples per unit of λ
    eps_mse, loss        means over the bin, each beside its …_variance over examples
    gradient_norm        ‖∇ eps_mse‖ with respect to the weights, at the centre of the bin

The ε-error at λ does not depend on prediction, schedule or weighting, so the tables of any runs on
the same data can be compared.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.training.run.figures import PALETTE, figure_style, new_figure

__all__ = ["NoiseLevels", "plot_noise_levels", "read_table", "table_text"]

MEANS = ("eps_mse", "eps_mse_variance", "loss", "loss_variance")
COLUMNS = (
    *("step", "stage", "logsnr_min", "logsnr_max"),
    *("count", "not_finite", "density", *MEANS, "gradient_norm"),
)
TRAIN, VAL = PALETTE[1], PALETTE[0]


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """Statistics of one stage at one step, for each bin of λ; NaN where a bin is empty.

    Shapes:
        edges (bins + 1,), increasing; all other tensors (bins,), float64.
    """

    step: int
    stage: str
    edges: Tensor
    count: Tensor
    not_finite: Tensor
    eps_mse: Tensor
    eps_mse_variance: Tensor
    loss: Tensor
    loss_variance: Tensor
    gradient_norm: Tensor

    @classmethod
    def of_sums(
        cls, step: int, stage: str, edges: Tensor, sums: Tensor, gradient_norm: Tensor
    ) -> NoiseLevels:
        """Means and variances from sums over examples.

        Args:
            step: Optimizer steps so far.
            stage: train or val.
            edges: The edges of the bins.
            sums: Count, Σ eps_mse, Σ eps_mse², Σ loss, Σ loss²; for each bin first over finite
                losses, then over the others, of which only the count is used.
            gradient_norm: The norm at each bin; NaN if unknown.

        Shapes:
            edges (bins + 1,); sums (5, 2 · bins); gradient_norm (bins,).
        """
        bins = len(edges) - 1
        count, *totals = sums[:, :bins]
        error, error2, loss, loss2 = (total / count for total in totals)
        return cls(
            *(step, stage, edges, count, sums[0, bins:]),
            *(error, (error2 - error**2).clamp(min=0), loss, (loss2 - loss**2).clamp(min=0)),
            gradient_norm,
        )

    @property
    def centres(self) -> Tensor:
        """The centre of each bin, (bins,)."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def density(self) -> Tensor:
        """Histogram estimate of p(λ): the fraction of examples per unit of λ, (bins,)."""
        total = self.count + self.not_finite
        return total / (total.sum() * self.edges.diff())


def table_text(records: list[NoiseLevels], header: bool = False) -> str:
    """Rows of noise_levels.csv; a missing number is left empty.

    Args:
        records: The records to write.
        header: Whether the first row has the column names.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    for record in records:
        numbers = [record.edges[:-1], record.edges[1:]]
        numbers += [getattr(record, name) for name in COLUMNS[4:]]
        for line in torch.stack(numbers, 1).tolist():
            shown = ("" if math.isnan(number) else f"{number:.9g}" for number in line)
            writer.writerow([record.step, record.stage, *shown])
    return text.getvalue()


def read_table(path: Path) -> list[NoiseLevels]:
    """Read the records of a noise_levels.csv, in the order in which they were written.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a table.
    """
    with path.open(newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
            groups = groupby(reader, key=lambda line: (int(line["step"]), line["stage"]))
            return [_record(step, stage, list(group)) for (step, stage), group in groups]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a table of NoiseLevelLoss: {error}.") from error


def _record(step: int, stage: str, lines: list[dict[str, str]]) -> NoiseLevels:
    if any(None in (*line, *line.values()) for line in lines):
        raise ValueError(f"expected {len(COLUMNS)} values in each row, not so at step {step}")
    names = (*COLUMNS[2:6], *COLUMNS[7:])  # the density follows from the counts
    numbers = [[float(line[name] or "nan") for name in names] for line in lines]
    low, high, *rest = torch.tensor(numbers, dtype=torch.float64).unbind(1)
    return NoiseLevels(step, stage, torch.cat([low, high[-1:]]), *rest)


# Figures ----------------------------------------------------------------------------------------


def plot_noise_levels(records: list[NoiseLevels]) -> Any:
    """Plot the latest statistics over λ, and heat maps of the ε-error over λ and steps.

    Args:
        records: All records of the run.
    """
    with figure_style():
        return _plot(records)


def _plot(records: list[NoiseLevels]) -> Any:
    figure = new_figure(14, 8, dpi=80)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes = figure.subplots(2, 3).flat
    last = {record.stage: record for record in records}
    step = max(record.step for record in records)
    figure.suptitle(f"Noise levels at step {step}: noise on the left, data on the right")
    _curves(axes[0], last, "eps_mse", "ε-error, mean (ε̂ − ε)²")
    _curves(axes[1], last, "loss", "loss per example, ½ w/p · ε-error")
    _density(axes[2], last)
    stages = {stage: [r for r in records if r.stage == stage] for stage in ("val", "train")}
    _heat_map(figure, axes[3], stages["val"], "eps_mse", "ε-error in validation")
    _heat_map(figure, axes[4], stages["train"], "eps_mse", "ε-error in training")
    probed = any(record.gradient_norm.isfinite().any() for record in stages["train"])
    name = ("gradient_norm", "gradient of the ε-error") if probed else ("loss", "loss in training")
    _heat_map(figure, axes[5], stages["train"], *name)
    return figure


def _curves(axes: Any, last: dict[str, NoiseLevels], name: str, title: str) -> None:
    for stage, colour, label in (("train", TRAIN, "training"), ("val", VAL, "validation")):
        if stage not in last:
            continue
        record = last[stage]
        seen = record.count > 0
        # matplotlib and numpy 2 disagree over tensors, hence .numpy() here and below.
        centres, mean = record.centres[seen].numpy(), getattr(record, name)[seen].numpy()
        error = (getattr(record, f"{name}_variance") / record.count).sqrt()[seen].numpy()
        axes.plot(centres, mean, color=colour, label=label, marker=".", markersize=4)
        # On a logarithmic axis a band that reaches zero would hide the curve.
        low = (mean - error).clip(mean / 2)
        axes.fill_between(centres, low, mean + error, color=colour, alpha=0.2, linewidth=0)
        if (mean > 0).any():
            axes.set_yscale("log")
    axes.set(title=title, xlabel="λ")
    axes.minorticks_off()  # they would take half of the plotting time
    axes.grid(alpha=0.3)
    axes.legend(title="mean ± standard error")


def _density(axes: Any, last: dict[str, NoiseLevels]) -> None:
    record = last.get("train", last.get("val"))
    if record is None:
        return
    axes.stairs(record.density.numpy(), record.edges.numpy(), fill=True, color=TRAIN, alpha=0.35)
    axes.set(title="density of the sampled λ", xlabel="λ", ylabel="fraction per unit of λ")
    if record.gradient_norm.isfinite().any():
        other = axes.twinx()
        other.plot(
            record.centres.numpy(), record.gradient_norm.numpy(), color="black", linewidth=1
        )
        other.set(ylabel="‖∇ ε-error‖ (line)", yscale="log")
        other.minorticks_off()
        axes.set_title("density of the sampled λ; gradient (line)")


def _heat_map(figure: Any, axes: Any, records: list[NoiseLevels], name: str, title: str) -> None:
    """λ along x, steps along y; each record fills the steps since the previous one."""
    from matplotlib.colors import LogNorm

    # A run is only resumed with the same bins, but the file may have been copied from another.
    # Edges read from the file have fewer digits than those just computed.
    records = [
        r
        for r in records
        if len(r.edges) == len(records[-1].edges)
        and torch.allclose(r.edges.double(), records[-1].edges.double(), atol=1e-3)
    ]
    axes.set(title=title, xlabel="λ", ylabel="step")
    values = [getattr(record, name).clone() for record in records]
    field = torch.stack(values) if values else torch.zeros(0, 1)
    shown = field[field.isfinite() & (field > 0)]
    if shown.numel() == 0:
        axes.text(0.5, 0.5, "no data yet", transform=axes.transAxes, ha="center")
        return
    field[~(field > 0)] = math.nan
    steps = [record.step for record in records]
    first = steps[0] - (steps[1] - steps[0]) if len(steps) > 1 else 0
    norm = LogNorm(float(shown.min()), float(shown.max()) * (1 + 1e-9))
    mesh = axes.pcolormesh(
        *(records[-1].edges.numpy(), [max(0, first), *steps], field.numpy()),
        norm=norm,
        cmap="viridis",
        rasterized=True,
    )
    axes.set_facecolor("0.9")  # empty bins
    figure.colorbar(mesh, ax=axes).minorticks_off()
