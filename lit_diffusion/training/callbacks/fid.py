"""Compute the Fréchet distance and related scores during validation and test."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn

from lit_diffusion.samplers import Sampler
from lit_diffusion.training.callbacks.periodic import Periodic, log
from lit_diffusion.training.evaluation import scores
from lit_diffusion.training.evaluation.comparison import Comparison, refuse_other_kinds
from lit_diffusion.training.evaluation.features import InceptionFeatures
from lit_diffusion.training.evaluation.generation import Generation
from lit_diffusion.training.evaluation.row_conditions import check_enough
from lit_diffusion.training.evaluation.scores import Score
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.measurements import FILE, Measurement, add_measurements
from lit_diffusion.training.run.tolerance import may_fail
from lit_diffusion.training.run.trainer import output_folder
from lit_diffusion.training.run.weights import weights_in_use
from lit_diffusion.training.step.ranks import place

__all__ = ["FID"]


class FID(Periodic):
    """Generates samples at validation and test, and computes their Fréchet distance from the data.

    The distance is ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½), with the means and covariances of the
    features of samples and real images. Logged are …/fid and, on request, …/kid,
    …/inception_score, …/precision, …/recall, …/density and …/coverage. The ranks share the work,
    and the samples are the same for any number of ranks.

    Every number is written with its protocol to metrics.json in the run folder: the reference and
    its hash, the number of samples, the sampler and its network calls, guidance, the weights, the
    seed, the rounding of images, and versions. Two numbers with the same protocol can be compared;
    most published ones are of 50,000 samples and Inception features against the training split.

    Labels have the frequencies of the training split. If the model has further conditions, sample
    i has those, and the label, of training example i, so num_samples is at most their number.

    With an `EMA` the samples are those of the average. The reference is computed once for each
    data set and feature network, and cached. The last weights of a fit are always measured;
    without validation data, epochs of training count as validations.

    Args:
        num_samples: Number of samples, at least 2.
        features: The network whose features are compared: None means `InceptionFeatures()`, else
            any that takes bytes (B, C, H, W) and returns (B, F), or a pair with logits.
        split: Split of the data to compare with.
        kid: Also compute the Kernel Inception Distance.
        inception_score: Also compute the Inception Score.
        precision_recall: Also compute precision and recall, density and coverage.
        sampler: The sampler; None for the model's own.
        guidance: Scale of classifier-free guidance, 1 for none.
        guidance_interval: Guide only where low ≤ λ ≤ high; None for everywhere.
        seed: Sample i is a function of (weights, seed, i).
        batch_size: Images per batch; whole batches are assigned to the ranks.
        every_n_validations: Measure at every n-th validation, and at the end of the fit.
        baseline_split: A split of real images whose own distance is computed once, as the score
            of perfect samples; logged as …/fid_baseline. None for none.
        reference_hash: A prefix of the expected hash of the reference; None accepts any.

    Raises:
        ValueError: If a number is too small, the hash of the reference differs, or the model
            cannot be guided.

    References:
        Heusel et al. (2017), GANs Trained by a Two Time-Scale Update Rule Converge to a Local
        Nash Equilibrium, arXiv:1706.08500.
    """

    # The feature network is an attribute of the callback and not of the model, so it is in no
    # checkpoint, and neither DDP nor an average of the weights sees it.

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
        super().__init__(every_n_validations, first=False)
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
        self.baseline_split = baseline_split
        self.reference_hash = reference_hash
        self.summary: str | None = None
        self._comparison: Comparison | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the feature network now, so that a missing file is reported before training."""
        refuse_other_kinds(getattr(trainer, "datamodule", None))
        if stage != "predict" and self.features is None:
            self.features = InceptionFeatures()

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read or compute the reference now, so that a mistake is reported before training."""
        self._comparison = self._open(trainer, pl_module)

    def _open(self, trainer: L.Trainer, model: LitDiffusion) -> Comparison:
        model.check_guidance(self.generation.guidance)
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "examples"):
            raise ValueError(
                "FID: expected a DataModule to compare samples with, got "
                f"{type(data).__name__}: give the trainer one, or leave FID out."
            )
        if model.conditions:
            check_enough(data, data.train_split, self.generation.num_samples)
        return Comparison.open(
            model,
            data,
            self.features or InceptionFeatures(),
            self.split,
            self.others,
            self.baseline_split,
            self.reference_hash,
        )

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compute the scores, in a hook where the averaged weights are in use."""
        log(pl_module, "test", self.measure(trainer, pl_module, "test"))

    def measure(self, trainer: L.Trainer, pl_module: Any, stage: str) -> dict[str, float]:
        """Compute the scores and record them with their protocol.

        Args:
            trainer: The trainer.
            pl_module: The model.
            stage: val or test.
        """
        model: LitDiffusion = pl_module
        if self._comparison is None:
            self._comparison = self._open(trainer, model)
        comparison = self._comparison
        found = comparison.scores(model, self.generation, *place())
        values = {name: score.value for name, score in found.items()}
        if comparison.baseline is not None:
            values["fid_baseline"] = comparison.baseline
        protocol = comparison.protocol(model, self.generation, weights_in_use(model))
        folder = output_folder(trainer)
        if trainer.is_global_zero and folder is not None:
            step = trainer.global_step
            new = [
                Measurement(name, one.value, one.error, step, stage, protocol | one.protocol)
                for name, one in found.items()
            ]
            if comparison.baseline is not None:
                about = {key: protocol[key] for key in ("reference", "versions")}
                about |= {"split": self.baseline_split}
                new.append(
                    Measurement("fid_baseline", comparison.baseline, None, step, stage, about)
                )
            with may_fail(folder / FILE):
                add_measurements(folder, new)
        self.summary = self._sentence(
            f"{stage}/fid at step {trainer.global_step}", found, protocol, comparison.baseline
        )
        return values

    def _sentence(
        self,
        name: str,
        found: dict[str, Score],
        protocol: dict[str, Any],
        baseline: float | None,
    ) -> str:
        """The summary that the command prints."""
        reference = protocol["reference"]
        fid = found["fid"].value
        relative = ""
        if baseline is not None:
            relative = (
                f", {fid / baseline:.2f} times that of split {self.baseline_split} "
                f"({baseline:.4g})"
            )
        others = "".join(
            f"; {name} {one.value:.4g}" + ("" if one.error is None else f" ± {one.error:.2g}")
            for name, one in found.items()
            if name != "fid"
        )
        return (
            f"{name}: {fid:.4g}{relative}{others}; {protocol['samples']} samples by "
            f"{protocol['sampler']}, {protocol['network calls']} network calls each, against "
            f"{reference['examples']} examples of split {reference['split']} "
            f"({reference['hash']}) under {reference['features']}"
        )
