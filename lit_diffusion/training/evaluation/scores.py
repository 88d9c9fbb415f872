"""Scores: how far samples are from a reference, as the reference implementations measure it.

The Fréchet distance is torchmetrics', from moments in float64 that are summed over the ranks: no
features travel. Kernel distance, Inception Score, precision and recall are torch-fidelity's, with
its subsets and its seed, from the features of all ranks in the order of the images; density and
coverage, which it lacks, are made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_diffusion.training import ranks
from lit_diffusion.training.evaluation.features import Features, extract
from lit_diffusion.training.evaluation.generation import SampleBatch
from lit_diffusion.training.evaluation.reference import Reference

__all__ = [
    "Score",
    "Scores",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]


class Score(NamedTuple):
    """A number, its scatter if it is known, and what else it depends on.

    Args:
        value: The number.
        error: Standard deviation over subsets or splits; None if there are none.
        protocol: Plain data.
    """

    value: float
    error: float | None = None
    protocol: dict[str, Any] = {}  # noqa: RUF012


class Scores:
    """Samples as they come, compared with a reference.

    Args:
        network: The feature network, on the device of the images.
        reference: What it says of the data.
        others: Scores beside the Fréchet distance, as functions of (samples, reference): features
            and logits of all samples, and the `Reference` with its features.

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
        others: tuple[Callable[[Features, Reference], dict[str, Score]], ...] = (),
    ) -> None:
        self.network = network
        self.reference = reference
        self.others = others
        self.metric = _frechet_metric(reference)
        self._index: list[Tensor] = []
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, drawn: SampleBatch) -> None:
        """Look at a batch of samples.

        Args:
            drawn: Their numbers and their bytes, on the network's device.
        """
        found = extract(self.network, drawn.images)
        self.metric.update(found.features.cpu().double(), real=False)
        if self.others:
            self._index.append(drawn.index.cpu())
            self._features.append(found.features.float())
            if found.logits is not None:
                self._logits.append(found.logits.float())

    def compute(self) -> dict[str, Score]:
        """All scores by name, the same on every rank; every rank calls it.

        Raises:
            ValueError: If there are fewer than two samples, or a score cannot be computed.
        """
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        for name in ("features_sum", "features_cov_sum", "features_num_samples"):
            state = getattr(self.metric, f"fake_{name}")
            wide = state.to(device) if device.type != "mps" else state
            setattr(self.metric, f"fake_{name}", ranks.add_up(wide).cpu())
        n = int(self.metric.fake_features_num_samples)
        if min(n, self.reference.count) < 2:
            raise ValueError(
                "A Fréchet distance needs at least two images on either side, got "
                f"{n} samples and {self.reference.count} of the reference."
            )
        scores = {"fid": Score(float(self.metric.compute()))}
        if not self.others:
            return scores
        index = torch.cat(self._index) if self._index else torch.zeros(0, dtype=torch.int64)
        together = Features(
            self._together(index, self._features, self.reference.total.shape[0], device),
            self._together(index, self._logits, 0, device),
        )
        for score in self.others:
            scores |= score(together, self.reference)
        return scores

    def _together(
        self, index: Tensor, parts: list[Tensor], size: int, device: torch.device
    ) -> Any:
        size = max(ranks.collect(parts[0].shape[1] if parts else size))
        if not size:
            return None
        mine = torch.cat(parts) if parts else torch.zeros(0, size, device=device)
        return ranks.collect_rows(index, mine).cpu()


def _frechet_metric(reference: Reference) -> Any:
    """The metric of torchmetrics, fed with features, one side of which is the reference."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = nn.Identity()
    given.num_features = len(reference.total)  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=given, sync_on_compute=False)
    metric.real_features_sum = reference.total.clone()
    metric.real_features_cov_sum = reference.outer.clone()
    metric.real_features_num_samples = torch.tensor(reference.count)
    # A rank without samples must know the precision, too.
    metric.update(torch.zeros(0, len(reference.total), dtype=torch.float64), real=False)
    return metric


def frechet_distance(one: Reference, other: Reference) -> float:
    """The Fréchet distance between two references.

    Args:
        one: What is compared.
        other: With what.
    """
    metric = _frechet_metric(other)
    metric.fake_features_sum = one.total.clone()
    metric.fake_features_cov_sum = one.outer.clone()
    metric.fake_features_num_samples = torch.tensor(one.count)
    return float(metric.compute())


def kernel_distance(samples: Features, reference: Reference) -> dict[str, Score]:
    """The Kernel Inception Distance, KID: the unbiased MMD² of a cubic kernel, over subsets.

    Unlike the Fréchet distance its expectation does not depend on the number of samples, so small
    sets can be compared.

    Args:
        samples: Features of the samples.
        reference: With its features.

    References:
        Bińkowski et al. (2018), Demystifying MMD GANs, arXiv:1801.01401.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    # Subsets of nearly the whole would be nearly alike, and of samples that they share.
    size = min(1000, max(2, min(len(samples.features), reference.count) // 2))
    found = kid_features_to_metric(
        samples.features, _rows(reference), kid_subset_size=size, verbose=False
    )
    return {
        "kid": Score(
            found["kernel_inception_distance_mean"],
            None,  # their deviation is that of a subset, not of the mean: several seeds tell
            {"subsets": 100, "subset size": size},
        )
    }


def inception_score(samples: Features, reference: Reference) -> dict[str, Score]:
    """The Inception Score, exp E[KL(p(y|x) ‖ p(y))]: sure of each image's class, and of many.

    Args:
        samples: With logits.
        reference: Not used.

    Raises:
        ValueError: If the feature network names no classes.

    References:
        Salimans et al. (2016), Improved Techniques for Training GANs, arXiv:1606.03498.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if samples.logits is None:
        raise ValueError(
            "The Inception Score needs a feature network that also returns logits of classes."
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
    """Precision: the share of samples among the data; recall: of the data among the samples.

    Among means within reach of one's third neighbour, in the space of the features.

    Args:
        samples: Features of the samples.
        reference: With its features.

    References:
        Kynkäänniemi et al. (2019), Improved Precision and Recall Metric for Assessing Generative
        Models, arXiv:1904.06991.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

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
    """Density: how crowded the data's neighbourhoods are; coverage: the share that is visited.

    With the ball of each real image out to its k-th real neighbour: density is the number of
    balls that a sample lies in, over k; coverage the share of balls with a sample in them. An
    outlier among the data has a large ball, which makes precision too high and hardly moves these.

    Args:
        samples: Features of the samples.
        reference: With its features.

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


def _rows(reference: Reference) -> Tensor:
    if reference.features is None:
        raise ValueError("This score needs the features of the reference: open it with rows=True.")
    return reference.features
