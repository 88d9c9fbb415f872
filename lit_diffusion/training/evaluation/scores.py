"""Scores: distances between samples and a reference, by the reference implementations.

The Fréchet distance is torchmetrics', from float64 moments that are summed over the ranks, so
that no features are exchanged. Kernel distance, Inception Score, precision and recall are those of
torch-fidelity, with its subsets and seed, from the features of all ranks in the order of the
images; density and coverage, which it lacks, are computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lit_diffusion.training.evaluation.features import Features, extract
from lit_diffusion.training.evaluation.generation import SampleBatch
from lit_diffusion.training.evaluation.reference import Reference
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.step import ranks

__all__ = [
    "Score",
    "ScoreFunction",
    "Scores",
    "all_scores",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]


class Score(NamedTuple):
    """A score, its error if known, and its protocol.

    Args:
        value: The number.
        error: Standard deviation over subsets or splits; None if there are none.
        protocol: Plain data.
    """

    value: float
    error: float | None = None
    protocol: dict[str, Any] = {}  # noqa: RUF012


_FEWEST = 10  # images on either side of a kernel distance

ScoreFunction: TypeAlias = Callable[[Features, Reference], dict[str, Score]]


class Scores:
    """Accumulates samples batch by batch and compares them with a reference.

    Args:
        network: The feature network, on the device of the images.
        reference: The statistics of the data under this network.
        others: Scores besides the Fréchet distance: functions of the `Features` of all samples
            and the `Reference` with its features.

    Example:
        >>> from lit_diffusion.training.evaluation.features import ClassifierFeatures
        >>> network = ClassifierFeatures()
        >>> images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
        >>> f = extract(network, images).features
        >>> scores = Scores(network, Reference(64, f.sum(0), f.T @ f, None, None, {}))
        >>> scores.add(SampleBatch(torch.arange(64), images))
        >>> abs(round(scores.compute()["fid"].value, 4))
        0.0
    """

    def __init__(
        self,
        network: nn.Module,
        reference: Reference,
        others: tuple[ScoreFunction, ...] = (),
    ) -> None:
        self.network = network
        self.reference = reference
        self.others = others
        self.metric = _frechet_metric(reference)
        self._index: list[Tensor] = []
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, batch: SampleBatch) -> None:
        """Add a batch of samples.

        Args:
            batch: Indices and images, on the device of the network.
        """
        found = extract(self.network, batch.images)
        self.metric.update(found.features.cpu().double(), real=False)
        if self.others:
            self._index.append(batch.index.cpu())
            self._features.append(found.features.float())
            if found.logits is not None:
                self._logits.append(found.logits.float())

    def compute(self) -> dict[str, Score]:
        """All scores by name, the same on every rank; a collective: every rank must call it.

        Raises:
            ValueError: If there are fewer than two samples, or a score cannot be computed.
        """
        device = _device(self.network)
        for name in ("features_sum", "features_cov_sum", "features_num_samples"):
            state = getattr(self.metric, f"fake_{name}")
            wide = state.to(device) if device.type != "mps" else state
            setattr(self.metric, f"fake_{name}", ranks.add_up(wide).cpu())
        n = int(self.metric.fake_features_num_samples)
        if min(n, self.reference.count) < 2:
            raise ValueError(
                "expected at least two images on either side of a Fréchet distance, got "
                f"{n} samples and {self.reference.count} of the reference."
            )
        scores = {"fid": Score(float(self.metric.compute()))}
        if not self.others:
            return scores
        features = self._gather(self._features, len(self.reference.total), device)
        classes = max(ranks.collect(self._logits[0].shape[1] if self._logits else 0))
        logits = self._gather(self._logits, classes, device) if classes else None
        together = Features(features, logits)
        for score in self.others:
            scores |= score(together, self.reference)
        return scores

    def _gather(self, parts: list[Tensor], width: int, device: torch.device) -> Tensor:
        """The rows of all ranks in the order of the images; a rank without samples has none."""
        index = torch.cat([torch.zeros(0, dtype=torch.int64), *self._index])
        none = torch.zeros(0, width, dtype=torch.float32, device=device)
        return ranks.collect_rows(index, torch.cat([none, *parts])).cpu()


def _frechet_metric(reference: Reference) -> Any:
    """The torchmetrics metric on given features, with the reference as its real side."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = nn.Identity()
    given.num_features = len(reference.total)  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=given, sync_on_compute=False)
    metric.real_features_sum = reference.total.clone()
    metric.real_features_cov_sum = reference.outer.clone()
    metric.real_features_num_samples = torch.tensor(reference.count)
    # Sets the precision on a rank without samples, too.
    metric.update(torch.zeros(0, len(reference.total), dtype=torch.float64), real=False)
    return metric


def frechet_distance(one: Reference, other: Reference) -> float:
    """The Fréchet distance between two references.

    Args:
        one: The moments of one set of images.
        other: Those of the other.
    """
    metric = _frechet_metric(other)
    metric.fake_features_sum = one.total.clone()
    metric.fake_features_cov_sum = one.outer.clone()
    metric.fake_features_num_samples = torch.tensor(one.count)
    return float(metric.compute())


def kernel_distance(samples: Features, reference: Reference) -> dict[str, Score]:
    """The Kernel Inception Distance, KID: the unbiased MMD² of a cubic kernel, over subsets.

    Unlike the Fréchet distance its expectation does not depend on the number of samples, so small
    sets can be compared; but its error does. For the digits and their classifier its standard
    deviation is 0.4 with 100 samples and 2 with 10, as much as the distance of pure noise. With
    fewer than 10 samples or real images it is left out, with a warning.

    Args:
        samples: The features of the samples.
        reference: The reference, with its features.

    References:
        Bińkowski et al. (2018), Demystifying MMD GANs, arXiv:1801.01401.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric  # type: ignore[import-untyped]

    count = min(len(samples.features), reference.count)
    if count < _FEWEST:
        warn(
            f"No kernel distance: it needs at least {_FEWEST} images on either side, got {count}."
        )
        return {}
    # Subsets of nearly the whole set would be nearly identical.
    size = min(1000, count // 2)
    found = kid_features_to_metric(
        samples.features, _rows(reference), kid_subset_size=size, verbose=False
    )
    return {
        "kid": Score(
            found["kernel_inception_distance_mean"],
            None,  # the deviation is of one subset, not of the mean: use several seeds
            {"subsets": 100, "subset size": size},
        )
    }


def inception_score(samples: Features, reference: Reference) -> dict[str, Score]:
    """The Inception Score, exp E[KL(p(y|x) ‖ p(y))]: high for confident and diverse classes.

    Args:
        samples: Features with logits.
        reference: Not used.

    Raises:
        ValueError: If the feature network returns no logits.

    References:
        Salimans et al. (2016), Improved Techniques for Training GANs, arXiv:1606.03498.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric  # type: ignore[import-untyped]

    if samples.logits is None:
        raise ValueError(
            "expected logits for the Inception Score, got none: choose features with classes."
        )
    splits = min(10, len(samples.logits))
    found = isc_features_to_metric(samples.logits, splits=splits)
    return {
        "inception_score": Score(
            found["inception_score_mean"],
            found["inception_score_std"],
            {"splits": splits, "error": "deviation over the splits"},
        )
    }


def precision_recall(samples: Features, reference: Reference) -> dict[str, Score]:
    """Precision: the fraction of samples within the data manifold; recall: the reverse.

    A manifold is the union of balls in feature space that reach to the third neighbour.

    Args:
        samples: The features of the samples.
        reference: The reference, with its features.

    References:
        Kynkäänniemi et al. (2019), Improved Precision and Recall Metric for Assessing Generative
        Models, arXiv:1904.06991.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric  # type: ignore[import-untyped]

    k = min(3, len(samples.features) - 1, reference.count - 1)
    found = prc_features_to_metric(
        samples.features,
        _rows(reference),
        prc_neighborhood=k,
        prc_batch_size=10_000,
        save_cpu_ram=True,
        verbose=False,
    )
    return {name: Score(found[name], None, {"neighbours": k}) for name in ("precision", "recall")}


def density_coverage(samples: Features, reference: Reference) -> dict[str, Score]:
    """Density: samples per data neighbourhood; coverage: the fraction of them with a sample.

    Each real image has a ball that reaches to its k-th real neighbour. Density is the mean number
    of balls that contain a sample, over k; coverage is the fraction of balls with a sample. An
    outlier has a large ball, which inflates precision but hardly affects these two.

    Args:
        samples: The features of the samples.
        reference: The reference, with its features.

    References:
        Naeem et al. (2020), Reliable Fidelity and Diversity Metrics for Generative Models,
        arXiv:2002.09797, Eqs. 4 and 5.
    """
    real, fake = _rows(reference).double(), samples.features.double()
    k = min(5, len(real) - 1)
    within, covered = 0.0, 0
    for part in real.split(1000):
        radius = torch.cdist(part, real).kthvalue(k + 1, dim=1).values
        inside = torch.cdist(part, fake) <= radius[:, None]
        within += float(inside.sum())
        covered += int(inside.any(1).sum())
    about = {"neighbours": k}
    return {
        "density": Score(within / (k * len(fake)), None, about),
        "coverage": Score(covered / len(real), None, about),
    }


def all_scores(network: nn.Module, images: Tensor) -> tuple[ScoreFunction, ...]:
    """Every score besides the Fréchet distance that a feature network allows.

    Args:
        network: The feature network; only one that returns logits has an Inception Score.
        images: Some of the images that will be compared, as bytes.

    Shapes:
        images (B, C, H, W), uint8.
    """
    classes = extract(network, images.to(_device(network))).logits is not None
    return (
        kernel_distance,
        *([inception_score] if classes else []),
        precision_recall,
        density_coverage,
    )


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _rows(reference: Reference) -> Tensor:
    if reference.features is None:
        raise ValueError(
            "expected a reference with its features, got moments only: open it with rows=True."
        )
    return reference.features
