"""The training wing: the only part of the house that knows Lightning, data and dashboards."""

from lit_diffusion.training.callbacks import EMA, LastCheckpoint, Likelihood, SampleGrid
from lit_diffusion.training.data import ImageDataModule
from lit_diffusion.training.learning_rates import WarmupDecayLR
from lit_diffusion.training.module import LitDiffusion

__all__ = [
    "EMA",
    "ImageDataModule",
    "LastCheckpoint",
    "Likelihood",
    "LitDiffusion",
    "SampleGrid",
    "WarmupDecayLR",
]
