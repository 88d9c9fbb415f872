"""The learned schedule: where to look is found out, too.

Letters: logsnr = λ; t ∈ [0, 1] from clean data to noise; u = share of the way from λ_max to λ_min.

The bound in continuous time depends on the two ends of the schedule and on nothing between. So
there are two things to learn, by two different gradients:

    the ends     by the bound itself: λ_max trades reconstruction for diffusion, λ_min the prior
    the shape    by the *variance* of the estimate, which is all that it changes

For the second, E[L] does not depend on the shape η, hence ∇Var(L) = ∇E[L²] = E[2 L ∇L]: the
ordinary gradient, scaled for each example by twice its own loss. That is one multiplication on the
way back (`at(t, shape_gradient)`), not a second backward pass, and it must reach the shape only:
network and ends want the gradient of L itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lit_diffusion.schedules.base import NoiseSchedule

__all__ = ["LearnedSchedule"]

_UNITS = 1024


def _raw(value: Tensor) -> Tensor:
    """Inverse of softplus."""
    return value + torch.log(-torch.expm1(-value))


class LearnedSchedule(NoiseSchedule):
    """A monotone network pinned at its ends: λ = (1 − u) λ_max + u λ_min, u = Δg(t)/Δg(1).

    Δg(t) = g(t) − g(0), g(t) = a t + mean_j h_j sigmoid(r_j a t + b_j) with positive a, h and r:
    1024 sigmoids, so that it can take any shape, and the ends hold exactly whatever the network
    does. It finds the density under which the estimate of the loss scatters least, at little cost,
    and stays a schedule throughout. At first it is nearly linear.

    Args:
        logsnr_min: Smallest λ, at first if the ends are learned; None means −20.
        logsnr_max: Largest λ, at first if the ends are learned; None means 20.
        learn: "shape" between fixed ends; "endpoints" (the loss then needs a decoder, without
            which they would collapse); or "both".

    Raises:
        ValueError: If `learn` is something else.

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
        # Sigmoids of all widths, from a quarter of the range to a 256th, everywhere in it; spread
        # by the golden ratio, not drawn, so that every run starts alike.
        place = (torch.arange(_UNITS) + 0.5) / _UNITS
        rate = 4 * 64 ** ((torch.arange(_UNITS) * 0.6180339887) % 1)
        learns = learn != "endpoints"
        self.slope = nn.Parameter(_raw(torch.ones(())), learns)
        self.rate = nn.Parameter(_raw(rate), learns)
        self.bias = nn.Parameter(-rate * place, learns)
        self.height = nn.Parameter(_raw(torch.ones(_UNITS)), learns)

    @property
    def learns_shape(self) -> bool:  # type: ignore[override]
        """Whether what lies between the ends is learned."""
        return self.slope.requires_grad

    def _shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the way u(t), and its slope du/dt."""
        slope, rate, height = (softplus(p.double()) for p in (self.slope, self.rate, self.height))
        steepness = slope * rate

        def network(t: Tensor) -> tuple[Tensor, Tensor]:
            unit = torch.sigmoid(t[:, None] * steepness + self.bias.double())
            rise = slope + (height * unit * (1 - unit) * steepness).mean(1)
            return slope * t + (height * unit).mean(1), rise

        value, rise = network(t)
        (start, end), _ = network(torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device))
        return (value - start) / (end - start), rise / (end - start)

    def _between(self, share: Tensor) -> Tensor:
        # Learned ends are float32 numbers: each meets a float64 one before they meet one another.
        return self.logsnr_max * (1 - share) + self.logsnr_min * share

    def _logsnr(self, t: Tensor) -> Tensor:
        return self._between(self._shape(t)[0])

    @torch.no_grad()
    def _time(self, logsnr: Tensor) -> Tensor:
        # A table, with a cell to spare on each side of an answer (beyond 0 and 1, too, where the
        # formula goes on), then Newton's method, kept within these cells.
        low, high = self.ends
        target = (high - logsnr) / (high - low)
        table = torch.arange(-2, 2051, dtype=torch.float64, device=logsnr.device) / 2048
        values = self._shape(table)[0]
        after = torch.searchsorted(values, target.contiguous()).clamp(2, 2051)
        left, right = table[after - 2], table[after + 1]
        away = (target - values[after - 1]) / (values[after] - values[after - 1])
        t = table[after - 1] + away / 2048
        for _ in range(3):
            parts = [self._shape(part) for part in t.split(512)]  # 4 MB each: fits a cache
            value, rise = (torch.cat(column) for column in zip(*parts, strict=True))
            left, right = (
                torch.where(value < target, t, left),
                torch.where(value < target, right, t),
            )
            step = t - (value - target) / rise
            good = ((step > left) & (step < right)) | ((step - t).abs() < 1e-12)
            t = torch.where(good, step, (left + right) / 2)
        return t

    @torch.no_grad()
    def log_prob(self, logsnr: Tensor) -> Tensor:
        """Log p(λ), by the slope at time(λ); −∞ outside the range.

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); result (B,), float64, detached.
        """
        low, high = self.ends
        logsnr = logsnr.to(torch.float64)
        parts = [self._shape(part)[1] for part in self.time(logsnr).split(512)]
        log_prob = -torch.log((high - low) * torch.cat(parts))
        return torch.where(self._outside(logsnr), -torch.inf, log_prob)

    def at(self, t: Tensor, shape_gradient: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """λ and log p(λ) at time t, differentiable.

        Args:
            t: Time in [0, 1].
            shape_gradient: What the gradient of each example is multiplied by before it reaches
                the shape: twice its loss. It is read in the backward pass and may be filled in
                until then, for the loss is known only after λ.

        Shapes:
            t and shape_gradient (B,); both results (B,), float64.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        share, rise = self._shape(t.detach().to(torch.float64))
        if learns and shape_gradient is not None and share.requires_grad:
            for part in (share, rise):
                part.register_hook(lambda gradient: gradient * shape_gradient.to(gradient.dtype))
        # From here on the ends come in, which the hooks do not touch.
        slope = self.logsnr_max * rise - self.logsnr_min * rise
        logsnr, log_prob = self._between(share), -torch.log(slope)
        return (logsnr, log_prob) if learns else (logsnr.detach(), log_prob.detach())
