"""The probability flow ODE: an exact density instead of a bound.

Letters: x data (B, *) of D dimensions; z noisy data at λ; div the divergence, Σ_i ∂f_i/∂z_i.

The solutions of this ordinary differential equation have the distribution of the noisy data at
every level::

    dz/dλ = f(z, λ) = ½ σ² z − ½ σ ε̂(z, λ)

It can be integrated from the data to pure noise, where the density is known. Along a solution the
log-density changes by the integral of the divergence::

    log p(z_λmax) = log N(z_λmin; 0, I) + ∫_{λmax → λmin} div f dλ

This is the log-likelihood of the model that a deterministic sampler samples from; the variational
bound is that of the ancestral sampler. It is a density, so discrete data must first be spread over
their bins, see `Dequantiser`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.gaussian import Generators, alpha_sigma, broadcast_to_data, noise_like
from lit_diffusion.grey_levels import Levels, level_borders, level_index, level_values
from lit_diffusion.predictions import Denoised

__all__ = ["Dequantiser", "TruncatedNormalDequantiser", "UniformDequantiser", "log_likelihood"]

Flow = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z, λ) → (dz/dλ, div)."""


class Dequantiser(ABC):
    """Spreads discrete data over their bins, so that they have a density.

    A subclass is a frozen dataclass with a field `levels` that defines `sample`. For any density
    q(z | x) on the bin of x, log P(x) ≥ E_q[log p(z) − log q(z | x)], so the result is a bound.
    """

    levels: Levels

    def __post_init__(self) -> None:
        """Reject invalid levels."""
        if isinstance(self.levels, list):
            object.__setattr__(self, "levels", tuple(self.levels))
        level_values(self.levels)

    @abstractmethod
    def sample(self, x: Tensor, logsnr: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        """Sample z at λ within the bin of each value, and return it with −log q(z | x).

        Args:
            x: Data on the grid of levels.
            logsnr: λ at which the flow starts.
            generator: Source of the noise.

        Shapes:
            x (B, *); logsnr (B,); z and −log q (B, *).
        """

    def _bins(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The borders of each value's bin; the outermost levels are at the centres of theirs."""
        values, borders = level_values(self.levels), level_borders(self.levels)
        low = torch.cat([2 * values[:1] - borders[:1], borders]).to(x.device, x.dtype)
        high = torch.cat([borders, 2 * values[-1:] - borders[-1:]]).to(x.device, x.dtype)
        index = level_index(x, self.levels)
        return low[index], high[index]


@dataclass(frozen=True)
class UniformDequantiser(Dequantiser):
    """Uniform noise over the bin: q(y | x) = 1/width, and the flow starts at z = α y.

    The usual choice, and the meaning of "bits per dimension" in older tables. To the bits of the
    density it adds log₂(1/width): 6.994 for bytes on [−1, 1], whose bins are 1/127.5 wide.

    Args:
        levels: Number of levels (see `level_values`), or their values.

    References:
        Theis et al. (2015), A Note on the Evaluation of Generative Models, arXiv:1511.01844,
        section 3.1.

    Example:
        >>> z, weight = UniformDequantiser().sample(torch.ones(1, 1), torch.tensor([15.0]), None)
        >>> weight / math.log(2)  # log₂ of the width
        tensor([[-6.9943]])
    """

    levels: Levels = 256

    def sample(self, x: Tensor, logsnr: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        """Z = α (x + u)."""
        low, high = self._bins(x)
        uniform = torch.special.ndtr(noise_like(x, generator))
        alpha = broadcast_to_data(alpha_sigma(logsnr)[0], x)
        return alpha * (low + (high - low) * uniform), torch.log(alpha * (high - low))


@dataclass(frozen=True)
class TruncatedNormalDequantiser(Dequantiser):
    """The noise of the process, truncated to the bin: z = α x + σ ε, ε truncated normal.

    The flow starts from noisy data z at λ_max, as seen in training, and not from clean data, which
    the network never sees. Compared with uniform noise the bound is tighter for a model that has
    learned the levels, and looser for one whose density is flat across a bin. Choose λ_max so that
    σ/α is about a third of half a bin, 13.3 for bytes.

    Args:
        levels: Number of levels (see `level_values`), or their values.

    References:
        Zheng et al. (2023), Improved Techniques for Maximum Likelihood Estimation for Diffusion
        ODEs, arXiv:2305.03935, section 3.1.

    Example:
        >>> dequantiser = TruncatedNormalDequantiser(256)
        >>> z, weight = dequantiser.sample(torch.zeros(1, 1) + 1, torch.tensor([13.3]), None)
        >>> bool((z - 1).abs() < 1 / 255)
        True
    """

    levels: Levels = 256

    def sample(self, x: Tensor, logsnr: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        """Z = α x + σ ε, with ε by inversion of its distribution function."""
        low, high = self._bins(x)
        alpha, sigma = (broadcast_to_data(c, x).double() for c in alpha_sigma(logsnr))
        first, last = (alpha * (border.double() - x.double()) / sigma for border in (low, high))
        below, inside = torch.special.ndtr(first), torch.special.ndtr(last)
        inside = inside - below
        uniform = torch.special.ndtr(noise_like(x, generator)).double()
        # The lower half from the lower tail, the upper half mirrored: full accuracy in both.
        upper = uniform > 0.5
        mass = torch.where(
            upper, torch.special.ndtr(-last) + (1 - uniform) * inside, below + uniform * inside
        )
        eps = torch.special.ndtri(mass.clamp(min=1e-300))
        eps = torch.where(upper, -eps, eps)
        weight = 0.5 * (eps**2 + math.log(2 * math.pi)) + torch.log(inside) + torch.log(sigma)
        return (alpha * x + sigma * eps).to(x.dtype), weight.to(x.dtype)


def log_likelihood(
    denoiser: Callable[..., Denoised],
    x: Tensor,
    logsnr_min: float = -15.0,
    logsnr_max: float = 15.0,
    dequantiser: Dequantiser | None = None,
    steps: int | None = 100,
    tolerance: float = 1e-5,
    probes: int | None = 1,
    samples: int = 1,
    generator: Generators = None,
    **cond: Any,
) -> Tensor:
    """Log p(x) by the probability flow ODE, in nats per dimension; divide by −ln 2 for bits.

    Args:
        denoiser: Called as denoiser(z, logsnr, **cond); differentiable in z.
        x: Data.
        logsnr_min: λ at the end of the flow, in noise.
        logsnr_max: λ at its start, at the data; both within the range of the denoiser's training.
        dequantiser: Spreads discrete data over their bins; the result is then a lower bound on the
            log-probability of the discrete x. None means continuous data, and a density.
        steps: Number of steps of the classical Runge-Kutta method (4 network calls each), uniform
            in λ; None means adaptive steps (Dormand and Prince, 6 calls each), with a step size
            of its own for each example, so that no result depends on the batch.
        tolerance: Error per adaptive step, of z and of the divergence per dimension, above 0.
        probes: Number of random vectors of ±1 that estimate the divergence (Hutchinson), constant
            along the path; None computes it exactly, with D backward passes instead of one per
            vector.
        samples: Number K of samples of the dequantiser per example, combined as log(1/K Σ e^…),
            a tighter bound than their mean. With random probes it is a bound only approximately,
            because the exponential of an unbiased estimate is biased.
        generator: Source of all noise: None, one generator, or one per example.
        **cond: Passed on to the denoiser (label=…).

    Shapes:
        x (B, *); result (B,), float64.

    Raises:
        ValueError: If a number is out of range, the data do not lie on the dequantiser's grid,
            there are several samples and no dequantiser, or the result is not finite.
        RuntimeError: If the adaptive steps become too small or too many.

    References:
        Song et al. (2020), Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Eq. 39;
        Grathwohl et al. (2018), FFJORD, arXiv:1810.01367, Eq. 7; Burda et al. (2015), Importance
        Weighted Autoencoders, arXiv:1509.00519, Eq. 8.

    Example:
        >>> x = 0.5 * torch.randn(4, 3)
        >>> exact = torch.distributions.Normal(0.0, 0.5).log_prob(x).mean(1)
        >>> found = log_likelihood(GaussianDenoiser(0.5), x, probes=None)
        >>> bool((found - exact).abs().max() < 1e-4)
        True
    """
    _check(logsnr_min, logsnr_max, dequantiser, steps, tolerance, probes, samples)
    dims = x[0].numel()
    first = torch.full((len(x),), float(logsnr_max), dtype=torch.float64, device=x.device)
    estimates = []
    # The divergence needs gradients, even where they are disabled for evaluation.
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone()
        for _ in range(samples):
            if dequantiser is None:
                alpha = broadcast_to_data(alpha_sigma(first)[0], x)
                z, weight = alpha * x, torch.log(alpha).expand_as(x)
            else:
                z, weight = dequantiser.sample(x, first, generator)
            vectors = None
            if probes is not None:
                ones = torch.ones_like(x)
                vectors = [torch.copysign(ones, noise_like(x, generator)) for _ in range(probes)]

            def flow(z: Tensor, logsnr: Tensor, vectors: Any = vectors) -> tuple[Tensor, Tensor]:
                return _flow(denoiser, z, logsnr, vectors, cond)

            if steps is None:
                z, divergence = _adaptive(flow, z, first, float(logsnr_min), tolerance)
            else:
                z, divergence = _fixed(flow, z, first, float(logsnr_min), steps)
            noise = -0.5 * (z.double() ** 2 + math.log(2 * math.pi)).flatten(1).sum(1)
            estimates.append(noise + divergence + weight.double().flatten(1).sum(1))
    total = torch.logsumexp(torch.stack(estimates), 0) - math.log(samples)
    if not bool(total.isfinite().all()):
        bad = int((~total.isfinite()).nonzero()[0])
        raise ValueError(
            f"The log-likelihood of example {bad} is {float(total[bad])} after integrating the "
            f"flow from λ = {logsnr_max:.6g} to {logsnr_min:.6g}: expected a finite number; check "
            "the network's output there, and the data."
        )
    return total / dims


def _check(
    logsnr_min: float,
    logsnr_max: float,
    dequantiser: Dequantiser | None,
    steps: int | None,
    tolerance: float,
    probes: int | None,
    samples: int,
) -> None:
    if dequantiser is not None and not isinstance(dequantiser, Dequantiser):
        raise TypeError(
            f"Expected a Dequantiser, such as UniformDequantiser(256), got {dequantiser!r}."
        )
    if not logsnr_min < logsnr_max:
        raise ValueError(
            f"logsnr_min must be below logsnr_max, got {logsnr_min} and {logsnr_max}."
        )
    for name, count in (("steps", steps), ("probes", probes), ("samples", samples)):
        if count is not None and count < 1:
            raise ValueError(f"log_likelihood: {name} must be at least 1, got {count}.")
    if not tolerance > 0:
        raise ValueError(f"log_likelihood: tolerance must be above 0, got {tolerance}.")
    if samples > 1 and dequantiser is None:
        raise ValueError(
            f"log_likelihood: samples={samples} requires a dequantiser to sample from: "
            "pass dequantiser=…, or samples=1."
        )


def _flow(
    denoiser: Callable[..., Denoised],
    z: Tensor,
    logsnr: Tensor,
    vectors: list[Tensor] | None,
    cond: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """dz/dλ and its divergence, in float64 (B,)."""
    z = z.detach().requires_grad_()
    _, sigma = alpha_sigma(logsnr)
    eps = denoiser(z, logsnr, **cond).eps
    field = broadcast_to_data(sigma**2 / 2, z) * z - broadcast_to_data(sigma / 2, z) * eps

    def along(direction: Tensor) -> Tensor:
        """The gradient of ⟨field, direction⟩."""
        (gradient,) = torch.autograd.grad((field * direction).sum(), z, retain_graph=True)
        return gradient

    if vectors is not None:
        products = [(v * along(v)).double().flatten(1).sum(1) for v in vectors]
        return field.detach(), torch.stack(products).mean(0)
    divergence = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for i in range(z[0].numel()):
        unit = torch.zeros_like(z[0]).flatten()
        unit[i] = 1
        divergence += along(unit.reshape(z.shape[1:]).expand_as(z)).flatten(1)[:, i].double()
    return field.detach(), divergence


def _fixed(flow: Flow, z: Tensor, first: Tensor, last: float, steps: int) -> tuple[Tensor, Tensor]:
    """Integrate the flow by the classical Runge-Kutta method of fourth order."""
    total = torch.zeros_like(first)
    h = (last - float(first[0])) / steps
    for i in range(steps):
        logsnr = first + i * h
        k1, d1 = flow(z, logsnr)
        k2, d2 = flow(z + h / 2 * k1, logsnr + h / 2)
        k3, d3 = flow(z + h / 2 * k2, logsnr + h / 2)
        k4, d4 = flow(z + h * k3, logsnr + h)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return z, total


# Dormand and Prince (1980), RK5(4)7M: nodes, stages, and the difference of the two solutions.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _adaptive(
    flow: Flow, z: Tensor, first: Tensor, last: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Integrate the flow with adaptive steps, of a size of its own for each example."""
    dims = z[0].numel()
    logsnr, total = first.clone(), torch.zeros_like(first)
    h = torch.full_like(first, -0.1)
    k: list[Tensor] = [torch.empty(0)] * 7
    d: list[Tensor] = [torch.empty(0)] * 7
    k[0], d[0] = flow(z, logsnr)
    for _ in range(10_000):
        remaining = last - logsnr
        if not bool((remaining < 0).any()):
            return z, total
        h = torch.maximum(h, remaining)  # both negative; a finished example stays
        step = broadcast_to_data(h, z)
        for i in range(1, 7):
            moved = z + step * sum(c * k[j] for j, c in enumerate(_STAGES[i]))
            k[i], d[i] = flow(moved, logsnr + _NODES[i] * h)
        gained = h * sum(c * d[j] for j, c in enumerate(_STAGES[6]))
        wrong = (step * sum(c * k[j] for j, c in enumerate(_ERROR))).double()
        error = torch.maximum(
            wrong.square().flatten(1).mean(1).sqrt(),
            (h * sum(c * d[j] for j, c in enumerate(_ERROR))).abs() / dims,
        )
        error = torch.where(error.isfinite(), error / tolerance, 1e6)
        good = error <= 1
        if bool((~good & (h > -1e-9)).any()):
            raise RuntimeError(
                f"The flow cannot be integrated at λ = {float(logsnr[~good][0]):.6g}: steps of "
                f"1e-9 have an error above {tolerance}. Raise the tolerance, or use fixed steps."
            )
        chosen = broadcast_to_data(good, z).bool()
        z = torch.where(chosen, moved, z)
        total = torch.where(good, total + gained, total)
        logsnr = torch.where(good, logsnr + h, logsnr)
        # The last stage of an accepted step is the first of the next.
        k[0], d[0] = torch.where(chosen, k[6], k[0]), torch.where(good, d[6], d[0])
        h = h * (0.9 * error.clamp(min=1e-8) ** -0.2).clamp(0.2, 5.0)
    raise RuntimeError(
        f"The flow did not reach its end within 10,000 steps: λ is still "
        f"{float(logsnr.max()):.6g}. Raise the tolerance, or use fixed steps."
    )
