"""Ancestral sampling: the reverse chain of DDPM and VDM.

Letters: z noisy data (B, *), logsnr = λ. A step goes from λ to logsnr_next = λ_s > λ, where the
letters are α_s, σ_s, z_s; c = 1 − e^(λ − λ_s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_diffusion.gaussian import broadcast_to_data, noise_like, posterior
from lit_diffusion.samplers.base import DenoiserCall, Sampler, SamplerStep
from lit_diffusion.schedules import NoiseSchedule

__all__ = ["AncestralSampler"]


@dataclass(frozen=True)
class AncestralSampler(Sampler):
    """Samples each level from the posterior given the one before: z_s ~ q(z_s | z_t, x = x̂).

    The sampler of DDPM and VDM. It is robust to errors of the denoiser, because fresh noise masks
    them. The variance of its samples is too small at few steps, so the original papers take
    hundreds; 50 suffice for small images.

    The cause is that the posterior variance β̃ = σ_s² c is exact if x is known, but x̂ is only its
    mean. For standard normal data the exact variance is that of a step of the forward process,
    β = 1 − α_t²/α_s²; other data of unit variance are between the two. `variance` = v interpolates
    between them, std² = β̃^(1−v) β^v, hence std = σ_s^(1−v) σ_t^v √c.

    Args:
        steps: Number of network calls, at least 1.
        schedule: The noise levels to visit; None means cosine over the trained range.
        variance: Interpolation v of log std² from log β̃, at 0, to log β, at 1.

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
        super().__post_init__()
        if not 0 <= self.variance <= 1:
            raise ValueError(
                f"AncestralSampler: variance must be in [0, 1], from the posterior's to that of "
                f"the forward process, got {self.variance}."
            )

    def step(self, denoiser: DenoiserCall, z: Tensor, step: SamplerStep) -> tuple[Tensor, Any]:
        """Move to λ_s: z ← mean of the posterior + σ_s^(1−v) σ_t^v √c·noise."""
        logsnr, logsnr_next, _, generator = step
        mean, _ = posterior(z, denoiser(z, logsnr).x, logsnr, logsnr_next)
        # β/β̃ = σ_t²/σ_s². In logarithms, because the quotient of two very clean levels can be 0/0.
        log_variance = torch.lerp(logsigmoid(-logsnr_next), logsigmoid(-logsnr), self.variance)
        std = torch.sqrt(-torch.expm1(logsnr - logsnr_next)) * torch.exp(log_variance / 2)
        return mean + broadcast_to_data(std, z) * noise_like(z, generator), None
