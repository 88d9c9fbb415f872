"""Sampling of times: for a loss, for the parts of a training step, for a fixed data set.

Letters: t ∈ [0, 1] from clean data to noise; a schedule turns t into a noise level λ(t).

Part of the variance of a loss averaged over B independent times is due to t alone. Stratified
times remove most of that part: each time is uniform on [0, 1], and together they cover it evenly.
In training, all ranks and accumulated micro-batches share one stratified set; in validation, all
examples of the data set do, so that the result depends on neither batch size nor ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.gaussian import Generators

__all__ = ["fixed_times", "sample_times", "stratified_times"]


def stratified_times(n: int, offset: Tensor, part: int = 0, parts: int = 1) -> Tensor:
    """Evenly spaced times with one random offset: t_i = (offset + (i + part/parts)/n) mod 1.

    The batch is one of `parts` batches that together form one stratified set: every rank and every
    accumulated micro-batch of a training step uses the same offset. Each covers [0, 1] evenly by
    itself as well, so that one which is smaller or missing leaves no gap.

    Args:
        n: Number of times, the size of the batch.
        offset: One random number, uniform on [0, 1).
        part: Index of this batch among them, from 0.
        parts: Number of batches.

    Shapes:
        offset (); result (n,), float64, on the offset's device.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, appendix I.1.

    Example:
        >>> stratified_times(4, torch.tensor(0.9))
        tensor([0.9000, 0.1500, 0.4000, 0.6500], dtype=torch.float64)
        >>> stratified_times(2, torch.tensor(0.9), part=1, parts=2)
        tensor([0.1500, 0.6500], dtype=torch.float64)
    """
    index = torch.arange(n, device=offset.device, dtype=torch.float64)
    return (offset + (index * parts + part) / (n * parts)) % 1.0


def sample_times(x: Tensor, generator: Generators = None) -> Tensor:
    """Sample one time per example, stratified over the batch.

    Args:
        x: The batch.
        generator: Source of the offset: one generator, or None for the global one.

    Shapes:
        x (B, *); result (B,), float64.

    Raises:
        ValueError: If there is one generator per example: they cannot share an offset.

    Example:
        >>> sample_times(torch.zeros(2, 1), torch.Generator().manual_seed(0))
        tensor([0.9701, 0.4701], dtype=torch.float64)
    """
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(
            "Expected one generator, for the offset that all times share, got one per example: "
            "pass t instead."
        )
    device = x.device if generator is None else generator.device
    offset = torch.rand((), dtype=torch.float64, generator=generator, device=device)
    return stratified_times(len(x), offset)


def fixed_times(index: Tensor, total: int | None, sample: int = 0, samples: int = 1) -> Tensor:
    """Fixed stratified times for evaluation: one example in each of `total` strata.

    Neighbours get distant strata (index · k mod total with k near total/φ), so that in a data set
    sorted by class the noise level does not depend on the class. With several samples per example,
    each sample shifts all times by another fraction of a stratum.

    Without a total the times are those of the golden-ratio sequence, (n + ½) / φ mod 1, which
    covers [0, 1) evenly for any number of examples.

    Args:
        index: Index of each example in the data set, from 0.
        total: Size of the data set; None means unknown.
        sample: Index of this sample, from 0.
        samples: Number of samples of the time per example.

    Shapes:
        index (B,), integer; result (B,), float64, in [0, 1).

    Example:
        >>> fixed_times(torch.arange(4), 4).sort().values
        tensor([0.1250, 0.3750, 0.6250, 0.8750], dtype=torch.float64)
        >>> fixed_times(torch.arange(4), 4, sample=1, samples=2).sort().values
        tensor([0.0000, 0.2500, 0.5000, 0.7500], dtype=torch.float64)
        >>> fixed_times(torch.arange(4), None).sort().values
        tensor([0.1631, 0.3090, 0.5451, 0.9271], dtype=torch.float64)
    """
    if total is None:
        number = index.to(torch.float64) * samples + sample
        return (number + 0.5) * ((math.sqrt(5) - 1) / 2) % 1
    stride = max(1, round(total * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, total) != 1:
        stride += 1
    t = (((index * stride) % total).to(torch.float64) + 0.5) / total
    return (t + sample / (samples * total)) % 1
