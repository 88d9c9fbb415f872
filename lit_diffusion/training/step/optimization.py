"""How a model is optimized: its optimizer, and the gradient and the means of an optimizer step."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_diffusion.loss import DiffusionLoss, LossTerms
from lit_diffusion.training.restore.rebuild import remember
from lit_diffusion.training.run.trainer import log_interval
from lit_diffusion.training.step.accumulation import MicroBatch, StepMean, scale_gradients
from lit_diffusion.training.step.optimizers import (
    clip_each_group,
    parameter_groups,
    with_learning_rates,
)

__all__ = ["OptimizedModule"]

_LOGGED = ("train/loss", "train/eps_mse", "train/extra_loss")


class OptimizedModule(L.LightningModule):
    """The part of `LitDiffusion` that turns the loss of micro-batches into optimizer steps.

    A subclass sets these attributes in its `__init__`.

    Attributes:
        loss: The training loss; its schedule may be learned.
        optimizer: Creates the optimizer from the parameters.
        lr_scheduler: Creates the learning-rate schedule from the optimizer, or None.
        schedule_lr: Learning rate of a learned noise schedule, or None.
    """

    loss: DiffusionLoss
    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    schedule_lr: float | None

    def __init__(self) -> None:
        super().__init__()
        self._step = StepMean(0)
        self._gradient_scale = 1.0  # of the optimizer step that the next backward pass completes

    def accumulate(
        self, terms: LossTerms, place: MicroBatch, extra: Tensor | None = None
    ) -> Tensor:
        """The loss of a micro-batch, weighted by its size; logs the means of a complete step.

        Args:
            terms: Of the micro-batch.
            place: Its place in the optimizer step.
            extra: A further loss, which is added.

        Shapes:
            extra (B,) or (); result ().
        """
        n, loss = len(terms.loss), terms.loss.mean()
        if place.index == 0 or self._step.step != self.global_step:
            self._step = StepMean(self.global_step)
        further = [] if extra is None else [extra.mean()]
        means = [loss, terms.eps_mse.mean(), *further]
        self._step.add(n, torch.stack([mean.detach() for mean in means]))
        loss = sum(further, loss)
        weight = self._step.weight(n)
        if place.last:
            self._gradient_scale = self._step.scale(self.trainer.accumulate_grad_batches)
            if (self.global_step + 1) % log_interval(self.trainer) == 0:  # or they are dropped
                for name, mean in zip(_LOGGED, self._step.means, strict=False):
                    self.log(name, mean, prog_bar=name == "train/loss", sync_dist=True)
                self.log("train/lr", float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        return loss if weight == 1 else loss * weight

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of a micro-batch; after the last one, that of the step is complete.

        Args:
            loss: As `accumulate` has returned it, divided by the number of micro-batches.
            *args: Passed on.
            **kwargs: Passed on.
        """
        super().backward(loss, *args, **kwargs)
        scale, self._gradient_scale = self._gradient_scale, 1.0
        scale_gradients(self.parameters(), scale)

    @property
    def lr(self) -> float:
        """The optimizer's learning rate; to be set before training, as Lightning's tuner does."""
        one = self.optimizer([nn.Parameter(torch.zeros(1))])
        return float(one.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer = functools.partial(self.optimizer, lr=value)  # type: ignore[call-arg]
        remember(self, {"optimizer": self.optimizer})

    def configure_optimizers(self) -> Any:
        """One optimizer over what learns, and its schedule if there is one."""
        groups = parameter_groups(self.parameters(), self.loss.schedule, self.schedule_lr)
        trainer = self._trainer
        return with_learning_rates(
            self.optimizer(groups),
            self.lr_scheduler,
            max_steps=-1 if trainer is None else trainer.max_steps,
            epochs=1 if trainer is None else trainer.check_val_every_n_epoch or 1,
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the float32 gradients in one fused pass.

        Lightning refuses to clip before a fused optimizer under bfloat16, where nothing has been
        scaled and clipping is safe; only float16, with its scaler, needs Lightning's own way.
        """
        scaled = self.trainer.precision == "16-mixed"
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and not scaled:
            clip_each_group(optimizer, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
