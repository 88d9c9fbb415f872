"""Measure the last weights of a fit, whatever ended it.

    the last step → on_train_end of all callbacks, the last checkpoint among them
       → validation of the last weights, unless they have just been validated
       → `measure_last` of each callback that measures: what that validation did not

The end is known only when it is there: a maximum of steps, epochs or time, early stopping or a
callback may bring it. A validation at that moment is no part of training: the checkpoint is
written before it and the noise of a validation is its own, so that a run which continues from
there is the run that was never measured there. A run that is ended by a signal or an error has no
such validation.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L

from lit_diffusion.training.lightning_internals import logged_as_last_step
from lit_diffusion.training.run.messages import inform
from lit_diffusion.training.run.trainer import all_callbacks

__all__ = ["MeasuredModule", "Measures", "has_validation", "measure_again"]


class Measures(L.Callback):
    """A callback that measures the weights of a fit, the last ones at any rate."""

    @abstractmethod
    def measure_last(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure the last weights, unless that has been done; every rank calls it.

        Args:
            trainer: At the end of a fit.
            pl_module: The model, with its raw weights.
        """


class MeasuredModule(L.LightningModule):
    """A model whose last weights are measured at the end of a fit.

    Attributes:
        validated_step: The optimizer steps of the weights that were validated or tested last; -1
            if none were, or none in this fit.
        finishing: Whether a validation outside of a fit belongs to one: to a fit that was resumed
            from its last step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.validated_step = -1
        self.finishing = False

    def on_train_end(self) -> None:
        """Validate and measure the last weights, after the callbacks, which save them before."""
        trainer = self.trainer
        if trainer.global_step == 0:
            return
        with logged_as_last_step(trainer):
            if self.validated_step != trainer.global_step and has_validation(trainer):
                trainer.validating = True
                trainer.fit_loop.epoch_loop.val_loop.run()
                trainer.training = True
            for callback in all_callbacks(trainer):
                if isinstance(callback, Measures):
                    callback.measure_last(trainer, self)


def has_validation(trainer: L.Trainer) -> bool:
    """Whether there is anything to validate on in a fit; every rank must ask.

    Args:
        trainer: In training.
    """
    if not trainer.enable_validation:
        return False
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.setup_data()
    trainer.training = True
    return not loop.skip


def measure_again(trainer: L.Trainer, model: MeasuredModule) -> None:
    """Validate and measure the weights of a fit that was resumed from its last step.

    Lightning then calls no hook of training. Its end may have been interrupted, and a repeated
    measurement has the same result and replaces the earlier one.

    Args:
        trainer: After a fit without a step.
        model: Its model.
    """
    inform(f"Step {trainer.global_step} was the last one: its weights are measured once more.")
    data = getattr(trainer, "datamodule", None)
    model.finishing = True
    try:
        with logged_as_last_step(trainer):
            trainer.validate(model, datamodule=data, verbose=False)
    finally:
        model.finishing = False
