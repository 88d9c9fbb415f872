"""The sliced Wasserstein distance, between sets of samples of any kind.

In one dimension the Wasserstein distance is that of the sorted numbers. In more it is averaged
over directions θ, from the numbers θ·x,

    SW² = E_θ ∫₀¹ (F_θ⁻¹(q) − G_θ⁻¹(q))² dq,    ‖θ‖ = 1.

It needs no network of features, and is zero only between equal distributions. Two finite sets of
one distribution are some distance apart, so a number means something only beside the distance of
real examples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["features_of", "sliced_wasserstein"]

SET_DIRECTIONS = 16  # along which the points of a set are sorted


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 512, seed: int = 0) -> float:
    """The sliced Wasserstein distance of two sets of vectors, in their unit.

    Args:
        x: One set.
        y: The other, of any number of vectors.
        projections: Number of directions θ.
        seed: Determines the directions.

    Shapes:
        x (n, D); y (m, D).

    Example:
        >>> x = torch.randn(500, 1)
        >>> round(sliced_wasserstein(x, x + 3.0), 4)
        3.0
    """
    theta = _directions(projections, x.shape[1], seed).to(x)
    most = max(len(x), len(y))
    total = 0.0
    for part in theta.split(64):
        one, other = (_quantiles((z @ part.T).sort(0).values, most) for z in (x, y))
        total += float((one - other).square().mean(0).sum())
    return math.sqrt(total / projections)


def features_of(x: Tensor, kind: str) -> Tensor:
    """Samples as vectors, such that samples that mean the same are the same vector.

    A set of points has no order. Its vector has the sorted numbers θ·p of its points p, for some
    directions θ of their space; the distance of two such vectors is itself a sliced Wasserstein
    distance, of the two sets.

    Args:
        x: Samples.
        kind: points for sets of points; all others are taken as they are.

    Shapes:
        x (n, C, *); result (n, D).
    """
    if kind != "points":
        return x.flatten(1)
    count = SET_DIRECTIONS if x.shape[1] > 1 else 1
    theta = _directions(count, x.shape[1], 0).to(x)
    return (theta @ x).sort(-1).values.flatten(1) / math.sqrt(count)


def _directions(number: int, size: int, seed: int) -> Tensor:
    """Unit vectors (number, size), distributed evenly over all directions."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(number, size, generator=generator, dtype=torch.float64)
    return theta / theta.norm(dim=1, keepdim=True)


def _quantiles(ordered: Tensor, count: int) -> Tensor:
    """The quantiles (i + ½)/count of sorted columns; all of them, if there are as many."""
    place = (torch.arange(count, device=ordered.device) + 0.5) * len(ordered) / count
    return ordered[place.long()]
