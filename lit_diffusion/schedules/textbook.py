"""The family of noise schedules: which published p(λ) is which.

Letters: logsnr = λ; t ∈ [0, 1] from clean data to noise; see `noise_schedule` for what all of
them share. As densities over λ the well-known names are::

    uniform              LinearSchedule     VDM's fixed schedule
    hyperbolic secant    CosineSchedule     improved DDPM, and most image models since
    logistic             FlowSchedule       flow matching, rectified flow (uniform t)
    normal               NormalSchedule     EDM's training; Stable Diffusion 3's logit-normal
    Laplace              LaplaceSchedule    improved noise schedule
    from linear betas    BetaSchedule       DDPM
    exponential          KarrasSchedule     EDM's sampling grid
    learned              LearnedSchedule    VDM
    a histogram          AdaptiveSchedule   VDM++
    a published table    TableSchedule      improved DDPM's chain, and any other
    any of them, moved   ShiftedSchedule    larger images

To add one: subclass `NoiseSchedule`, give `_logsnr`; `testing.check_schedule` proves it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.schedules.base import NoiseSchedule

__all__ = [
    "BetaSchedule",
    "CosineSchedule",
    "FlowSchedule",
    "KarrasSchedule",
    "LaplaceSchedule",
    "LinearSchedule",
    "NormalSchedule",
    "ShiftedSchedule",
]


class LinearSchedule(NoiseSchedule):
    """Linear in λ, the uniform density: λ = logsnr_max + (logsnr_min − logsnr_max) t.

    Every noise level is visited equally: the plain estimate of the integral, and the natural
    start where nothing is known about the loss.

    Args:
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.
        learn: Whether both ends are learned, from the values above (the "scalar" schedule of VDM);
            the loss then needs a decoder.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, appendix H.

    Example:
        >>> LinearSchedule(-10.0, 10.0).logsnr(torch.tensor([0.0, 0.25, 1.0]))
        tensor([ 10.,   5., -10.], dtype=torch.float64)
    """

    def __init__(
        self,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
        learn: bool = False,
    ) -> None:
        low = -20.0 if logsnr_min is None else float(logsnr_min)
        high = 20.0 if logsnr_max is None else float(logsnr_max)
        super().__init__(low, high, support=(low, high), learn_ends=learn)
        self.learn = learn

    def _logsnr(self, t: Tensor) -> Tensor:
        # Learned ends are float32 numbers: each meets a float64 one before they meet one another.
        return self.logsnr_max * (1 - t) + self.logsnr_min * t

    def _time(self, logsnr: Tensor) -> Tensor:
        low, high = self.ends
        return (high - logsnr) / (high - low)

    def _slope(self, t: Tensor, s: Tensor) -> Tensor | None:
        if isinstance(self.logsnr_min, Tensor) or isinstance(self.logsnr_max, Tensor):
            return None  # to read learned ends would be to wait for the device
        return torch.full_like(t, self.logsnr_min - self.logsnr_max)


class CosineSchedule(NoiseSchedule):
    """Cosine, p(λ) = sech(λ/2)/2π: λ = −2 log tan(πt/2), so that α = cos(πt/2).

    The standard for images: most effort near λ = 0, where shapes are decided.

    Args:
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.

    References:
        Nichol & Dhariwal (2021), Improved DDPM, arXiv:2102.09672, Eq. 17 (without its offset);
        Kingma & Gao (2023), arXiv:2303.00848, table 1.

    Example:
        >>> CosineSchedule().log_prob(torch.tensor([0.0, 5.0])).exp()
        tensor([0.1592, 0.0260], dtype=torch.float64)
    """

    centre = 0.0

    def __init__(self, logsnr_min: float | None = None, logsnr_max: float | None = None) -> None:
        super().__init__(logsnr_min, logsnr_max)

    def _logsnr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(math.pi / 2 * t))

    def _time(self, logsnr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-logsnr / 2))

    def _slope(self, t: Tensor, s: Tensor) -> Tensor:
        return -2 * math.pi / torch.sin(math.pi * torch.minimum(t, s))


class FlowSchedule(NoiseSchedule):
    """Flow matching with uniform t, p(λ) = sech²(λ/4)/8: λ = 2 log((1 − t)/t).

    The path of rectified flow and of optimal transport, (1 − t)x + tε, in λ: a logistic density
    of scale 2.

    Args:
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.

    References:
        Lipman et al. (2022), Flow Matching for Generative Modeling, arXiv:2210.02747, Eq. 20;
        Kingma & Gao (2023), arXiv:2303.00848, table 1.

    Example:
        >>> FlowSchedule().log_prob(torch.tensor([0.0, 5.0])).exp()
        tensor([0.1250, 0.0351], dtype=torch.float64)
    """

    centre = 0.0

    def __init__(self, logsnr_min: float | None = None, logsnr_max: float | None = None) -> None:
        super().__init__(logsnr_min, logsnr_max)

    def _logsnr(self, t: Tensor) -> Tensor:
        return -2 * torch.logit(t)

    def _time(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2)

    def _slope(self, t: Tensor, s: Tensor) -> Tensor:
        return -2 / (t * s)


class NormalSchedule(NoiseSchedule):
    """Normal, p(λ) = N(λ; mean, std²): λ = mean − std·Φ⁻¹(t).

    The defaults are EDM's training density (ln σ of its z/α frame is N(−1.2, 1.2²)). The
    logit-normal density of Stable Diffusion 3 is the same family: t = sigmoid(N(m, s²)) on the
    flow path is mean = −2m, std = 2s.

    Args:
        mean: Mean of λ.
        std: Standard deviation of λ, above 0.
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.

    Raises:
        ValueError: If std is not positive.

    References:
        Karras et al. (2022), Elucidating the Design Space of Diffusion-Based Generative Models,
        arXiv:2206.00364, table 1; Esser et al. (2024), Scaling Rectified Flow Transformers,
        arXiv:2403.03206, Eq. 19.

    Example:
        >>> NormalSchedule().logsnr(torch.tensor([0.5]))
        tensor([2.4000], dtype=torch.float64)
    """

    def __init__(
        self,
        mean: float = 2.4,
        std: float = 2.4,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        super().__init__(logsnr_min, logsnr_max)
        if not std > 0:
            raise ValueError(f"NormalSchedule: std must be above 0, got {std}.")
        self.mean = self.centre = mean
        self.std = std

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.mean - self.std * torch.special.ndtri(t)

    def _time(self, logsnr: Tensor) -> Tensor:
        # Not ndtr, which loses the tail below 1e-16.
        return 0.5 * torch.special.erfc((logsnr - self.mean) / (self.std * math.sqrt(2)))


class LaplaceSchedule(NoiseSchedule):
    """Laplace, p(λ) = e^(−|λ − mean|/scale)/(2 scale): a sharp peak at one noise level.

    Chosen for fast training of images: effort is concentrated where signal and noise are equal.

    Args:
        mean: Log-SNR of the peak.
        scale: Width b, above 0.
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.

    Raises:
        ValueError: If scale is not positive.

    References:
        Hang & Gu (2024), Improved Noise Schedule for Diffusion Training, arXiv:2407.03297,
        table 1.

    Example:
        >>> LaplaceSchedule().log_prob(torch.tensor([0.0, 1.0])).exp()
        tensor([1.0000, 0.1353], dtype=torch.float64)
    """

    def __init__(
        self,
        mean: float = 0.0,
        scale: float = 0.5,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        super().__init__(logsnr_min, logsnr_max)
        if not scale > 0:
            raise ValueError(f"LaplaceSchedule: scale must be above 0, got {scale}.")
        self.mean = self.centre = mean
        self.scale = scale

    def _logsnr(self, t: Tensor) -> Tensor:
        distance = torch.where(t <= 0.5, -torch.log(2 * t), torch.log(2 * (1 - t)))
        return self.mean + self.scale * distance

    def _time(self, logsnr: Tensor) -> Tensor:
        distance = (logsnr - self.mean) / self.scale
        return torch.where(
            distance > 0,
            0.5 * torch.exp(-distance.clamp(min=0)),
            1 - 0.5 * torch.exp(distance.clamp(max=0)),
        )


class BetaSchedule(NoiseSchedule):
    """DDPM's chain with linear betas, made continuous: α² = Π(1 − β_i), β_i linear in i.

    At t = (i − 1)/(steps − 1) it passes the i-th level of the published table (to 1e-11), and
    between two levels it is the smooth sum −log α² = Σ −log(1 − β), summed by Euler-Maclaurin.
    `grid(steps - 1)` is therefore DDPM's own list of levels, from step `steps` to step 1.

    Args:
        beta_min: First beta, in (0, beta_max).
        beta_max: Last beta, in (beta_min, 1).
        steps: Length of the chain, at least 2.
        logsnr_min: Smallest λ; None means that of the last step, −10.12 for DDPM's values.
        logsnr_max: Largest λ; None means that of the first step, 9.21 for DDPM's values.

    Raises:
        ValueError: If the betas are not 0 < beta_min < beta_max < 1, or steps is below 2.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, section 4.

    Example:
        >>> BetaSchedule().logsnr(torch.tensor([0.0, 1.0]))
        tensor([  9.2102, -10.1177], dtype=torch.float64)
    """

    def __init__(
        self,
        beta_min: float = 1e-4,
        beta_max: float = 0.02,
        steps: int = 1000,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        if not 0 < beta_min < beta_max < 1:
            raise ValueError(
                "BetaSchedule: expected 0 < beta_min < beta_max < 1, "
                f"got beta_min={beta_min} and beta_max={beta_max}."
            )
        if steps < 2:
            raise ValueError(f"BetaSchedule: steps must be at least 2, got {steps}.")
        betas = torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)
        decay = -torch.log1p(-betas).cumsum(0)  # −log α² along the table
        ends = -torch.log(torch.expm1(decay[[-1, 0]]))
        super().__init__(logsnr_min, logsnr_max, support=(float(ends[0]), float(ends[1])))
        self.beta_min = beta_min
        self.beta_max = beta_max
        self.steps = steps

    def _decay(self, t: Tensor) -> Tensor:
        """−log α² after n = 1 + (steps − 1)t factors, as integral plus midpoint correction."""
        step = (self.beta_max - self.beta_min) / (self.steps - 1)
        first = self.beta_min - step / 2
        last = first + step * (1 + (self.steps - 1) * t)

        def integral(beta: Tensor) -> Tensor:
            return beta + (1 - beta) * torch.log1p(-beta)

        start = torch.full_like(t, first)
        correction = step / 24 * (1 / (1 - last) - 1 / (1 - start))
        return (integral(last) - integral(start)) / step - correction

    def _logsnr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._decay(t)))

    def _time(self, logsnr: Tensor) -> Tensor:
        # −log α² is a parabola in t up to O(β³): start there, then Newton's method.
        decay = torch.nn.functional.softplus(-logsnr)
        step = (self.beta_max - self.beta_min) / (self.steps - 1)
        first = self.beta_min - step / 2
        last = torch.sqrt(first**2 + 2 * step * decay)
        t = ((last - first) / step - 1) / (self.steps - 1)
        for _ in range(6):
            beta = first + step * (1 + (self.steps - 1) * t)
            slope = (self.steps - 1) * -torch.log1p(-beta)
            t = (t - (self._decay(t) - decay) / slope).clamp(0, 1)
        return t


class KarrasSchedule(NoiseSchedule):
    """EDM's sampling grid, linear in σ^(1/ρ) of the z/α frame: σ = e^(−λ/2).

    Steps grow shorter towards clean data, where the sampler's error would show. Meant for
    walking; as a training density it is p(λ) ∝ e^(−λ/2ρ).

    Args:
        sigma_min: Smallest noise level σ, above 0.
        sigma_max: Largest noise level σ, above sigma_min.
        rho: Curvature ρ, above 0; larger means more steps at low noise.
        logsnr_min: Smallest λ; None means −2 ln sigma_max.
        logsnr_max: Largest λ; None means −2 ln sigma_min.

    Raises:
        ValueError: If not 0 < sigma_min < sigma_max, or rho is not positive.

    References:
        Karras et al. (2022), Elucidating the Design Space of Diffusion-Based Generative Models,
        arXiv:2206.00364, Eq. 5.

    Example:
        >>> KarrasSchedule().grid(4)
        tensor([-8.7641, -5.7276, -1.8447,  3.5468, 12.4292], dtype=torch.float64)
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                "KarrasSchedule: expected 0 < sigma_min < sigma_max, "
                f"got sigma_min={sigma_min} and sigma_max={sigma_max}."
            )
        if not rho > 0:
            raise ValueError(f"KarrasSchedule: rho must be above 0, got {rho}.")
        support = (-2 * math.log(sigma_max), -2 * math.log(sigma_min))
        super().__init__(logsnr_min, logsnr_max, support=support)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def _logsnr(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return -2 * self.rho * torch.log(low + (high - low) * t)

    def _time(self, logsnr: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (torch.exp(-logsnr / (2 * self.rho)) - low) / (high - low)


class ShiftedSchedule(NoiseSchedule):
    """Another schedule moved along λ, then truncated: λ → λ + shift.

    Larger images need more noise to lose the same detail: for image side d, relative to 64, the
    shift is 2 ln(64/d), negative above 64.

    Args:
        base: The schedule to move; None means `CosineSchedule()`.
        shift: What is added to λ.
        logsnr_min: Smallest λ; None means the base's own (moved, if its formula ends there).
        logsnr_max: Largest λ; None means the base's own (moved, if its formula ends there).

    References:
        Hoogeboom et al. (2023), Simple Diffusion, arXiv:2301.11093, Eq. 4;
        Esser et al. (2024), arXiv:2403.03206, Eq. 23 (the same in flow time).

    Example:
        >>> ShiftedSchedule(shift=-2.0).logsnr(torch.tensor([0.5]))
        tensor([-1.9998], dtype=torch.float64)
    """

    def __init__(
        self,
        base: NoiseSchedule | None = None,
        shift: float = 0.0,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        base = CosineSchedule() if base is None else base
        if any(p.requires_grad for p in base.parameters()):
            raise ValueError(
                f"ShiftedSchedule: {type(base).__name__} is learned, shift and all: give it the "
                "shifted ends instead."
            )
        low, high = (end + shift for end in base.support)
        if logsnr_min is None:
            logsnr_min = low if math.isfinite(low) else base.ends[0]
        if logsnr_max is None:
            logsnr_max = high if math.isfinite(high) else base.ends[1]
        super().__init__(logsnr_min, logsnr_max, support=(low, high))
        self.base = base
        self.shift = shift

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.base._logsnr(t) + self.shift

    def _time(self, logsnr: Tensor) -> Tensor:
        return self.base._time(logsnr - self.shift)

    def _tail_logsnr(self, s: Tensor) -> Tensor:
        return self.base._tail_logsnr(s) + self.shift

    def _tail_time(self, logsnr: Tensor) -> Tensor:
        return self.base._tail_time(logsnr - self.shift)
