"""Decoders: the distribution p(x | z) of the data given the cleanest z.

The last term of the bound is −E log p(x | z) at λ_max, the cost of encoding the exact data when z
is known. It is negligible at high λ but can be large at low λ: 1.8 bits per dimension at λ = 10
for 256 levels. The choice of p is part of the result, so each choice has a name here.

Letters: x data (B, *), z noisy data at λ (B,); v_k the levels of discrete data.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.domains import check_finite
from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data, diffuse
from lit_diffusion.grey_levels import Levels, level_borders, level_index, level_values
from lit_diffusion.predictions import Denoised
from lit_diffusion.registry import Registry

__all__ = [
    "DECODERS",
    "Decoder",
    "DiscretizedGaussianDecoder",
    "GaussianDecoder",
    "SoftmaxDecoder",
]


class Decoder(ABC):
    """The distribution p(x | z) of the data given the cleanest z.

    A subclass is a frozen dataclass that defines `log_prob`; for discrete data it has a field
    `levels`.

    Example:
        >>> round(SoftmaxDecoder(levels=256).cost(13.3), 4)  # bits per dimension
        0.01
    """

    @abstractmethod
    def log_prob(
        self, x: Tensor, z: Tensor, logsnr: Tensor, denoise: Callable[..., Denoised]
    ) -> Tensor:
        """Log p(x_i | z) of each dimension of the data.

        Args:
            x: Data.
            z: Noisy data at λ.
            logsnr: λ of each example.
            denoise: Called as denoise(z, logsnr) by decoders that use the network.

        Shapes:
            x and z (B, *); logsnr (B,); result (B, *), float32 or better.
        """

    def __post_init__(self) -> None:
        """Reject invalid levels here and not at their first use."""
        levels = getattr(self, "levels", None)
        if isinstance(levels, list):
            object.__setattr__(self, "levels", tuple(levels))  # hashable, for the caches
        if levels is not None:
            try:
                level_values(self.levels)  # type: ignore[attr-defined]
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: {error}") from error

    def check(self, x: Tensor) -> None:
        """Check that the data are of the kind that this decoder describes.

        Args:
            x: Data.

        Raises:
            ValueError: If they are not on the grid of levels.
        """
        levels = getattr(self, "levels", None)
        if levels is not None:
            level_index(x, levels)

    def reconstruction(
        self,
        denoiser: Callable[..., Denoised],
        x: Tensor,
        logsnr: Tensor,
        eps: Tensor,
        **cond: Any,
    ) -> Tensor:
        """The reconstruction term of the bound, −log p(x | αx + σε), in nats per dimension.

        Args:
            denoiser: Called as denoiser(z, logsnr, **cond).
            x: Data.
            logsnr: λ of each example.
            eps: Noise.
            **cond: Passed on to the denoiser.

        Shapes:
            x and eps (B, *); logsnr (B,); result (B,).
        """

        def denoise(z: Tensor, logsnr: Tensor) -> Denoised:
            return denoiser(z, logsnr, **cond)

        log_prob = self.log_prob(x, diffuse(x, eps, logsnr), logsnr, denoise)
        return -log_prob.flatten(1).mean(1)

    def cost(self, logsnr: float) -> float:
        """Bits per dimension of the reconstruction at λ, assuming equally frequent levels.

        A decoder that uses the network is given the estimate x̂ = z/α instead.

        Args:
            logsnr: λ.

        Raises:
            TypeError: If the decoder has no levels: a density has no cost in bits.
        """
        if not hasattr(self, "levels"):
            raise TypeError(f"{type(self).__name__} is a density and has no cost in bits.")
        return _cost(self, float(logsnr))

    def warn_if_costly(self, logsnr: float) -> None:
        """Warn if λ_max is too low to distinguish the levels: above 1 bit per dimension.

        Args:
            logsnr: λ_max.
        """
        if hasattr(self, "levels") and (bits := self.cost(logsnr)) > 1:
            # Four times the SNR for each bit, and a margin.
            enough = logsnr + 2 * math.log(2) * bits + 0.8
            warnings.warn(
                f"logsnr_max={logsnr:.4g} is too low for levels={self.levels!r:.40}: the "
                f"reconstruction alone costs about {bits:.2f} bits per dimension; "
                f"at {enough:.4g} it would be {self.cost(enough):.2g}.",
                stacklevel=3,
            )


@lru_cache(maxsize=64)
def _cost(decoder: Any, logsnr: float) -> float:
    values = level_values(decoder.levels)
    noise = torch.linspace(-9, 9, 361, dtype=torch.float64)  # the cost comes from rare large noise
    weight = torch.softmax(-0.5 * noise**2, 0)
    x = values.expand(len(noise), -1)
    levels = torch.full((len(noise),), logsnr, dtype=torch.float64)

    def plain(z: Tensor, logsnr: Tensor) -> Denoised:
        return Denoised(z / broadcast_to_data(alpha_sigma(logsnr)[0], z), torch.zeros_like(z))

    eps = noise[:, None].expand_as(x)
    return float(weight @ decoder.reconstruction(plain, x, levels, eps)) / math.log(2)


@dataclass(frozen=True)
class SoftmaxDecoder(Decoder):
    """VDM's decoder: p(x = v_k | z) = softmax_k(−½ e^λ (z/α − v_k)²).

    The posterior by Bayes' rule if all levels are equally likely and the dimensions independent.
    It needs no network and becomes exact as λ grows.

    Args:
        levels: Number of levels (see `level_values`), or their values.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, section 3.3.

    Example:
        >>> x, z = torch.tensor([[-1.0, 1.0]]), torch.tensor([[-0.5, -0.5]])
        >>> SoftmaxDecoder(levels=2).log_prob(x, z, torch.zeros(1), None)
        tensor([[-0.2176, -1.6318]])
    """

    levels: Levels = 256

    def log_prob(
        self, x: Tensor, z: Tensor, logsnr: Tensor, denoise: Callable[..., Denoised]
    ) -> Tensor:
        """Log softmax at the level of x."""
        alpha, _ = alpha_sigma(logsnr)
        centre = (z / broadcast_to_data(alpha, z)).flatten()
        sharpness = broadcast_to_data(torch.exp(logsnr / 2), z).expand_as(z).flatten()
        index = level_index(x, self.levels, check=False).flatten()
        values = level_values(self.levels).to(centre.device, centre.dtype)
        found = []
        size = max(1, 2**22 // len(values))  # in parts: there are L logits for each number
        for c, s, k in zip(
            *(part.split(size) for part in (centre, sharpness, index)), strict=True
        ):
            logits = -0.5 * (s[:, None] * (c[:, None] - values)) ** 2
            found.append(torch.log_softmax(logits, -1).gather(-1, k[:, None])[:, 0])
        return torch.cat(found).reshape(x.shape)


@dataclass(frozen=True)
class DiscretizedGaussianDecoder(Decoder):
    """DDPM's decoder: p(x = v_k | z) = ∫ N(u; x̂(z), std²) du over the bin of v_k.

    Bins extend halfway to the neighbouring levels, the first and the last to infinity. The mean is
    the network's x̂, so the last step is learned as well.

    Args:
        levels: Number of levels (see `level_values`), or their values.
        std: Standard deviation, above 0; None means e^(−λ/2), which on DDPM's table is √β₁.

    Raises:
        ValueError: If std is not positive.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Eq. 13.

    Example:
        >>> DiscretizedGaussianDecoder(levels=2).log_prob(
        ...     torch.tensor([[-1.0, 1.0]]),
        ...     torch.tensor([[-0.5, -0.5]]),
        ...     torch.zeros(1),
        ...     GaussianDenoiser(std=1.0),
        ... )
        tensor([[-0.4492, -1.0166]])
    """

    levels: Levels = 256
    std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, std=self.std)
        if self.std is not None and not self.std > 0:
            raise ValueError(f"DiscretizedGaussianDecoder: std must be above 0, got {self.std}.")

    def log_prob(
        self, x: Tensor, z: Tensor, logsnr: Tensor, denoise: Callable[..., Denoised]
    ) -> Tensor:
        """Log of the integral over the bin of x."""
        mean = denoise(z, logsnr).x
        std = torch.exp(-logsnr / 2) if self.std is None else torch.full_like(logsnr, self.std)
        index = level_index(x, self.levels, check=False)
        borders = level_borders(self.levels).to(mean.device, mean.dtype)
        last = len(borders)
        low = (borders[(index - 1).clamp(min=0)] - mean) / broadcast_to_data(std, z)
        high = (borders[index.clamp(max=last - 1)] - mean) / broadcast_to_data(std, z)
        low = torch.where(index == 0, torch.full_like(low, -math.inf), low)
        high = torch.where(index == last, torch.full_like(high, math.inf), high)
        # Φ(high) − Φ(low), computed in the tail where both are small, to avoid cancellation.
        mirrored = low > 0
        low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
        log_high = torch.special.log_ndtr(high)
        return log_high + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - log_high))


@dataclass(frozen=True)
class GaussianDecoder(Decoder):
    """The decoder of continuous data: p(x | z) = N(x; z/α, e^(−λ)).

    A density, for data that were never quantised; it approaches the true one as λ grows. The bound
    depends on the unit of x and may be negative.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, section 3.3 (the
        limit of their decoder for ever finer levels).

    Example:
        >>> GaussianDecoder().log_prob(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), None)
        tensor([[-0.9189]])
    """

    def log_prob(
        self, x: Tensor, z: Tensor, logsnr: Tensor, denoise: Callable[..., Denoised]
    ) -> Tensor:
        """Log density."""
        alpha, _ = alpha_sigma(logsnr)
        distance = broadcast_to_data(torch.exp(logsnr / 2), z) * (
            x - z / broadcast_to_data(alpha, z)
        )
        return broadcast_to_data(logsnr / 2, z) - 0.5 * (distance**2 + math.log(2 * math.pi))


DECODERS: Registry[Decoder] = Registry(Decoder)  # type: ignore[type-abstract]
