"""The base class of samplers, which holds the loop over noise levels.

Letters: z noisy data (B, *), logsnr = λ; a step goes from λ to logsnr_next > λ.

A sampler visits the levels of a noise schedule in increasing λ. Each step calls the denoiser for
(x̂, ε̂) and moves z to the next level; at the last level the result is x̂. This schedule belongs to
the sampler: which levels it visits does not depend on how λ was sampled in training.

`steps` is the number of levels. A sampler with one call per step calls the network `steps` times
(DDPM: 1000), and one with two calls per step does so at every level but the last (EDM: 18 levels,
35 calls); see `calls`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_diffusion.gaussian import Generators
from lit_diffusion.predictions import Denoised
from lit_diffusion.schedules import CosineSchedule, KarrasSchedule, NoiseSchedule

__all__ = ["DenoiserCall", "Sampler", "SamplerStep"]


class DenoiserCall(Protocol):
    """The denoiser as a sampler calls it: (z, λ) → (x̂, ε̂), with its conditions already bound."""

    def __call__(self, z: Tensor, logsnr: Tensor) -> Denoised:
        """Estimate x and ε.

        Args:
            z: Noisy data.
            logsnr: λ of each example.

        Shapes:
            z (B, *), logsnr (B,) → x̂ and ε̂ (B, *).
        """


class SamplerStep(NamedTuple):
    """One step of a sampler: from which noise level to which, with what memory and noise.

    Attributes:
        logsnr: λ of each example, (B,).
        logsnr_next: The next, higher, level of each example, (B,); ∞, the data's, at the last one.
        memory: What the previous step returned as its memory; None at the first step.
        generator: The source of noise, for `noise_like(z, generator)`.
    """

    logsnr: Tensor
    logsnr_next: Tensor
    memory: Any = None
    generator: Generators = None


def karras_grid(logsnr_min: float, logsnr_max: float) -> KarrasSchedule:
    """EDM's noise levels, restricted to a range of λ; the default of second-order samplers.

    Args:
        logsnr_min: Smallest λ the denoiser was trained on.
        logsnr_max: Largest λ the denoiser was trained on.
    """
    usual = KarrasSchedule().ends
    low, high = max(logsnr_min, usual[0]), min(logsnr_max, usual[1])
    if low >= high:
        low, high = logsnr_min, logsnr_max
    return KarrasSchedule(sigma_min=math.exp(-high / 2), sigma_max=math.exp(-low / 2))


class Sampler(ABC):
    """Maps noise to data: z at low λ → x̂ at high λ.

    A subclass is a frozen dataclass with the fields `steps` and `schedule`, and any of its own.
    It implements `step` and sets its `order` of convergence, and `calls_per_step` if that is not
    1. At the last level the base class returns x̂; override `finish` to do more there.

    Between the first and the last call of the denoiser nothing is copied to or from the device and
    no shape changes, so the host can run ahead and a compiled network is compiled only once.

    Example:
        >>> z = torch.randn(1000, 4)
        >>> x = DDIMSampler(steps=100)(GaussianDenoiser(std=0.5), z)
        >>> abs(float(x.std() / z.std()) - 0.5) < 0.02
        True
    """

    order: ClassVar[int]
    calls_per_step: ClassVar[int] = 1
    steps: int
    schedule: NoiseSchedule | None

    def __post_init__(self) -> None:
        """Refuse a number of steps that is none; a subclass with checks of its own calls this."""
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"{type(self).__name__}: expected a whole number of at least 1 step, "
                f"got steps={self.steps}."
            )

    @property
    def calls(self) -> int:
        """Number of calls of the denoiser for one batch, including one at the last level.

        Example:
            >>> DDIMSampler(steps=18).calls, HeunSampler(steps=18).calls
            (18, 35)
        """
        return (self.steps - 1) * self.calls_per_step + 1

    @abstractmethod
    def step(self, denoiser: DenoiserCall, z: Tensor, step: SamplerStep) -> tuple[Tensor, Any]:
        """Move z from step.logsnr to step.logsnr_next; return it and the memory of the next step.

        Args:
            denoiser: Called as denoiser(z, logsnr); conditions are bound already.
            z: Noisy data at step.logsnr.
            step: The two noise levels, the memory of the previous step, the source of noise.

        Shapes:
            z (B, *); the new z (B, *).
        """

    def finish(self, denoiser: DenoiserCall, z: Tensor, step: SamplerStep) -> Tensor:
        """Return the result at the last level: x̂.

        Args:
            denoiser: Called as denoiser(z, logsnr); conditions are bound already.
            z: Noisy data at step.logsnr, the last level.
            step: As in `step`; its logsnr_next is ∞.

        Shapes:
            z (B, *); result x̂ (B, *).
        """
        return denoiser(z, step.logsnr).x

    def default_schedule(self, logsnr_min: float, logsnr_max: float) -> NoiseSchedule:
        """The schedule over a range of λ that is used if none is given: cosine.

        Args:
            logsnr_min: Smallest λ the denoiser was trained on.
            logsnr_max: Largest λ the denoiser was trained on.
        """
        return CosineSchedule(logsnr_min, logsnr_max)

    def levels(self) -> Tensor:
        """The noise levels λ visited, from noise to data.

        Shapes:
            result (steps,), float64, increasing.

        Example:
            >>> DDIMSampler(steps=3, schedule=LinearSchedule(-4.0, 4.0)).levels()
            tensor([-4.,  0.,  4.], dtype=torch.float64)
        """
        if self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, got steps={self.steps}.")
        schedule = self.default_schedule(-20.0, 20.0) if self.schedule is None else self.schedule
        with torch.no_grad():
            return schedule.logsnr(torch.linspace(1, 0, self.steps, dtype=torch.float64))

    def __call__(
        self,
        denoiser: Callable[..., Denoised],
        z: Tensor,
        generator: Generators = None,
        progress: Callable[[Any], Any] = iter,
        **cond: Any,
    ) -> Tensor:
        """Map z, noise at the first level, to data.

        Args:
            denoiser: Called as denoiser(z, logsnr, **cond).
            z: Standard normal noise to start from.
            generator: Source of noise for stochastic samplers: None, one, or one per example.
            progress: Wraps the list of steps, such as tqdm.
            **cond: Passed to the denoiser.

        Shapes:
            z (B, *); result x̂ (B, *).
        """

        def bound(z: Tensor, logsnr: Tensor) -> Denoised:
            return denoiser(z, logsnr, **cond)

        # All levels are copied before the loop, since each copy waits for the device.
        to_data = pad(self.levels(), (0, 1), value=math.inf).to(z.device)  # data are at λ = ∞
        levels = [level.expand(len(z)) for level in to_data]
        memory = None
        for logsnr, logsnr_next in progress([*pairwise(levels)]):
            step = SamplerStep(logsnr, logsnr_next, memory, generator)
            if logsnr_next is levels[-1]:
                z = self.finish(bound, z, step)
            else:
                z, memory = self.step(bound, z, step)
        return z
