"""The base class of noise schedules: a probability density over noise levels.

Letters: logsnr = λ; t ∈ [0, 1] runs from clean data (t = 0) to noise (t = 1).

Every diffusion objective is ½∫ w(λ) E‖ε̂ − ε‖² dλ. A noise schedule only determines where this
integral is sampled: it is a probability density p(λ) on [logsnr_min, logsnr_max]. There are three
equivalent descriptions::

    λ = logsnr(t)     decreasing; the quantile function: for uniform t, λ has density p
    t = time(λ)       its inverse; the survival function of p
    p(λ) = |dt/dλ|    the density, so that integrals over t and λ agree

Training samples from it; a sampler takes its levels from it. The package `schedules` lists them
all.

A textbook formula often reaches λ = ±∞. It is truncated by restricting t to the part within the
range, never by clipping λ, which would put probability mass on both ends::

    logsnr(t) = f(t₀ + (t₁ − t₀) t)      t₀ = f⁻¹(logsnr_max),  t₁ = f⁻¹(logsnr_min)

There are only B values of λ, so everything is computed in float64. Near t = 1 even float64 cannot
represent 1 − t accurately, so quantiles there are computed from the other tail, s = 1 − t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor, nn

from lit_diffusion.exact import ExactModule
from lit_diffusion.registry import plain_arguments
from lit_diffusion.times import stratified_times

__all__ = ["NoiseSchedule"]


class NoiseSchedule(ExactModule, ABC):
    """A density p(λ) on [logsnr_min, logsnr_max], given by its quantile function.

    A subclass defines `_logsnr`, the untruncated textbook formula, and its inverse `_time` if
    there is a closed form. For a symmetric density it also sets `centre`, which makes the noisy
    tail as accurate as the clean one. Truncation, density, samples and grids are derived.

    Args:
        logsnr_min: Smallest λ (most noise); None means the formula's own end if finite, else −20.
        logsnr_max: Largest λ (least noise); None means the formula's own end if finite, else 20.
        support: The range of λ that the formula itself covers, given by the subclass.
        learn_ends: Whether both ends are learned parameters, for a subclass whose formula depends
            on its ends.

    Raises:
        ValueError: If the range is empty, infinite, or wider than the formula's own.

    Example:
        >>> class TriangleSchedule(NoiseSchedule):
        ...     def __init__(self, logsnr_min=None, logsnr_max=None):
        ...         super().__init__(logsnr_min, logsnr_max, support=(0.0, 1.0))
        ...
        ...     def _logsnr(self, t):
        ...         return 1 - t.sqrt()
        >>> TriangleSchedule().log_prob(torch.tensor([0.25])).exp()
        tensor([1.5000], dtype=torch.float64)
    """

    centre: float | None = None
    """The centre of a symmetric density; None for the others."""

    logsnr_min: float | Tensor
    logsnr_max: float | Tensor

    def __init__(
        self,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
        support: tuple[float, float] = (-math.inf, math.inf),
        learn_ends: bool = False,
    ) -> None:
        super().__init__()
        low, high = support
        if logsnr_min is None:
            logsnr_min = low if math.isfinite(low) else -20.0
        if logsnr_max is None:
            logsnr_max = high if math.isfinite(high) else 20.0
        name = type(self).__name__
        if not (math.isfinite(logsnr_min) and math.isfinite(logsnr_max)):
            raise ValueError(
                f"{name}: logsnr_min and logsnr_max must be finite, "
                f"got {logsnr_min} and {logsnr_max}."
            )
        if not logsnr_min < logsnr_max:
            raise ValueError(
                f"{name}: logsnr_min must be below logsnr_max, got {logsnr_min} and {logsnr_max}."
            )
        slack = 1e-9  # tolerates the rounding of a printed range
        if logsnr_min < low - slack or logsnr_max > high + slack:
            raise ValueError(
                f"{name}: its formula covers λ in [{low:.6g}, {high:.6g}] only, got "
                f"logsnr_min={logsnr_min} and logsnr_max={logsnr_max}; stay within it or choose "
                "another schedule."
            )
        self.support = support
        self.logsnr_min = max(float(logsnr_min), low)
        self.logsnr_max = min(float(logsnr_max), high)
        if learn_ends:
            self.logsnr_min, self.logsnr_max = (
                nn.Parameter(torch.tensor(end, dtype=torch.float32))
                for end in (self.logsnr_min, self.logsnr_max)
            )

    # What a subclass defines ---------------------------------------------------------------------

    @abstractmethod
    def _logsnr(self, t: Tensor) -> Tensor:
        """The textbook formula f(t), decreasing, on (0, 1), before truncation."""

    def _time(self, logsnr: Tensor) -> Tensor:
        """Its inverse; by default by bisection in logit t, which is accurate near t = 0."""
        low = torch.full_like(logsnr, -700.0)
        high = -low
        for _ in range(64):
            middle = (low + high) / 2
            too_clean = self._logsnr(torch.sigmoid(middle)) > logsnr
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        return torch.sigmoid((low + high) / 2)

    def _slope(self, t: Tensor, s: Tensor) -> Tensor | None:
        """The derivative f'(t) if there is a closed form, which saves automatic differentiation.

        It receives t and s = 1 − t, each of them accurate where it is small.
        """
        return None

    def _tail_logsnr(self, s: Tensor) -> Tensor:
        """f(1 − s), accurate for small s."""
        if self.centre is None:
            return self._logsnr(1 - s)
        return 2 * self.centre - self._logsnr(s)

    def _tail_time(self, logsnr: Tensor) -> Tensor:
        """1 − f⁻¹(λ), accurate where it is small."""
        if self.centre is None:
            return 1 - self._time(logsnr)
        return self._time(2 * self.centre - logsnr)

    # What is derived --------------------------------------------------------------------------

    @property
    def learns_ends(self) -> bool:
        """Whether the ends of the range are learned and not frozen."""
        return isinstance(self.logsnr_min, nn.Parameter) and self.logsnr_min.requires_grad

    @property
    def learns_shape(self) -> bool:
        """Whether any other parameter is learned, and thus the shape between the ends."""
        ends = {"logsnr_min", "logsnr_max"}
        return any(p.requires_grad for name, p in self.named_parameters() if name not in ends)

    @property
    def ends(self) -> tuple[float, float]:
        """(logsnr_min, logsnr_max) as numbers; the current values if they are learned."""
        low, high = (end.detach() if isinstance(end, Tensor) else end for end in self._range)
        return float(low), float(high)

    @property
    def _range(self) -> tuple[float | Tensor, float | Tensor]:
        """(logsnr_min, logsnr_max), always in this order.

        A step of the optimizer could make learned ends cross: from a distance of 1 downwards,
        their distance is exponential in the difference of the parameters and stays positive.
        """
        low, high = self.logsnr_min, self.logsnr_max
        if not (isinstance(low, Tensor) and isinstance(high, Tensor)):
            return low, high
        low, high = low.double(), high.double()
        near = low + torch.exp((high - low).clamp(-20, 1) - 1)  # at least 1e-9, for float64
        return low, torch.where(high - low >= 1, high, near)

    @cached_property
    def _has_tail(self) -> bool:
        """Whether the noisy end has a formula of its own."""
        own = type(self)._tail_logsnr is not NoiseSchedule._tail_logsnr
        return own or self.centre is not None

    @cached_property
    def _window(self) -> tuple[float, float]:
        """The probability of the formula above logsnr_max, and below logsnr_min."""
        if isinstance(self.logsnr_min, nn.Parameter) or self.ends == self.support:
            return 0.0, 0.0
        ends = torch.tensor([self.logsnr_max, self.logsnr_min], dtype=torch.float64)
        return float(self._time(ends)[0]), float(self._tail_time(ends)[1])

    def _quantile(self, t: Tensor, s: Tensor) -> Tensor:
        """Compute f(t), t = 1 − s, from the nearer tail; the other one is evaluated at ½."""
        if not self._has_tail:
            return self._logsnr(t)
        clean = t <= 0.5
        half = torch.full_like(t, 0.5)
        return torch.where(
            clean,
            self._logsnr(torch.where(clean, t, half)),
            self._tail_logsnr(torch.where(clean, half, s)),
        )

    def _inner(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The time t of the truncated schedule in the formula's own time, and 1 − that time."""
        above, below = self._window
        inside = 1 - above - below
        return above + inside * t, below + inside * (1 - t)

    def _truncated(self, t: Tensor) -> Tensor:
        above, below = self._window
        if not self._has_tail:
            return self._logsnr(t if above == below == 0 else self._inner(t)[0])
        return self._quantile(*self._inner(t))

    def _pinned(self, logsnr: Tensor, t: Tensor) -> Tensor:
        """λ(0) = logsnr_max and λ(1) = logsnr_min exactly, whatever the rounding."""
        low, high = self._range
        logsnr = logsnr.clamp(low, high)  # type: ignore[arg-type]
        logsnr = torch.where(t <= 0, high, logsnr)
        return torch.where(t >= 1, low, logsnr)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """λ and log p(λ) at time t, as used in training.

        Both are computed from t, without an inversion. They carry gradients to the learned
        parameters of the schedule if it has any, and are detached otherwise.

        Args:
            t: Time in [0, 1].

        Shapes:
            t (B,); both results (B,), float64.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        t = t.detach().to(torch.float64)
        slope = None if learns else self._slope(*self._inner(t))
        if slope is not None:
            above, below = self._window
            logsnr = self._truncated(t).clamp(*self.ends)
            return logsnr, -torch.log(slope * (above + below - 1))
        # Validation runs in inference mode, which does not allow differentiation: leave it.
        with torch.inference_mode(False), torch.enable_grad():
            t = t.clone().requires_grad_()
            logsnr = self._truncated(t)
            (slope,) = torch.autograd.grad(logsnr.sum(), t, create_graph=learns)
            log_prob = -torch.log(-slope)
            logsnr = logsnr.clamp(*self._range)  # type: ignore[arg-type]
        return (logsnr, log_prob) if learns else (logsnr.detach(), log_prob.detach())

    def at_with_shape(self, t: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """λ and log p(λ) as from `at`, and the tensors through which the shape is learned.

        In continuous time E[L] does not depend on the shape of a schedule, only the variance of
        its estimate does, so the shape is to follow ∇E[L²] = E[2 L ∇L] while all else follows
        ∇E[L]. The loss therefore multiplies, in the backward pass, the gradient of each example
        with respect to the tensors returned here by twice the loss of that example.

        Without learned ends λ and log p themselves are these tensors, and a schedule with an
        `nn.Parameter` in its formula learns its shape without further code. A schedule that learns
        its ends as well must override this method: it returns intermediate results that depend on
        the shape alone.

        Args:
            t: Time in [0, 1].

        Shapes:
            t (B,); λ and log p (B,), float64; each tensor of the shape (B,), none if the shape is
            not learned or no gradient is recorded.

        Raises:
            NotImplementedError: If both the ends and the shape are learned and this is not
                overridden.
        """
        logsnr, log_prob = self.at(t)
        if not (self.learns_shape and logsnr.requires_grad):
            return logsnr, log_prob, ()
        if self.learns_ends:
            name = type(self).__name__
            raise NotImplementedError(
                f"{name} learns its ends and its shape, which follow different gradients: "
                f"override {name}.at_with_shape to return the tensors that depend on the shape "
                "alone, or learn only one of them."
            )
        return logsnr, log_prob, (logsnr, log_prob)

    def logsnr(self, t: Tensor) -> Tensor:
        """λ at time t: the quantile function, decreasing from logsnr_max to logsnr_min.

        Args:
            t: Time in [0, 1].

        Shapes:
            t (B,); result (B,), float64.
        """
        t = t.to(torch.float64)
        return self._pinned(self._truncated(t), t)

    def time(self, logsnr: Tensor) -> Tensor:
        """The time t at which λ(t) = λ: the survival function of p.

        Args:
            logsnr: λ; outside the range the result is 0 or 1.

        Shapes:
            logsnr (B,); result (B,), float64.
        """
        logsnr = logsnr.to(torch.float64)
        above, below = self._window
        inside = 1 - above - below
        inner = logsnr.clamp(*self.ends)
        t = (self._time(inner) - above) / inside
        if self._has_tail:
            s = (self._tail_time(inner) - below) / inside
            t = torch.where(t <= 0.5, t, 1 - s)
        t = t.clamp(0, 1)
        low, high = self._range
        t = torch.where(logsnr >= high, torch.zeros_like(t), t)
        return torch.where(logsnr <= low, torch.ones_like(t), t)

    def log_prob(self, logsnr: Tensor) -> Tensor:
        """Log p(λ) = log|dt/dλ|, for analysis, and for objectives that contain p; −∞ outside.

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); result (B,), float64, differentiable in λ if λ is.
        """
        follows = torch.is_grad_enabled() and logsnr.requires_grad
        wide = logsnr.to(torch.float64)
        above, below = self._window
        inner = wide.detach().clamp(*self.ends)
        with torch.inference_mode(False), torch.enable_grad():
            inner = inner.clone()
            t, s = self._time(inner).detach(), self._tail_time(inner).detach()

            def slope(move: Tensor, create_graph: bool = False) -> Tensor:
                # One variable for both tails: moving t by dt moves s by −dt.
                level = self._quantile(t + move, s - move).sum()
                return torch.autograd.grad(level, move, create_graph=create_graph)[0]

            rate = slope(torch.zeros_like(t).requires_grad_())
            if follows:  # t moves with λ, by dλ/f'
                rate = slope((wide - wide.detach()) / rate, create_graph=True)
        log_prob = -torch.log(-rate) - math.log1p(-above - below)
        return torch.where(self._outside(wide.detach()), -math.inf, log_prob)

    def _outside(self, logsnr: Tensor) -> Tensor:
        """Whether λ is outside the range by more than rounding to float32."""
        low, high = self.ends
        slack = 1e-6 * max(1.0, abs(low), abs(high))
        return (logsnr < low - slack) | (logsnr > high + slack)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample n noise levels, stratified over the density.

        Args:
            n: Number of noise levels.
            generator: Source of the one random offset; None means the global generator.

        Shapes:
            result (n,), float64.

        Example:
            >>> LinearSchedule(0.0, 4.0).sample(4, torch.Generator().manual_seed(0))
            tensor([0.1198, 3.1198, 2.1198, 1.1198], dtype=torch.float64)
        """
        device = generator.device if generator else None
        offset = torch.rand((), generator=generator, dtype=torch.float64, device=device)
        return self.logsnr(stratified_times(n, offset))

    def grid(self, steps: int) -> Tensor:
        """A grid of noise levels for a sampler, from noise to data, uniform in t.

        Args:
            steps: Number of intervals, at least 1.

        Shapes:
            result (steps + 1,), float64, increasing.

        Raises:
            ValueError: If steps is below 1.

        Example:
            >>> LinearSchedule(0.0, 4.0).grid(2)
            tensor([0., 2., 4.], dtype=torch.float64)
        """
        if steps < 1:
            raise ValueError(f"A grid needs at least 1 step, got {steps}.")
        return self.logsnr(torch.linspace(1, 0, steps + 1, dtype=torch.float64))

    def extra_repr(self) -> str:
        """The arguments, as in the constructor call."""
        return plain_arguments(self)
