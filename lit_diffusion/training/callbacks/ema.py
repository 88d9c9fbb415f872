"""The average of the weights that a run is judged by."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.averaging import ConstantProfile, PowerProfile, Profile, RunningAverage
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.weights import RAW, add_average, take_average, weights_name

__all__ = ["EMA", "name_of", "trained_weights"]


class EMA(L.Callback):
    """Exponential moving average of the parameters: θ̄ ← θ̄ + (1 − d)(θ − θ̄) at each step.

    Samples and likelihoods of the average are much better than those of the last weights, whose
    noise it removes. The decay d rises as (1 + n)/(10 + n) until it reaches its value, so that
    the initial weights are forgotten. With `sigma_rel` it is a power function instead, whose
    window is that fraction of the run, however long the run is. Validation, test and prediction
    use the average, and so does every checkpoint's `state_dict`; the raw weights stand beside it
    for training to go on. `Averages` keeps others besides.

    Args:
        decay: d, in [0, 1); 0.999 averages over about a thousand steps. None means 0.999, if
            there is no sigma_rel.
        sigma_rel: Relative width σ of a power function, in (0, 0.2887], in place of decay.

    Raises:
        ValueError: If decay or sigma_rel is outside its range, or both are given.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, appendix B.
        Karras et al. (2023), Analyzing and Improving the Training Dynamics of Diffusion Models,
        arXiv:2312.02696, section 3.
    """

    # The swap stands in the outer hooks (…_start, …_end): a callback that works in the inner ones
    # (epoch, batch) sees the average wherever it stands in the list. Weights are swapped by value,
    # since optimizer, DDP and compiled graphs hold on to the tensors.

    def __init__(self, decay: float | None = None, sigma_rel: float | None = None) -> None:
        if decay is not None and sigma_rel is not None:
            raise ValueError(
                f"EMA: one of decay and sigma_rel, got decay={decay} and sigma_rel={sigma_rel}."
            )
        self.decay = decay
        self.sigma_rel = sigma_rel
        if sigma_rel is not None:
            self._profile: Profile = PowerProfile(sigma_rel)
        else:
            self._profile = ConstantProfile(0.999 if decay is None else decay)
        self.updates = 0
        self._weights: dict[str, Tensor] = {}  # found once: walking the modules costs 0.3 ms
        self._average: RunningAverage | None = None
        self._raw: list[Tensor] | None = None  # the weights, while the average is in their place
        self._loaded: dict[str, Tensor] | None = None
        self._kept = ""  # name of the average in the checkpoint; older ones do not say
        self._in_place = ""  # name of the module's weights while no average is updated
        self._last_step = 0

    @property
    def profile(self) -> str:
        """Which average validation, samples and checkpoints have, such as EMA(decay=0.999)."""
        if self._average is None and self._in_place:
            return self._in_place
        return name_of(self._profile, self.updates, self._last_step)

    @property
    def swapped(self) -> bool:
        """Whether the average is in the weights' place."""
        return self._raw is not None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the average on the parameters' device, or take it from the checkpoint."""
        self._weights = trained_weights(pl_module)
        start, self._loaded = self._loaded or {}, None
        if start and isinstance(self._profile, PowerProfile) and self._kept != str(self._profile):
            # A constant decay forgets what it began with, a power function would not.
            warn(
                f"EMA: the checkpoint has the average {self._kept or 'of a constant decay'}, not "
                f"{self._profile}, which begins anew from the weights as they are."
            )
            start, self.updates = {}, 0
        elif not start and trainer.global_step == 0:
            self.updates = 0
        self._average = RunningAverage(self._profile, list(self._weights.values()), self.updates)
        begin = [start.get(name, w) for name, w in self._weights.items()]
        torch._foreach_copy_(self._average.values, begin)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only by now."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Follow the weights, once for each optimizer step."""
        if trainer.global_step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = trainer.global_step
        self._average.update(list(self._weights.values()))
        self.updates = self._average.updates

    @torch.no_grad()
    def _in(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in place of the weights."""
        if self._average is not None and self._raw is None:
            weights = list(self._weights.values())
            self._raw = [w.clone() for w in weights]
            torch._foreach_copy_(weights, self._average.values)
            pl_module.weights = self.profile  # type: ignore[assignment]

    @torch.no_grad()
    def _out(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Put the weights back."""
        if self._raw is not None:
            torch._foreach_copy_(list(self._weights.values()), self._raw)
            self._raw = None
            pl_module.weights = RAW  # type: ignore[assignment]

    on_validation_start = on_test_start = on_predict_start = _in
    on_validation_end = on_test_end = on_predict_end = _out
    on_exception = _out

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module, which is what one samples from afterwards."""
        self._in(trainer, pl_module)
        self._in_place = self.profile
        self._average, self._raw, self._weights = None, None, {}

    def state_dict(self) -> dict[str, Any]:
        """How many updates the average has seen, and which it is."""
        return {"updates": self.updates, "profile": str(self._profile)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.updates, self._kept = state_dict["updates"], state_dict.get("profile", "")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the average as the model's state with its name, and the raw weights beside it."""
        if self._average is not None:
            names = self._weights
            raw = {} if self._raw is None else dict(zip(names, self._raw, strict=True))
            add_average(checkpoint, dict(zip(names, self._average.values, strict=True)), raw)
        if self._average is not None or self._in_place:
            checkpoint["average"] = self.profile

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the average until the parameters are on their device."""
        self._loaded = take_average(checkpoint)
        self._in_place = weights_name(checkpoint)


def trained_weights(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """The parameters that are trained, by all the names they have in the state.

    Args:
        pl_module: The model.
    """
    named = pl_module.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in named if p.requires_grad}


def name_of(profile: Profile, updates: int, step: int) -> str:
    """Which average of a run this is; one that did not begin with the run says so.

    Args:
        profile: How it follows the weights.
        updates: How many updates it has seen.
        step: Optimizer steps of the run.

    Example:
        >>> name_of(PowerProfile(0.1), 300, 300), name_of(PowerProfile(0.1), 300, 1000)
        ('EMA(sigma_rel=0.1)', 'EMA(sigma_rel=0.1, from step 700)')
    """
    return str(profile) if step <= updates else f"{str(profile)[:-1]}, from step {step - updates})"
