"""Maintain the average of the weights that validation, samples and checkpoints use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.averaging import ConstantProfile, PowerProfile, Profile, RunningAverage
from lit_diffusion.training.run.messages import inform, warn
from lit_diffusion.training.run.trainer import all_callbacks
from lit_diffusion.training.run.weights import RAW, add_average, take_average, weights_name

__all__ = ["EMA", "averaged", "name_of", "trained_weights"]


class EMA(L.Callback):
    """Exponential moving average of the parameters: θ̄ ← θ̄ + (1 − d)(θ − θ̄) at each step.

    Averaging removes the noise of the last optimizer steps, so samples and likelihoods of the
    average are much better than those of the raw weights. The decay d increases with the number n
    of updates as (1 + n)/(10 + n) until it reaches its value, so that the initial weights are
    forgotten. With `sigma_rel` the weights in the average follow a power function instead, whose
    width is a constant fraction of the run. Validation, test and prediction use the average, and
    it is the `state_dict` of every checkpoint, which also has the raw weights to resume from.
    `Averages` maintains further ones.

    Args:
        decay: The decay d, in [0, 1); 0.999 averages over about a thousand steps. None means 0.999
            unless sigma_rel is given.
        sigma_rel: Relative width σ of a power function, in (0, 0.2887], instead of a decay.

    Raises:
        ValueError: If decay or sigma_rel is outside its range, or both are given.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, appendix B.
        Karras et al. (2023), Analyzing and Improving the Training Dynamics of Diffusion Models,
        arXiv:2312.02696, section 3.
    """

    # Weights are swapped in the outer hooks (…_start, …_end), so that callbacks which use the
    # inner ones (epoch, batch) see the average at any place in the list. They are swapped by
    # value, since optimizer, DDP and compiled graphs keep references to the tensors.

    def __init__(self, decay: float | None = None, sigma_rel: float | None = None) -> None:
        if decay is not None and sigma_rel is not None:
            raise ValueError(
                f"EMA: expected either decay or sigma_rel, got {decay} and {sigma_rel}."
            )
        self.decay = decay
        self.sigma_rel = sigma_rel
        if sigma_rel is not None:
            self._profile: Profile = PowerProfile(sigma_rel)
        else:
            self._profile = ConstantProfile(0.999 if decay is None else decay)
        self.updates = 0
        self._weights: dict[str, Tensor] = {}  # found once, which takes 0.3 ms
        self._average: RunningAverage | None = None
        self._raw: list[Tensor] | None = None  # the raw weights while they are swapped out
        self._after: tuple[L.LightningModule, dict[str, Tensor]] | None = None  # … and after a fit
        self._loaded: dict[str, Tensor] | None = None
        self._loaded_name = ""  # of the average in the checkpoint; early ones do not name it
        self._in_place = ""  # name of the module's weights while no average is updated
        self._last_step = 0

    @property
    def profile(self) -> str:
        """The name of the average, such as EMA(decay=0.999)."""
        if self._average is None and self._in_place:
            return self._in_place
        return name_of(self._profile, self.updates, self._last_step)

    @property
    def swapped(self) -> bool:
        """Whether the model has the average in place of its raw weights."""
        return self._raw is not None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the average on the parameters' device, or take it from the checkpoint."""
        self._weights = trained_weights(pl_module)
        start, self._loaded, self._after = self._loaded or {}, None, None
        other = self._loaded_name != str(self._profile)
        if start and other and isinstance(self._profile, PowerProfile):
            # A constant decay forgets where it started; a power function does not.
            warn(
                f"EMA: expected the average {self._profile} in the checkpoint, got "
                f"{self._loaded_name or 'one of a constant decay'}: averaging restarts from the "
                "present weights."
            )
            start, self.updates = {}, 0
        elif start and other and self._loaded_name:
            inform(
                f"Note: the average was {self._loaded_name} in the checkpoint and is now "
                f"{self._profile}"
            )
        elif not start and trainer.global_step == 0:
            self.updates = 0
        self._average = RunningAverage(self._profile, list(self._weights.values()), self.updates)
        begin = [start.get(name, w) for name, w in self._weights.items()]
        torch._foreach_copy_(self._average.values, begin)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, which a resumed run knows only now."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Update the average at each optimizer step."""
        if self._average is None or trainer.global_step == self._last_step:
            return  # the latter after a micro-batch of an accumulated step
        self._last_step = trainer.global_step
        self._average.update(list(self._weights.values()))
        self.updates = self._average.updates

    @torch.no_grad()
    def _swap_in(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Put the average in place of the weights."""
        if self._average is not None and self._raw is None:
            weights = list(self._weights.values())
            self._raw = [w.clone() for w in weights]
            torch._foreach_copy_(weights, self._average.values)
            pl_module.weights = self.profile

    @torch.no_grad()
    def _swap_out(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Put the weights back."""
        if self._raw is not None:
            torch._foreach_copy_(list(self._weights.values()), self._raw)
            self._raw = None
            pl_module.weights = RAW

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = _swap_out

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the raw weights."""
        self._swap_out(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module, to sample from it; keep the raw weights to be saved."""
        self._swap_in(trainer, pl_module)
        self._in_place = self.profile
        if self._raw is not None:
            self._after = pl_module, dict(zip(self._weights, self._raw, strict=True))
        self._average, self._raw, self._weights = None, None, {}

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, and the name of the average."""
        return {"updates": self.updates, "profile": str(self._profile)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates."""
        self.updates, self._loaded_name = state_dict["updates"], state_dict.get("profile", "")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the state of the model, with its name, beside the raw weights."""
        if self._average is not None:
            names = self._weights
            raw = {} if self._raw is None else dict(zip(names, self._raw, strict=True))
            add_average(checkpoint, dict(zip(names, self._average.values, strict=True)), raw)
        elif self._after is not None and self._after[0] is pl_module:
            add_average(checkpoint, {}, self._after[1])
        if self._average is not None or self._in_place:
            checkpoint["average"] = self.profile

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the average until the parameters are on their device."""
        self._loaded = take_average(checkpoint)
        self._in_place, self._after = weights_name(checkpoint), None


@contextlib.contextmanager
def averaged(trainer: L.Trainer, model: L.LightningModule) -> Iterator[None]:
    """The model as in a validation: with the average of an `EMA`, in eval mode, without gradients.

    Args:
        trainer: Has the callbacks.
        model: The model.
    """
    found = [one for one in all_callbacks(trainer) if isinstance(one, EMA) and not one.swapped]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for one in found:
        one.on_validation_start(trainer, model)
    try:
        with torch.no_grad():
            yield
    finally:
        for one in found:
            one.on_validation_end(trainer, model)
        for module, mode in modes:
            module.training = mode


def trained_weights(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """The trained parameters, by all the names that they have in the state.

    Args:
        pl_module: The model.
    """
    named = pl_module.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in named if p.requires_grad}


def name_of(profile: Profile, updates: int, step: int) -> str:
    """The name of an average, with its first step if it did not start with the run.

    Args:
        profile: How it weights the steps.
        updates: The number of its updates.
        step: Optimizer steps of the run.

    Example:
        >>> name_of(PowerProfile(0.1), 300, 300), name_of(PowerProfile(0.1), 300, 1000)
        ('EMA(sigma_rel=0.1)', 'EMA(sigma_rel=0.1, from step 700)')
    """
    return str(profile) if step <= updates else f"{str(profile)[:-1]}, from step {step - updates})"
