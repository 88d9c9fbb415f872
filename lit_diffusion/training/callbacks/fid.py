"""Compute the Fréchet distance and related scores during validation and test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_diffusion.samplers import Sampler
from lit_diffusion.training.evaluation import scores
from lit_diffusion.training.evaluation.features import InceptionFeatures
from lit_diffusion.training.evaluation.generation import Generation, refuse_conditions
from lit_diffusion.training.evaluation.reference import Reference, class_shares, open_reference
from lit_diffusion.training.ranks import place
from lit_diffusion.training.run.measurements import Measurement, add_measurements, versions
from lit_diffusion.training.run.weights import weights_in_use

__all__ = ["FID"]


class FID(L.Callback):
    """Generates samples at validation and test, and computes their distance from the data.

    Logged are …/fid and, by argument, …/kid, …/inception_score, …/precision, …/recall, …/density
    and …/coverage. All ranks draw and look at their part, and the samples are the same however
    many there are. Every number goes with its protocol to metrics.json in the run folder: the
    reference and its hash, how many samples, the sampler and how often it asks the network,
    guidance, which weights, the seed, what is done to an image, versions. Two numbers whose
    protocols agree may be compared; most published ones are 50,000 samples, Inception, the
    training split.

    With an `EMA` the samples are those of the average. The reference is measured once for each
    data set and feature network, and kept in the cache.

    Args:
        num_samples: Number of samples, at least 2.
        features: The network whose features are compared: None means `InceptionFeatures()`, else
            any that takes bytes (B, C, H, W) and returns (B, F), or a pair with logits.
        split: Split of the data to compare with.
        kid: Also the kernel distance.
        inception_score: Also the Inception Score.
        precision_recall: Also precision and recall, density and coverage.
        sampler: The sampler; None for the model's own.
        guidance: Strength of classifier-free guidance, 1 for none.
        guidance_interval: Guide only for λ within; None means everywhere.
        seed: Sample i is a function of (weights, seed, i).
        batch_size: Images at a time, dealt to the ranks.
        every_n_validations: Measure at every n-th validation and at the last step only.
        baseline_split: A split of real images whose own distance is measured once, as what perfect
            samples would score; logged as …/fid_floor. None for none.
        reference_hash: A prefix of the expected hash of the reference; None accepts any.

    Raises:
        ValueError: If a number is too small, or the reference's hash is another.

    References:
        Heusel et al. (2017), GANs Trained by a Two Time-Scale Update Rule Converge to a Local
        Nash Equilibrium, arXiv:1706.08500.
    """

    # The network is an attribute of the callback, so no checkpoint, average or DDP knows of it.

    def __init__(
        self,
        num_samples: int = 50_000,
        features: nn.Module | None = None,
        split: str = "train",
        kid: bool = False,
        inception_score: bool = False,
        precision_recall: bool = False,
        sampler: Sampler | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        seed: int = 0,
        batch_size: int = 256,
        every_n_validations: int = 1,
        baseline_split: str | None = None,
        reference_hash: str | None = None,
    ) -> None:
        if num_samples < 2 or every_n_validations < 1:
            raise ValueError(
                "FID: num_samples must be at least 2 and every_n_validations at least 1, "
                f"got {num_samples} and {every_n_validations}."
            )
        self.generation = Generation(
            num_samples, sampler, guidance, guidance_interval, seed, batch_size
        )
        self.features = features
        self.split = split
        wanted = {
            scores.kernel_distance: kid,
            scores.inception_score: inception_score,
            scores.precision_recall: precision_recall,
            scores.density_coverage: precision_recall,
        }
        self.others = tuple(score for score, is_wanted in wanted.items() if is_wanted)
        self.every_n_validations = every_n_validations
        self.baseline_split = baseline_split
        self.reference_hash = reference_hash
        self.summary: str | None = None
        self._reference: Reference | None = None
        self._shares: Tensor | None = None
        self._floor: float | None = None
        self._validations = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the feature network now, so that a missing file is reported before training."""
        if stage != "predict" and self.features is None:
            self.features = InceptionFeatures()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the reference now, so that a mistake is reported before training."""
        self._open(trainer, pl_module)

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        refuse_conditions(pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is None or not hasattr(data, "examples"):
            raise ValueError("FID needs an ImageDataModule to compare with, got none.")
        assert self.features is not None
        network = self.features.to(pl_module.device).eval()
        rows = bool(self.others)
        self._reference = open_reference(
            data, self.split, network, pl_module.device, rows, self.reference_hash
        )
        self._shares = None
        if pl_module.num_classes is not None:
            self._shares = class_shares(data, self._reference, network, pl_module.device)
        if self.baseline_split is not None:
            floor = open_reference(data, self.baseline_split, network, pl_module.device)
            self._floor = scores.frechet_distance(floor, self._reference)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the scores, in a hook where the averaged weights are in use."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        alone = trainer.state.fn != "fit"
        last = alone or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        if self._validations % self.every_n_validations == 0 or last:
            self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As in validation."""
        self._measure(trainer, pl_module, "test")

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._reference is None:
            self._open(trainer, pl_module)
        assert self.features is not None
        assert self._reference is not None
        found = scores.Scores(self.features, self._reference, self.others)
        rank, world = place()
        for batch in self.generation.sample(pl_module, self._shares, rank, world):
            found.add(batch)
        measured = found.compute()
        values = {name: score.value for name, score in measured.items()}
        values |= {} if self._floor is None else {"fid_floor": self._floor}
        for name, number in values.items():
            # Every rank has the number; sync_dist only says that it may be monitored anywhere.
            value = torch.tensor(number, device=pl_module.device)
            pl_module.log(f"{stage}/{name}", value, sync_dist=True, prog_bar=name == "fid")
        self._report(trainer, pl_module, stage, measured)

    def _report(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        stage: str,
        measured: dict[str, scores.Score],
    ) -> None:
        """Write metrics.json, and the summary that the command prints."""
        folder = trainer.log_dir  # a collective: every rank asks
        protocol = self.protocol(trainer, pl_module)
        step = trainer.global_step
        new = [
            Measurement(name, one.value, one.error, step, stage, protocol | one.protocol)
            for name, one in measured.items()
        ]
        if self._floor is not None:
            about = {key: protocol[key] for key in ("reference", "versions")}
            about |= {"split": self.baseline_split}
            new.append(Measurement("fid_floor", self._floor, None, step, stage, about))
        if trainer.is_global_zero and folder is not None:
            add_measurements(Path(folder), new)
        reference = protocol["reference"]
        fid = measured["fid"].value
        floor = ""
        if self._floor is not None:
            times = fid / self._floor
            floor = f", {times:.2f} times that of split {self.baseline_split} ({self._floor:.4g})"
        others = "".join(
            f"; {name} {one.value:.4g}" + ("" if one.error is None else f" ± {one.error:.2g}")
            for name, one in measured.items()
            if name != "fid"
        )
        self.summary = (
            f"{stage}/fid: {fid:.4g}{floor}{others}; {protocol['samples']} samples by "
            f"{protocol['sampler']}, {protocol['network calls']} network calls each, against "
            f"{reference['examples']} examples of split {reference['split']} "
            f"({reference['hash']}) under {reference['features']}"
        )

    def protocol(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """The settings that the scores depend on, besides the weights.

        Args:
            trainer: Has the callbacks.
            pl_module: The LitDiffusion that is measured.
        """
        assert self._reference is not None
        return {
            "reference": self._reference.protocol,
            **self.generation.protocol(pl_module),
            "weights": weights_in_use(pl_module),
            "versions": versions(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The number of validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]
