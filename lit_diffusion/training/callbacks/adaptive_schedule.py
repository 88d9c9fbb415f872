"""Update an adaptive noise schedule from the training losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.schedules import AdaptiveSchedule
from lit_diffusion.training.run.dashboard import show
from lit_diffusion.training.run.figures import save_figure
from lit_diffusion.training.run.messages import warn

__all__ = ["AdaptiveScheduleUpdate", "draw_density"]


class AdaptiveScheduleUpdate(L.Callback):
    """Feeds an `AdaptiveSchedule` with the losses of training: h = w(λ)·mean (ε̂ − ε)².

    Every rank adds up its own examples, and every n steps the sums of all go into the schedule of
    each, so the schedules stay the same. Nothing waits for the device. What is not in the schedule
    yet goes into the checkpoint, rank by rank, so that a resumed run is the same run.

    At each validation schedule.png in the run folder shows the density as it has become.

    In continuous time the objective stays what it was. The levels of a discrete chain are its
    schedule's and move along, so its bound then changes by about 1/steps.

    Args:
        every_n_steps: Optimizer steps between two updates, at least 1.
        weighted: Follow w(λ)·mean (ε̂ − ε)². False leaves w out: the schedule then follows the
            entropy rate of the data, whatever the objective.

    Raises:
        ValueError: If every_n_steps is below 1, or the model's schedule is no AdaptiveSchedule.

    References:
        Kingma & Gao (2023), arXiv:2303.00848 (adaptive noise schedules); without w: Raya et al.
        (2026), InfoNoise, arXiv:2602.18647.
    """

    # The sums are neither a buffer, which DDP would overwrite with rank 0's, nor in the callback's
    # state, which only rank 0 writes: they are gathered when a checkpoint is made.

    def __init__(self, every_n_steps: int = 10, weighted: bool = True) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"AdaptiveScheduleUpdate: every_n_steps must be at least 1, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self.weighted = weighted
        self._sums: Tensor | None = None
        self._loaded: Tensor | None = None
        self._last_step = 0
        self._folder: Path | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the schedule, and restore this rank's sums from a checkpoint."""
        schedule: Any = pl_module.loss.schedule  # type: ignore[union-attr]
        if not isinstance(schedule, AdaptiveSchedule):
            raise ValueError(
                f"AdaptiveScheduleUpdate needs model.schedule to be an AdaptiveSchedule, got "
                f"{type(schedule).__name__}; configs/with/adaptive.yaml sets both."
            )
        self._sums = torch.zeros(4, schedule.bins, dtype=torch.float64, device=pl_module.device)
        if self._loaded is not None and self._loaded.shape[1:] == self._sums.shape:
            ranks = self._loaded.to(pl_module.device)
            if len(ranks) == trainer.world_size:
                self._sums += ranks[trainer.global_rank]
            elif trainer.is_global_zero:  # another number of ranks: one takes what all had
                self._sums += ranks.sum(0)
        self._loaded = None
        folder = trainer.log_dir  # a collective: every rank asks
        kept = trainer.is_global_zero and trainer.loggers and not trainer.fast_dev_run
        self._folder = Path(folder) if kept and folder is not None else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, which a resumed run knows only now."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch; update the schedule every n optimizer steps."""
        loss: Any = pl_module.loss
        logsnr, values = outputs["logsnr"], outputs["eps_mse"]
        if self.weighted:
            values = loss.weighting(logsnr) * values
        self._sums += loss.schedule.tally(logsnr, values)
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        if step % self.every_n_steps == 0:
            total: Any = trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")
            loss.schedule.absorb(total)
            self._sums.zero_()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plot the density."""
        if self._folder is not None and not trainer.sanity_checking:
            schedule: Any = pl_module.loss.schedule  # type: ignore[union-attr]
            path = self._folder / "schedule.png"
            save_figure(draw_density(schedule, trainer.global_step), path)
            show(trainer, "schedule", path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the losses that were skipped."""
        rejected = int(pl_module.loss.schedule.rejected)  # type: ignore[union-attr, arg-type]
        if rejected and trainer.is_global_zero:
            warn(f"AdaptiveSchedule: {rejected} non-finite losses were ignored.")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the sums of every rank."""
        if self._sums is not None:
            ranks = trainer.strategy.all_gather(self._sums)
            checkpoint["adaptive_schedule_sums"] = ranks.reshape(-1, *self._sums.shape).cpu()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the sums until the model is on its device."""
        self._loaded = checkpoint.get("adaptive_schedule_sums")


def draw_density(schedule: AdaptiveSchedule, step: int) -> Any:
    """Plot the density of an adaptive schedule, now and at the start.

    Args:
        schedule: The schedule.
        step: Optimizer steps so far.
    """
    from matplotlib.figure import Figure

    low, high = schedule.ends
    borders = torch.linspace(low, high, schedule.bins + 1, dtype=torch.float64)
    now = schedule.beyond.diff().flip(0).cpu() / schedule.width
    start = schedule._initial_mass(torch.full_like(schedule.first, 1 / schedule.bins)).cpu()
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.stairs(now.numpy(), borders.numpy(), fill=True, color="#17407f", alpha=0.35, label="now")
    start = start / schedule.width
    axes.stairs(start.numpy(), borders.numpy(), color="black", linewidth=1, label="at the start")
    axes.set(title=f"Density of λ at step {step}", xlabel="λ", ylabel="fraction per unit of λ")
    axes.legend()
    return figure
