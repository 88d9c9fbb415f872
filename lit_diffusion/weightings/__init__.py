"""Weightings: functions w(λ), one for each published objective.

`base` defines a weighting, `continuous` contains those in continuous time, `chain` those of a
discrete chain, and `derived` those made from another weighting or from a schedule. A subclass of
`Weighting` registers itself.
"""

from lit_diffusion.registry import Registry
from lit_diffusion.weightings.base import *
from lit_diffusion.weightings.chain import *
from lit_diffusion.weightings.continuous import *
from lit_diffusion.weightings.derived import *

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
