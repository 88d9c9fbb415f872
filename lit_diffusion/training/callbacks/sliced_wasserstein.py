"""Compute the sliced Wasserstein distance during validation and test, for data of any kind."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.samplers import Sampler
from lit_diffusion.training.callbacks.periodic import Periodic, log
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.evaluation.generation import Generation
from lit_diffusion.training.evaluation.row_conditions import RowConditions, check_enough
from lit_diffusion.training.evaluation.sliced_wasserstein import features_of, sliced_wasserstein
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.measurements import FILE, Measurement, add_measurements, versions
from lit_diffusion.training.run.tolerance import may_fail
from lit_diffusion.training.run.trainer import output_folder
from lit_diffusion.training.run.weights import weights_in_use
from lit_diffusion.training.step.batches import standard
from lit_diffusion.training.step.ranks import collect_rows, place

__all__ = ["SlicedWasserstein"]


class SlicedWasserstein(Periodic):
    """Generates samples at validation and test, and computes how far they are from the data.

    The sliced Wasserstein distance is that of the distributions of θ·x over random directions θ,
    ∫ (F⁻¹(q) − G⁻¹(q))² dq, its root mean square over θ. It needs no network of features and suits
    every kind of data that `FID` does not: signals, volumes, vectors, and sets of points, of which
    it sees no order. Its unit is that of the normalised data.

    Logged are …/sliced_wasserstein, the distance of the samples from examples of the validation
    split, and …/sliced_wasserstein_baseline, that of as many training examples from the same: a
    perfect model has about this distance, not zero. With its protocol the number is written to
    metrics.json in the run folder. In many dimensions the projections of most distributions are
    nearly normal, so that mainly means and covariances are compared.

    The ranks share the work. Labels have the frequencies of the training examples; if the model
    has further conditions, sample i has those of training example i.

    Args:
        num_samples: Number of samples, and of examples of each split at most, at least 2.
        projections: Number of directions θ, at least 1.
        sampler: The sampler; None for the model's own.
        seed: Sample i is a function of (weights, seed, i).
        batch_size: Samples per batch; whole batches are assigned to the ranks.
        every_n_validations: Measure at every n-th validation, and at the end of the fit.

    Raises:
        ValueError: If a number is too small, or the data have no validation split.

    References:
        Bonneel et al. (2015), Sliced and Radon Wasserstein Barycenters of Measures, Journal of
        Mathematical Imaging and Vision 51.
    """

    def __init__(
        self,
        num_samples: int = 1024,
        projections: int = 512,
        sampler: Sampler | None = None,
        seed: int = 0,
        batch_size: int = 256,
        every_n_validations: int = 1,
    ) -> None:
        super().__init__(every_n_validations, first=False)
        if num_samples < 2 or min(projections, every_n_validations) < 1:
            raise ValueError(
                "SlicedWasserstein: num_samples must be at least 2, projections and "
                "every_n_validations at least 1, got "
                f"{num_samples}, {projections} and {every_n_validations}."
            )
        self.generation = Generation(num_samples, sampler, seed=seed, batch_size=batch_size)
        self.projections = projections
        self.summary: str | None = None
        self._reference: _Examples | None = None
        self._baseline: _Examples | None = None
        self._baseline_distance = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the data now, so that a mistake is reported before training."""
        self._data(trainer, pl_module)

    def _data(self, trainer: L.Trainer, model: LitDiffusion) -> DataModule:
        """The data to compare with."""
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "examples"):
            raise ValueError(
                "SlicedWasserstein: expected a DataModule to compare samples with, got "
                f"{type(data).__name__}: give the trainer one, or leave SlicedWasserstein out."
            )
        train, other = data.train_split, data.splits_in_use()[-1]
        if other == train:
            raise ValueError(
                f"SlicedWasserstein: expected a split to validate on besides {train!r}, got none: "
                "set data.val_split, or leave SlicedWasserstein out."
            )
        if model.conditions:
            check_enough(data, train, self.generation.num_samples)
        found: DataModule = data
        return found

    def _read(self, trainer: L.Trainer, model: LitDiffusion) -> None:
        """Read the examples, once, when the model knows how they are normalised."""
        data, most = self._data(trainer, model), self.generation.num_samples
        self._reference = _Examples(data, data.splits_in_use()[-1], model, most)
        self._baseline = _Examples(data, data.train_split, model, most)
        self._baseline_distance = self._distance(self._baseline.features, self._reference)

    def _distance(self, features: Tensor, reference: _Examples) -> float:
        return sliced_wasserstein(features, reference.features, self.projections)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compute the distance, in a hook where the averaged weights are in use."""
        log(pl_module, "test", self.measure(trainer, pl_module, "test"))

    def measure(self, trainer: L.Trainer, pl_module: Any, stage: str) -> dict[str, float]:
        """Compute the distance and record it with its protocol.

        Args:
            trainer: The trainer.
            pl_module: The model.
            stage: val or test.
        """
        model: LitDiffusion = pl_module
        if self._reference is None or self._baseline is None:
            self._read(trainer, model)
        assert self._reference is not None
        assert self._baseline is not None
        distance = self._distance(self._samples(trainer, model), self._reference)
        baseline = self._baseline_distance
        protocol = {
            "reference": self._reference.protocol,
            "baseline": self._baseline.protocol,
            **self.generation.protocol(model),
            "projections": self.projections,
            "weights": weights_in_use(model),
            "versions": versions(),
        }
        del protocol["bytes"]  # floats are compared
        values = {"sliced_wasserstein": distance, "sliced_wasserstein_baseline": baseline}
        folder, step = output_folder(trainer), trainer.global_step
        if trainer.is_global_zero and folder is not None:
            with may_fail(folder / FILE):
                add_measurements(
                    folder,
                    [Measurement(n, v, None, step, stage, protocol) for n, v in values.items()],
                )
        # Where the splits are the same examples, as in swirl, there is nothing to divide by.
        times = f", {distance / baseline:.2f} times" if baseline > 0 else " beside"
        self.summary = (
            f"{stage}/sliced_wasserstein at step {step}: {distance:.4g}"
            f"{times} that of training examples ({baseline:.4g}); "
            f"{protocol['samples']} samples by {protocol['sampler']}, against "
            f"{len(self._reference.features)} examples of split {self._reference.split}"
        )
        return values

    def _samples(self, trainer: L.Trainer, model: LitDiffusion) -> Tensor:
        """The samples of all ranks, as vectors; a collective."""
        assert self._baseline is not None
        rows = None
        if model.conditions:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            rows = RowConditions(model, data, data.train_split, self.generation.batch_size)
        shares = self._baseline.shares
        return _gather(
            [
                (index, features_of(x.detach().cpu(), model.kind))
                for index, x in self.generation.floats(model, shares, *place(), rows)
            ],
            self._baseline.features.shape[1],
            model,
        )


class _Examples:
    """The first examples of a split, normalised as the model reads them, as vectors.

    Args:
        data: The data.
        split: The split.
        model: The model.
        most: How many.
    """

    def __init__(self, data: DataModule, split: str, model: LitDiffusion, most: int) -> None:
        self.split = split
        batch_size = min(256, most)
        found: list[tuple[Tensor, Tensor]] = []
        labels: list[Tensor] = []
        for batch in data.examples(split, batch_size):
            if batch["batch"] * batch_size >= most:
                break
            x = standard(batch)["image"]
            if model.normalization is not None:
                x = model.normalization.normalize(x)
            found.append((batch["index"], features_of(x, model.kind)))
            labels += [batch["label"]] if "label" in batch else []
        size = features_of(torch.zeros(1, *model.shape), model.kind).shape[1]
        self.features = _gather(found, size, model)[:most]
        self.shares = None
        if model.num_classes is not None and labels:
            known = torch.cat(labels).long()
            self.shares = torch.bincount(known[known >= 0], minlength=model.num_classes).double()
        self.protocol = {"split": split, "examples": len(self.features)}


def _gather(found: list[tuple[Tensor, Tensor]], size: int, model: LitDiffusion) -> Tensor:
    """The vectors of all ranks in the order of their numbers, float64 on the CPU; a collective."""
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *(i for i, _ in found)])
    rows = torch.cat([torch.zeros(0, size), *(x.float() for _, x in found)])
    return collect_rows(index, rows.to(model.device)).cpu().double()
