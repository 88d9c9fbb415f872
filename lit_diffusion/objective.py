"""Analyse an objective: its curves over λ, whether it is an ELBO, and its variance.

Letters: logsnr = λ, w the weight, p the density λ is sampled from, h(λ) the mean squared error
per dimension of the optimal denoiser for Gaussian data of variance c²,

    h(λ) = α²c²/(α²c² + σ²) = sigmoid(λ + 2 ln c)

It is the fraction of the noise that cannot be predicted at λ, so w h shows where the loss is.
Integration by parts, with B(λ) = ½∫h up to λ, the bound for data at noise level λ, gives

    ½∫ w h dλ = w(λ_max) B(λ_max) − w(λ_min) B(λ_min) + ∫ (−dw/dλ) B(λ) dλ

If w never increases, all coefficients but the constant one are positive, and the objective is a
mixture of bounds over noise levels, that is, the bound of noise-augmented data (Kingma & Gao 2023,
theorem 1). All of this is computed from the curves, never from the names of classes.
"""

from __future__ import annotations

import copy
import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffusion.predictions import Prediction
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.weightings import Weighting, chain_step

__all__ = ["NoiseMixture", "NoisePart", "Objective", "gaussian_error"]

_POINTS = 8001
_FLAT = 1e-6  # a relative increase up to this is rounding
_NAMED = 1e-2  # a density is named if its distribution function is closer than this


class NoisePart(NamedTuple):
    """The positive or the negative part of the mixture: its mass, and its mean and std in λ.

    Shapes:
        mass, mean and std are numbers; mean and std are nan if the mass is 0.
    """

    mass: float
    mean: float
    std: float


class NoiseMixture(NamedTuple):
    """The objective as a signed mixture of bounds over noise levels.

    `decreasing` is the part where w decreases, −dw/dλ > 0; `increasing` the part where it
    increases, which counts negatively; `clean` the point mass at λ_max. They are scaled so that
    `decreasing.mass + clean` is 1. If w is monotone, the scale is w(λ_min), `increasing.mass` is
    0, and the mixture is a probability distribution.
    """

    decreasing: NoisePart
    increasing: NoisePart
    clean: float


def gaussian_error(logsnr: Tensor, data_std: float = 0.5) -> Tensor:
    """The minimal E(ε̂ − ε)² per dimension for Gaussian data: h(λ) = sigmoid(λ + 2 ln c).

    Args:
        logsnr: λ.
        data_std: Standard deviation c of the data, above 0.

    Shapes:
        logsnr (B,); result (B,), of the same dtype.

    Example:
        >>> gaussian_error(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.0327, 0.2000, 0.6488])
    """
    return torch.sigmoid(logsnr + 2 * math.log(data_std))


def _moments(mass: Tensor, logsnr: Tensor) -> NoisePart:
    total = float(mass.sum())
    if not total > 0:
        return NoisePart(0.0, math.nan, math.nan)
    mean = float((mass * logsnr).sum()) / total
    variance = float((mass * (logsnr - mean) ** 2).sum()) / total
    return NoisePart(total, mean, math.sqrt(variance))


def _number(value: float) -> str:
    """At most two decimals without trailing zeros, and with a proper minus sign."""
    text = f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")
    return text.replace("-", "−")


def _quantiles(share: Tensor, logsnr: Tensor, at: tuple[float, ...]) -> list[float]:
    """Quantiles of a distribution function on the grid, by linear interpolation."""
    wanted = torch.tensor(at, dtype=share.dtype)
    after = torch.searchsorted(share, wanted).clamp(1, len(share) - 1)
    below, above = share[after - 1], share[after]
    inside = (wanted - below) / (above - below)
    found: list[float] = torch.lerp(logsnr[after - 1], logsnr[after], inside).tolist()
    return found


class Objective:
    """Analyses a schedule, a weighting and a prediction as one objective.

    It answers, before anything is trained, which errors count, whether the objective is a
    likelihood and of which data, and what the variance of its estimate is; `published` compares it
    with the objectives of papers. It works on CPU copies of its parts, learned ones in their
    current state.

    Args:
        schedule: Density p that λ is sampled from; its range is the range of all curves.
        weighting: Weight w on the squared error of ε.
        prediction: What the network outputs.
        num_timesteps: Number T of steps of a discrete chain, at least 1; None means continuous
            time.

    Raises:
        ValueError: If num_timesteps is below 1.

    References:
        Kingma & Gao (2023), Understanding Diffusion Objectives as the ELBO with Simple Data
        Augmentation, arXiv:2303.00848, theorem 1 and table 1.

    Example:
        >>> objective = Objective(CosineSchedule(), SigmoidWeighting(bias=2.0), EpsPrediction())
        >>> objective.monotone, round(objective.std_over_mean(), 2)
        (True, 0.84)
        >>> print(objective.meaning())
        Training on this objective maximises the ELBO of the data with Gaussian noise added
            at λ ~ Logistic(2, 1). A fraction of 1.5e-08 remains clean.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        weighting: Weighting,
        prediction: Prediction,
        num_timesteps: int | None = None,
    ) -> None:
        if num_timesteps is not None and num_timesteps < 1:
            raise ValueError(
                f"Objective: a chain needs at least 1 step, got num_timesteps={num_timesteps}."
            )
        self.schedule = copy.deepcopy(schedule).cpu()
        self.weighting = copy.deepcopy(weighting).cpu()
        self.prediction = prediction
        self.num_timesteps = num_timesteps

    # Curves --------------------------------------------------------------------------------

    @cached_property
    def logsnr(self) -> Tensor:
        """λ at 8001 points of the schedule's range, (N,); all curves are given at these points."""
        return torch.linspace(*self.schedule.ends, _POINTS, dtype=torch.float64)

    @cached_property
    def weight(self) -> Tensor:
        """w(λ), the weight on ‖ε̂ − ε‖²."""
        return self.weight_at(self.logsnr)

    @torch.no_grad()
    def weight_at(self, logsnr: Tensor) -> Tensor:
        """w(λ) at any λ.

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); result (B,), float64, detached.
        """
        return self.weighting(logsnr).double()

    @cached_property
    def density(self) -> Tensor:
        """p(λ), the density λ is sampled from; for a chain, the density of its levels."""
        return self.schedule.log_prob(self.logsnr).exp()

    @cached_property
    def ratio(self) -> Tensor:
        """w/p, the factor on a sampled error; for a chain w·T·expm1(λ_s − λ)."""
        return self._ratio(self.logsnr)

    @torch.no_grad()
    def _ratio(self, logsnr: Tensor) -> Tensor:
        if self.num_timesteps is None:
            return self.weight_at(logsnr) * torch.exp(-self.schedule.log_prob(logsnr))
        step = chain_step(self.schedule, self.num_timesteps, logsnr)
        return self.weight_at(logsnr) * self.num_timesteps * torch.expm1(step)

    def weight_on(self, prediction: Prediction) -> Tensor:
        """The equivalent weight on the error of another target: w·`eps_error_scale`.

        Args:
            prediction: The prediction that defines the target.

        Example:
            >>> objective = Objective(LinearSchedule(-2.0, 2.0), ELBOWeighting(), VPrediction())
            >>> objective.weight_on(XPrediction())[[0, 4000, 8000]]  # e^λ
            tensor([0.1353, 1.0000, 7.3891], dtype=torch.float64)
        """
        return self.weight * prediction.eps_error_scale(self.logsnr)

    def loss_density(self, data_std: float = 0.5) -> Tensor:
        """The density of the loss over λ, w h/∫ w h, for Gaussian data and the optimal denoiser.

        Args:
            data_std: Standard deviation c of the data, above 0.
        """
        loss = self.weight * gaussian_error(self.logsnr, data_std)
        return loss / torch.trapezoid(loss, self.logsnr)

    # Likelihood ----------------------------------------------------------------------------

    def increasing_intervals(self) -> list[tuple[float, float]]:
        """The intervals of λ on which w increases, none if it is monotone; to 1/8000 of the range.

        Increases by less than one part in a million are taken for rounding.

        Example:
            >>> edm = Objective(NormalSchedule(), EDMWeighting(), EDMPrediction())
            >>> [(round(low, 2), round(high, 2)) for low, high in edm.increasing_intervals()]
            [(-20.0, -3.31)]
        """
        up = torch.nn.functional.pad((self.weight.diff() > 0).int(), (1, 1)).diff()
        runs = zip(up.eq(1).nonzero().tolist(), up.eq(-1).nonzero().tolist(), strict=True)
        return [
            (float(self.logsnr[first]), float(self.logsnr[last]))
            for (first,), (last,) in runs
            if float(self.weight[last]) > (1 + _FLAT) * float(self.weight[first])
        ]

    @property
    def monotone(self) -> bool:
        """Whether w never increases with λ, so that the loss is a bound on a likelihood."""
        return not self.increasing_intervals()

    def augmentation_density(self) -> Tensor:
        """−dw/dλ in the scale of `mixture`, at the midpoints of the grid, (N − 1,).

        If w is monotone, this is the density of the augmentation noise, apart from the point mass
        on clean data; where w increases it is negative.
        """
        return -self.weight.diff() / self._whole / self.logsnr.diff()

    @cached_property
    def _whole(self) -> float:
        """The total decrease of w, plus w(λ_max); equal to w(λ_min) if w is monotone."""
        return float((-self.weight.diff()).clamp(min=0).sum() + self.weight[-1])

    def mixture(self) -> NoiseMixture:
        """The mixture of noise levels over which the loss is a bound; signed if w increases.

        Example:
            >>> mixture = Objective(CosineSchedule(), SigmoidWeighting(), VPrediction()).mixture()
            >>> noise = mixture.decreasing
            >>> f"{noise.mean:.2f} ± {noise.std:.2f}, clean {mixture.clean:.1e}"
            '2.00 ± 1.81, clean 1.5e-08'
        """
        middle = (self.logsnr[1:] + self.logsnr[:-1]) / 2
        mass = -self.weight.diff() / self._whole
        increase = (-mass).clamp(min=0) if not self.monotone else torch.zeros_like(mass)
        return NoiseMixture(
            _moments(mass.clamp(min=0), middle),
            _moments(increase, middle),
            float(self.weight[-1]) / self._whole,
        )

    def augmentation_name(self) -> str:
        """The augmentation noise of a monotone objective, by the name of its density if known.

        Known are Logistic(mean, scale), Normal(mean, std) and λ_min + Exponential(scale), matched
        if the distribution functions differ by less than 0.01; otherwise mean and std are given.

        Example:
            >>> objective = Objective(CosineSchedule(), ExponentialWeighting(), VPrediction())
            >>> objective.augmentation_name()
            'λ ~ −20 + Exponential(2)'
        """
        fall = (-self.weight.diff()).clamp(min=0)
        share = torch.nn.functional.pad(fall.cumsum(0) / fall.sum(), (1, 0))
        first, median, third = _quantiles(share, self.logsnr, (0.25, 0.5, 0.75))
        low = float(self.logsnr[0])
        logistic, std = (third - first) / (2 * math.log(3)), (third - first) / 1.3489795
        scale = (median - low) / math.log(2)
        candidates = {
            f"Logistic({_number(median)}, {_number(logistic)})": torch.sigmoid(
                (self.logsnr - median) / logistic
            ),
            f"Normal({_number(median)}, {_number(std)})": torch.special.ndtr(
                (self.logsnr - median) / std
            ),
            f"{_number(low)} + Exponential({_number(scale)})": -torch.expm1(
                -(self.logsnr - low) / scale
            ),
        }
        away = {name: float((cdf - share).abs().max()) for name, cdf in candidates.items()}
        name = min(away, key=lambda name: away[name])
        if away[name] < _NAMED:
            return f"λ ~ {name}"
        part = self.mixture().decreasing
        return f"λ with mean {_number(part.mean)} and std {_number(part.std)}"

    def meaning(self) -> str:
        """The objective in words: the ELBO that training maximises, or why it is not one."""
        mixture = self.mixture()
        if self.monotone and mixture.decreasing.mass < _FLAT:
            return "Training on this objective maximises the ELBO of the data themselves."
        if self.monotone:
            return (
                "Training on this objective maximises the ELBO of the data with Gaussian noise "
                f"added at {self.augmentation_name()}. A fraction of {mixture.clean:.2g} remains "
                "clean."
            )
        where = ", ".join(
            f"[{_number(low)}, {_number(high)}]" for low, high in self.increasing_intervals()
        )
        parts = [
            f"mass {sign}{_number(part.mass)} (mean {_number(part.mean)}, std {_number(part.std)})"
            for sign, part in (("+", mixture.decreasing), ("−", mixture.increasing))
        ]
        return (
            f"This objective is not an ELBO under noise augmentation: w increases on {where}, "
            f"where {self.share_increasing():.1%} of the expected loss is. Integration by parts "
            "gives a signed mixture of ELBOs over the λ of added noise, with "
            f"{' and '.join(parts)}; the fraction of clean data is {mixture.clean:.2g}."
        )

    def share_increasing(self, data_std: float = 0.5) -> float:
        """The fraction of the expected loss where w increases: Gaussian data, optimal denoiser.

        Args:
            data_std: Standard deviation c of the data, above 0.

        Example:
            >>> edm = Objective(NormalSchedule(), EDMWeighting(), EDMPrediction())
            >>> f"{edm.share_increasing():.1%}"
            '0.9%'
        """
        loss = self.loss_density(data_std)
        share = 0.0
        for low, high in self.increasing_intervals():
            inside = (self.logsnr >= low) & (self.logsnr <= high)
            share += float(torch.trapezoid(loss[inside], self.logsnr[inside]))
        return share

    # The estimate --------------------------------------------------------------------------

    def std_over_mean(self, data_std: float = 0.5, dims: int = 192) -> float:
        """Standard deviation over mean of a single-sample loss: Gaussian data, optimal denoiser.

        The mean is ∫ w h dλ and the second moment (1 + 2/D) ∫ w²h²/p dλ, as D Gaussian errors are
        averaged; for a chain both are means over its levels. This is what a schedule can reduce,
        to √(2/D) at best.

        Args:
            data_std: Standard deviation c of the data, above 0.
            dims: Number D of dimensions, at least 1.

        Example:
            >>> cosine = Objective(CosineSchedule(), ELBOWeighting(), EpsPrediction())
            >>> uniform = Objective(LinearSchedule(), ELBOWeighting(), EpsPrediction())
            >>> round(cosine.std_over_mean(), 1), round(uniform.std_over_mean(), 2)
            (20.1, 1.03)
        """
        if self.num_timesteps is None:
            loss = self.weight * gaussian_error(self.logsnr, data_std)
            mean = torch.trapezoid(loss, self.logsnr)
            # Where w and p are both 0 the contribution is 0, not nan.
            square = torch.where(loss > 0, loss * self.ratio, 0.0)
            square = square * gaussian_error(self.logsnr, data_std)
            second = torch.trapezoid(square, self.logsnr)
        else:
            with torch.no_grad():
                levels = self.schedule.grid(self.num_timesteps)[:-1]
            losses = self._ratio(levels) * gaussian_error(levels, data_std)
            mean, second = losses.mean(), losses.square().mean()
        return math.sqrt(max(0.0, float(second * (1 + 2 / dims) / mean**2) - 1))
