"""DDIM: a deterministic sampler, with noise up to that of ancestral sampling.

Letters: z noisy data (B, *), logsnr = λ. A step goes from λ to logsnr_next = λ_s > λ, where the
letters are α_s, σ_s, z_s; c = 1 − e^(λ − λ_s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data, noise_like
from lit_diffusion.samplers.base import DenoiserCall, Sampler, SamplerStep
from lit_diffusion.schedules import NoiseSchedule

__all__ = ["DDIMSampler"]


@dataclass(frozen=True)
class DDIMSampler(Sampler):
    """Recombines x̂ and ε̂ at the next noise level: z_s = α_s x̂ + √(σ_s² − η²v) ε̂ + η√v n.

    n is fresh noise and v = σ_s² c the variance of the posterior, so η = 1 is ancestral sampling.
    With η = 0 it is deterministic, Euler's method for the probability-flow ODE: good at 20 to 100
    steps, and the image is a function of the initial noise.

    Args:
        steps: Number of network calls, at least 1.
        schedule: The noise levels to visit; None means cosine over the trained range.
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
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIMSampler: eta must be in [0, 1], got {self.eta}.")

    def step(self, denoiser: DenoiserCall, z: Tensor, step: SamplerStep) -> tuple[Tensor, Any]:
        """Move to λ_s: z ← α_s x̂ + √(σ_s² − η²v) ε̂ + η√v n."""
        x, eps = denoiser(z, step.logsnr)
        alpha, sigma = alpha_sigma(step.logsnr_next)
        fresh_share = self.eta**2 * -torch.expm1(step.logsnr - step.logsnr_next)
        kept, fresh = sigma * torch.sqrt(1 - fresh_share), sigma * torch.sqrt(fresh_share)
        z = broadcast_to_data(alpha, z) * x + broadcast_to_data(kept, z) * eps
        if self.eta > 0:
            z = z + broadcast_to_data(fresh, z) * noise_like(z, step.generator)
        return z, None
