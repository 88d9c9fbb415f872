"""Noise schedules: densities p(λ) from which noise levels are sampled.

`base` defines a schedule, `textbook` contains the published formulas, `learned` and `adaptive` the
schedules that change during training, and `table` the one given by a list of noise levels. A
subclass of `NoiseSchedule` registers itself.
"""

from lit_diffusion.registry import Registry
from lit_diffusion.schedules.adaptive import AdaptiveSchedule
from lit_diffusion.schedules.base import NoiseSchedule
from lit_diffusion.schedules.beta import BetaSchedule
from lit_diffusion.schedules.learned import LearnedSchedule
from lit_diffusion.schedules.shifted import ShiftedSchedule
from lit_diffusion.schedules.table import TableSchedule, chain_levels
from lit_diffusion.schedules.textbook import (
    CosineSchedule,
    FlowSchedule,
    KarrasSchedule,
    LaplaceSchedule,
    LinearSchedule,
    NormalSchedule,
)

__all__ = [
    "SCHEDULES",
    "AdaptiveSchedule",
    "BetaSchedule",
    "CosineSchedule",
    "FlowSchedule",
    "KarrasSchedule",
    "LaplaceSchedule",
    "LearnedSchedule",
    "LinearSchedule",
    "NoiseSchedule",
    "NormalSchedule",
    "ShiftedSchedule",
    "TableSchedule",
    "chain_levels",
]

SCHEDULES: Registry[NoiseSchedule] = Registry(NoiseSchedule)  # type: ignore[type-abstract]
