"""The laws of samplers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.denoisers import GaussianDenoiser
from lit_diffusion.gaussian import alpha_sigma
from lit_diffusion.samplers import Sampler
from lit_diffusion.schedules import LinearSchedule
from lit_diffusion.testing.laws import close, is_frozen, law

__all__ = ["check_sampler"]


def check_sampler(sampler: Sampler) -> None:
    """Check that a sampler maps noise to the distribution of the data, with its order.

    For Gaussian data and the exact denoiser the result is known: mean and standard deviation must
    be correct, and the error of the latter must decrease as steps^(−order). Seeds must reproduce
    samples, per batch and per example; float32 must stay finite; the denoiser must be called
    `calls` times.

    Args:
        sampler: The sampler, of any arguments; its steps and schedule are replaced.

    Raises:
        AssertionError: If a law is violated, with its name and the numbers.

    Example:
        >>> check_sampler(DDIMSampler())
    """
    law(isinstance(sampler, Sampler), sampler, "expected an instance of Sampler.")
    law(is_frozen(sampler), sampler, "a sampler is a frozen dataclass.")
    schedule = LinearSchedule(-8.0, 8.0)
    denoiser = GaussianDenoiser(std=0.5, mean=0.3)
    ends = torch.tensor([schedule.logsnr_min, schedule.logsnr_max], dtype=torch.float64)
    alpha, sigma = alpha_sigma(ends)
    std = torch.sqrt((alpha * denoiser.std) ** 2 + sigma**2)
    # The result is x̂ at the last level, whose distribution is slightly narrower than the data's.
    expected = float(alpha[1] * denoiser.std**2 / std[1])

    def sample(steps: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(steps)
        start = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        start = (start - start.mean()) / start.std(correction=0)  # no sampling error of its own
        own = dataclasses.replace(sampler, steps=steps, schedule=schedule)  # type: ignore[type-var]
        return own(denoiser, float(alpha[0]) * denoiser.mean + std[0] * start, generator)

    n = 100_000
    errors = []
    for steps in (17, 33, 65):
        x = sample(steps, n)
        errors.append(abs(float(x.std(correction=0)) / expected - 1))
        off = abs(float(x.mean()) - denoiser.mean)
        law(off < 0.02, sampler, f"the mean is correct: off by {off:.3g} at {steps} steps.")
    noise = 3 / math.sqrt(2 * n)  # three standard errors of a standard deviation of n samples
    if errors[-1] > noise:
        slope = math.log2((errors[0] + 1e-15) / errors[-1]) / 2
        law(
            slope >= sampler.order - 0.2,
            sampler,
            f"the error of the standard deviation decreases with order {sampler.order}: "
            f"{errors} at 17, 33, 65 steps is order {slope:.2f}.",
        )
    law(errors[-1] < 0.2, sampler, f"the standard deviation is correct: off by {errors[-1]:.3g}.")

    short = dataclasses.replace(sampler, steps=5, schedule=schedule)  # type: ignore[type-var]
    z = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))

    def seeded(first: int, last: int) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(first, last)]
        return short(denoiser, z[first:last], generators)

    whole = seeded(0, 4)
    law(bool(whole.isfinite().all()), sampler, "float32 stays finite.")
    law(whole.dtype == torch.float32, sampler, f"float32 stays float32, got {whole.dtype}.")
    law(torch.equal(seeded(0, 4), whole), sampler, "the same seeds give the same samples.")
    halves = torch.cat([seeded(0, 2), seeded(2, 4)])
    law(close(halves, whole, 1e-6), sampler, "a sample depends on its own seed only.")
    for steps in (1, 5):
        own = dataclasses.replace(short, steps=steps)  # type: ignore[type-var]
        calls = _count_calls(own, z)
        law(
            calls == own.calls,
            sampler,
            f"it calls the denoiser `calls` times: {own.calls} at {steps} steps, got {calls}.",
        )


def _count_calls(sampler: Sampler, z: Tensor) -> int:
    calls = 0
    exact = GaussianDenoiser()

    def counted(z: Tensor, logsnr: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return exact(z, logsnr)

    sampler(counted, z)
    return calls
