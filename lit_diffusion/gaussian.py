"""The Gaussian diffusion process that turns data into noise.

Letters: x data, z noisy data, eps = ε standard normal noise, logsnr = λ. B is the batch, * the
shape of one example; data are (B, *), λ is (B,).

The whole library uses one parameterisation, the variance-preserving one::

    z = α(λ) x + σ(λ) ε      α² = sigmoid(λ)      σ² = sigmoid(−λ)      λ = log α²/σ²

λ, the log signal-to-noise ratio, is the only measure of the noise level: high λ is clean data, low
λ is noise. Every other Gaussian process in the literature is this one with z rescaled:

    variance exploding, EDM    z / α                = x + e^(−λ/2) ε
    flow matching              z / (α + σ)          = (1 − t) x + t ε    with λ = 2 log((1 − t)/t)

A known rescaling changes neither what a denoiser can infer nor any loss on ε, so one process
class is enough.

For a cleaner level s and a noisier level t (λ_s > λ_t), with c = 1 − e^(λ_t − λ_s), Bayes' rule
gives the posterior that ancestral sampling follows::

    q(z_s | z_t, x) = N( α_s ( (1 − c) z_t / α_t + c x ),  σ_s² c )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.exact import at_least_float32

__all__ = [
    "Generators",
    "alpha_sigma",
    "broadcast_to_data",
    "diffuse",
    "noise_like",
    "posterior",
    "prior_kl",
]

Generators = torch.Generator | Sequence[torch.Generator] | None
"""None for the global generator, one generator for the batch, or one per example."""


def broadcast_to_data(coefficient: Tensor, like: Tensor) -> Tensor:
    """Reshape one coefficient per example to broadcast over the data: (B,) → (B, 1, …, 1).

    All broadcasting is done here. The result has the data's dtype, but at least float32: bfloat16
    distinguishes only 190 of 1000 noise levels.

    Args:
        coefficient: One number per example, or one for all.
        like: The data to be multiplied.

    Shapes:
        coefficient (B,) or (); like (B, *); result (B, 1, …, 1), as many axes as `like`.

    Raises:
        ValueError: If there is not one coefficient per example.

    Example:
        >>> broadcast_to_data(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 4, 5)).shape
        torch.Size([2, 1, 1, 1])
    """
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and len(coefficient) != len(like)):
        raise ValueError(
            f"Expected one coefficient per example, shape ({len(like)},), for data of shape "
            f"{tuple(like.shape)}; got shape {tuple(coefficient.shape)}."
        )
    coefficient = coefficient.to(torch.promote_types(like.dtype, torch.float32))
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the data and of the noise at λ: α = √sigmoid(λ), σ = √sigmoid(−λ).

    Args:
        logsnr: λ, any real number.

    Shapes:
        logsnr (B,); both results (B,), float32 or better.

    Example:
        >>> alpha, sigma = alpha_sigma(torch.tensor([-2.0, 0.0, 2.0]))
        >>> alpha
        tensor([0.3453, 0.7071, 0.9385])
        >>> alpha**2 + sigma**2
        tensor([1.0000, 1.0000, 1.0000])
    """
    logsnr = at_least_float32(logsnr)
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def diffuse(x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """Noisy data at λ: z = α(λ) x + σ(λ) ε.

    Args:
        x: Data.
        eps: Standard normal noise.
        logsnr: λ of each example.

    Shapes:
        x and eps (B, *); logsnr (B,); result (B, *).

    Example:
        >>> diffuse(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([20.0, -20.0]))
        tensor([[1.0000e+00],
                [4.5400e-05]])
    """
    alpha, sigma = alpha_sigma(logsnr)
    return broadcast_to_data(alpha, x) * x + broadcast_to_data(sigma, x) * eps


def posterior(z: Tensor, x: Tensor, logsnr: Tensor, logsnr_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z_s | z_t, x), one step from noise towards data.

    mean = α_s((1 − c) z/α_t + c x), std = σ_s √c, c = 1 − e^(λ_t − λ_s). At the noise levels of
    DDPM the mean is its μ̃ and std² its β̃.

    Args:
        z: Noisy data at the noisier level t.
        x: Clean data, or an estimate of it.
        logsnr: λ_t.
        logsnr_next: λ_s ≥ λ_t.

    Shapes:
        z and x (B, *); logsnr and logsnr_next (B,); mean (B, *); std (B, 1, …, 1).

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Eq. 6-7;
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, Eq. 25-26.

    Example:
        >>> levels = torch.tensor([0.0]), torch.tensor([2.0])
        >>> mean, std = posterior(torch.ones(1, 1), torch.zeros(1, 1), *levels)
        >>> mean, std
        (tensor([[0.1796]]), tensor([[0.3210]]))
    """
    alpha, _ = alpha_sigma(logsnr)
    alpha_next, sigma_next = alpha_sigma(logsnr_next)
    c = -torch.expm1(logsnr - logsnr_next)
    mean = (
        broadcast_to_data(alpha_next * (1 - c) / alpha, z) * z
        + broadcast_to_data(alpha_next * c, z) * x
    )
    return mean, broadcast_to_data(sigma_next * c.sqrt(), z)


def prior_kl(x: Tensor, logsnr: Tensor) -> Tensor:
    """The prior term of the bound: KL(q(z|x) ‖ N(0, I)) = ½ mean(α²x² + σ² − log σ² − 1).

    It is in nats per dimension and measures what z at λ still reveals about x, which a sampler
    that starts from pure noise neglects.

    Args:
        x: Data.
        logsnr: λ of each example, usually the smallest λ of the process.

    Shapes:
        x (B, *); logsnr (B,); result (B,), float64.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, Eq. 11.

    Example:
        >>> prior_kl(torch.full((1, 4), 0.5), torch.tensor([-5.0]))
        tensor([0.0008], dtype=torch.float64)
    """
    logsnr = logsnr.to(torch.float64)
    mean_square = x.to(torch.float64).square().flatten(1).mean(1)
    # −log σ² = softplus(λ) and σ² − 1 = −α²: the only difference of nearly equal numbers left is
    # softplus(λ) − α² ≈ α⁴/2, for which float64 is accurate enough.
    alpha_squared = torch.sigmoid(logsnr)
    softplus = torch.nn.functional.softplus(logsnr)
    return 0.5 * (alpha_squared * mean_square + softplus - alpha_squared)


def noise_like(z: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise with the shape of z.

    With one generator per example, the noise of each example depends on its own seed only, so the
    samples do not depend on the batch size or the number of devices.

    Args:
        z: Tensor that gives shape, dtype and device.
        generator: None, one generator, or a sequence of B generators on one device; the device
            may differ from that of z.

    Shapes:
        z (B, *); result (B, *).

    Raises:
        ValueError: If a sequence does not have B generators.

    Example:
        >>> generators = [torch.Generator().manual_seed(i) for i in range(3)]
        >>> a = noise_like(torch.zeros(3, 2), generators)
        >>> b = noise_like(torch.zeros(1, 2), [torch.Generator().manual_seed(2)])
        >>> torch.equal(a[2:], b)
        True
    """
    if generator is None:
        return torch.randn_like(z)
    if isinstance(generator, torch.Generator):
        return torch.randn(
            z.shape, generator=generator, dtype=z.dtype, device=generator.device
        ).to(z.device)
    if len(generator) != len(z):
        raise ValueError(
            f"Expected one generator for each of the {len(z)} examples, got {len(generator)}."
        )
    like: dict[str, Any] = {"dtype": z.dtype, "device": generator[0].device}
    rows = [torch.randn(z.shape[1:], generator=each, **like) for each in generator]
    return torch.stack(rows).to(z.device)  # one copy: each may wait for the device
