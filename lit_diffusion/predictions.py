"""Predictions: what the network outputs.

Letters: x data, z noisy data, eps = ε noise, logsnr = λ, out the network's output; data are
(B, *), λ and coefficients (B,).

All targets in use are linear in data and noise, so a prediction is one row (a, b) at each λ::

    target = a(λ) x + b(λ) ε

Together with z = αx + σε that is a two-by-two linear system. With det = aσ − bα its solution is

    x̂ = (σ·out − b z)/det        ε̂ = (a z − α·out)/det        ‖ε̂ − ε‖² = (α/det)² ‖out − target‖²

so a new prediction needs one row, not a conversion function for each pair. The loss is always on
ε, through the factor above; the choice of prediction changes what is easy for the network to
learn, but not the objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffusion.domains import check_finite
from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data
from lit_diffusion.registry import Registry

__all__ = [
    "PREDICTIONS",
    "Denoised",
    "EDMPrediction",
    "EpsPrediction",
    "FlowPrediction",
    "Prediction",
    "ScorePrediction",
    "VPrediction",
    "XPrediction",
]


class Denoised(NamedTuple):
    """The output of a denoiser: estimates of the data and of the noise, with z = α x̂ + σ ε̂.

    Shapes:
        x and eps (B, *).
    """

    x: Tensor
    eps: Tensor


class Prediction(ABC):
    """A row (a, b): the network is trained to output a(λ)x + b(λ)ε.

    A subclass defines `coefficients`, and `input_scale` if its network needs a rescaled input. It
    is a frozen dataclass that holds a formula and no tensors. Everything else is derived.

    Example:
        >>> class MyPrediction(Prediction):
        ...     def coefficients(self, logsnr):
        ...         return torch.ones_like(logsnr), torch.zeros_like(logsnr)
        >>> MyPrediction().target(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1))
        tensor([[1., 1.]])
    """

    @abstractmethod
    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """The row (a, b) at λ.

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); a and b (B,).
        """

    def input_scale(self, logsnr: Tensor) -> Tensor:
        """The factor by which z is multiplied before it enters the network; 1 by default.

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); result (B,).
        """
        return torch.ones_like(logsnr)

    def target(self, x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
        """The regression target of the network: a(λ)x + b(λ)ε.

        Args:
            x: Data.
            eps: Noise.
            logsnr: λ.

        Shapes:
            x and eps (B, *); logsnr (B,); result (B, *).
        """
        a, b = self.coefficients(logsnr)
        return broadcast_to_data(a, x) * x + broadcast_to_data(b, x) * eps

    def decode(self, out: Tensor, z: Tensor, logsnr: Tensor) -> Denoised:
        """Convert the network's output into estimates of data and noise.

        Args:
            out: The network's output.
            z: Noisy data (not rescaled).
            logsnr: λ.

        Shapes:
            out and z (B, *); logsnr (B,); x̂ and ε̂ (B, *), float32 or better.
        """
        a, b = self.coefficients(logsnr)
        alpha, sigma = alpha_sigma(logsnr)
        det = a * sigma - b * alpha
        return Denoised(  # z first: the results have the memory format of z, not of the network's
            x=broadcast_to_data(-b / det, z) * z + broadcast_to_data(sigma / det, z) * out,
            eps=broadcast_to_data(a / det, z) * z - broadcast_to_data(alpha / det, z) * out,
        )

    def eps_error_scale(self, logsnr: Tensor) -> Tensor:
        """The factor (α/det)² in ‖ε̂ − ε‖² = factor · ‖out − target‖².

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); result (B,).
        """
        a, b = self.coefficients(logsnr)
        alpha, sigma = alpha_sigma(logsnr)
        return (alpha / (a * sigma - b * alpha)) ** 2


@dataclass(frozen=True)
class EpsPrediction(Prediction):
    """The noise: target = ε.

    The choice of DDPM. Accurate at high λ, where the noise is hard to see; at very low λ its
    x̂ = (z − σ ε̂)/α divides a small error by a small α.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Eq. 14.

    Example:
        >>> EpsPrediction().eps_error_scale(torch.tensor([-2.0, 2.0]))
        tensor([1., 1.])
    """

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Row (0, 1)."""
        return torch.zeros_like(logsnr), torch.ones_like(logsnr)


@dataclass(frozen=True)
class XPrediction(Prediction):
    """The data: target = x.

    Natural where the data lie near a low-dimensional manifold; ‖x̂ − x‖² = e^(−λ)‖ε̂ − ε‖².

    References:
        Salimans & Ho (2022), Progressive Distillation, arXiv:2202.00512, section 4.

    Example:
        >>> XPrediction().eps_error_scale(torch.tensor([-2.0, 2.0]))
        tensor([0.1353, 7.3891])
    """

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Row (1, 0)."""
        return torch.ones_like(logsnr), torch.zeros_like(logsnr)


@dataclass(frozen=True)
class VPrediction(Prediction):
    """The velocity along the circle z = cos φ x + sin φ ε: target v = αε − σx.

    Close to ε on clean data (high λ) and to −x in noise (low λ), so the target has unit scale and
    the estimates are well conditioned at both ends. A safe default.

    References:
        Salimans & Ho (2022), Progressive Distillation, arXiv:2202.00512, appendix D.

    Example:
        >>> VPrediction().eps_error_scale(torch.tensor([-2.0, 2.0]))
        tensor([0.1192, 0.8808])
    """

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Row (−σ, α)."""
        alpha, sigma = alpha_sigma(logsnr)
        return -sigma, alpha


@dataclass(frozen=True)
class FlowPrediction(Prediction):
    """The velocity of the straight path (1 − t)x + tε: target = ε − x.

    The target of flow matching and rectified flow. Their path is z/(α + σ), a rescaling of z.

    References:
        Lipman et al. (2022), Flow Matching for Generative Modeling, arXiv:2210.02747, Eq. 23;
        Liu et al. (2022), Flow Straight and Fast, arXiv:2209.03003, Eq. 1.

    Example:
        >>> FlowPrediction().eps_error_scale(torch.tensor([-2.0, 2.0]))
        tensor([0.0723, 0.5344])
    """

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Row (−1, 1)."""
        return -torch.ones_like(logsnr), torch.ones_like(logsnr)


@dataclass(frozen=True)
class ScorePrediction(Prediction):
    """The score of z given x: target = −ε/σ, whose posterior mean given z is ∇ log q(z).

    References:
        Song et al. (2020), Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Eq. 7.

    Example:
        >>> ScorePrediction().eps_error_scale(torch.tensor([-2.0, 2.0]))
        tensor([0.8808, 0.1192])
    """

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Row (0, −1/σ)."""
        _, sigma = alpha_sigma(logsnr)
        return torch.zeros_like(sigma), -1 / sigma


@dataclass(frozen=True)
class EDMPrediction(Prediction):
    """EDM's preconditioned output F, with R² = σ² + α² d²: target = (σx/d − αdε)/R.

    Input and target have unit variance at every λ if the data have standard deviation d. For
    d = 1 the target is −v. Use the same data_std in `EDMWeighting`.

    Args:
        data_std: Standard deviation d of the data, above 0; 0.5 for images on [−1, 1].

    Raises:
        ValueError: If data_std is not positive.

    References:
        Karras et al. (2022), Elucidating the Design Space of Diffusion-Based Generative Models,
        arXiv:2206.00364, Eq. 7 and table 1 (in variance-exploding coordinates z/α).

    Example:
        >>> EDMPrediction().eps_error_scale(torch.tensor([-2.0, 2.0]))
        tensor([0.0327, 0.6488])
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        check_finite(self, data_std=self.data_std)
        if not self.data_std > 0:
            raise ValueError(f"EDMPrediction: data_std must be above 0, got {self.data_std}.")

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Row (σ/(dR), −αd/R)."""
        alpha, sigma = alpha_sigma(logsnr)
        scale = self.input_scale(logsnr)
        return sigma / self.data_std * scale, -alpha * self.data_std * scale

    def input_scale(self, logsnr: Tensor) -> Tensor:
        """1/R, the reciprocal standard deviation of z."""
        alpha, sigma = alpha_sigma(logsnr)
        return torch.rsqrt(sigma**2 + (alpha * self.data_std) ** 2)


PREDICTIONS: Registry[Prediction] = Registry(Prediction)  # type: ignore[type-abstract]
