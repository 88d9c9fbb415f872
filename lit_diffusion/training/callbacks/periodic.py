"""Measure at some of the validations, and the last weights of a fit in any case."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
import torch

from lit_diffusion.training.callbacks.ema import averaged
from lit_diffusion.training.last_weights import Measures, has_validation
from lit_diffusion.training.lightning_internals import logged_step

__all__ = ["Periodic", "log"]


class Periodic(Measures):
    """Measures every n-th validation, and at the end of a fit the last weights, once.

    Where there is nothing to validate on, complete epochs of training count as validations.

    Args:
        every_n_validations: The n.
        first: Whether the first validation counts; otherwise the n-th is the first that does.
    """

    def __init__(self, every_n_validations: int, first: bool) -> None:
        self.every_n_validations = every_n_validations
        self._first = first
        self._validations = 0
        self._measured_step = -1
        self._validates = True

    @abstractmethod
    def measure(self, trainer: L.Trainer, pl_module: Any, stage: str) -> dict[str, float]:
        """Measure the weights in the model; return the numbers to log. Every rank calls it.

        Args:
            trainer: The trainer.
            pl_module: The model, with its averaged weights if it has any.
            stage: val or test.
        """

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Find out whether there are validations."""
        self._measured_step = -1
        self._validates = has_validation(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure if it is due, in a hook where the averaged weights are in use."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit" or self._is_due():
            values = self.measure(trainer, pl_module, "val")
            self._measured_step = trainer.global_step
            log(pl_module, "val", values)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure if it is due and there are no validations; a part of an epoch is none."""
        if not self._validates and trainer.is_last_batch and self._is_due():
            log(pl_module, "val", self._measure_average(trainer, pl_module))

    def measure_last(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure the last weights, unless that has been done."""
        if self._measured_step == trainer.global_step:
            return
        values = self._measure_average(trainer, pl_module)
        named = {f"val/{name}": value for name, value in values.items()}
        # No hook at the end of training may call `log`.
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in named.items()})
        for logger in trainer.loggers if named else ():
            logger.log_metrics(named, step=logged_step(trainer))

    def _measure_average(self, trainer: L.Trainer, model: Any) -> dict[str, float]:
        with averaged(trainer, model):
            values = self.measure(trainer, model, "val")
        self._measured_step = trainer.global_step
        return values

    def _is_due(self) -> bool:
        """Count a validation; return whether it is one to measure at."""
        self._validations += 1
        return (self._validations - self._first) % self.every_n_validations == 0

    def state_dict(self) -> dict[str, Any]:
        """The number of validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]


def log(model: L.LightningModule, stage: str, values: dict[str, float]) -> None:
    """Log numbers that every rank has; `sync_dist` only says that they may be monitored anywhere.

    Args:
        model: In a hook where it may log.
        stage: val or test.
        values: By name.
    """
    for name, number in values.items():
        value = torch.tensor(number, device=model.device)
        model.log(f"{stage}/{name}", value, sync_dist=True, prog_bar=name == "fid")
