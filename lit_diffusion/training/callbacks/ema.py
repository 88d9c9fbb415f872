"""An average of the weights along the run."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

__all__ = ["EMA"]


class EMA(L.Callback):
    """Exponential moving average of the parameters: θ̄ ← θ̄ + (1 − d)(θ − θ̄) at each step.

    Samples and likelihoods of the average are much better than those of the last weights, whose
    noise it removes. The decay d rises as (1 + n)/(10 + n) until it reaches its value, so that
    the initial weights are forgotten. Validation, test and prediction use the average, and so
    does every checkpoint's `state_dict`; the raw weights stand beside it for training to go on.

    Args:
        decay: d, in [0, 1); 0.999 averages over about a thousand steps.

    Raises:
        ValueError: If decay is outside [0, 1).

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, appendix B.
    """

    # The swap stands in the outer hooks (…_start, …_end): a callback that works in the inner ones
    # (epoch, batch) sees the average wherever it stands in the list. Weights are swapped by value,
    # since optimizer, DDP and compiled graphs hold on to the tensors.

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay}.")
        self.decay = decay
        self.updates = 0
        self.swapped = False
        self._weights: dict[str, Tensor] = {}  # found once: walking the modules costs 0.3 ms
        self._average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] | None = None
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the average on the parameters' device, or take it from the checkpoint."""
        start = self._loaded or {}
        self._weights = {
            name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad
        }
        self._average = {
            name: start.get(name, w).to(w.device, w.dtype, copy=True)
            for name, w in self._weights.items()
        }
        self._loaded = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only by now."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Follow the weights, once for each optimizer step."""
        if trainer.global_step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, weights = list(self._average.values()), list(self._weights.values())
        torch._foreach_lerp_(average, weights, 1 - decay)

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._average:
            return
        average, weights = list(self._average.values()), list(self._weights.values())
        kept = [w.clone() for w in weights]
        torch._foreach_copy_(weights, average)
        torch._foreach_copy_(average, kept)
        self.swapped = not self.swapped

    def _in(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in place of the weights."""
        if not self.swapped:
            self._swap()

    def _out(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Put the weights back."""
        if self.swapped:
            self._swap()

    on_validation_start = on_test_start = on_predict_start = _in
    on_validation_end = on_test_end = on_predict_end = _out
    on_exception = _out

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module, which is what one samples from afterwards."""
        self._in(trainer, pl_module)
        self._average, self._weights, self.swapped = {}, {}, False

    def state_dict(self) -> dict[str, Any]:
        """How many updates the average has seen."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.updates = state_dict["updates"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the average as the model's state, and the raw weights beside it."""
        if not self._average:
            return
        here = checkpoint["state_dict"]
        there = here | self._average
        raw, average = (there, here) if self.swapped else (here, there)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, raw

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the average until the parameters are on their device."""
        self._loaded = checkpoint.pop("average_model_state", None)
