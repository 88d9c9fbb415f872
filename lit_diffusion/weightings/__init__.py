"""Weightings: a family of functions w(λ), one for each published objective.

`base` defines a weighting, `continuous` has those in continuous time, `chain` those of a
discrete chain, `derived` those made from another weighting or from a schedule. A class of your
own joins the registry by subclassing `Weighting`.
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
