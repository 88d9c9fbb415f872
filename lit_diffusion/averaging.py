"""Averages of the weights over training, and post-hoc reconstruction of one from others.

Letters: θ_n the weights after the n-th update, n = 1, 2, …; t the number of updates so far; θ̄ an
average; σ its relative width.

Every average here is updated by one rule, θ̄ ← θ̄ + step(n)·(θ_n − θ̄), and a profile is the choice
of step(n). It determines S_t(n), the total weight of θ_1 … θ_n in θ̄ at time t. With

    1 − step(n) = (1 − 1/n)^p        S_t(n) = Π_{m = n+1…t} (1 − step(m)) = (n/t)^p

since the product telescopes: the weight of θ_n is proportional to n^(p−1) (up to the
discretisation in steps), exactly, from the first step on. The window grows with the run, and its
standard deviation is a fixed fraction of the run, σ² = p/((p + 1)²(p + 2)).

**Post-hoc reconstruction.** Let a linear combination Σ c_i θ̄_i of such averages, of several times
and widths, approximate another one, θ̄*. With Σ c_i = 1, summation by parts gives

    Σ c_i θ̄_i − θ̄* = Σ_n D(n)·(θ_n − θ_{n+1})        D(n) = Σ c_i S_i(n) − S*(n)

so D(n) is the error in the contribution of each step of the weights. If the steps are uncorrelated
and of equal variance, the expected squared error is that variance times ∫ D², which `reconstruct`
minimises. Karras et al. (2023) fit the densities dS/dn by least squares instead, which is optimal
for weights that fluctuate about a constant; this criterion suits weights that drift.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ConstantProfile",
    "PowerProfile",
    "Profile",
    "Reconstruction",
    "RunningAverage",
    "Snapshot",
    "overlaps",
    "reconstruct",
]

WIDEST = 12**-0.5  # the relative width of the plain mean of all steps


class Profile(ABC):
    """The update rule of an average of the weights: θ̄ ← θ̄ + step(n)·(θ_n − θ̄).

    A subclass is a frozen dataclass; its string is the name of the average in all results.

    Example:
        >>> print(ConstantProfile(0.99), PowerProfile(0.1))
        EMA(decay=0.99) EMA(sigma_rel=0.1)
    """

    @abstractmethod
    def step(self, n: int) -> float:
        """The fraction of the way towards the weights in the n-th update, in (0, 1].

        Args:
            n: Number of the update, from 1.
        """


@dataclass(frozen=True)
class ConstantProfile(Profile):
    """A constant decay d: step(n) = 1 − min(d, (1 + n)/(10 + n)).

    It averages over about the last 1/(1 − d) steps, whatever the length of the run. The decay
    increases to d as (1 + n)/(10 + n), so that the initial weights are forgotten.

    Args:
        decay: d, in [0, 1).

    Raises:
        ValueError: If decay is outside [0, 1).

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, appendix B.

    Example:
        >>> ConstantProfile(0.5).step(1), ConstantProfile(0.5).step(100)
        (0.8181818181818181, 0.5)
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        """Reject a decay outside [0, 1)."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {self.decay}.")

    def step(self, n: int) -> float:
        """1 − min(d, (1 + n)/(10 + n)).

        Args:
            n: Number of the update, from 1.
        """
        return 1 - min(self.decay, (1 + n) / (10 + n))

    def __str__(self) -> str:
        return f"EMA(decay={self.decay})"


@dataclass(frozen=True)
class PowerProfile(Profile):
    """The power-function profile of EDM2: step(n) = 1 − (1 − 1/n)^p, of relative width σ.

    The window covers a fixed fraction of the run, so one σ suits runs of any length, and the
    initial weights have no influence. Averages of other widths can be reconstructed from a few
    that were kept during training (`reconstruct`).

    Args:
        sigma_rel: σ, the standard deviation of the window divided by the number of steps so far,
            in (0, 12^(−1/2)]; 0.05 to 0.15 is usual, 12^(−1/2) = 0.2887 is the plain mean.

    Raises:
        ValueError: If sigma_rel is outside that range.

    References:
        Karras et al. (2023), Analyzing and Improving the Training Dynamics of Diffusion Models,
        arXiv:2312.02696, section 3.1 and appendix C; their γ is p − 1.

    Example:
        >>> profile = PowerProfile(0.1)
        >>> round(profile.power, 3), profile.step(1), round(profile.step(1000), 5)
        (7.937, 1.0, 0.00791)
    """

    sigma_rel: float = 0.1

    def __post_init__(self) -> None:
        """Reject a width that no power function has, or only one that favours early steps."""
        if not 0 < self.sigma_rel <= WIDEST:
            raise ValueError(
                f"EMA: sigma_rel must be above 0 and at most {WIDEST:.4f}, the plain mean of all "
                f"steps, got {self.sigma_rel}."
            )

    @property
    def power(self) -> float:
        """The exponent p ≥ 1 of this width, the largest root of σ²(p + 1)²(p + 2) = p.

        With m = p + 1 the equation is m³ + m² − m/σ² + 1/σ² = 0. It has three real roots, and
        the cosine form of the cubic gives the largest.
        """
        y = self.sigma_rel**-2
        a, b = y + 1 / 3, 4 * y / 3 + 2 / 27  # m = u − 1/3 leaves u³ − a u + b = 0
        u = 2 * math.sqrt(a / 3) * math.cos(math.acos(-1.5 * b / a * math.sqrt(3 / a)) / 3)
        return max(1.0, u - 4 / 3)

    def step(self, n: int) -> float:
        """1 − (1 − 1/n)^p, without cancellation for large n.

        Args:
            n: Number of the update, from 1.
        """
        return 1.0 if n == 1 else -math.expm1(self.power * math.log1p(-1 / n))

    def __str__(self) -> str:
        return f"EMA(sigma_rel={self.sigma_rel})"


class RunningAverage:
    """A running average of some tensors, all updated in one call.

    It is kept in float32 or better: in bfloat16 an update by a thousandth would be rounded away.

    Args:
        profile: The update rule.
        start: Initial values; copied.
        updates: Number of updates that `start` has already received.

    Example:
        >>> average = RunningAverage(PowerProfile(12**-0.5), [torch.zeros(1)])
        >>> for value in (1.0, 2.0, 6.0):
        ...     average.update([torch.tensor([value])])
        >>> print(f"{float(average.values[0]):.4f}")  # the plain mean
        3.0000
    """

    def __init__(self, profile: Profile, start: Sequence[Tensor], updates: int = 0) -> None:
        self.profile = profile
        self.updates = updates
        self.values = [
            w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True) for w in start
        ]
        self._narrow = any(w.dtype != v.dtype for w, v in zip(start, self.values, strict=True))

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """Update the average with the current weights.

        Args:
            weights: As many tensors as at the start, of the same shapes.
        """
        self.updates += 1
        if self._narrow:
            weights = [w.to(v.dtype) for w, v in zip(weights, self.values, strict=True)]
        torch._foreach_lerp_(self.values, list(weights), self.profile.step(self.updates))


class Snapshot(NamedTuple):
    """An average at some time of the run: its power profile and its number t of updates."""

    profile: PowerProfile
    updates: int


def overlaps(snapshots: Sequence[Snapshot]) -> Tensor:
    """Inner products of what averages have not yet absorbed of the run: ∫ R_i R_j dn.

    R = 1 − S decreases from 1 at the beginning to 0 at the average's own time. For powers p and q
    and times t ≤ u, with r = t/u::

        ∫₀ᵗ (1 − (n/t)^p)(1 − (n/u)^q) dn = t·p·(1/(p + 1) − r^q/((q + 1)(p + q + 1)))

    Args:
        snapshots: The averages.

    Shapes:
        result (len(snapshots), len(snapshots)), float64, symmetric.

    Example:
        >>> mean = Snapshot(PowerProfile(12**-0.5), 100)  # R falls linearly from 1 to 0
        >>> round(float(overlaps([mean])), 3)
        33.333
    """
    power = torch.tensor([s.profile.power for s in snapshots], dtype=torch.float64)
    time = torch.tensor([s.updates for s in snapshots], dtype=torch.float64)
    earlier = time[:, None] <= time
    p = torch.where(earlier, power[:, None], power)
    q = torch.where(earlier, power, power[:, None])
    t = torch.minimum(time[:, None], time)
    gap = (time[:, None].log() - time.log()).abs()
    return t * p * (1 / (p + 1) - torch.exp(-q * gap) / ((q + 1) * (p + q + 1)))


class Reconstruction(NamedTuple):
    """A linear combination that approximates an average, and its error.

    Both errors are relative to the distance of the average from the last weights, assuming
    that the weights move in uncorrelated steps of equal variance.

    Args:
        weights: c_i of each snapshot; their sum is 1.
        misfit: √(∫ D²/∫ S*²), the error of the profile alone; below 1e-7 it is rounding.
        error: The same, including the noise of the snapshots.
    """

    weights: Tensor
    misfit: float
    error: float


def reconstruct(
    target: Snapshot, snapshots: Sequence[Snapshot], noise: float = 0.0
) -> Reconstruction:
    """The best combination of averages: minimise ∫ D² + noise·Σ c_i² subject to Σ c_i = 1.

    The noise regularises the c_i: without it a narrow width is composed of large coefficients of
    both signs, which amplify the rounding errors of the snapshots.

    Args:
        target: The average to reconstruct.
        snapshots: The averages available, at least one; those of later times do not help.
        noise: Variance of a snapshot's error, relative to that of one step of the weights.

    Shapes:
        weights of the result (len(snapshots),), float64.

    References:
        Karras et al. (2023), arXiv:2312.02696, section 3.2, for the idea; the inner product and
        the constraint are derived in this module.

    Example:
        >>> tracked = [Snapshot(PowerProfile(s), t) for t in (800, 900, 1000) for s in (0.05, 0.1)]
        >>> found = reconstruct(Snapshot(PowerProfile(0.08), 1000), tracked)
        >>> print(f"{float(found.weights.sum()):.6f} {found.misfit:.0e}")
        1.000000 3e-03
    """
    n = len(snapshots)
    whole = overlaps([*snapshots, target]) / target.updates
    share = noise / target.updates
    system = torch.ones(n + 1, n + 1, dtype=torch.float64)  # the last row is the constraint
    system[:n, :n] = whole[:n, :n] + share * torch.eye(n, dtype=torch.float64)
    system[n, n] = 0
    right = torch.cat([whole[:n, n], torch.ones(1, dtype=torch.float64)])[:, None]
    # Snapshots of nearby times are nearly linearly dependent: the system is close to singular.
    weights = torch.linalg.lstsq(system, right, driver="gelsd").solution[:n, 0]
    error = torch.cat([weights, -torch.ones(1, dtype=torch.float64)])
    square = float(error @ whole @ error)
    scale = 1 / (2 * target.profile.power + 1)  # ∫ S*² over the target's time
    rounding = share * float(weights.square().sum())
    return Reconstruction(
        weights,
        math.sqrt(max(0.0, square) / scale),
        math.sqrt(max(0.0, square + rounding) / scale),
    )
