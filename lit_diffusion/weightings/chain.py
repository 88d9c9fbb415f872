"""Weightings of a discrete chain: the losses of DDPM besides L_simple.

Letters: t and s = t − 1/T the ends of a step of a chain of T steps, λ_t < λ_s; β the variance that
the forward step adds, β̃ the variance of its posterior q(z_s | z_t, x).

DDPM regresses on the noise, on the posterior mean μ̃, or minimises the bound itself, with a fixed
variance σ² of the model's step. All are weighted losses of the same chain. In the discrete form

    L_w = T/2 E_t[ expm1(λ_s − λ_t) w(λ_t) ‖ε̂ − ε‖² ]

the bound with σ² = β̃ has w = 1, because with c = 1 − e^(λ_t − λ_s)

    ‖μ̃ − μ‖² = α_s² c² ‖x̂ − x‖² = α_s² c² e^(−λ_t) ‖ε̂ − ε‖²      β̃ = σ_s² c
    ‖μ̃ − μ‖² / 2β̃ = ½ c e^(λ_s − λ_t) ‖ε̂ − ε‖² = ½ expm1(λ_s − λ_t) ‖ε̂ − ε‖²

The others differ by one factor: w = β̃/σ² for steps of variance σ², w = β̃ for regression on the
mean (up to a factor), and w = 1/(T expm1(λ_s − λ_t)) for L_simple, which is the density p(λ) in
the limit of short steps (`DensityWeighting` with num_timesteps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.domains import check_count
from lit_diffusion.gaussian import alpha_sigma
from lit_diffusion.schedules import BetaSchedule, NoiseSchedule
from lit_diffusion.weightings.base import Weighting

__all__ = ["PosteriorMeanWeighting", "VariationalWeighting", "chain_step"]


def chain_step(schedule: NoiseSchedule, num_timesteps: int, logsnr: Tensor) -> Tensor:
    """The increase of λ over the step that starts at λ_t: λ_s − λ_t, s = t − 1/T.

    Outside the chain the nearest step counts.

    Args:
        schedule: Schedule of the chain; DDPM's own is `BetaSchedule()` with 999 steps.
        num_timesteps: Number T of steps, at least 1.
        logsnr: λ_t.

    Shapes:
        logsnr (B,); result (B,), float64, positive.

    Example:
        >>> chain_step(LinearSchedule(-10.0, 10.0), 100, torch.tensor([0.0, 10.0]))
        tensor([0.2000, 0.2000], dtype=torch.float64)
    """
    t = schedule.time(logsnr.detach())
    if logsnr.requires_grad:  # dt/dλ = −p
        t = t - (logsnr - logsnr.detach()) * schedule.log_prob(logsnr.detach()).exp()
    t = t.clamp(min=1 / num_timesteps)
    return schedule.logsnr(t - 1 / num_timesteps) - schedule.logsnr(t)


class VariationalWeighting(Weighting):
    """The bound of a chain whose steps have variance σ²: w(λ) = β̃/σ².

    log σ² varies linearly from log β̃ to log β as `variance` goes from 0 to 1, as in
    `AncestralSampler`. 0 gives w = 1, VDM's bound; 1 gives DDPM's, up to a constant that the
    network does not influence.

    Args:
        schedule: Schedule of the chain; None means `BetaSchedule()`.
        num_timesteps: Number T of steps of the chain, at least 1; DDPM's thousand levels have
            999 steps between them.
        variance: From 0, the posterior variance β̃, to 1, the forward variance β.

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
        check_count(self, 1, num_timesteps=num_timesteps)
        if not 0 <= variance <= 1:
            raise ValueError(f"VariationalWeighting: variance must be in [0, 1], got {variance}.")
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

    The most direct way to train a chain, and the first of DDPM: predict the mean of the next,
    cleaner image. Noisy levels dominate, and clean ones hardly count.

    Args:
        schedule: Schedule of the chain; None means `BetaSchedule()`.
        num_timesteps: Number T of steps of the chain, at least 1; DDPM's thousand levels have
            999 steps between them.

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
        check_count(self, 1, num_timesteps=num_timesteps)
        self.schedule = BetaSchedule() if schedule is None else schedule
        self.num_timesteps = num_timesteps

    def forward(self, logsnr: Tensor) -> Tensor:
        """β̃."""
        step = chain_step(self.schedule, self.num_timesteps, logsnr)
        _, cleaner = alpha_sigma(logsnr + step)
        return (cleaner**2 * -torch.expm1(-step)).to(logsnr.dtype)
