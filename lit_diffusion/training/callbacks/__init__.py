"""Callbacks: what may be added to a run without touching the model."""

from lit_diffusion.training.callbacks.adaptive_schedule import AdaptiveScheduleUpdate
from lit_diffusion.training.callbacks.averages import Averages
from lit_diffusion.training.callbacks.compile import Compile
from lit_diffusion.training.callbacks.ema import EMA
from lit_diffusion.training.callbacks.fid import FID
from lit_diffusion.training.callbacks.guard import Guard
from lit_diffusion.training.callbacks.last_checkpoint import LastCheckpoint
from lit_diffusion.training.callbacks.likelihood import Likelihood
from lit_diffusion.training.callbacks.noise_level_loss import NoiseLevelLoss
from lit_diffusion.training.callbacks.overview import Overview
from lit_diffusion.training.callbacks.rank_watch import RankWatch
from lit_diffusion.training.callbacks.sample_grid import SampleGrid
from lit_diffusion.training.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "FID",
    "AdaptiveScheduleUpdate",
    "Averages",
    "Compile",
    "Guard",
    "LastCheckpoint",
    "Likelihood",
    "NoiseLevelLoss",
    "Overview",
    "RankWatch",
    "SampleGrid",
    "Throughput",
]
