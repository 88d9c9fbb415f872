"""Noise schedules: densities p(λ) from which noise levels are sampled.

`base` defines a schedule, `textbook` contains the published formulas, `learned` and `adaptive` the
schedules that change during training, and `table` the one given by a list of noise levels. A
subclass of `NoiseSchedule` registers itself.
"""

from lit_diffusion.registry import Registry
from lit_diffusion.schedules.adaptive import *
from lit_diffusion.schedules.base import *
from lit_diffusion.schedules.beta import *
from lit_diffusion.schedules.learned import *
from lit_diffusion.schedules.shifted import *
from lit_diffusion.schedules.table import *
from lit_diffusion.schedules.textbook import *

SCHEDULES: Registry[NoiseSchedule] = Registry(NoiseSchedule)  # type: ignore[type-abstract]

# Public here is what each file lists in its own `__all__`.
__all__ = [
    "SCHEDULES",
    *(
        name
        for name, one in globals().items()
        if getattr(one, "__module__", "").startswith(f"{__name__}.")
    ),
]
