"""Heun's method: the second-order sampler of EDM, with churn.

Letters: z noisy data (B, *), logsnr = λ. A step goes from λ to logsnr_next = λ_s > λ, where the
letters are α_s, σ_s, z_s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_diffusion.domains import check_finite
from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data, noise_like
from lit_diffusion.samplers.base import DenoiserCall, Sampler, SamplerStep, karras_grid
from lit_diffusion.schedules import NoiseSchedule

__all__ = ["HeunSampler"]


@dataclass(frozen=True)
class HeunSampler(Sampler):
    """Heun's method for d(z/α) = ε̂ d(σ/α): a DDIM step, corrected by half the change of ε̂.

    With z' = α_s x̂ + σ_s ε̂ it is z_s = z' + ½ (σ_s − α_s σ/α) (ε̂(z', λ_s) − ε̂). The sampler of
    EDM: second order at two network calls per step, without memory between steps. Its default
    levels are those of `KarrasSchedule`, for which it was designed. The factor in brackets is
    large if one step covers much of the range of strong noise: with few cosine levels over
    [−20, 20] the first step has a large error.

    `s_churn` > 0 makes it stochastic: before each step fresh noise raises the noise level σ/α by a
    factor of 1 + γ, γ = min(s_churn/steps, √2 − 1), which masks errors of the network as ancestral
    noise does. Unlike in the paper, the level is not raised above the first one, where the network
    may not have been trained, so the first step has no churn.

    Args:
        steps: Number of levels, at least 1; the network is called 2·steps − 1 times.
        schedule: The noise levels to visit; None means `KarrasSchedule` within the trained range.
        s_churn: Total churn, 0 (deterministic) or above.
        s_min: Churn only where σ/α = e^(−λ/2) is at least this.
        s_max: Churn only where σ/α = e^(−λ/2) is at most this, at least s_min.
        s_noise: Standard deviation of the fresh noise, above 0; slightly above 1 compensates for
            detail that a network removes.

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
        super().__post_init__()
        check_finite(self, s_churn=self.s_churn, s_min=self.s_min, s_noise=self.s_noise)
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
            logsnr_min: Smallest λ the denoiser was trained on.
            logsnr_max: Largest λ the denoiser was trained on.
        """
        return karras_grid(logsnr_min, logsnr_max)

    def _churned(self, z: Tensor, step: SamplerStep, first: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise to z, down to a λ not below the first level; return z and that λ."""
        logsnr = step.logsnr
        if self.s_churn == 0:
            return z, logsnr
        gamma = min(self.s_churn / self.steps, math.sqrt(2) - 1)
        level = torch.exp(-logsnr / 2)
        chosen = (level >= self.s_min) & (level <= self.s_max)
        raised = torch.where(chosen, logsnr - 2 * math.log1p(gamma), logsnr)
        raised = torch.maximum(raised, first)
        _, sigma = alpha_sigma(logsnr)
        # α'/α in logarithms. The noise to add at the new level, α' √(σ'²/α'² − σ²/α²), in a form
        # without a difference of squares.
        shrink = torch.exp((logsigmoid(raised) - logsigmoid(logsnr)) / 2)
        missing = shrink * sigma * torch.expm1(logsnr - raised).sqrt()
        fresh = self.s_noise * noise_like(z, step.generator)
        return broadcast_to_data(shrink, z) * z + broadcast_to_data(missing, z) * fresh, raised

    def step(self, denoiser: DenoiserCall, z: Tensor, step: SamplerStep) -> tuple[Tensor, Any]:
        """Move to λ_s: z ← z' + ½ (σ_s − α_s σ/α)(ε̂' − ε̂) after z' = α_s x̂ + σ_s ε̂."""
        first = step.logsnr if step.memory is None else step.memory
        z, logsnr = self._churned(z, step, first)
        x, eps = denoiser(z, logsnr)
        alpha, sigma = alpha_sigma(step.logsnr_next)
        z = broadcast_to_data(alpha, z) * x + broadcast_to_data(sigma, z) * eps
        # σ_s − α_s σ/α with σ/α = e^(−λ/2), written so that no digits are lost at high λ.
        lever = -sigma * torch.expm1((step.logsnr_next - logsnr) / 2)
        z = z + broadcast_to_data(lever / 2, z) * (denoiser(z, step.logsnr_next).eps - eps)
        return z, first

    def finish(self, denoiser: DenoiserCall, z: Tensor, step: SamplerStep) -> Tensor:
        """Return x̂ at the last level, after churn, as in EDM's last step."""
        first = step.logsnr if step.memory is None else step.memory
        return denoiser(*self._churned(z, step, first)).x
