"""The adaptive schedule: sample noise levels in proportion to their loss.

Letters: logsnr = λ; h = w(λ)·mean (ε̂ − ε)², the contribution of an example before the division by
the density p(λ) from which λ was sampled.

The objective ½∫ E[h] dλ does not depend on p, but the variance of its estimate h/p does. If
p ∝ E[h], every noise level contributes equally on average, and all batches are about equally
informative. E[h] is unknown but observed at every step, so the schedule keeps a histogram of it
and samples from that: p is piecewise constant, hence λ(t) piecewise linear.

Only the density depends on the losses, so the objective stays the same, even if this schedule
replaces another one in the middle of a run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.domains import check_count
from lit_diffusion.schedules.base import NoiseSchedule

__all__ = ["AdaptiveSchedule"]

_LEAST = 1e-6  # smallest mass of a bin, relative to a uniform one: bounds 1/p
_NEIGHBOURS = 2  # on either side
_OUTLIER = 3.0  # times e^width above the median of its neighbourhood, a bin is one


class AdaptiveSchedule(NoiseSchedule):
    """A histogram of the loss as density: p(λ) = (1 − u)·E[h]/∫E[h] + u·uniform.

    Efficient for any weighting, without being tuned to it. `update` adds the losses of a batch; in
    training the callback `AdaptiveScheduleUpdate` calls it. Each bin keeps a running average that
    decays by `decay` with each example that falls into it, and is corrected for its empty start:
    v/(1 − decayⁿ) after n examples. A bin without examples counts as the mean of the others.

    A single huge loss must not attract all samples. The mean loss is smooth in λ, so an average
    counts as at most 3 e^width times the median of those of its bin and of the two bins on either
    side, `width` being that of a bin in λ. The averages themselves are kept as they are, and the
    loss remains unbiased, since it is divided by the density that results.

    Args:
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.
        bins: Number of bins of equal width, at least 1.
        decay: Decay of a bin's average with each new example, in [0, 1).
        uniform_share: Fraction u of uniform samples, in [0, 1), so that no level is neglected.
        warmup: Number of updates before the density follows them, 0 or more.
        initial: Density until then; None means uniform.
        rms: Follow √E[h²], which minimises the variance of a single sample, instead of E[h].

    Raises:
        ValueError: If a number is out of range, or a state has another number of bins.

    References:
        Kingma & Gao (2023), Understanding Diffusion Objectives as the ELBO with Simple Data
        Augmentation, arXiv:2303.00848 (adaptive noise schedules). √E[h²]: Nichol & Dhariwal
        (2021), Improved DDPM, arXiv:2102.09672, section 3.3. With h = mean (ε̂ − ε)², whatever the
        weighting, it follows the entropy rate of the data: Raya et al. (2026), InfoNoise,
        arXiv:2602.18647.

    Example:
        >>> schedule = AdaptiveSchedule(-10.0, 10.0, bins=4, uniform_share=0.0)
        >>> logsnr = torch.tensor([-7.5, -2.5, 2.5, 7.5])
        >>> schedule.update(logsnr, torch.tensor([0.0, 1.0, 2.0, 1.0]))
        >>> schedule.log_prob(logsnr[1:]).exp()
        tensor([0.0500, 0.1000, 0.0500], dtype=torch.float64)
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    updates: Tensor
    rejected: Tensor
    beyond: Tensor

    def __init__(
        self,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
        bins: int = 100,
        decay: float = 0.999,
        uniform_share: float = 0.1,
        warmup: int = 0,
        initial: NoiseSchedule | None = None,
        rms: bool = False,
    ) -> None:
        low = -20.0 if logsnr_min is None else float(logsnr_min)
        high = 20.0 if logsnr_max is None else float(logsnr_max)
        super().__init__(low, high, support=(low, high))
        check_count(self, 1, bins=bins)
        check_count(self, 0, warmup=warmup)
        if not (0 <= decay < 1 and 0 <= uniform_share < 1):
            raise ValueError(
                "AdaptiveSchedule: decay and uniform_share must be in [0, 1), "
                f"got {decay} and {uniform_share}."
            )
        self.bins = bins
        self.decay = decay
        self.uniform_share = uniform_share
        self.warmup = warmup
        self.initial = initial
        self.rms = rms
        zeros = torch.zeros(bins, dtype=torch.float64)
        self.register_buffer("first", zeros.clone())  # decayed sum of h in each bin
        self.register_buffer("second", zeros.clone())  # … and of h²
        self.register_buffer("weight", zeros.clone())  # 1 − decayⁿ, the total weight of these sums
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rejected", torch.zeros((), dtype=torch.int64))
        # Mass on the clean side of each border, from the clean end on: the t of the borders.
        self.register_buffer("beyond", torch.zeros(bins + 1, dtype=torch.float64))
        self._settle()

    @property
    def width(self) -> float:
        """Width of a bin."""
        low, high = self.ends
        return (high - low) / self.bins

    # The histogram ---------------------------------------------------------------------------

    def update(self, logsnr: Tensor, values: Tensor) -> None:
        """Update the histogram with a batch.

        Args:
            logsnr: λ of each example.
            values: h = w(λ)·eps_mse of each example; non-finite values are counted and left out.

        Shapes:
            logsnr and values (B,).

        Raises:
            ValueError: If a λ is outside the range (checked on the CPU only), or shapes differ.
        """
        self.absorb(self.tally(logsnr, values))

    @torch.no_grad()
    def tally(self, logsnr: Tensor, values: Tensor) -> Tensor:
        """The sums of a batch, which can be added to those of others before `absorb`.

        Args:
            logsnr: λ of each example.
            values: h of each.

        Shapes:
            logsnr and values (B,); result (4, bins), float64: count, Σh, Σh², and the number
            of non-finite values.

        Raises:
            ValueError: If a λ is outside the range (checked on the CPU only), or shapes differ.
        """
        if logsnr.shape != values.shape or logsnr.ndim != 1:
            raise ValueError(
                f"Expected values and λ of the same shape (B,), got {tuple(values.shape)} and "
                f"{tuple(logsnr.shape)}."
            )
        logsnr, values = logsnr.detach().to(torch.float64), values.detach().to(torch.float64)
        if logsnr.device.type == "cpu" and bool(self._outside(logsnr).any()):
            worst = logsnr[self._outside(logsnr)][0]
            raise ValueError(
                f"AdaptiveSchedule: λ = {float(worst):.6g} is outside its range "
                f"{list(self.ends)}, and it can learn only from levels within it."
            )
        index = ((logsnr - self.ends[0]) / self.width).long().clamp_(0, self.bins - 1)
        finite = values.isfinite()
        values, count = torch.where(finite, values, 0.0), finite.to(torch.float64)
        rows = torch.stack([count, values, values.square(), 1 - count])
        return rows.new_zeros(4, self.bins).index_add_(1, index, rows)

    @torch.no_grad()
    def absorb(self, sums: Tensor) -> None:
        """Update each bin with the mean of its examples, weighted by their number.

        Args:
            sums: Results of `tally`, summed over batches and ranks.

        Shapes:
            sums (4, bins).
        """
        count, total, square, rejected = sums.to(self.first.device).unbind()
        kept = self.decay**count
        share = (1 - kept) / count.clamp(min=1)  # per example: 1 − decayⁿ in all
        self.first.mul_(kept).add_(share * total)
        self.second.mul_(kept).add_(share * square)
        self.weight.mul_(kept).add_(1 - kept)
        self.updates.add_(1)
        self.rejected.add_(rejected.sum().to(torch.int64))
        self._settle()

    def _settle(self) -> None:
        """Compute the masses of the bins, and t at their borders."""
        seen = self.weight > 0
        average = (self.second if self.rms else self.first) / self.weight.clamp(min=1e-300)
        height = torch.where(seen, average.sqrt() if self.rms else average, 0.0)
        height = torch.minimum(height, self._limit(height, seen))
        mean = height.sum() / seen.sum().clamp(min=1)
        height = torch.where(seen, height, mean)
        flat = torch.full_like(height, 1 / self.bins)
        total = height.sum()
        mass = torch.where(total > 0, height / total.clamp(min=1e-300), flat)
        mass = torch.where(self.updates > self.warmup, mass, self._initial_mass(flat))
        mass = (1 - self.uniform_share) * mass + self.uniform_share * flat
        mass = mass.clamp(min=_LEAST / self.bins)
        beyond = mass.flip(0).cumsum(0) / mass.sum()
        beyond[-1] = 1
        self.beyond.copy_(torch.cat([torch.zeros_like(beyond[:1]), beyond]))

    def _limit(self, height: Tensor, seen: Tensor) -> Tensor:
        """The largest height of each bin: a multiple of the median over its neighbourhood.

        The median is over the seen bins within two of it, the bin itself included. Where it is 0
        there is no limit, because the weight of all others is 0.
        """
        size, pad = 2 * _NEIGHBOURS + 1, (_NEIGHBOURS, _NEIGHBOURS)
        values = torch.where(seen, height, torch.inf)  # the others come last
        values = torch.nn.functional.pad(values, pad, value=torch.inf).unfold(0, size, 1)
        count = torch.nn.functional.pad(seen.long(), pad).unfold(0, size, 1).sum(1, keepdim=True)
        middle = (count - 1).clamp(min=0).div(2, rounding_mode="floor")
        median = values.sort(dim=1).values.gather(1, middle).squeeze(1)
        return torch.where(median > 0, _OUTLIER * math.exp(self.width) * median, torch.inf)

    def _initial_mass(self, flat: Tensor) -> Tensor:
        if self.initial is None:
            return flat
        borders = torch.linspace(*self.ends, self.bins + 1, dtype=torch.float64)
        mass = -self.initial.time(borders.to(flat.device)).detach().diff()
        return mass / mass.sum()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        kept = state.get(f"{prefix}first")
        if kept is not None and len(kept) != self.bins:
            raise ValueError(
                f"AdaptiveSchedule: the checkpoint has {len(kept)} bins, not {self.bins}: "
                f"set bins={len(kept)} to continue from it."
            )
        super()._load_from_state_dict(state, prefix, *args)

    # The schedule ------------------------------------------------------------------------------

    def _logsnr(self, t: Tensor) -> Tensor:
        bin = torch.searchsorted(self.beyond, t.detach().contiguous(), right=True)
        bin = bin.clamp(1, self.bins) - 1
        start, end = self.beyond[bin], self.beyond[bin + 1]
        return self.ends[1] - self.width * (bin + (t - start) / (end - start))

    def _time(self, logsnr: Tensor) -> Tensor:
        place = (self.ends[1] - logsnr) / self.width
        bin = place.detach().long().clamp(0, self.bins - 1)
        start, end = self.beyond[bin], self.beyond[bin + 1]
        return start + (place - bin) * (end - start)
