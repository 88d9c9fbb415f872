"""Callbacks: what may be added to a run without touching the model.

Each file lists what is public in its own `__all__`: one line here makes it a name of the package.
"""

import lightning as L

from lit_diffusion.training.callbacks.adaptive_schedule import *
from lit_diffusion.training.callbacks.averages import *
from lit_diffusion.training.callbacks.compile import *
from lit_diffusion.training.callbacks.ema import *
from lit_diffusion.training.callbacks.fid import *
from lit_diffusion.training.callbacks.guard import *
from lit_diffusion.training.callbacks.last_checkpoint import *
from lit_diffusion.training.callbacks.likelihood import *
from lit_diffusion.training.callbacks.noise_level_loss import *
from lit_diffusion.training.callbacks.overview import *
from lit_diffusion.training.callbacks.predictions import *
from lit_diffusion.training.callbacks.sample_grid import *
from lit_diffusion.training.callbacks.sliced_wasserstein import *
from lit_diffusion.training.callbacks.throughput import *

__all__ = sorted(
    name
    for name, one in globals().items()
    if isinstance(one, type) and issubclass(one, L.Callback)
)
