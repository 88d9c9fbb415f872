"""Compute the variational bound, in bits per dimension, during validation and test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.decoders import Decoder, SoftmaxDecoder
from lit_diffusion.likelihood import BoundTerms, variational_bound
from lit_diffusion.schedules import LinearSchedule, NoiseSchedule
from lit_diffusion.times import fixed_times
from lit_diffusion.training import randomness
from lit_diffusion.training.run.measurements import Measurement, add_measurements, versions
from lit_diffusion.training.run.weights import weights_in_use

__all__ = ["Likelihood"]


class Likelihood(L.Callback):
    """Computes the variational bound in validation and test: bits per dimension, in three terms.

    Logged are …/bpd and what it is made of, …/bpd_prior, …/bpd_diffusion, …/bpd_reconstruction,
    all in bits per dimension, whatever weighting the model is trained with. The noise is keyed by
    example and the noise levels are spread evenly over the whole set, so the number is the same
    for the same weights, whatever the batches and ranks. With an `EMA` it is that of the average.

    Args:
        decoder: The distribution of the data given the cleanest z; None means the model's own,
            else `SoftmaxDecoder()` over the 256 bytes.
        num_timesteps: Number T of steps of the chain whose bound it is, at least 1; None means
            the model's own, continuous time if it has none.
        draws: Noise levels per example, at least 1; more reduce the standard error.
        schedule: Sampled for λ, over the model's range; None means uniform, or the model's own
            if that is learned or the time discrete.

    Raises:
        ValueError: If num_timesteps or draws is below 1.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630.
    """

    def __init__(
        self,
        decoder: Decoder | None = None,
        num_timesteps: int | None = None,
        draws: int = 1,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        if draws < 1 or (num_timesteps is not None and num_timesteps < 1):
            raise ValueError(
                "Likelihood: num_timesteps and draws must be at least 1, "
                f"got {num_timesteps} and {draws}."
            )
        self.decoder = decoder
        self.num_timesteps = num_timesteps
        self.draws = draws
        self.schedule = schedule
        self.summary: str | None = None
        self._sums = torch.zeros(0)

    def protocol(self, pl_module: Any) -> dict[str, Any]:
        """The settings of the bound: decoder, steps, and the schedule that λ is sampled from.

        Args:
            pl_module: The LitDiffusion whose bound it is.
        """
        loss = pl_module.loss
        decoder = self.decoder or loss.decoder or SoftmaxDecoder()
        num_timesteps = loss.num_timesteps if self.num_timesteps is None else self.num_timesteps
        schedule = self.schedule
        if schedule is None:
            learned = loss.schedule.learns_ends or loss.schedule.learns_shape
            own = learned or num_timesteps is not None
            schedule = loss.schedule if own else LinearSchedule(*loss.schedule.ends)
        elif schedule.ends != loss.schedule.ends:
            raise ValueError(
                f"Likelihood: the model covers λ in {list(loss.schedule.ends)} and the schedule "
                f"{list(schedule.ends)}: give it that range, or leave it out."
            )
        return {
            "decoder": decoder,
            "num_timesteps": num_timesteps,
            "schedule": schedule.to(pl_module.device),
        }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second `Likelihood`, which would overwrite the numbers of the first."""
        count = sum(isinstance(callback, Likelihood) for callback in trainer.callbacks)
        if count > 1:
            raise ValueError(
                f"Likelihood is listed {count} times and their numbers have one name: keep one."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check at once that the decoder fits the data, not after the first hour."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        protocol = self.protocol(pl_module)
        for batch in [] if data is None else data.val_dataloader():
            x = data.on_after_batch_transfer(dict(batch), 0)["image"]
            protocol["decoder"].check(x)
            protocol["decoder"].warn_if_costly(protocol["schedule"].ends[1])
            break

    def bound(self, pl_module: Any, batch: dict[str, Any]) -> BoundTerms:
        """The terms of each example, averaged over the draws.

        Args:
            pl_module: The LitDiffusion whose bound it is.
            batch: A batch of the validation data.

        Shapes:
            terms (B,), float64.
        """
        x, index, total = batch["image"], batch["index"], int(batch["total"])
        protocol = self.protocol(pl_module)
        found = []
        for draw in range(self.draws):
            noise = randomness.generators(pl_module.seed, f"bound {draw}", index.tolist())
            t = fixed_times(index, total, draw, self.draws)
            terms = variational_bound(
                pl_module.denoiser,
                x,
                **protocol,
                generator=noise,
                t=t,
                **pl_module.condition(batch),
            )
            found.append(torch.stack(terms))
        return BoundTerms(*torch.stack(found).mean(0))

    def sums(self, pl_module: Any, batch: dict[str, Any]) -> Tensor:
        """Sums over a batch: the three terms in bits, the square of their sum, the examples.

        Args:
            pl_module: The LitDiffusion whose bound it is.
            batch: A batch of the validation data.

        Shapes:
            result (5,), float64.
        """
        terms = BoundTerms(*(term / math.log(2) for term in self.bound(pl_module, batch)))
        rows = [*terms, terms.total**2, torch.ones_like(terms.total)]
        return torch.stack([row.sum() for row in rows])

    def measurements(
        self, pl_module: Any, total: Tensor, step: int, stage: str, weights: str
    ) -> list[Measurement]:
        """The bound and its three terms with their protocol, from the `sums` of a whole set.

        Args:
            pl_module: The LitDiffusion whose bound it is.
            total: The sums.
            step: Optimizer steps of the model.
            stage: val, test or evaluate.
            weights: Which weights they are.

        Shapes:
            total (5,), float64.
        """
        found = self.protocol(pl_module)
        low, high = pl_module.loss.schedule.ends
        protocol = {
            "examples": int(total[-1]),
            "draws": self.draws,
            "num_timesteps": found["num_timesteps"],
            "λ": [float(low), float(high)],
            "drawn from": repr(found["schedule"]),
            "decoder": repr(found["decoder"]),
            "error": "standard error over the examples",
            "weights": weights,
            "versions": versions(),
        }
        terms = BoundTerms(*(total[:3] / total[-1]))
        error = ((total[3] / total[-1] - terms.total**2).clamp(min=0) / total[-1]).sqrt()
        values = {"bpd": (terms.total, float(error))}
        values |= {f"bpd_{name}": (term, None) for name, term in terms._asdict().items()}
        return [
            Measurement(name, float(value), error, step, stage, protocol)
            for name, (value, error) in values.items()
        ]

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=pl_module.device)

    def _add(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch, in a hook where the averaged weights are in use."""
        if not trainer.sanity_checking:
            self._sums += self.sums(pl_module, batch)

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means over the whole set, the same on every rank."""
        if trainer.sanity_checking:
            return
        total: Tensor = trainer.strategy.reduce(self._sums, reduce_op="sum")  # type: ignore[assignment]
        stage = "test" if trainer.state.fn == "test" else "val"
        folder = trainer.log_dir  # a collective: every rank asks
        n = int(total[-1])
        if n == 0:
            return
        measured = self.measurements(
            pl_module, total, trainer.global_step, stage, weights_in_use(pl_module)
        )
        for one in measured:
            value = torch.tensor(one.value, device=pl_module.device)
            pl_module.log(f"{stage}/{one.name}", value, prog_bar=one.name == "bpd", sync_dist=True)
        if trainer.is_global_zero and folder is not None:
            add_measurements(Path(folder), measured)
        bits, *terms = measured
        protocol = self.protocol(pl_module)
        chain = (
            "continuous time"
            if protocol["num_timesteps"] is None
            else f"{protocol['num_timesteps']} steps"
        )
        low, high = pl_module.loss.schedule.ends  # type: ignore[union-attr, operator]
        parts = ", ".join(f"{one.name.removeprefix('bpd_')} {one.value:.4f}" for one in terms)
        density = not hasattr(protocol["decoder"], "levels")
        what = ", of a density in units of x, not of grey levels" if density else ""
        self.summary = (
            f"{stage}/bpd: {bits.value:.4f} bits per dimension at most{what} ({parts}); "
            f"± {bits.error:.4f} "
            f"over {n} examples, {self.draws} draw(s) each, {chain}, "
            f"λ in [{low:.4g}, {high:.4g}], {protocol['decoder']}"
        )

    on_validation_epoch_start = on_test_epoch_start = _start
    on_validation_batch_end = on_test_batch_end = _add
    on_validation_epoch_end = on_test_epoch_end = _finish
