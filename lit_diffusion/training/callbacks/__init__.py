"""Callbacks: what may be added to a run without touching the model."""

from lit_diffusion.training.callbacks.ema import EMA
from lit_diffusion.training.callbacks.last_checkpoint import LastCheckpoint
from lit_diffusion.training.callbacks.likelihood import Likelihood
from lit_diffusion.training.callbacks.sample_grid import SampleGrid

__all__ = ["EMA", "LastCheckpoint", "Likelihood", "SampleGrid"]
