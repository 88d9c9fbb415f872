"""Weightings: functions w(λ), one for each published objective.

`base` defines a weighting, `continuous` contains those in continuous time and `chain` those of a
discrete chain. A subclass of `Weighting` registers itself.
"""

from lit_diffusion.registry import Registry
from lit_diffusion.weightings.base import Weighting
from lit_diffusion.weightings.chain import PosteriorMeanWeighting, VariationalWeighting, chain_step
from lit_diffusion.weightings.continuous import (
    DensityWeighting,
    EDMWeighting,
    ELBOWeighting,
    ExponentialWeighting,
    InDIWeighting,
    MinSNRWeighting,
    MonotoneWeighting,
    P2Weighting,
    SechWeighting,
    ShiftedWeighting,
    SigmoidWeighting,
    SoftMinSNRWeighting,
)

__all__ = [
    "WEIGHTINGS",
    "DensityWeighting",
    "EDMWeighting",
    "ELBOWeighting",
    "ExponentialWeighting",
    "InDIWeighting",
    "MinSNRWeighting",
    "MonotoneWeighting",
    "P2Weighting",
    "PosteriorMeanWeighting",
    "SechWeighting",
    "ShiftedWeighting",
    "SigmoidWeighting",
    "SoftMinSNRWeighting",
    "VariationalWeighting",
    "Weighting",
    "chain_step",
]

WEIGHTINGS: Registry[Weighting] = Registry(Weighting)  # type: ignore[type-abstract]
