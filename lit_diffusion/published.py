"""Published objectives, and the distance of an objective to them.

Letters: logsnr = λ, w the weight, p the density that λ is sampled from, h the error of the
optimal denoiser for Gaussian data (`gaussian_error`).

Objectives are compared by their curves and not by the names of their classes: a wrapper or a
plug-in with the same curves is the same objective. The curves are defined in `objective`.
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
    NoiseSchedule,
    NormalSchedule,
)
from lit_diffusion.weightings import (
    DensityWeighting,
    EDMWeighting,
    ELBOWeighting,
    ExponentialWeighting,
    InDIWeighting,
    JiTWeighting,
    MaxSNRWeighting,
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

_DATA_STD = 0.5  # of the Gaussian data for which the distance is computed
_POINTS = 8001


class ObjectiveDistance(NamedTuple):
    """The distance between two objectives: three numbers from 0 to 1, and their `total`.

    `weight` is ½∫|f − f'| dλ for f = w h/∫w h on the common range: constant factors of w cancel,
    and levels without loss do not count. `density` is ½∫|p − p'| dλ over both ranges. `prediction`
    is the mean, under the first objective's f, of ‖r − r'‖/(‖r‖ + ‖r'‖) for the rows r = (a c, b)
    of the targets, up to the sign of a target. h and c are those of Gaussian data with c = 0.5.
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
    """Interpolate p on the objective's own grid: a learned density is expensive to evaluate."""
    low, high = objective.schedule.ends
    place = (logsnr - low) / (high - low) * (len(objective.logsnr) - 1)
    left = place.floor().clamp(0, len(objective.logsnr) - 2).long()
    p = torch.lerp(objective.density[left], objective.density[left + 1], place - left)
    return torch.where((logsnr < low) | (logsnr > high), 0.0, p)


def objective_distance(objective: Objective, other: Objective) -> ObjectiveDistance:
    """The distance between two objectives in weight, density and prediction.

    Args:
        objective: The first objective.
        other: The second one. If the ranges are disjoint, weight and prediction are 1.

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
    """The nearest of the `PUBLISHED` objectives, with their distances.

    With a total below 0.001 the objective is the published one.

    Args:
        objective: Any objective.
        n: Number of objectives to return, the nearest first.

    Example:
        >>> mine = Objective(CosineSchedule(), SigmoidWeighting(bias=1.0), EpsPrediction())
        >>> [(name, round(distance.total, 2)) for name, distance in nearest_published(mine, n=2)]
        [('sigmoid', 0.12), ('min-snr', 0.16)]
    """
    found = {name: objective_distance(objective, other) for name, other in PUBLISHED.items()}
    return sorted(found.items(), key=lambda item: item[1].total)[:n]


def _flow_loss(schedule: NoiseSchedule) -> Objective:
    """The unweighted squared error of ε − x at the times of a schedule."""
    prediction = FlowPrediction()
    return Objective(schedule, DensityWeighting(schedule, prediction=prediction), prediction)


#: Name → objective, with the ranges of the overlays of that name in `configs/objective/`.
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
    "jit": Objective(NormalSchedule(-1.6, 1.6), JiTWeighting(), XPrediction()),
    "max-snr": Objective(CosineSchedule(), MaxSNRWeighting(), XPrediction()),
    "min-snr": Objective(CosineSchedule(), MinSNRWeighting(), EpsPrediction()),
    "p2": Objective(
        BetaSchedule(),
        P2Weighting(schedule=BetaSchedule(), num_timesteps=999),
        EpsPrediction(),
        num_timesteps=999,
    ),
    "sd3": _flow_loss(NormalSchedule(0.0, 2.0)),
    "sd3-cosmap": _flow_loss(CosineSchedule()),
    "sd3-mode": _flow_loss(FlowSchedule(mode_scale=1.29)),
    "sigmoid": Objective(CosineSchedule(), SigmoidWeighting(), EpsPrediction()),
    "soft-min-snr": Objective(NormalSchedule(), SoftMinSNRWeighting(), EDMPrediction()),
    "v-cosine": Objective(CosineSchedule(), ExponentialWeighting(), VPrediction()),
    "vdm": Objective(LinearSchedule(-5.0, 13.3), ELBOWeighting(), EpsPrediction()),
}
