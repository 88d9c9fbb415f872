"""The published noise schedules that have a closed form.

Letters: logsnr = λ; t ∈ [0, 1] from clean data to noise; see `schedules.base` for what they share.
As densities over λ they are::

    uniform              LinearSchedule     VDM's fixed schedule
    hyperbolic secant    CosineSchedule     improved DDPM, and most image models since
    logistic             FlowSchedule       flow matching; Stable Diffusion 3's mode sampling
    normal               NormalSchedule     EDM's training; Stable Diffusion 3's logit-normal
    Laplace              LaplaceSchedule    improved noise schedule
    from linear betas    BetaSchedule       DDPM
    exponential          KarrasSchedule     EDM's sampling grid
    learned              LearnedSchedule    VDM
    a histogram          AdaptiveSchedule   VDM++
    a published table    TableSchedule      improved DDPM's chain, and any other
    any of them, shifted ShiftedSchedule    larger images

To add one, subclass `NoiseSchedule`, define `_logsnr`, and test it with `testing.check_schedule`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.domains import check_finite
from lit_diffusion.schedules.base import NoiseSchedule

__all__ = [
    "CosineSchedule",
    "FlowSchedule",
    "KarrasSchedule",
    "LaplaceSchedule",
    "LinearSchedule",
    "NormalSchedule",
]


class LinearSchedule(NoiseSchedule):
    """Linear in t, the uniform density: λ = logsnr_max + (logsnr_min − logsnr_max) t.

    All noise levels are sampled equally: the plain estimate of the integral, and the natural
    choice where nothing is known about the loss.

    Args:
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.
        learn: Whether both ends are learned, with these initial values (the "scalar" schedule of
            VDM); the loss then needs a decoder.

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
        low, high = self._range
        return high * (1 - t) + low * t

    def _time(self, logsnr: Tensor) -> Tensor:
        low, high = self.ends
        return (high - logsnr) / (high - low)

    def _slope(self, t: Tensor, s: Tensor) -> Tensor | None:
        if isinstance(self.logsnr_min, Tensor) or isinstance(self.logsnr_max, Tensor):
            return None  # reading learned ends would synchronise with the device
        return torch.full_like(t, self.logsnr_min - self.logsnr_max)


class CosineSchedule(NoiseSchedule):
    """Cosine, p(λ) = sech(λ/2)/2π: λ = −2 log tan(πt/2), so that α = cos(πt/2).

    The standard for images: most samples are near λ = 0, where the shapes are decided.

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

    The path (1 − t)x + tε of rectified flow and conditional optimal transport, in λ: a logistic
    density of scale 2. With a mode_scale it is Stable Diffusion 3's mode sampling, at the times
    t + mode_scale (t − sin²(πt/2)) of that path: its middle is sampled more often, but its ends
    keep a density of at least 1/(1 + mode_scale), while that of a logit-normal, `NormalSchedule`,
    falls to zero.

    Args:
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.
        mode_scale: From above −1 (the ends more often) to below 2/(π − 2) = 1.75 (the middle);
            0 is uniform t, and 1.29 a published choice.

    Raises:
        ValueError: If mode_scale is outside its domain, where the times would not increase.

    References:
        Lipman et al. (2022), Flow Matching for Generative Modeling, arXiv:2210.02747, Eq. 20;
        Kingma & Gao (2023), arXiv:2303.00848, table 1; Esser et al. (2024), Scaling Rectified
        Flow Transformers, arXiv:2403.03206, Eq. 20 (there in 1 − t).

    Example:
        >>> FlowSchedule().log_prob(torch.tensor([0.0, 5.0])).exp()
        tensor([0.1250, 0.0351], dtype=torch.float64)
        >>> FlowSchedule(mode_scale=1.29).log_prob(torch.tensor([0.0, 5.0])).exp()
        tensor([0.4741, 0.0169], dtype=torch.float64)
    """

    centre = 0.0

    def __init__(
        self,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
        mode_scale: float = 0.0,
    ) -> None:
        super().__init__(logsnr_min, logsnr_max)
        if not -1 < mode_scale < 2 / (math.pi - 2):
            raise ValueError(
                "FlowSchedule: mode_scale must be above −1 and below 2/(π − 2) = 1.75, "
                f"got {mode_scale}."
            )
        self.mode_scale = mode_scale

    def _path_time(self, t: Tensor) -> Tensor:
        """The time on the flow path."""
        if self.mode_scale == 0:
            return t
        return t + self.mode_scale * (t - torch.sin(math.pi / 2 * t) ** 2)

    def _path_rate(self, t: Tensor) -> Tensor:
        """Its derivative."""
        return 1 + self.mode_scale * (1 - math.pi / 2 * torch.sin(math.pi * t))

    def _logsnr(self, t: Tensor) -> Tensor:
        return -2 * torch.logit(self._path_time(t))

    def _time(self, logsnr: Tensor) -> Tensor:
        path = torch.sigmoid(-logsnr / 2)
        if self.mode_scale == 0:
            return path
        # Newton's method for Kepler's equation, on the half where t ≤ ½: there the time on the
        # path is concave (or convex, below 0), so the iteration is monotone from this start.
        near = torch.minimum(path, torch.sigmoid(logsnr / 2))
        t = (near / (1 + self.mode_scale)).clamp(max=0.5)
        for _ in range(25):
            t = t - (self._path_time(t) - near) / self._path_rate(t)
        return torch.where(path <= 0.5, t, 1 - t)

    def _slope(self, t: Tensor, s: Tensor) -> Tensor:
        near = torch.minimum(t, s)
        return -2 * self._path_rate(near) / (self._path_time(t) * self._path_time(s))


class NormalSchedule(NoiseSchedule):
    """Normal, p(λ) = N(λ; mean, std²): λ = mean − std·Φ⁻¹(t).

    The defaults are EDM's training density (ln σ ~ N(−1.2, 1.2²) in its coordinates z/α). The
    logit-normal density of Stable Diffusion 3 belongs to the same family: t = sigmoid(N(m, s²)) on
    the flow path is mean = −2m, std = 2s. (Its objective is the flow loss under that density,
    `DensityWeighting(NormalSchedule(−2m, 2s), prediction=FlowPrediction())`.)

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
        check_finite(self, mean=mean, std=std)
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

    Proposed for fast training on images: samples concentrate where signal and noise are equal.

    Args:
        mean: λ of the peak.
        scale: Scale parameter, above 0.
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
        check_finite(self, mean=mean, scale=scale)
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


class KarrasSchedule(NoiseSchedule):
    """EDM's sampling grid, linear in σ^(1/ρ) in its coordinates z/α: σ = e^(−λ/2).

    Steps become shorter towards clean data, where the sampler's error would be visible. Meant for
    sampling; as a training density it is p(λ) ∝ e^(−λ/2ρ).

    Args:
        sigma_min: Smallest noise level σ, above 0.
        sigma_max: Largest noise level σ, above sigma_min.
        rho: Curvature ρ, above 0; a larger value means more steps at low noise.
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
        check_finite(self, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
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
