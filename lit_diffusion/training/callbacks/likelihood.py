"""Compute the variational bound, in bits per dimension, during validation and test."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.decoders import Decoder, GaussianDecoder, SoftmaxDecoder
from lit_diffusion.likelihood import BoundTerms, variational_bound
from lit_diffusion.schedules import LinearSchedule, NoiseSchedule
from lit_diffusion.times import fixed_times
from lit_diffusion.training.data.decoding.transforms import protocol_of
from lit_diffusion.training.last_weights import has_validation
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.measurements import (
    FILE,
    Measurement,
    add_measurements,
    versions,
)
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.tolerance import may_fail
from lit_diffusion.training.run.trainer import all_callbacks, output_folder
from lit_diffusion.training.run.weights import weights_in_use
from lit_diffusion.training.step import randomness

__all__ = ["Likelihood"]


class BoundSettings(NamedTuple):
    """The settings of a bound that `variational_bound` takes.

    Args:
        decoder: The distribution of the data given the cleanest z.
        num_timesteps: Number of steps of the chain; None for continuous time.
        schedule: The density that λ is sampled from.
    """

    decoder: Decoder
    num_timesteps: int | None
    schedule: NoiseSchedule


class Likelihood(L.Callback):
    """Computes the variational bound on −log₂ p(x) per dimension, in validation and test.

    Logged are …/bpd and its three terms, …/bpd_prior, …/bpd_diffusion and …/bpd_reconstruction,
    all in bits per dimension. Unlike the loss they do not depend on the weighting, so models with
    different objectives can be compared. The noise is a function of the example and the noise
    levels are stratified over the whole set, so the same weights give the same number for any
    batch size and any number of ranks. With an `EMA` it is the bound of the average.

    Args:
        decoder: The distribution of the data given the cleanest z; None means the model's own,
            else `SoftmaxDecoder()` over the 256 bytes of pictures and `GaussianDecoder()`, a
            density, for all other data. Of normalised data it is that in their own unit.
        num_timesteps: Number T of steps of the chain whose bound is computed, at least 1; None
            means the model's own, which may be continuous time.
        samples_per_example: Noise levels per example, at least 1; more reduce the standard error.
        schedule: The density that λ is sampled from, over the model's range; None means uniform,
            or the model's own if that is learned or time is discrete.

    Raises:
        ValueError: If num_timesteps or samples_per_example is below 1, or the ranges of λ differ.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630.
    """

    def __init__(
        self,
        decoder: Decoder | None = None,
        num_timesteps: int | None = None,
        samples_per_example: int = 1,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        if samples_per_example < 1 or (num_timesteps is not None and num_timesteps < 1):
            raise ValueError(
                "Likelihood: num_timesteps and samples_per_example must be at least 1, "
                f"got {num_timesteps} and {samples_per_example}."
            )
        self.decoder = decoder
        self.num_timesteps = num_timesteps
        self.samples_per_example = samples_per_example
        self.schedule = schedule
        self.summary: str | None = None
        self._sums = torch.zeros(0)

    def settings(self, model: LitDiffusion) -> BoundSettings:
        """Decoder, number of steps, and the schedule that λ is sampled from.

        Args:
            model: The model whose bound is computed.

        Raises:
            ValueError: If the schedule has another range of λ than the model.
        """
        loss = model.loss
        grey = model.kind == "image" and model.normalization is None
        usual = SoftmaxDecoder if grey else GaussianDecoder
        decoder = self.decoder or loss.decoder or usual()
        num_timesteps = loss.num_timesteps if self.num_timesteps is None else self.num_timesteps
        schedule = self.schedule
        if schedule is None:
            learned = loss.schedule.learns_ends or loss.schedule.learns_shape
            own = learned or num_timesteps is not None
            schedule = loss.schedule if own else LinearSchedule(*loss.schedule.ends)
        elif schedule.ends != loss.schedule.ends:
            raise ValueError(
                "Likelihood: expected a schedule over the model's range of λ, "
                f"{list(loss.schedule.ends)}, got {list(schedule.ends)}: give it that range, or "
                "leave it out."
            )
        return BoundSettings(decoder, num_timesteps, schedule.to(model.device))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second `Likelihood`, which would overwrite the numbers of the first."""
        count = sum(isinstance(callback, Likelihood) for callback in all_callbacks(trainer))
        if count > 1:
            raise ValueError(
                f"Likelihood: expected one in trainer.callbacks, got {count}, whose numbers would "
                "have the same names: keep one."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check now that the decoder fits the data, not at the first validation."""
        data: Any = getattr(trainer, "datamodule", None)
        decoder, _, schedule = self.settings(pl_module)
        for batch in [] if data is None else data.val_dataloader():
            x = pl_module.standard(data.on_after_batch_transfer(batch, 0))["image"]
            decoder.check(x)
            decoder.warn_if_costly(schedule.ends[1])
            break

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report before the first step that there is nothing to compute the bound of."""
        if not has_validation(trainer):
            warn(
                "Likelihood: this fit has no validation data (data.val_split or "
                "trainer.limit_val_batches), so there will be no bound: set them, or use "
                "`lit-diffusion evaluate` afterwards."
            )

    def bound(self, model: LitDiffusion, batch: Any) -> BoundTerms:
        """The terms of each example, averaged over its noise levels.

        Args:
            model: The model whose bound is computed.
            batch: A batch of the validation data.

        Shapes:
            terms (B,), float64.
        """
        batch = model.numbered(batch)
        x, index, total = batch["image"], batch["index"], batch["total"]
        decoder, num_timesteps, schedule = self.settings(model)
        cond: dict[str, Any] = model.condition(batch)
        found = []
        for sample in range(self.samples_per_example):
            noise = randomness.generators(model.seed, f"bound {sample}", index.tolist())
            t = fixed_times(index, total, sample, self.samples_per_example)
            terms = variational_bound(
                model.denoiser,
                x,
                schedule=schedule,
                decoder=decoder,
                num_timesteps=num_timesteps,
                generator=noise,
                t=t,
                **cond,
            )
            found.append(torch.stack(terms))
        terms = BoundTerms(*torch.stack(found).mean(0))
        if model.normalization is None or hasattr(decoder, "levels"):
            return terms
        # A density depends on the unit: that of the data, not that of x.
        shift = model.normalization.mean_log_scale
        return terms._replace(reconstruction=terms.reconstruction + shift)

    def sums(self, model: LitDiffusion, batch: Any) -> Tensor:
        """Sums over a batch: the three terms in bits, the square of their sum, and the examples.

        Args:
            model: The model whose bound is computed.
            batch: A batch of the validation data.

        Shapes:
            result (5,), float64.
        """
        terms = BoundTerms(*(term / math.log(2) for term in self.bound(model, batch)))
        rows = [*terms, terms.total**2, torch.ones_like(terms.total)]
        return torch.stack([row.sum() for row in rows])

    def measurements(
        self,
        model: LitDiffusion,
        total: Tensor,
        step: int,
        stage: str,
        weights: str,
        data: Any = None,
    ) -> list[Measurement]:
        """The bound and its three terms with their protocol, from the `sums` of a whole set.

        Args:
            model: The model whose bound was computed.
            total: The sums.
            step: Optimizer steps of the model.
            stage: val, test or evaluate.
            weights: The name of its weights.
            data: The data, for the protocol.

        Shapes:
            total (5,), float64.
        """
        decoder, num_timesteps, schedule = self.settings(model)
        low, high = model.loss.schedule.ends
        protocol = {
            "examples": int(total[-1]),
            **protocol_of(data),
            "samples per example": self.samples_per_example,
            "num_timesteps": num_timesteps,
            "λ": [float(low), float(high)],
            "sampled from": repr(schedule),
            "decoder": repr(decoder),
            **self._unit(model, decoder),
            "error": "standard error over the examples",
            "weights": weights,
            "versions": versions(),
        }
        terms = BoundTerms(*(total[:3] / total[-1]))
        error = ((total[3] / total[-1] - terms.total**2).clamp(min=0) / total[-1]).sqrt()
        values: dict[str, tuple[Tensor, float | None]] = {"bpd": (terms.total, float(error))}
        values |= {f"bpd_{name}": (term, None) for name, term in terms._asdict().items()}
        return [
            Measurement(name, float(value), error, step, stage, protocol)
            for name, (value, error) in values.items()
        ]

    @staticmethod
    def _unit(model: LitDiffusion, decoder: Decoder) -> dict[str, Any]:
        """In which unit a density is, for the protocol; nothing if it is of grey levels."""
        if hasattr(decoder, "levels"):
            return {}
        normalization = model.normalization
        return {"unit": "x" if normalization is None else f"of the data, x of {normalization}"}

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=pl_module.device)

    def _add(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch, in a hook where the averaged weights are in use."""
        if not trainer.sanity_checking:
            self._sums += self.sums(pl_module, batch)

    def _finish(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the means over the whole set, the same on every rank."""
        if trainer.sanity_checking:
            return
        total: Tensor = trainer.strategy.reduce(self._sums, reduce_op="sum")
        stage = "test" if trainer.state.fn == "test" else "val"
        folder = output_folder(trainer)
        if total[-1] == 0:
            return
        weights, data = weights_in_use(pl_module), getattr(trainer, "datamodule", None)
        measured = self.measurements(pl_module, total, trainer.global_step, stage, weights, data)
        for one in measured:
            value = torch.tensor(one.value, device=pl_module.device)
            pl_module.log(f"{stage}/{one.name}", value, prog_bar=one.name == "bpd", sync_dist=True)
        if trainer.is_global_zero and folder is not None:
            with may_fail(folder / FILE):
                add_measurements(folder, measured)
        self.summary = self._sentence(pl_module, stage, measured)

    def _sentence(self, model: LitDiffusion, stage: str, measured: list[Measurement]) -> str:
        """The summary that the command prints."""
        bits, *terms = measured
        decoder, num_timesteps, _ = self.settings(model)
        chain = "continuous time" if num_timesteps is None else f"{num_timesteps} steps"
        low, high = model.loss.schedule.ends
        parts = ", ".join(f"{one.name.removeprefix('bpd_')} {one.value:.4f}" for one in terms)
        density = not hasattr(decoder, "levels")
        unit = "units of x" if model.normalization is None else "the unit of the data"
        what = f", of a density in {unit}, not of grey levels" if density else ""
        return (
            f"{stage}/bpd at step {bits.step}: at most {bits.value:.4f} ± {bits.error:.4f} bits "
            f"per dimension{what} "
            f"({parts}), over {bits.protocol['examples']} examples, "
            f"{self.samples_per_example} noise level(s) each, {chain}, "
            f"λ in [{low:.4g}, {high:.4g}], {decoder}"
        )

    on_validation_epoch_start = on_test_epoch_start = _start
    on_validation_batch_end = on_test_batch_end = _add
    on_validation_epoch_end = on_test_epoch_end = _finish
