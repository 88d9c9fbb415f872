"""The weightings that are a formula in λ.

Letters: logsnr = λ, w the weight; see `weightings.base` for the convention. Where the formula
contains the density of a schedule, constant factors are dropped, since they only scale the loss.
Losses under the density of any schedule are in `weightings.density` and `weightings.snr`, and the
weightings that exist for a discrete chain only in `weightings.chain`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.domains import check_finite
from lit_diffusion.weightings.base import Weighting

__all__ = [
    "EDMWeighting",
    "ELBOWeighting",
    "ExponentialWeighting",
    "InDIWeighting",
    "SechWeighting",
    "SigmoidWeighting",
]


def _sech(u: Tensor) -> Tensor:
    return 1 / torch.cosh(u)


def _normal(logsnr: Tensor, mean: float, std: float) -> Tensor:
    scale = 1 / (std * math.sqrt(2 * math.pi))
    return scale * torch.exp(-0.5 * ((logsnr - mean) / std) ** 2)


class ELBOWeighting(Weighting):
    """The likelihood: w(λ) = 1.

    The loss is then the diffusion term of the variational bound, in nats: the choice for
    compression and density estimation. Most of it is due to detail that the eye cannot see.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, Eq. 17.

    Example:
        >>> ELBOWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([1., 1., 1.])
    """

    def forward(self, logsnr: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(logsnr)


class SechWeighting(Weighting):
    """The ε-loss under a cosine schedule: w(λ) = sech(λ/2).

    The objective of improved DDPM and most ε-models. Not monotone: it decreases at high noise,
    too.

    References:
        Nichol & Dhariwal (2021), Improved DDPM, arXiv:2102.09672;
        Kingma & Gao (2023), arXiv:2303.00848, table 1.

    Example:
        >>> SechWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.6481, 1.0000, 0.6481])
    """

    def forward(self, logsnr: Tensor) -> Tensor:
        """sech(λ/2)."""
        return _sech(logsnr / 2)


class ExponentialWeighting(Weighting):
    """The v-loss under a cosine schedule, and flow matching: w(λ) = e^(−λ/2).

    These two objectives are the same: they differ only in what the network outputs and in the
    density of λ. Monotone.

    References:
        Salimans & Ho (2022), arXiv:2202.00512; Lipman et al. (2022), arXiv:2210.02747;
        Kingma & Gao (2023), arXiv:2303.00848, table 1.

    Example:
        >>> ExponentialWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([2.7183, 1.0000, 0.3679])
    """

    def forward(self, logsnr: Tensor) -> Tensor:
        """e^(−λ/2)."""
        return torch.exp(-logsnr / 2)


class InDIWeighting(Weighting):
    """The x-loss on the flow path with uniform t: w(λ) = e^(−λ) sech²(λ/4).

    Regression on the clean image from every degree of degradation (inversion by direct iteration).

    References:
        Delbracio & Milanfar (2023), Inversion by Direct Iteration, arXiv:2303.11435;
        Kingma & Gao (2023), arXiv:2303.00848, table 1.

    Example:
        >>> InDIWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([5.8111, 1.0000, 0.1064])
    """

    def forward(self, logsnr: Tensor) -> Tensor:
        """e^(−λ) sech²(λ/4)."""
        return torch.exp(-logsnr) * _sech(logsnr / 4) ** 2


class EDMWeighting(Weighting):
    """EDM's loss: w(λ) = N(λ; mean, std²) (e^(−λ) + data_std²).

    EDM's loss on F, whose weight is one at initialisation, under its normal density. With the
    defaults it increases below λ = −3.31; `MonotoneWeighting(EDMWeighting())` is the monotone
    variant.

    Args:
        data_std: Standard deviation of the data, above 0; the same as in `EDMPrediction`.
        mean: Mean of λ in EDM's training density.
        std: Standard deviation of λ in EDM's training density, above 0.

    Raises:
        ValueError: If data_std or std is not positive.

    References:
        Karras et al. (2022), Elucidating the Design Space of Diffusion-Based Generative Models,
        arXiv:2206.00364, table 1; Kingma & Gao (2023), arXiv:2303.00848, table 1.

    Example:
        >>> EDMWeighting()(torch.tensor([-3.308, 0.0, 2.4]))
        tensor([0.2710, 0.1260, 0.0566])
    """

    def __init__(self, data_std: float = 0.5, mean: float = 2.4, std: float = 2.4) -> None:
        super().__init__()
        check_finite(self, data_std=data_std, mean=mean, std=std)
        if not (data_std > 0 and std > 0):
            raise ValueError(
                f"EDMWeighting: data_std and std must be above 0, got {data_std} and {std}."
            )
        self.data_std = data_std
        self.mean = mean
        self.std = std

    def forward(self, logsnr: Tensor) -> Tensor:
        """N(λ; mean, std²) (e^(−λ) + data_std²)."""
        return _normal(logsnr, self.mean, self.std) * (torch.exp(-logsnr) + self.data_std**2)


class SigmoidWeighting(Weighting):
    """Sigmoid: w(λ) = sigmoid(bias − λ).

    It approaches 1 at high noise and e^(bias − λ) at low noise, so capacity is not spent on
    invisible detail. Monotone: the ELBO of images with noise added at λ ~ Logistic(bias, 1).

    Args:
        bias: λ at which the weight is one half; 2 was best on ImageNet 64.

    References:
        Kingma & Gao (2023), arXiv:2303.00848, section 5; Hoogeboom et al. (2024), Simpler
        Diffusion, arXiv:2410.19324 (there as a weight on the error of x).

    Example:
        >>> SigmoidWeighting(bias=0.0)(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.8808, 0.5000, 0.1192])
    """

    def __init__(self, bias: float = 2.0) -> None:
        super().__init__()
        check_finite(self, bias=bias)
        self.bias = bias

    def forward(self, logsnr: Tensor) -> Tensor:
        """sigmoid(bias − λ)."""
        return torch.sigmoid(self.bias - logsnr)
