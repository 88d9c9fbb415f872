"""Whose objective it is: the published ones, and the distance to them.

Letters: logsnr = λ, w the weight, p the density that λ is sampled from, h the error of the best
denoiser for Gaussian data (`gaussian_error`).

Two objectives are compared by their curves, whatever their classes are called: a wrapper or a
plug-in with the same curves is the same objective. See `objective` for the curves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffusion.objective import Objective, gaussian_error
from lit_diffusion.predictions import (
    EDMPrediction,
    EpsPrediction,
    FlowPrediction,
    VPrediction,
    XPrediction,
)
from lit_diffusion.schedules import (
    BetaSchedule,
    CosineSchedule,
    FlowSchedule,
    LinearSchedule,
    NormalSchedule,
)
from lit_diffusion.weightings import (
    DensityWeighting,
    EDMWeighting,
    ELBOWeighting,
    ExponentialWeighting,
    InDIWeighting,
    MinSNRWeighting,
    MonotoneWeighting,
    P2Weighting,
    PosteriorMeanWeighting,
    SechWeighting,
    SigmoidWeighting,
    SoftMinSNRWeighting,
    VariationalWeighting,
)

__all__ = ["PUBLISHED", "ObjectiveDistance", "nearest_published", "objective_distance"]

_DATA_STD = 0.5  # of the Gaussian data that the distance is measured on
_POINTS = 8001


class ObjectiveDistance(NamedTuple):
    """How far two objectives are apart: three numbers from 0 to 1, and `total`.

    `weight` is ½∫|f − f'| dλ for f = w h/∫w h on the common range: factors of w drop out, and
    levels where nothing is at stake do not count. `density` is ½∫|p − p'| dλ over both ranges.
    `prediction` is the mean, under the first one's f, of ‖r − r'‖/(‖r‖ + ‖r'‖) for the rows
    r = (a c, b) of their targets, the sign of a target being free. h and c are those of Gaussian
    data of standard deviation c = 0.5.
    """

    weight: float
    density: float
    prediction: float

    @property
    def total(self) -> float:
        """The sum weight + (density + prediction)/4: only the weight changes what is optimised."""
        return self.weight + (self.density + self.prediction) / 4


def _loss_density(objective: Objective, logsnr: Tensor) -> Tensor:
    loss = objective.weight_at(logsnr) * gaussian_error(logsnr, _DATA_STD)
    return loss / torch.trapezoid(loss, logsnr)


def _density(objective: Objective, logsnr: Tensor) -> Tensor:
    """p, linear between the points of the objective's own grid: a learned one is dear to ask."""
    low, high = objective.schedule.ends
    place = (logsnr - low) / (high - low) * (len(objective.logsnr) - 1)
    left = place.floor().clamp(0, len(objective.logsnr) - 2).long()
    p = torch.lerp(objective.density[left], objective.density[left + 1], place - left)
    return torch.where((logsnr < low) | (logsnr > high), 0.0, p)


def objective_distance(objective: Objective, other: Objective) -> ObjectiveDistance:
    """How far two objectives are apart in weight, density and prediction.

    Args:
        objective: The one.
        other: The other. If the two ranges have nothing in common, weight and prediction are 1.

    Example:
        >>> v = Objective(CosineSchedule(), ExponentialWeighting(), VPrediction())
        >>> flow = Objective(FlowSchedule(), ExponentialWeighting(), FlowPrediction())
        >>> [round(number, 2) for number in objective_distance(v, flow)]
        [0.0, 0.09, 0.23]
    """
    ends = [*objective.schedule.ends, *other.schedule.ends]
    both = torch.linspace(min(ends), max(ends), _POINTS, dtype=torch.float64)
    p, q = (_density(part, both) for part in (objective, other))
    density = float(torch.trapezoid((p - q).abs(), both)) / 2
    low, high = max(ends[0], ends[2]), min(ends[1], ends[3])
    if not low < high:
        return ObjectiveDistance(1.0, density, 1.0)
    logsnr = torch.linspace(low, high, _POINTS, dtype=torch.float64)
    f, g = (_loss_density(part, logsnr) for part in (objective, other))
    c = torch.tensor([[_DATA_STD], [1.0]], dtype=torch.float64)
    r, s = (c * torch.stack(part.prediction.coefficients(logsnr)) for part in (objective, other))
    longest = r.norm(dim=0) + s.norm(dim=0)
    rows = [float(torch.trapezoid(f * (r + k * s).norm(dim=0) / longest, logsnr)) for k in (1, -1)]
    return ObjectiveDistance(
        float(torch.trapezoid((f - g).abs(), logsnr)) / 2, min(1.0, density), min(rows)
    )


def nearest_published(objective: Objective, n: int = 3) -> list[tuple[str, ObjectiveDistance]]:
    """The names of the nearest of `PUBLISHED` by the total distance, and how far they are.

    Below a total of 0.001 an objective is the published one.

    Args:
        objective: Any objective.
        n: How many, the nearest first.

    Example:
        >>> mine = Objective(CosineSchedule(), SigmoidWeighting(bias=1.0), EpsPrediction())
        >>> [(name, round(distance.total, 2)) for name, distance in nearest_published(mine, n=2)]
        [('sigmoid', 0.12), ('min-snr', 0.16)]
    """
    found = {name: objective_distance(objective, other) for name, other in PUBLISHED.items()}
    return sorted(found.items(), key=lambda item: item[1].total)[:n]


#: Name → objective, on the ranges of the overlays of the same names in `configs/objective/`.
PUBLISHED: dict[str, Objective] = {
    "ddpm": Objective(
        BetaSchedule(),
        DensityWeighting(BetaSchedule(), num_timesteps=999),
        EpsPrediction(),
        num_timesteps=999,
    ),
    "ddpm-bound": Objective(
        BetaSchedule(), VariationalWeighting(), EpsPrediction(), num_timesteps=999
    ),
    "ddpm-mean": Objective(
        BetaSchedule(), PosteriorMeanWeighting(), EpsPrediction(), num_timesteps=999
    ),
    "edm": Objective(NormalSchedule(), EDMWeighting(), EDMPrediction()),
    "edm-monotonic": Objective(NormalSchedule(), MonotoneWeighting(), EDMPrediction()),
    "flow-matching": Objective(FlowSchedule(), ExponentialWeighting(), FlowPrediction()),
    "iddpm": Objective(CosineSchedule(), SechWeighting(), EpsPrediction()),
    "indi": Objective(FlowSchedule(), InDIWeighting(), XPrediction()),
    "min-snr": Objective(CosineSchedule(), MinSNRWeighting(), EpsPrediction()),
    "p2": Objective(CosineSchedule(), P2Weighting(), EpsPrediction()),
    "sigmoid": Objective(CosineSchedule(), SigmoidWeighting(), EpsPrediction()),
    "soft-min-snr": Objective(NormalSchedule(), SoftMinSNRWeighting(), EDMPrediction()),
    "v-cosine": Objective(CosineSchedule(), ExponentialWeighting(), VPrediction()),
    "vdm": Objective(LinearSchedule(-5.0, 13.3), ELBOWeighting(), EpsPrediction()),
}
