"""The laws of decoders."""

from __future__ import annotations

import math

import torch

from lit_diffusion.decoders import Decoder
from lit_diffusion.denoisers import GaussianDenoiser
from lit_diffusion.grey_levels import level_values
from lit_diffusion.testing.laws import close, is_frozen, law

__all__ = ["check_decoder"]


def check_decoder(decoder: Decoder) -> None:
    """Check that a decoder is a distribution of each value of x given z.

    It sums to one over its levels, or integrates to one as a density, at every λ; log p is finite
    for every z; the cost decreases with λ and is differentiable in λ, which a learned schedule
    needs; an example does not depend on the rest of the batch.

    Args:
        decoder: The decoder, of any arguments.

    Raises:
        AssertionError: If a law is violated, with its name and the numbers.

    Example:
        >>> check_decoder(SoftmaxDecoder(levels=17))
    """
    law(isinstance(decoder, Decoder), decoder, "expected an instance of Decoder.")
    law(is_frozen(decoder), decoder, "a decoder is a frozen dataclass.")
    levels = getattr(decoder, "levels", None)
    discrete = levels is not None
    denoiser = GaussianDenoiser(std=0.5)
    for level in (-5.0, 0.0, 5.0, 10.0):
        # One row per z; along it every value that x can take.
        z = torch.tensor([-1.5, -0.2, 0.0, 0.9], dtype=torch.float64)
        logsnr = torch.full((len(z),), level, dtype=torch.float64)
        reach = 12 * math.exp(-level / 2)
        values = torch.linspace(-6 - reach, 6 + reach, 100_001, dtype=torch.float64)
        if discrete:
            values = level_values(levels)
        x = values.expand(len(z), -1)
        log_prob = decoder.log_prob(x, z[:, None].expand_as(x), logsnr, denoiser)
        law(bool(log_prob.isfinite().all()), decoder, f"log p is finite at λ = {level}.")
        total = log_prob.exp().sum(1) if discrete else torch.trapezoid(log_prob.exp(), values)
        worst = float((total - 1).abs().max())
        law(worst < 1e-6, decoder, f"p(x|z) adds up to 1 at λ = {level}, off by {worst:.3g}.")

    # Four different sizes, so that a coefficient on the wrong axis is noticed.
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(2, 3, 4, 5, generator=generator)
    x = 0.5 * torch.randn(2, 3, 4, 5, generator=generator)
    if discrete:
        values = level_values(levels).float()
        x = values[torch.randint(len(values), (2, 3, 4, 5), generator=generator)]
    decoder.check(x)
    logsnr = torch.tensor([2.0, 12.0], dtype=torch.float64, requires_grad=True)
    cost = decoder.reconstruction(denoiser, x, logsnr, eps)
    law(cost.shape == (2,), decoder, f"one cost for each example, got {tuple(cost.shape)}.")
    law(bool(cost[1] < cost[0]), decoder, f"a higher λ costs less, got {cost.tolist()}.")
    (slope,) = torch.autograd.grad(cost.sum(), logsnr)
    law(bool(slope.isfinite().all()), decoder, "the cost has finite gradients in λ.")
    alone = decoder.reconstruction(denoiser, x[:1], logsnr[:1], eps[:1])
    law(close(alone, cost[:1], 1e-5), decoder, "an example does not depend on the batch.")
