"""The laws of noise schedules."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from lit_diffusion.denoisers import GaussianDenoiser
from lit_diffusion.loss import noise_error, weighted_error
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.testing.laws import close, law
from lit_diffusion.weightings import SigmoidWeighting

__all__ = ["check_schedule"]


def check_schedule(schedule: NoiseSchedule) -> None:
    """Check that a noise schedule is a density and that its methods are consistent.

    λ(0) and λ(1) are exactly the ends; λ(t) decreases strictly; `time` is its inverse; a tensor
    without dimensions is allowed; the density is |dt/dλ| and integrates to 1; samples follow it;
    E_p[f/p] = ∫f; float32 times give the float64 result; it works in inference mode, and a
    state_dict or a copy preserves it. If it is learned, its ends follow the gradient of the loss,
    and its shape that of E[L²].

    Args:
        schedule: The schedule, of any arguments.

    Raises:
        AssertionError: If a law is violated, with its name and the numbers.

    Example:
        >>> check_schedule(CosineSchedule(logsnr_min=-10.0, logsnr_max=10.0))
    """
    law(isinstance(schedule, NoiseSchedule), schedule, "expected an instance of NoiseSchedule.")
    _check_quantiles(schedule)
    _check_density(schedule)
    _check_copies(schedule)
    _check_learning(schedule)


def _check_quantiles(schedule: NoiseSchedule) -> None:
    """λ(t), its inverse, and `at` and `log_prob` at the same levels."""
    low, high = schedule.ends
    ends = schedule.logsnr(torch.tensor([0.0, 1.0])).tolist()
    law(ends == [high, low], schedule, f"λ(0), λ(1) are {[high, low]} exactly, got {ends}.")

    edge = torch.logspace(-12, -3, 50, dtype=torch.float64)
    inner = torch.linspace(0, 1, 1003, dtype=torch.float64)
    t = torch.cat([edge, inner, 1 - edge]).unique()
    logsnr = schedule.logsnr(t).detach()
    law(logsnr.dtype == torch.float64, schedule, f"λ is float64, got {logsnr.dtype}.")
    falls = logsnr[1:-1].diff()
    decreases = bool((falls < 0).all())
    law(decreases, schedule, f"λ(t) decreases, got a step of {float(falls.max()):.3g}.")
    error = float((schedule.time(logsnr).detach() - t).abs().max())
    law(error < 1e-9, schedule, f"time(logsnr(t)) = t, off by {error:.3g}.")
    beyond = schedule.time(torch.tensor([high + 1, low - 1])).tolist()
    law(beyond == [0.0, 1.0], schedule, f"time beyond the range is 0 and 1, got {beyond}.")
    outside = schedule.log_prob(torch.tensor([high + 1, low - 1]))
    law(bool((outside == -math.inf).all()), schedule, "log p is −∞ outside the range.")
    _check_scalar(schedule)

    at_logsnr, at_log_prob = schedule.at(t)
    law(close(at_logsnr, logsnr, 1e-12), schedule, "at(t) and logsnr(t) agree.")
    log_prob = schedule.log_prob(logsnr)
    positive = (at_log_prob > -100) & (log_prob > -100)  # a density may vanish at an end
    error = float((at_log_prob - log_prob)[positive].abs().quantile(0.99).detach())
    law(error < 1e-4, schedule, f"at(t) and log_prob(λ) agree, off by {error:.3g}.")


def _check_scalar(schedule: NoiseSchedule) -> None:
    """A tensor without dimensions is a time, or a λ, like any other."""
    t = torch.tensor(0.3, dtype=torch.float64)
    logsnr = schedule.logsnr(t).detach()
    for name, alone, together in [
        ("logsnr(t)", logsnr, schedule.logsnr(t[None])),
        ("at(t)", schedule.at(t)[1], schedule.at(t[None])[1]),
        ("time(λ)", schedule.time(logsnr), schedule.time(logsnr[None])),
        ("log_prob(λ)", schedule.log_prob(logsnr), schedule.log_prob(logsnr[None])),
    ]:
        same = alone.shape == () and close(alone[None], together, 1e-12)
        law(same, schedule, f"{name} of a tensor without dimensions is that of a batch of one.")


def _check_density(schedule: NoiseSchedule) -> None:
    """The density integrates to 1, samples follow it, and importance sampling is unbiased."""
    low, high = schedule.ends
    cells = 50_000
    width = (high - low) / cells
    borders = torch.linspace(low, high, cells + 1, dtype=torch.float64)
    mass = schedule.log_prob(borders[:-1] + width / 2).exp() * width
    below = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    error = float((below - (1 - schedule.time(borders).detach())).abs().max())
    density = "the density is |dt/dλ| and integrates to 1"
    law(error < 1e-4, schedule, f"{density}, off by {error:.3g}.")

    n = 20_000
    samples = schedule.sample(n, torch.Generator().manual_seed(0)).detach().sort().values
    expected = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = float((1 - schedule.time(samples).detach() - expected).abs().max())
    law(distance < 2 / n, schedule, f"samples follow the density (KS {distance:.2g}).")

    quartiles = schedule.logsnr(torch.tensor([0.25, 0.5, 0.75])).detach()
    middle, spread = quartiles[1], (quartiles[0] - quartiles[2]) / 2

    def bump(value: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((value - middle) / spread) ** 2)

    logsnr, log_prob = schedule.at((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    estimate = float((bump(logsnr) / log_prob.exp()).mean().detach())
    integral = float(bump(borders[:-1] + width / 2).sum() * width)
    error = abs(estimate / integral - 1)
    law(error < 2e-3, schedule, f"E[f/p] = ∫f, off by a factor of 1 + {error:.2g}.")


def _check_copies(schedule: NoiseSchedule) -> None:
    """The same result in another precision, in inference mode and from a copy."""
    t32 = torch.rand(100, generator=torch.Generator().manual_seed(0))
    same = torch.equal(schedule.logsnr(t32), schedule.logsnr(t32.double()))
    law(same, schedule, "float32 times give the float64 result.")
    with torch.inference_mode():
        same = close(schedule.at(t32)[1], schedule.at(t32.double())[1], 1e-12)
    law(same, schedule, "at(t) works in inference mode.")
    twin = copy.deepcopy(schedule)
    twin.load_state_dict(schedule.state_dict())
    same = torch.equal(twin.logsnr(t32), schedule.logsnr(t32))
    law(same, schedule, "a copy with its state_dict is the same schedule.")


def _check_learning(schedule: NoiseSchedule) -> None:
    """The gradients of a loss ½ h(λ)/p(λ): from `weighted_error`, and of its moments directly."""
    learned = {name: p for name, p in schedule.named_parameters() if p.requires_grad}
    t = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    logsnr, log_prob = schedule.at(t)
    law(
        log_prob.requires_grad == logsnr.requires_grad == bool(learned),
        schedule,
        "at(t) carries gradients if and only if the schedule has parameters that learn.",
    )
    if not learned:
        return
    x, eps = torch.full((64, 2), 0.5, dtype=torch.float64), torch.ones(64, 2, dtype=torch.float64)
    denoiser, weighting = GaussianDenoiser(0.5), SigmoidWeighting()
    error = noise_error(denoiser, x, eps, logsnr)
    loss = 0.5 * weighting(logsnr) * torch.exp(-log_prob) * error
    parameters = list(learned.values())

    def gradient(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    mean, second = gradient(loss.mean()), gradient(loss.square().mean())
    terms = weighted_error(denoiser, x, schedule, weighting, None, t, eps)
    found = gradient(terms.loss.mean())
    for name, ours, of_mean, of_second in zip(learned, found, mean, second, strict=True):
        is_end = name in ("logsnr_min", "logsnr_max")
        expected = of_mean if is_end else of_second
        sentence = "an end follows ∇E[L]" if is_end else "the shape follows ∇E[L²] = E[2 L ∇L]"
        off = float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        law(off < 1e-4, schedule, f"{sentence}: the gradient of {name} is off by {off:.2g}.")
