"""The adaptive schedule along the run."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.adaptive_schedule import AdaptiveSchedule

__all__ = ["AdaptiveScheduleUpdate"]


class AdaptiveScheduleUpdate(L.Callback):
    """Feeds an `AdaptiveSchedule` with the losses of training: h = w(λ)·mean (ε̂ − ε)².

    Every rank adds up its own examples, and every n steps the sums of all go into the schedule of
    each, so the schedules stay the same. Nothing waits for the device. What is not in the schedule
    yet goes into the checkpoint, rank by rank, so that a resumed run is the same run.

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

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the schedule, and this rank's sums of a checkpoint."""
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only by now."""
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
        """Add a micro-batch; every n optimizer steps let the schedule follow."""
        loss: Any = pl_module.loss
        logsnr, values = outputs["logsnr"], outputs["eps_error"]
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

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what was left out."""
        rejected = int(pl_module.loss.schedule.rejected)  # type: ignore[union-attr, arg-type]
        if rejected and trainer.is_global_zero:
            L.pytorch.utilities.rank_zero_warn(
                f"AdaptiveSchedule: {rejected} losses were not finite and did not count."
            )

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the sums of every rank."""
        if self._sums is not None:
            ranks = trainer.strategy.all_gather(self._sums)
            checkpoint["adaptive_schedule_sums"] = ranks.reshape(-1, *self._sums.shape).cpu()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the sums until the model is on its device."""
        self._loaded = checkpoint.get("adaptive_schedule_sums")
