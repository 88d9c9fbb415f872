"""Update an adaptive noise schedule from the training losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.loss import DiffusionLoss
from lit_diffusion.schedules import AdaptiveSchedule
from lit_diffusion.training.run.dashboard import show
from lit_diffusion.training.run.figures import PALETTE, figure_style, new_figure, save_figure
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.tolerance import may_fail
from lit_diffusion.training.run.trainer import output_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AdaptiveScheduleUpdate", "plot_density"]


class AdaptiveScheduleUpdate(L.Callback):
    """Updates an `AdaptiveSchedule` from the training losses: p(λ) ∝ E[w(λ) · mean (ε̂ − ε)² | λ].

    Sampling λ where the weighted loss is large keeps the loss of an example nearly constant in λ,
    which reduces the variance of the gradient. In continuous time the objective does not change,
    only where it is sampled. The levels of a discrete chain move with its schedule, which changes
    its bound by about 1/num_timesteps.

    Each rank sums over its own examples. Every n steps the sums of all ranks update the schedule
    on each rank, so that the schedules stay equal; in between nothing synchronises with the
    device. Sums that are not yet in the schedule are stored in the checkpoint, rank by rank, so
    that a resumed run is identical to an uninterrupted one. At each validation schedule.png in
    the run folder shows the present density.

    Args:
        every_n_steps: Optimizer steps between two updates, at least 1.
        weighted: Whether w(λ) is included. Without it the schedule follows the entropy rate of
            the data, whatever the objective.

    Raises:
        ValueError: If every_n_steps is below 1, or the schedule is not an `AdaptiveSchedule`.

    References:
        Kingma & Gao (2023), arXiv:2303.00848 (adaptive noise schedules); without w: Raya et al.
        (2026), InfoNoise, arXiv:2602.18647.
    """

    # The sums are not a buffer, which DDP would overwrite with that of rank 0, and not part of the
    # callback's state, which only rank 0 writes: they are gathered when a checkpoint is saved.

    def __init__(self, every_n_steps: int = 10, weighted: bool = True) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"AdaptiveScheduleUpdate: every_n_steps must be at least 1, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self.weighted = weighted
        self._sums = torch.zeros(0)  # empty until training begins
        self._loaded: Tensor | None = None
        self._last_step = 0
        self._folder: Path | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the schedule, and restore this rank's sums from a checkpoint."""
        schedule = pl_module.loss.schedule
        if not isinstance(schedule, AdaptiveSchedule):
            raise ValueError(
                "AdaptiveScheduleUpdate: expected an AdaptiveSchedule as model.schedule, got "
                f"{type(schedule).__name__}; configs/with/adaptive.yaml sets both."
            )
        self._sums = torch.zeros(4, schedule.bins, dtype=torch.float64, device=pl_module.device)
        if self._loaded is not None and self._loaded.shape[1:] == self._sums.shape:
            by_rank = self._loaded.to(pl_module.device)
            if len(by_rank) == trainer.world_size:
                self._sums += by_rank[trainer.global_rank]
            elif trainer.is_global_zero:  # a different number of ranks: one takes all sums
                self._sums += by_rank.sum(0)
        self._loaded = None
        folder = output_folder(trainer)
        self._folder = folder if trainer.is_global_zero and trainer.loggers else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, which a resumed run knows only now."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch; update the schedule every n optimizer steps."""
        loss: DiffusionLoss = pl_module.loss
        schedule: AdaptiveSchedule = pl_module.loss.schedule
        if outputs:  # the step of a subclass may have skipped the batch
            logsnr, values = outputs["logsnr"], outputs["eps_mse"]
            if self.weighted:
                values = loss.weighting(logsnr) * values
            self._sums += schedule.tally(logsnr, values)
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        if step % self.every_n_steps == 0:
            schedule.absorb(trainer.strategy.reduce(self._sums.clone(), reduce_op="sum"))
            self._sums.zero_()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Plot the density."""
        if self._folder is not None and not trainer.sanity_checking:
            path = self._folder / "schedule.png"
            with may_fail(path):
                save_figure(plot_density(pl_module.loss.schedule, trainer.global_step), path)
                show(trainer, "schedule", path)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Report the losses that were left out."""
        rejected = int(pl_module.loss.schedule.rejected)
        if rejected:
            warn(f"AdaptiveSchedule: {rejected} non-finite losses were left out.")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the sums of every rank."""
        if self._sums.numel():
            by_rank = trainer.strategy.all_gather(self._sums)
            checkpoint["adaptive_schedule_sums"] = by_rank.reshape(-1, *self._sums.shape).cpu()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the sums until the model is on its device."""
        self._loaded = checkpoint.get("adaptive_schedule_sums")


def plot_density(schedule: AdaptiveSchedule, step: int) -> Figure:
    """Plot the density p(λ) of an adaptive schedule, now and at the start.

    Args:
        schedule: The schedule.
        step: Optimizer steps so far.
    """
    low, high = schedule.ends
    borders = torch.linspace(low, high, schedule.bins + 1, dtype=torch.float64)
    now = schedule.beyond.diff().flip(0).cpu() / schedule.width
    start = schedule._initial_mass(torch.full_like(schedule.first, 1 / schedule.bins)).cpu()
    start = start / schedule.width
    with figure_style():
        figure = new_figure(7, 4)
        axes = figure.subplots()
        bars = {"fill": True, "color": PALETTE[0], "alpha": 0.35}
        axes.stairs(now.numpy(), borders.numpy(), **bars, label="now")
        axes.stairs(start.numpy(), borders.numpy(), color=PALETTE[1], label="at the start")
        axes.set(title=f"Density of λ at step {step}", xlabel="λ", ylabel="fraction per unit of λ")
        axes.legend()
    return figure
