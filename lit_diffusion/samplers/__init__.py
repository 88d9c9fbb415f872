"""Samplers: algorithms that map noise to data, one per file.

`AncestralSampler` and `DDIMSampler` are of first order and differ in how much fresh noise they
add. `HeunSampler` and `DPMSolverSampler` are of second order: the first evaluates the network
again at the end of each step, the second reuses the previous estimate. `base` defines what a
sampler is. Subclassing `Sampler` registers a class of your own.
"""

from lit_diffusion.registry import Registry
from lit_diffusion.samplers.ancestral import *
from lit_diffusion.samplers.base import *
from lit_diffusion.samplers.ddim import *
from lit_diffusion.samplers.dpm_solver import *
from lit_diffusion.samplers.heun import *

SAMPLERS: Registry[Sampler] = Registry(Sampler)  # type: ignore[type-abstract]

# Public here is what each file lists in its own `__all__`.
__all__ = [
    "SAMPLERS",
    *(
        name
        for name, one in globals().items()
        if getattr(one, "__module__", "").startswith(f"{__name__}.")
    ),
]
