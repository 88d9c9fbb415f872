"""Weightings: a family of functions w(λ), one for each published objective.

`base` defines a weighting, `continuous` has those in continuous time, `chain` those of a
discrete chain. A class of your own joins the registry by subclassing `Weighting`.
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
