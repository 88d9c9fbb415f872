"""Noise schedules: a family of densities p(λ), one for each way of choosing noise levels.

`base` says what a schedule is, `textbook` has the published formulas, `learned` and `adaptive`
those that change during training, `table` a list of noise levels. A class of your own joins the
registry by subclassing `NoiseSchedule`.
"""

from lit_diffusion.registry import Registry
from lit_diffusion.schedules.adaptive import AdaptiveSchedule
from lit_diffusion.schedules.base import NoiseSchedule, stratified_times
from lit_diffusion.schedules.learned import LearnedSchedule
from lit_diffusion.schedules.table import TableSchedule, chain_levels
from lit_diffusion.schedules.textbook import (
    BetaSchedule,
    CosineSchedule,
    FlowSchedule,
    KarrasSchedule,
    LaplaceSchedule,
    LinearSchedule,
    NormalSchedule,
    ShiftedSchedule,
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
    "stratified_times",
]

SCHEDULES: Registry[NoiseSchedule] = Registry(NoiseSchedule)  # type: ignore[type-abstract]
