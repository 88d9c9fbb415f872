"""Samplers: the family.

Letters: z noisy data (B, *), logsnr = λ, c = 1 − e^(λ − λ_s); a step goes from λ to
logsnr_next = λ_s > λ, and the letters α_s, σ_s, z_s are those at the end of it.

Two of first order, which differ in how much fresh noise they add, and two of second order, which
correct the same first-order step by how the estimates change: Heun asks again at the end of the
step, DPM-Solver++ looks back at the last one. What a sampler is stands in `sampler`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_diffusion.gaussian import Generators, alpha_sigma, expand, noise_like, posterior
from lit_diffusion.noise_schedule import NoiseSchedule
from lit_diffusion.registry import Registry
from lit_diffusion.sampler import Ask, Sampler
from lit_diffusion.schedules import KarrasSchedule

__all__ = [
    "SAMPLERS",
    "AncestralSampler",
    "DDIMSampler",
    "DPMSolverSampler",
    "HeunSampler",
]


@dataclass(frozen=True)
class AncestralSampler(Sampler):
    """Draws each level from the posterior of the one before: z_s ~ q(z_s | z_t, x = x̂).

    The sampler of DDPM and VDM. Forgiving of a denoiser's errors, because fresh noise covers
    them. Its variance is biased low at few steps, so the originals take hundreds; small images
    are fine with 50.

    That bias has a cause: the posterior's variance β̃ = σ_s² c is right if x̂ is certain, but x̂ is
    only a mean. For data that are standard normal the right variance is that of a step of the
    forward process, β = 1 − α_t²/α_s², and every other case of unit variance lies between.
    `variance` = v goes from the first to the second, std² = β̃^(1−v) β^v, hence
    std = σ_s^(1−v) σ_t^v √c.

    Args:
        steps: Number of network calls, at least 1.
        schedule: The levels to walk; None means cosine over the trained range.
        variance: Place v of log std² between log β̃, at 0, and log β, at 1; 0 by default.

    Raises:
        ValueError: If variance is outside [0, 1].

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239,
        algorithm 2, section 3.2 for the two variances; Kingma et al. (2021), Variational
        Diffusion Models, arXiv:2107.00630, Eq. 34; Nichol & Dhariwal (2021), Improved Denoising
        Diffusion Probabilistic Models, arXiv:2102.09672, Eq. 15, where a network learns v.

    Example:
        >>> z = torch.randn(10_000, 1)
        >>> for variance in (0.0, 1.0):
        ...     x = AncestralSampler(steps=50, variance=variance)(GaussianDenoiser(std=0.5), z)
        ...     print(f"{x.std():.2f}")
        0.47
        0.52
    """

    order: ClassVar[int] = 1
    steps: int = 250
    schedule: NoiseSchedule | None = None
    variance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.variance <= 1:
            raise ValueError(
                f"AncestralSampler: variance must be in [0, 1], from the posterior's to the "
                f"forward process's, got {self.variance}."
            )

    def step(
        self,
        denoiser: Ask,
        z: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        memory: Any,
        generator: Generators,
    ) -> tuple[Tensor, Any]:
        """Move: z ← mean of the posterior + σ_s^(1−v) σ_t^v √c·noise."""
        mean, _ = posterior(z, denoiser(z, logsnr).x, logsnr, logsnr_next)
        # β/β̃ = σ_t²/σ_s². In logs, for between very clean levels that quotient can be 0/0.
        log_variance = torch.lerp(logsigmoid(-logsnr_next), logsigmoid(-logsnr), self.variance)
        std = torch.sqrt(-torch.expm1(logsnr - logsnr_next)) * torch.exp(log_variance / 2)
        return mean + expand(std, z) * noise_like(z, generator), memory


@dataclass(frozen=True)
class DDIMSampler(Sampler):
    """Keeps x̂ and ε̂ and changes their proportions: z_s = α_s x̂ + √(σ_s² − η²v) ε̂ + η√v n.

    With η = 0 it is deterministic: Euler's method on the probability-flow ODE, good at 20 to
    100 steps, and the image is a function of the starting noise. v is the posterior's variance,
    so η = 1 is the ancestral sampler.

    Args:
        steps: Number of network calls, at least 1.
        schedule: The levels to walk; None means cosine over the trained range.
        eta: Share of fresh noise η, from 0 to 1.

    Raises:
        ValueError: If eta is outside [0, 1].

    References:
        Song et al. (2020), Denoising Diffusion Implicit Models, arXiv:2010.02502, Eq. 12.

    Example:
        >>> z = torch.randn(1000, 4)
        >>> x = DDIMSampler(steps=50)(GaussianDenoiser(std=0.5), z)
        >>> abs(float(x.std() / z.std()) - 0.5) < 0.03
        True
    """

    order: ClassVar[int] = 1
    steps: int = 50
    schedule: NoiseSchedule | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIMSampler: eta must be in [0, 1], got {self.eta}.")

    def step(
        self,
        denoiser: Ask,
        z: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        memory: Any,
        generator: Generators,
    ) -> tuple[Tensor, Any]:
        """Move: z ← α_s x̂ + √(σ_s² − η²v) ε̂ + η√v n."""
        x, eps = denoiser(z, logsnr)
        alpha, sigma = alpha_sigma(logsnr_next)
        fresh_share = self.eta**2 * -torch.expm1(logsnr - logsnr_next)
        kept = sigma * torch.sqrt(1 - fresh_share)
        z = expand(alpha, z) * x + expand(kept, z) * eps
        if self.eta > 0:
            z = z + expand(sigma * torch.sqrt(fresh_share), z) * noise_like(z, generator)
        return z, memory


def _karras(low: float, high: float) -> KarrasSchedule:
    """EDM's grid, as much of it as lies within [low, high]."""
    usual = KarrasSchedule().ends
    inner = max(low, usual[0]), min(high, usual[1])
    low, high = inner if inner[0] < inner[1] else (low, high)
    return KarrasSchedule(sigma_min=math.exp(-high / 2), sigma_max=math.exp(-low / 2))


@dataclass(frozen=True)
class HeunSampler(Sampler):
    """Heun's method for d(z/α) = ε̂ d(σ/α): DDIM's step, then half of how ε̂ changed along it.

    With z' = α_s x̂ + σ_s ε̂ it is z_s = z' + ½ (σ_s − α_s σ/α) (ε̂(z', λ_s) − ε̂). The sampler of
    EDM: of second order at two network calls a step, with nothing remembered between steps. It
    walks `KarrasSchedule`, which it was made for, unless told otherwise. The bracket is a long
    lever where one step spans much of the strong noise: of few cosine levels over [−20, 20] the
    first step ruins the walk.

    `s_churn` > 0 makes it stochastic: before a step fresh noise raises the noise level σ/α by a
    factor of 1 + γ, γ = min(s_churn/steps, √2 − 1), which covers errors of the network as
    ancestral noise does. Unlike in the paper the level is never raised beyond the first of the
    walk, since no network need have been trained there; so the first step is not churned.

    Args:
        steps: Number of levels, at least 1; the network is called 2·steps − 1 times.
        schedule: The levels to walk; None means `KarrasSchedule` within the trained range.
        s_churn: Churn of the whole walk, 0 (deterministic) or above.
        s_min: Churn only where σ/α = e^(−λ/2) is at least this.
        s_max: Churn only where σ/α = e^(−λ/2) is at most this, at least s_min.
        s_noise: Standard deviation of the fresh noise, above 0; a little above 1 makes up for
            detail that a network takes away.

    Raises:
        ValueError: If s_churn is below 0, s_min above s_max, or s_noise not above 0.

    References:
        Karras et al. (2022), Elucidating the Design Space of Diffusion-Based Generative Models,
        arXiv:2206.00364, algorithms 1 and 2.

    Example:
        >>> denoiser, z, schedule = GaussianDenoiser(std=0.5), torch.ones(1, 1), KarrasSchedule()
        >>> HeunSampler(steps=50, schedule=schedule)(denoiser, z)  # 99 calls; exact: 0.5
        tensor([[0.5031]])
        >>> DDIMSampler(steps=99, schedule=schedule)(denoiser, z)
        tensor([[0.4857]])
    """

    order: ClassVar[int] = 2
    calls_per_step: ClassVar[int] = 2
    steps: int = 18
    schedule: NoiseSchedule | None = None
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not self.s_churn >= 0:
            raise ValueError(
                f"HeunSampler: s_churn must be 0, for no churn, or above, got {self.s_churn}."
            )
        if not self.s_min <= self.s_max:
            raise ValueError(
                "HeunSampler: churn needs s_min at or below s_max, "
                f"got s_min={self.s_min} and s_max={self.s_max}."
            )
        if not self.s_noise > 0:
            raise ValueError(
                f"HeunSampler: s_noise must be above 0, got {self.s_noise}; "
                "for no noise at all set s_churn=0."
            )

    def default_schedule(self, logsnr_min: float, logsnr_max: float) -> NoiseSchedule:
        """EDM's grid within the range.

        Args:
            logsnr_min: Smallest λ the denoiser knows.
            logsnr_max: Largest λ the denoiser knows.
        """
        return _karras(logsnr_min, logsnr_max)

    def _churned(
        self, z: Tensor, logsnr: Tensor, first: Tensor, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """Noise z further, to a λ not below the first; all of it on the device, per example."""
        if self.s_churn == 0:
            return z, logsnr
        gamma = min(self.s_churn / self.steps, math.sqrt(2) - 1)
        level = torch.exp(-logsnr / 2)
        chosen = (level >= self.s_min) & (level <= self.s_max)
        raised = torch.where(chosen, logsnr - 2 * math.log1p(gamma), logsnr)
        raised = torch.maximum(raised, first)
        _, sigma = alpha_sigma(logsnr)
        # α'/α in logs. The noise that is missing at the new level, α' √(σ'²/α'² − σ²/α²), in a
        # form without a difference of squares.
        shrink = torch.exp((logsigmoid(raised) - logsigmoid(logsnr)) / 2)
        missing = shrink * sigma * torch.expm1(logsnr - raised).sqrt()
        fresh = self.s_noise * noise_like(z, generator)
        return expand(shrink, z) * z + expand(missing, z) * fresh, raised

    def step(
        self,
        denoiser: Ask,
        z: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        memory: Any,
        generator: Generators,
    ) -> tuple[Tensor, Any]:
        """Move: z ← z' + ½ (σ_s − α_s σ/α)(ε̂' − ε̂) after z' = α_s x̂ + σ_s ε̂."""
        first = logsnr if memory is None else memory
        z, logsnr = self._churned(z, logsnr, first, generator)
        x, eps = denoiser(z, logsnr)
        alpha, sigma = alpha_sigma(logsnr_next)
        z = expand(alpha, z) * x + expand(sigma, z) * eps
        # σ_s − α_s σ/α, with σ/α = e^(−λ/2): relative to σ_s no digits are lost at high λ.
        lever = -sigma * torch.expm1((logsnr_next - logsnr) / 2)
        z = z + expand(lever / 2, z) * (denoiser(z, logsnr_next).eps - eps)
        return z, first

    def finish(
        self, denoiser: Ask, z: Tensor, logsnr: Tensor, memory: Any, generator: Generators
    ) -> Tensor:
        """The answer at the last level: x̂, after a last churn, for EDM's own last step has one."""
        first = logsnr if memory is None else memory
        return denoiser(*self._churned(z, logsnr, first, generator)).x


@dataclass(frozen=True)
class DPMSolverSampler(Sampler):
    """DDIM with x̂ followed along its last change, at no further call: DPM-Solver++(2M).

    With h = (λ_s − λ)/2 and r = h_last/h, x̂_last and h_last being those of the step before,
    z_s = (σ_s/σ) z + α_s (1 − e^(−h)) (x̂ + (x̂ − x̂_last)/2r). DDIM assumes that x̂ stands still
    during a step; here it goes on as it went, which makes the second order. The choice for few
    calls, if the levels lie evenly in λ, roughly, as those of `KarrasSchedule` and
    `LinearSchedule` do. Few cosine levels end in a step many times longer than the one before,
    over which x̂ is extrapolated too far.

    Args:
        steps: Number of network calls, at least 1.
        schedule: The levels to walk; None means `KarrasSchedule` within the trained range.

    References:
        Lu et al. (2022), DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
        Models, arXiv:2211.01095, algorithm 2. Its λ is half of ours.

    Example:
        >>> denoiser, z, schedule = GaussianDenoiser(std=0.5), torch.ones(1, 1), KarrasSchedule()
        >>> DPMSolverSampler(steps=25, schedule=schedule)(denoiser, z)  # exact: 0.5
        tensor([[0.5149]])
        >>> DDIMSampler(steps=25, schedule=schedule)(denoiser, z)
        tensor([[0.4442]])
    """

    order: ClassVar[int] = 2
    steps: int = 20
    schedule: NoiseSchedule | None = None

    default_schedule = HeunSampler.default_schedule

    def step(
        self,
        denoiser: Ask,
        z: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        memory: Any,
        generator: Generators,
    ) -> tuple[Tensor, Any]:
        """Move: z ← α_s x̂ + σ_s ε̂, DDIM's step, + α_s (1 − e^(−h)) (x̂ − x̂_last)/2r."""
        x, eps = denoiser(z, logsnr)
        alpha, sigma = alpha_sigma(logsnr_next)
        z = expand(alpha, z) * x + expand(sigma, z) * eps
        if memory is not None:
            x_last, logsnr_last = memory
            inverse_r = (logsnr_next - logsnr) / (logsnr - logsnr_last)
            share = -alpha * torch.expm1((logsnr - logsnr_next) / 2) * inverse_r / 2
            z = z + expand(share, z) * (x - x_last)
        return z, (x, logsnr)


SAMPLERS: Registry[Sampler] = Registry(Sampler)  # type: ignore[type-abstract]
