"""What a sampler is: a walk from noise back to data.

Letters: z noisy data (B, *), logsnr = λ; a step goes from λ to logsnr_next > λ.

A sampler walks up the levels of a noise schedule. Each step asks the denoiser for (x̂, ε̂) and
moves z to the next level; at the last level the answer is x̂ itself. The schedule it walks is its
own: how λ was drawn in training and how it is walked afterwards are unrelated choices.

A leaf gives one `step`; the loop is written once. `steps` counts levels, so a sampler that asks
once a step calls the network `steps` times, DDPM's 1000, and one that asks twice does so at each
level but the last, EDM's 18 → 35; `calls` says which. The family is in `samplers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_diffusion.gaussian import Generators
from lit_diffusion.predictions import Denoised
from lit_diffusion.schedules import CosineSchedule, NoiseSchedule

__all__ = ["Sampler"]

Ask = Callable[..., Denoised]


class Sampler(ABC):
    """A walk from noise to data: z at low λ → x̂ at high λ.

    A leaf is a frozen dataclass with the fields `steps` and `schedule` (and its own), names its
    `order` of convergence and its `calls_per_step`, if that is not 1, and gives `step`. The last
    level is the base's: its answer is x̂. A leaf that has more to do there gives `finish`, too.

    From the first call of the denoiser to the last nothing is read from the device or sent to it,
    and no shape changes, so that the host runs ahead and a compiled network stays compiled.

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

    @property
    def calls(self) -> int:
        """How often the denoiser is asked in a walk: as a step does, and once at the last level.

        Example:
            >>> DDIMSampler(steps=18).calls, HeunSampler(steps=18).calls
            (18, 35)
        """
        return (self.steps - 1) * self.calls_per_step + 1

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

    def finish(
        self, denoiser: Ask, z: Tensor, logsnr: Tensor, memory: Any, generator: Generators
    ) -> Tensor:
        """The answer at the last level: x̂.

        Args:
            denoiser: Called as denoiser(z, logsnr); conditions are bound already.
            z: Noisy data at λ.
            logsnr: λ of each example, the last level.
            memory: What the last step returned as its memory; None if there was no step.
            generator: For `noise_like`, if noise is added.

        Shapes:
            z (B, *); logsnr (B,); result x̂ (B, *).
        """
        return denoiser(z, logsnr).x

    def default_schedule(self, logsnr_min: float, logsnr_max: float) -> NoiseSchedule:
        """What is walked over a range of λ if no schedule is given: a cosine.

        Args:
            logsnr_min: Smallest λ the denoiser knows.
            logsnr_max: Largest λ the denoiser knows.
        """
        return CosineSchedule(logsnr_min, logsnr_max)

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
        schedule = self.default_schedule(-20.0, 20.0) if self.schedule is None else self.schedule
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

        # All of them at once, before the walk: each copy to a device waits for it.
        levels = [level.expand(len(z)) for level in self.levels().to(z.device)]
        memory = None
        for logsnr, logsnr_next in progress([*pairwise(levels), (levels[-1], None)]):
            if logsnr_next is None:
                z = self.finish(ask, z, logsnr, memory, generator)
            else:
                z, memory = self.step(ask, z, logsnr, logsnr_next, memory, generator)
        return z
