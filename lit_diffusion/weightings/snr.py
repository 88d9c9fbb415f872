"""Weightings by the signal-to-noise ratio, SNR = e^λ: each a factor times a density.

Letters: logsnr = λ, w the weight, p the density of a schedule, which is part of each objective;
see `weightings.density`. The factors are weights on the squared error of ε. On the error of x the
same weights are larger by SNR, and on that of v by SNR/(SNR + 1), whatever the network outputs::

    weighting      on ε                   on x                       on v
    P2             1/(k + SNR)^γ          SNR/(k + SNR)^γ
    Min-SNR        min(1, γ/SNR)          min(SNR, γ)                min(SNR, γ)/(SNR + 1)
    soft Min-SNR   γ/(SNR + γ)            SNR γ/(SNR + γ)
    Max-SNR        max(1, γ/SNR)          max(SNR, γ)                max(SNR, γ)/(SNR + 1)
    debiased       1/√SNR                 √SNR
    SNR + 1        1 + 1/SNR              SNR + 1                    1

The last row is the v-loss, `DensityWeighting(prediction=VPrediction())`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.domains import check_finite
from lit_diffusion.predictions import FlowPrediction
from lit_diffusion.schedules import NoiseSchedule, NormalSchedule
from lit_diffusion.weightings.density import FactorWeighting

__all__ = [
    "DebiasedWeighting",
    "JiTWeighting",
    "MaxSNRWeighting",
    "MinSNRWeighting",
    "P2Weighting",
    "SoftMinSNRWeighting",
]


class P2Weighting(FactorWeighting):
    """Perception-prioritised: w(λ) = p(λ)/(k + e^λ)^gamma.

    Reduces the weight at the clean end, where errors are invisible. The paper trains DDPM's chain,
    `P2Weighting(schedule=BetaSchedule(), num_timesteps=999)`; the default cosine is that of Kingma
    & Gao's table, where it is sech(λ/2)/(1 + e^λ)^gamma up to a factor.

    Args:
        gamma: Strength, 0 or more; the paper uses 0.5 and 1.
        k: SNR around which the reduction begins, above 0; the paper uses 1.
        schedule: Schedule whose density is a factor of the weight; None means `CosineSchedule()`.
        num_timesteps: Number of steps of a chain; None means continuous time.

    Raises:
        ValueError: If gamma is negative, k is not positive, or num_timesteps is below 1.

    References:
        Choi et al. (2022), Perception Prioritized Training of Diffusion Models,
        arXiv:2204.00227, Eq. 8.

    Example:
        >>> P2Weighting(gamma=1.0)(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.0909, 0.0796, 0.0123])
    """

    def __init__(
        self,
        gamma: float = 1.0,
        k: float = 1.0,
        schedule: NoiseSchedule | None = None,
        num_timesteps: int | None = None,
    ) -> None:
        super().__init__(schedule, num_timesteps)
        check_finite(self, gamma=gamma, k=k)
        if gamma < 0 or not k > 0:
            raise ValueError(
                f"P2Weighting: gamma must be 0 or more and k above 0, got {gamma} and {k}."
            )
        self.gamma = gamma
        self.k = k

    def factor(self, logsnr: Tensor) -> Tensor:
        """1/(k + SNR)^gamma."""
        return (self.k + torch.exp(logsnr)) ** -self.gamma


class MinSNRWeighting(FactorWeighting):
    """Min-SNR: w(λ) = p(λ) min(1, gamma e^(−λ)).

    The ε-loss with its weight on x clamped at gamma, so that clean levels do not dominate. As w is
    always the weight on ε, it is the same for every prediction. The paper's models are trained
    under a cosine schedule.

    Args:
        gamma: Largest weight on the error of x, above 0.
        schedule: Schedule whose density is a factor of the weight; None means `CosineSchedule()`.
        num_timesteps: Number of steps of a chain; None means continuous time.

    Raises:
        ValueError: If gamma is not positive, or num_timesteps is below 1.

    References:
        Hang et al. (2023), Efficient Diffusion Training via Min-SNR Weighting Strategy,
        arXiv:2303.09556, section 3.4.

    Example:
        >>> MinSNRWeighting(gamma=5.0)(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.1031, 0.1592, 0.0698])
    """

    def __init__(
        self,
        gamma: float = 5.0,
        schedule: NoiseSchedule | None = None,
        num_timesteps: int | None = None,
    ) -> None:
        super().__init__(schedule, num_timesteps)
        _positive(self, gamma=gamma)
        self.gamma = gamma

    def factor(self, logsnr: Tensor) -> Tensor:
        """min(1, gamma/SNR)."""
        return torch.clamp(self.gamma * torch.exp(-logsnr), max=1)


class SoftMinSNRWeighting(FactorWeighting):
    """Soft Min-SNR: w(λ) = p(λ) sigmoid(ln gamma − λ).

    A smooth version of Min-SNR: the weight on x is SNR·gamma/(SNR + gamma).

    Args:
        gamma: Value at which the weight on x saturates, above 0; 1/data_std², 4 for images.
        schedule: Schedule whose density is a factor of the weight; None means
            `NormalSchedule()`, EDM's.
        num_timesteps: Number of steps of a chain; None means continuous time.

    Raises:
        ValueError: If gamma is not positive, or num_timesteps is below 1.

    References:
        Crowson et al. (2024), Scalable High-Resolution Pixel-Space Image Synthesis with
        Hourglass Diffusion Transformers, arXiv:2401.11605, section 4.5.

    Example:
        >>> SoftMinSNRWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.0299, 0.0807, 0.0576])
    """

    def __init__(
        self,
        gamma: float = 4.0,
        schedule: NoiseSchedule | None = None,
        num_timesteps: int | None = None,
    ) -> None:
        super().__init__(NormalSchedule() if schedule is None else schedule, num_timesteps)
        _positive(self, gamma=gamma)
        self.gamma = gamma

    def factor(self, logsnr: Tensor) -> Tensor:
        """gamma/(SNR + gamma)."""
        return torch.sigmoid(math.log(self.gamma) - logsnr)


class MaxSNRWeighting(FactorWeighting):
    """Max-SNR, also called truncated SNR: w(λ) = p(λ) max(1, gamma e^(−λ)).

    The loss is the larger of the errors of ε and of x, if gamma is 1: at high noise, where a
    network that predicts ε says little about x, the error of x counts. Monotone under the cosine
    schedule, which is the paper's.

    Args:
        gamma: Smallest weight on the error of x, above 0; the paper uses 1.
        schedule: Schedule whose density is a factor of the weight; None means `CosineSchedule()`.
        num_timesteps: Number of steps of a chain; None means continuous time.

    Raises:
        ValueError: If gamma is not positive, or num_timesteps is below 1.

    References:
        Salimans & Ho (2022), Progressive Distillation for Fast Sampling of Diffusion Models,
        arXiv:2202.00512, section 4.

    Example:
        >>> MaxSNRWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.7622, 0.1592, 0.1031])
    """

    def __init__(
        self,
        gamma: float = 1.0,
        schedule: NoiseSchedule | None = None,
        num_timesteps: int | None = None,
    ) -> None:
        super().__init__(schedule, num_timesteps)
        _positive(self, gamma=gamma)
        self.gamma = gamma

    def factor(self, logsnr: Tensor) -> Tensor:
        """max(1, gamma/SNR)."""
        return torch.clamp(self.gamma * torch.exp(-logsnr), min=1)


class DebiasedWeighting(FactorWeighting):
    """Debiased estimation: w(λ) = p(λ) e^(−λ/2), the ε-loss times 1/√SNR.

    Under the cosine schedule, whose density is sech(λ/2)/2π, it is the sigmoid weighting with bias
    0, up to a factor, and hence monotone.

    Args:
        schedule: Schedule whose density is a factor of the weight; None means `CosineSchedule()`.
        num_timesteps: Number of steps of a chain; None means continuous time.

    Raises:
        ValueError: If num_timesteps is below 1.

    References:
        Yu et al. (2023), Debias the Training of Diffusion Models (later titled Unmasking Bias in
        Diffusion Model Training), arXiv:2310.08442.

    Example:
        >>> DebiasedWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.2804, 0.1592, 0.0379])
    """

    def factor(self, logsnr: Tensor) -> Tensor:
        """1/√SNR."""
        return torch.exp(-logsnr / 2)


class JiTWeighting(FactorWeighting):
    """Just image transformers: the flow loss of an x-prediction, with its divisor bounded below.

    On the flow path z = (1 − t)x + tε the loss is ‖x̂ − x‖²/max(t, t_min)². Where t ≥ t_min this is
    the unweighted loss on ε − x, and closer to the data it is a loss on x, so
    w(λ) = p(λ) (1 + e^(−λ/2))² min(1, t/t_min)² with t = sigmoid(−λ/2). (The paper writes t for
    1 − t, and its u ~ N(−0.8, 0.8²), t = sigmoid(u), is λ ~ N(−1.6, 1.6²).)

    Args:
        t_min: Smallest divisor, in (0, 1); the paper uses 0.05.
        schedule: Schedule whose density is a factor of the weight; None means
            `NormalSchedule(mean=-1.6, std=1.6)`, the paper's.
        num_timesteps: Number of steps of a chain; None means continuous time.

    Raises:
        ValueError: If t_min is outside (0, 1), or num_timesteps is below 1.

    References:
        Li & He (2025), Back to Basics: Let Denoising Generative Models Denoise, arXiv:2511.13720.

    Example:
        >>> JiTWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([3.3412, 0.6049, 0.0371])
    """

    def __init__(
        self,
        t_min: float = 0.05,
        schedule: NoiseSchedule | None = None,
        num_timesteps: int | None = None,
    ) -> None:
        default = NormalSchedule(mean=-1.6, std=1.6) if schedule is None else schedule
        super().__init__(default, num_timesteps)
        if not 0 < t_min < 1:
            raise ValueError(f"JiTWeighting: t_min must be in (0, 1), got {t_min}.")
        self.t_min = t_min

    def factor(self, logsnr: Tensor) -> Tensor:
        """(1 + e^(−λ/2))² min(1, t/t_min)²."""
        t = torch.sigmoid(-logsnr / 2)
        bounded = torch.clamp(t / self.t_min, max=1) ** 2
        return bounded / FlowPrediction().eps_error_scale(logsnr)


def _positive(who: FactorWeighting, gamma: float) -> None:
    check_finite(who, gamma=gamma)
    if not gamma > 0:
        raise ValueError(f"{type(who).__name__}: gamma must be above 0, got {gamma}.")
