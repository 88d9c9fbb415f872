"""Weightings of the discrete chain: DDPM's other losses.

Letters: t and s = t − 1/T the ends of a step of a chain of T steps, λ_t < λ_s; β the variance that
it adds going forward, β̃ that of its posterior q(z_s | z_t, x).

DDPM regresses on the noise, on the posterior mean μ̃, or on the bound itself, with a variance σ²
of its choice for the model's step. All are weighted losses of the same chain. In its discrete form

    L_w = T/2 E_t[ expm1(λ_s − λ_t) w(λ_t) ‖ε̂ − ε‖² ]

a step of the bound with σ² = β̃ has w = 1, because with c = 1 − e^(λ_t − λ_s)

    ‖μ̃ − μ‖² = α_s² c² ‖x̂ − x‖² = α_s² c² e^(−λ_t) ‖ε̂ − ε‖²      β̃ = σ_s² c
    ‖μ̃ − μ‖² / 2β̃ = ½ c e^(λ_s − λ_t) ‖ε̂ − ε‖² = ½ expm1(λ_s − λ_t) ‖ε̂ − ε‖²

From there the others are one factor away: w = β̃/σ² for a step of variance σ², w = β̃ for the mean
itself, and L_simple is 1/(T expm1(λ_s − λ_t)), which is the density p(λ) where steps are short
(`DensityWeighting`, given the steps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.gaussian import alpha_sigma
from lit_diffusion.schedules import BetaSchedule, NoiseSchedule
from lit_diffusion.weightings.base import Weighting

__all__ = ["PosteriorMeanWeighting", "VariationalWeighting", "chain_step"]


def chain_step(schedule: NoiseSchedule, num_timesteps: int, logsnr: Tensor) -> Tensor:
    """How far λ rises in the step that starts at λ: λ_s − λ_t, s = t − 1/T.

    Beyond the first and the last step of the chain the nearest step counts.

    Args:
        schedule: Whose levels; DDPM's own table is `BetaSchedule()` with 999 steps.
        num_timesteps: Number T of steps, at least 1.
        logsnr: λ_t.

    Shapes:
        logsnr (B,); result (B,), float64, positive.

    Example:
        >>> chain_step(LinearSchedule(-10.0, 10.0), 100, torch.tensor([0.0, 10.0]))
        tensor([0.2000, 0.2000], dtype=torch.float64)
    """
    t = schedule.time(logsnr.detach()).clamp(min=1 / num_timesteps)
    return schedule.logsnr(t - 1 / num_timesteps) - schedule.logsnr(t)


class VariationalWeighting(Weighting):
    """The bound of a chain whose steps have variance σ²: w(λ) = β̃/σ².

    log σ² goes from log β̃ to log β as `variance` goes from 0 to 1, as in `AncestralSampler`. At 0
    it is w = 1, VDM's bound; at 1 it is DDPM's, what the network can do about it (the variances
    themselves cost a constant more).

    Args:
        schedule: Whose levels; None means `BetaSchedule()`.
        num_timesteps: Number T of steps of the chain, at least 1; DDPM's thousand levels are 999
            steps apart.
        variance: From 0, the posterior's, to 1, the forward step's.

    Raises:
        ValueError: If num_timesteps is below 1 or variance outside [0, 1].

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Eq. 12.

    Example:
        >>> VariationalWeighting()(torch.tensor([-5.0, 5.0, 9.0]))
        tensor([0.9999, 0.9235, 0.4547])
    """

    def __init__(
        self,
        schedule: NoiseSchedule | None = None,
        num_timesteps: int = 999,
        variance: float = 1.0,
    ) -> None:
        super().__init__()
        if num_timesteps < 1 or not 0 <= variance <= 1:
            raise ValueError(
                "VariationalWeighting: num_timesteps must be at least 1 and variance in [0, 1], "
                f"got {num_timesteps} and {variance}."
            )
        self.schedule = BetaSchedule() if schedule is None else schedule
        self.num_timesteps = num_timesteps
        self.variance = variance

    def forward(self, logsnr: Tensor) -> Tensor:
        """(σ_s²/σ_t²)^variance, since β̃/β = σ_s²/σ_t²."""
        _, sigma = alpha_sigma(logsnr.double())
        _, cleaner = alpha_sigma(logsnr + chain_step(self.schedule, self.num_timesteps, logsnr))
        return ((cleaner / sigma) ** (2 * self.variance)).to(logsnr.dtype)


class PosteriorMeanWeighting(Weighting):
    """Regression on the posterior mean, ‖μ̃ − μ‖²: w(λ) = β̃ = σ_s² (1 − e^(λ_t − λ_s)).

    The plainest way to train a chain, and DDPM's first: predict the mean of the next, cleaner,
    image. It counts noisy levels most, and by this measure the clean ones hardly at all.

    Args:
        schedule: Whose levels; None means `BetaSchedule()`.
        num_timesteps: Number T of steps of the chain, at least 1; DDPM's thousand levels are 999
            steps apart.

    Raises:
        ValueError: If num_timesteps is below 1.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Eq. 8 and
        table 2.

    Example:
        >>> PosteriorMeanWeighting()(torch.tensor([-5.0, 5.0, 9.0]))
        tensor([1.4079e-02, 4.7563e-04, 3.0597e-05])
    """

    def __init__(self, schedule: NoiseSchedule | None = None, num_timesteps: int = 999) -> None:
        super().__init__()
        if num_timesteps < 1:
            raise ValueError(
                f"PosteriorMeanWeighting: num_timesteps must be at least 1, got {num_timesteps}."
            )
        self.schedule = BetaSchedule() if schedule is None else schedule
        self.num_timesteps = num_timesteps

    def forward(self, logsnr: Tensor) -> Tensor:
        """β̃."""
        step = chain_step(self.schedule, self.num_timesteps, logsnr)
        _, cleaner = alpha_sigma(logsnr + step)
        return (cleaner**2 * -torch.expm1(-step)).to(logsnr.dtype)
