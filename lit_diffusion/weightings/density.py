"""Published losses as weightings: a factor of λ times the density that the paper samples from.

Letters: logsnr = λ, w the weight, p the density of a schedule, f a factor of λ; s(λ) is
`Prediction.eps_error_scale`, ‖ε̂ − ε‖² = s ‖out − target‖².

A paper states its loss as a squared error of its own target, weighted by f and averaged over a
density p, which is part of the objective. For any network, whatever it outputs,

    E_{λ~p}[ f(λ) ‖out − target‖² ] = ∫ p f/s · E‖ε̂ − ε‖² dλ = 2 · ½ ∫ w E‖ε̂ − ε‖² dλ

    w(λ) = p(λ) f(λ)/s(λ)

so the weighted loss with this w is half the published one. Once w is fixed, λ may be sampled from
any other density and the objective stays the same; sampled from p itself, w/p = f/s and the loss
is, example by example, half the published one. With s written out, f/s is

    loss on ε        f
    loss on x        f e^(−λ)                   = f σ²/α²
    loss on v        f (1 + e^(−λ))             = f/α²
    loss on ε − x    f (1 + e^(−λ/2))²          = f/(1 − t)² on the flow path
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lit_diffusion.domains import check_count
from lit_diffusion.predictions import EpsPrediction, Prediction
from lit_diffusion.schedules import CosineSchedule, NoiseSchedule
from lit_diffusion.weightings.base import Weighting
from lit_diffusion.weightings.chain import chain_step

__all__ = ["DensityWeighting", "FactorWeighting"]


class FactorWeighting(Weighting):
    """A factor of λ times the density of a schedule: w(λ) = factor(λ) p(λ).

    A subclass defines `factor`, the paper's weight on the squared error of ε, f/s; a paper that
    gives a weight on another target divides it by that prediction's `eps_error_scale`. With
    num_timesteps=T, p is the density of the chain, 1/(T expm1(λ_s − λ)), and a `DiffusionLoss`
    with the same num_timesteps is half the published loss at every level. Outside the range of
    the schedule, where the paper does not sample, the weight is 0.

    Args:
        schedule: Schedule whose density is a factor of the weight; None means `CosineSchedule()`.
        num_timesteps: Number T of steps of the chain; None means continuous time.

    Raises:
        ValueError: If num_timesteps is below 1.

    References:
        Kingma & Gao (2023), Understanding Diffusion Objectives as the ELBO with Simple Data
        Augmentation, arXiv:2303.00848, section 2 and table 1.

    Example:
        >>> class SNRWeighting(FactorWeighting):
        ...     def factor(self, logsnr):
        ...         return torch.exp(logsnr)
        >>> SNRWeighting(LinearSchedule(-5.0, 5.0))(torch.tensor([0.0, 1.0]))
        tensor([0.1000, 0.2718])
    """

    def __init__(
        self, schedule: NoiseSchedule | None = None, num_timesteps: int | None = None
    ) -> None:
        super().__init__()
        check_count(self, 1, num_timesteps=num_timesteps)
        self.schedule = CosineSchedule() if schedule is None else schedule
        self.num_timesteps = num_timesteps

    @abstractmethod
    def factor(self, logsnr: Tensor) -> Tensor:
        """The weight on ‖ε̂ − ε‖² without the density.

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,), float64; result (B,).
        """

    def forward(self, logsnr: Tensor) -> Tensor:
        """factor(λ) p(λ)."""
        wide = logsnr.double()
        if self.num_timesteps is None:
            density = self.schedule.log_prob(wide).exp()
        else:
            step = chain_step(self.schedule, self.num_timesteps, wide)
            density = 1 / (self.num_timesteps * torch.expm1(step))
        return (self.factor(wide) * density).to(logsnr.dtype)


class DensityWeighting(FactorWeighting):
    """The unweighted loss of a prediction under the density of a schedule: w(λ) = p(λ)/s(λ).

    The factor s is the prediction's `eps_error_scale`, 1 for ε. DDPM's L_simple is
    `DensityWeighting(BetaSchedule())`; the v-loss, or SNR + 1 weighting of x,
    `DensityWeighting(CosineSchedule(), prediction=VPrediction())`; Stable Diffusion 3's
    `DensityWeighting(NormalSchedule(0, 2), prediction=FlowPrediction())`. The network may have
    another prediction. If λ is sampled from the same schedule, the loss is half the mean squared
    error of the target; under any other schedule the objective remains the same. With
    num_timesteps=T the density is that of the discrete chain.

    Args:
        schedule: Schedule whose density is a factor of the weight; None means `CosineSchedule()`.
        num_timesteps: Number T of steps of the chain; None means continuous time.
        prediction: The target whose squared error is not weighted; None means `EpsPrediction()`.

    Raises:
        ValueError: If num_timesteps is below 1.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Eq. 14;
        Salimans & Ho (2022), arXiv:2202.00512, section 4; Esser et al. (2024), Scaling Rectified
        Flow Transformers, arXiv:2403.03206, section 3.1; Kingma & Gao (2023), arXiv:2303.00848.

    Example:
        >>> DensityWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.1031, 0.1592, 0.1031])
        >>> DensityWeighting(prediction=VPrediction())(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.8653, 0.3183, 0.1171])
    """

    def __init__(
        self,
        schedule: NoiseSchedule | None = None,
        num_timesteps: int | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        super().__init__(schedule, num_timesteps)
        self.prediction = EpsPrediction() if prediction is None else prediction

    def factor(self, logsnr: Tensor) -> Tensor:
        """1/s(λ)."""
        return 1 / self.prediction.eps_error_scale(logsnr)
