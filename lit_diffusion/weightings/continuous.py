"""The weightings in continuous time: the w(λ) of each published objective.

Letters: logsnr = λ, w the weight; see `weightings.base` for the convention. To convert a published
loss to a weighting, divide its weight on its own target by `Prediction.eps_error_scale` and
multiply by the density p(λ) from which it samples; constant factors are dropped here, since they
only scale the loss. In particular an unweighted ε-loss under the density p has w = p
(`DensityWeighting`). The weightings that exist for a discrete chain only are in
`weightings.chain`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.weightings.base import Weighting

__all__ = [
    "EDMWeighting",
    "ELBOWeighting",
    "ExponentialWeighting",
    "InDIWeighting",
    "MinSNRWeighting",
    "P2Weighting",
    "SechWeighting",
    "SigmoidWeighting",
    "SoftMinSNRWeighting",
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


class P2Weighting(Weighting):
    """Perception-prioritised, cosine schedule: w(λ) = sech(λ/2) / (1 + e^λ)^gamma.

    Reduces the weight at the clean end, where errors are invisible.

    Args:
        gamma: Strength, 0 or more; the paper uses 0.5 and 1.

    Raises:
        ValueError: If gamma is negative.

    References:
        Choi et al. (2022), Perception Prioritized Training of Diffusion Models,
        arXiv:2204.00227, Eq. 8 (k = 1).

    Example:
        >>> P2Weighting(gamma=1.0)(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.5708, 0.5000, 0.0772])
    """

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"P2Weighting: gamma must be 0 or more, got {gamma}.")
        self.gamma = gamma

    def forward(self, logsnr: Tensor) -> Tensor:
        """sech(λ/2) sigmoid(−λ)^gamma."""
        return _sech(logsnr / 2) * torch.sigmoid(-logsnr) ** self.gamma


class MinSNRWeighting(Weighting):
    """Min-SNR, cosine schedule: w(λ) = sech(λ/2) min(1, gamma e^(−λ)).

    The ε-loss with its weight on x clamped at gamma, so that clean levels do not dominate. As w is
    always the weight on ε, it is the same for every prediction.

    Args:
        gamma: Largest weight on the error of x, above 0.

    Raises:
        ValueError: If gamma is not positive.

    References:
        Hang et al. (2023), Efficient Diffusion Training via Min-SNR Weighting Strategy,
        arXiv:2303.09556, section 3.4.

    Example:
        >>> MinSNRWeighting(gamma=5.0)(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.6481, 1.0000, 0.4385])
    """

    def __init__(self, gamma: float = 5.0) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"MinSNRWeighting: gamma must be above 0, got {gamma}.")
        self.gamma = gamma

    def forward(self, logsnr: Tensor) -> Tensor:
        """sech(λ/2) min(1, gamma e^(−λ))."""
        return _sech(logsnr / 2) * torch.clamp(self.gamma * torch.exp(-logsnr), max=1)


class SoftMinSNRWeighting(Weighting):
    """Soft Min-SNR, EDM's density: w(λ) = N(λ; mean, std²) sigmoid(ln gamma − λ).

    A smooth version of Min-SNR: the weight on x is SNR·gamma/(SNR + gamma).

    Args:
        gamma: Value at which the weight on x saturates, above 0; 1/data_std², 4 for images.
        mean: Mean of λ in the training density.
        std: Standard deviation of λ in the training density, above 0.

    Raises:
        ValueError: If gamma or std is not positive.

    References:
        Crowson et al. (2024), Scalable High-Resolution Pixel-Space Image Synthesis with
        Hourglass Diffusion Transformers, arXiv:2401.11605, section 4.5.

    Example:
        >>> SoftMinSNRWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.0299, 0.0807, 0.0576])
    """

    def __init__(self, gamma: float = 4.0, mean: float = 2.4, std: float = 2.4) -> None:
        super().__init__()
        if not (gamma > 0 and std > 0):
            raise ValueError(
                f"SoftMinSNRWeighting: gamma and std must be above 0, got {gamma} and {std}."
            )
        self.gamma = gamma
        self.mean = mean
        self.std = std

    def forward(self, logsnr: Tensor) -> Tensor:
        """N(λ; mean, std²) sigmoid(ln gamma − λ)."""
        return _normal(logsnr, self.mean, self.std) * torch.sigmoid(math.log(self.gamma) - logsnr)


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
        self.bias = bias

    def forward(self, logsnr: Tensor) -> Tensor:
        """sigmoid(bias − λ)."""
        return torch.sigmoid(self.bias - logsnr)
