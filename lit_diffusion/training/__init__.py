"""The training wing: the only part of the house that knows Lightning, data and dashboards."""

from lit_diffusion.training.callbacks import (
    EMA,
    FID,
    AdaptiveScheduleUpdate,
    Averages,
    Compile,
    Guard,
    LastCheckpoint,
    Likelihood,
    NoiseLevelLoss,
    Overview,
    RankWatch,
    SampleGrid,
    Throughput,
)
from lit_diffusion.training.data.module import ImageDataModule
from lit_diffusion.training.evaluation.features import ClassifierFeatures, InceptionFeatures
from lit_diffusion.training.learning_rates import WarmupDecayLR
from lit_diffusion.training.module import LitDiffusion

__all__ = [
    "EMA",
    "FID",
    "AdaptiveScheduleUpdate",
    "Averages",
    "ClassifierFeatures",
    "Compile",
    "Guard",
    "ImageDataModule",
    "InceptionFeatures",
    "LastCheckpoint",
    "Likelihood",
    "LitDiffusion",
    "NoiseLevelLoss",
    "Overview",
    "RankWatch",
    "SampleGrid",
    "Throughput",
    "WarmupDecayLR",
]
