"""The learned schedule: its ends minimise the bound, its shape the variance of the estimate.

Letters: logsnr = λ; t ∈ [0, 1] from clean data to noise; u = the fraction of the way from λ_max to
λ_min.

In continuous time the bound depends on the schedule only through its two ends. So there are two
things to learn, with two different gradients:

    the ends     from the bound itself: λ_max trades reconstruction for diffusion, λ_min the prior
    the shape    from the *variance* of the estimate, the only thing that it changes

As E[L] does not depend on the shape η, ∇Var(L) = ∇E[L²] = E[2 L ∇L]: the ordinary gradient, scaled
for each example by twice its own loss. This takes one multiplication in the backward pass and no
second pass, but it must affect the shape only: network and ends follow the gradient of L itself.
`at_with_shape` returns the tensors whose gradient the loss scales.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lit_diffusion.schedules.base import NoiseSchedule

__all__ = ["LearnedSchedule"]

_UNITS = 1024
_LEAST_SLOPE = 1e-30  # far below any that matters, and above 0, where u would be 0/0


def _raw(value: Tensor) -> Tensor:
    """Inverse of softplus."""
    return value + torch.log(-torch.expm1(-value))


class LearnedSchedule(NoiseSchedule):
    """A monotone network with exact ends: λ = (1 − u) λ_max + u λ_min, u = Δg(t)/Δg(1).

    Δg(t) = g(t) − g(0), g(t) = a t + mean_j h_j sigmoid(r_j a t + b_j) with positive a, h and r:
    1024 sigmoids approximate any shape, and the ends are exact for all parameters. It learns the
    density that minimises the variance of the loss estimate, at little cost, and is a valid
    schedule at every step. It is nearly linear at initialisation.

    Args:
        logsnr_min: Smallest λ, or its initial value if the ends are learned; None means −20.
        logsnr_max: Largest λ, or its initial value if the ends are learned; None means 20.
        learn: "shape" between fixed ends, "endpoints", or "both"; learned ends require a loss with
            a decoder, without which they would collapse.

    Raises:
        ValueError: If `learn` is none of these.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, appendix H (Eq. 59)
        and I.2.

    Example:
        >>> LearnedSchedule(-5.0, 13.3).logsnr(torch.tensor([0.0, 0.5, 1.0])).detach()
        tensor([13.3000,  4.1518, -5.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
        learn: Literal["shape", "endpoints", "both"] = "shape",
    ) -> None:
        if learn not in ("shape", "endpoints", "both"):
            raise ValueError(
                f"LearnedSchedule: learn must be 'shape', 'endpoints' or 'both', got {learn!r}."
            )
        super().__init__(logsnr_min, logsnr_max, learn_ends=learn != "shape")
        self.learn = learn
        # Sigmoids of all widths, from 1/4 to 1/256 of the range, at all places; distributed by the
        # golden ratio and not at random, so that every run starts from the same schedule.
        place = (torch.arange(_UNITS, dtype=torch.float32) + 0.5) / _UNITS
        golden = torch.arange(_UNITS, dtype=torch.float32) * 0.6180339887
        rate = 4 * 64 ** (golden % 1)
        learns = learn != "endpoints"
        self.slope = nn.Parameter(_raw(torch.ones((), dtype=torch.float32)), learns)
        self.rate = nn.Parameter(_raw(rate), learns)
        self.bias = nn.Parameter(-rate * place, learns)
        self.height = nn.Parameter(_raw(torch.ones(_UNITS, dtype=torch.float32)), learns)

    def _shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The fraction u(t), and its derivative du/dt."""
        slope, rate, height = (softplus(p.double()) for p in (self.slope, self.rate, self.height))
        slope = slope.clamp(min=_LEAST_SLOPE)
        steepness, bias = slope * rate, self.bias.double()

        def network(t: Tensor) -> tuple[Tensor, Tensor]:
            """Δg(t)/slope and its derivative."""
            away = t.unsqueeze(-1) * steepness
            unit = torch.sigmoid(away + bias)
            # sigmoid(a + b) − sigmoid(b) without cancellation, which a small slope would cause.
            climb = -torch.expm1(-away) * unit * torch.sigmoid(-bias)
            rise = 1 + (height * unit * (1 - unit) * rate).mean(-1)
            return t + (height * climb).mean(-1) / slope, rise

        value, rise = network(t)
        end, _ = network(torch.ones((), dtype=torch.float64, device=t.device))
        return value / end, rise / end

    def _between(self, share: Tensor) -> Tensor:
        low, high = self._range
        return high * (1 - share) + low * share

    def _logsnr(self, t: Tensor) -> Tensor:
        return self._between(self._shape(t)[0])

    @torch.no_grad()
    def _time(self, logsnr: Tensor) -> Tensor:
        # A table brackets the solution, with one more cell on each side (also beyond 0 and 1,
        # where the formula continues); then Newton's method within these cells.
        low, high = self.ends
        shape = logsnr.shape
        target = ((high - logsnr) / (high - low)).reshape(-1)
        table = torch.arange(-2, 2051, dtype=torch.float64, device=logsnr.device) / 2048
        values = self._shape(table)[0]
        after = torch.searchsorted(values, target.contiguous()).clamp(2, 2051)
        left, right = table[after - 2], table[after + 1]
        away = (target - values[after - 1]) / (values[after] - values[after - 1])
        t = table[after - 1] + away / 2048
        for _ in range(3):
            parts = [self._shape(part) for part in t.split(512)]  # 4 MB each, to fit the cache
            value, rise = (torch.cat(column) for column in zip(*parts, strict=True))
            left, right = (
                torch.where(value < target, t, left),
                torch.where(value < target, right, t),
            )
            step = t - (value - target) / rise
            good = ((step > left) & (step < right)) | ((step - t).abs() < 1e-12)
            t = torch.where(good, step, (left + right) / 2)
        return t.reshape(shape)

    @torch.no_grad()
    def log_prob(self, logsnr: Tensor) -> Tensor:
        """Log p(λ), from the derivative at time(λ); −∞ outside the range.

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); result (B,), float64, detached.
        """
        low, high = self.ends
        logsnr = logsnr.to(torch.float64)
        parts = [self._shape(part)[1] for part in self.time(logsnr).reshape(-1).split(512)]
        log_prob = -torch.log((high - low) * torch.cat(parts)).reshape(logsnr.shape)
        return torch.where(self._outside(logsnr), -torch.inf, log_prob)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """λ and log p(λ) at time t, differentiable.

        Args:
            t: Time in [0, 1].

        Shapes:
            t (B,); both results (B,), float64.
        """
        return self.at_with_shape(t)[:2]

    def at_with_shape(self, t: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """λ and log p(λ) at time t, and u and du/dt, which depend on the shape alone.

        Args:
            t: Time in [0, 1].

        Shapes:
            t (B,); all results (B,), float64.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        share, rise = self._shape(t.detach().to(torch.float64))
        # From here on the ends enter, which follow the gradient of the loss itself.
        low, high = self._range
        slope = (high - low) * rise
        logsnr, log_prob = self._between(share), -torch.log(slope)
        if not learns:
            return logsnr.detach(), log_prob.detach(), ()
        return logsnr, log_prob, (share, rise) if share.requires_grad else ()
