"""Samplers: from noise back to data.

Letters: z noisy data (B, *), logsnr = λ; a step goes from λ to logsnr_next > λ.

A sampler walks up the levels of a noise schedule. Each step asks the denoiser for (x̂, ε̂) and
moves z to the next level; at the last level the answer is x̂ itself. The schedule it walks is its
own: how λ was drawn in training and how it is walked afterwards are unrelated choices.

A leaf gives one `step`; the loop is written once. `steps` counts levels, so a first-order
sampler calls the network `steps` times (DDPM's 1000, EDM's 18 → 35 for the second order).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_diffusion.gaussian import Generators, alpha_sigma, expand, noise_like, posterior
from lit_diffusion.noise_schedule import NoiseSchedule
from lit_diffusion.predictions import Denoised
from lit_diffusion.registry import Registry
from lit_diffusion.schedules import CosineSchedule

__all__ = ["SAMPLERS", "AncestralSampler", "DDIMSampler", "Sampler"]

Ask = Callable[..., Denoised]


class Sampler(ABC):
    """A walk from noise to data: z at low λ → x̂ at high λ.

    A leaf is a frozen dataclass with the fields `steps` and `schedule` (and its own), names its
    `order` of convergence, and gives `step`.

    Example:
        >>> z = torch.randn(1000, 4)
        >>> x = DDIMSampler(steps=100)(GaussianDenoiser(std=0.5), z)
        >>> abs(float(x.std() / z.std()) - 0.5) < 0.02
        True
    """

    order: ClassVar[int]
    steps: int
    schedule: NoiseSchedule | None

    @abstractmethod
    def step(
        self,
        denoiser: Ask,
        z: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        memory: Any,
        generator: Generators,
    ) -> tuple[Tensor, Any]:
        """Move z from λ to logsnr_next.

        Args:
            denoiser: Called as denoiser(z, logsnr); conditions are bound already.
            z: Noisy data at λ.
            logsnr: λ of each example.
            logsnr_next: The next, higher, level of each example.
            memory: What the last step returned as its memory; None at the first step.
            generator: For `noise_like`, if the step adds noise.

        Shapes:
            z (B, *); logsnr and logsnr_next (B,); the new z (B, *).
        """

    def levels(self) -> Tensor:
        """The noise levels that are visited, from noise to data.

        Shapes:
            result (steps,), float64, increasing.

        Example:
            >>> DDIMSampler(steps=3, schedule=LinearSchedule(-4.0, 4.0)).levels()
            tensor([-4.,  0.,  4.], dtype=torch.float64)
        """
        if self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, got steps={self.steps}.")
        schedule = CosineSchedule() if self.schedule is None else self.schedule
        with torch.no_grad():
            return schedule.logsnr(torch.linspace(1, 0, self.steps, dtype=torch.float64))

    def __call__(
        self,
        denoiser: Ask,
        z: Tensor,
        generator: Generators = None,
        progress: Callable[[Any], Any] = iter,
        **cond: Any,
    ) -> Tensor:
        """Walk from z, noise at the first level, to data.

        Args:
            denoiser: Called as denoiser(z, logsnr, **cond).
            z: Where to start: standard normal noise.
            generator: Source of noise for stochastic samplers: None, one, or one per example.
            progress: Wraps the list of steps, such as tqdm.
            **cond: Handed to the denoiser.

        Shapes:
            z (B, *); result x̂ (B, *).
        """

        def ask(z: Tensor, logsnr: Tensor) -> Denoised:
            return denoiser(z, logsnr, **cond)

        levels = [level.to(z.device).expand(len(z)) for level in self.levels()]
        memory = None
        for logsnr, logsnr_next in progress([*pairwise(levels), (levels[-1], None)]):
            if logsnr_next is None:
                z = ask(z, logsnr).x
            else:
                z, memory = self.step(ask, z, logsnr, logsnr_next, memory, generator)
        return z


@dataclass(frozen=True)
class AncestralSampler(Sampler):
    """Draws each level from the posterior of the one before: z_s ~ q(z_s | z_t, x = x̂).

    The sampler of DDPM and VDM. Forgiving of a denoiser's errors, because fresh noise covers
    them. Its variance is biased low at few steps, so the originals take hundreds; small images
    are fine with 50.

    Args:
        steps: Number of network calls, at least 1.
        schedule: The levels to walk; None means cosine over the trained range.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239,
        algorithm 2; Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, Eq. 34.

    Example:
        >>> sampler = AncestralSampler(steps=250)
        >>> x = sampler(GaussianDenoiser(std=0.5), torch.randn(1000, 4))
        >>> abs(float(x.std()) - 0.5) < 0.03
        True
    """

    order: ClassVar[int] = 1
    steps: int = 250
    schedule: NoiseSchedule | None = None

    def step(
        self,
        denoiser: Ask,
        z: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        memory: Any,
        generator: Generators,
    ) -> tuple[Tensor, Any]:
        """Move: z ← mean + std·noise of the posterior."""
        mean, std = posterior(z, denoiser(z, logsnr).x, logsnr, logsnr_next)
        return mean + std * noise_like(z, generator), memory


@dataclass(frozen=True)
class DDIMSampler(Sampler):
    """Keeps x̂ and ε̂ and changes their proportions: z_s = α_s x̂ + √(σ_s² − η²v) ε̂ + η√v n.

    With η = 0 it is deterministic: Euler's method on the probability-flow ODE, good at 20 to
    100 steps, and the image is a function of the starting noise. v is the posterior's variance,
    so η = 1 is the ancestral sampler.

    Args:
        steps: Number of network calls, at least 1.
        schedule: The levels to walk; None means cosine over the trained range.
        eta: Share of fresh noise η, from 0 to 1.

    Raises:
        ValueError: If eta is outside [0, 1].

    References:
        Song et al. (2020), Denoising Diffusion Implicit Models, arXiv:2010.02502, Eq. 12.

    Example:
        >>> z = torch.randn(1000, 4)
        >>> x = DDIMSampler(steps=50)(GaussianDenoiser(std=0.5), z)
        >>> abs(float(x.std() / z.std()) - 0.5) < 0.03
        True
    """

    order: ClassVar[int] = 1
    steps: int = 50
    schedule: NoiseSchedule | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIMSampler: eta must be in [0, 1], got {self.eta}.")

    def step(
        self,
        denoiser: Ask,
        z: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        memory: Any,
        generator: Generators,
    ) -> tuple[Tensor, Any]:
        """Move: z ← α_s x̂ + √(σ_s² − η²v) ε̂ + η√v n."""
        x, eps = denoiser(z, logsnr)
        alpha, sigma = alpha_sigma(logsnr_next)
        fresh_share = self.eta**2 * -torch.expm1(logsnr - logsnr_next)
        kept = sigma * torch.sqrt(1 - fresh_share)
        z = expand(alpha, z) * x + expand(kept, z) * eps
        if self.eta > 0:
            z = z + expand(sigma * torch.sqrt(fresh_share), z) * noise_like(z, generator)
        return z, memory


SAMPLERS: Registry[Sampler] = Registry(Sampler)  # type: ignore[type-abstract]
