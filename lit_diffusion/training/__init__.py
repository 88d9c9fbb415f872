"""The training wing: the only part of the house that knows Lightning, data and dashboards."""

from lit_diffusion.training import callbacks
from lit_diffusion.training.callbacks import *
from lit_diffusion.training.data.module import ImageDataModule
from lit_diffusion.training.evaluation.features import ClassifierFeatures, InceptionFeatures
from lit_diffusion.training.learning_rates import WarmupDecayLR
from lit_diffusion.training.module import LitDiffusion

__all__ = [
    *callbacks.__all__,
    "ClassifierFeatures",
    "ImageDataModule",
    "InceptionFeatures",
    "LitDiffusion",
    "WarmupDecayLR",
]
