"""Weightings: functions w(λ), one for each published objective.

`base` defines a weighting, `continuous` contains those that are a formula in λ, `density` and
`snr` those that are a factor times the density of any schedule, `chain` those of a discrete chain,
and `derived` those made from another weighting. A subclass of `Weighting` registers itself.
"""

from lit_diffusion.registry import Registry
from lit_diffusion.weightings.base import *
from lit_diffusion.weightings.chain import *
from lit_diffusion.weightings.continuous import *
from lit_diffusion.weightings.density import *
from lit_diffusion.weightings.derived import *
from lit_diffusion.weightings.snr import *

WEIGHTINGS: Registry[Weighting] = Registry(Weighting)  # type: ignore[type-abstract]

# Public here is what each file lists in its own `__all__`.
__all__ = [
    "WEIGHTINGS",
    *(
        name
        for name, one in globals().items()
        if getattr(one, "__module__", "").startswith(f"{__name__}.")
    ),
]
