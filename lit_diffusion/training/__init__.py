"""The training wing: the only part of the house that knows Lightning, data and dashboards."""

from lit_diffusion.training.callbacks import (
    EMA,
    AdaptiveScheduleUpdate,
    Guard,
    LastCheckpoint,
    Likelihood,
    NoiseLevelLoss,
    RankWatch,
    SampleGrid,
)
from lit_diffusion.training.data import ImageDataModule
from lit_diffusion.training.learning_rates import WarmupDecayLR
from lit_diffusion.training.module import LitDiffusion

__all__ = [
    "EMA",
    "AdaptiveScheduleUpdate",
    "Guard",
    "ImageDataModule",
    "LastCheckpoint",
    "Likelihood",
    "LitDiffusion",
    "NoiseLevelLoss",
    "RankWatch",
    "SampleGrid",
    "WarmupDecayLR",
]
