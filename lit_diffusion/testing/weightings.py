"""The laws of weightings."""

from __future__ import annotations

import torch

from lit_diffusion.testing.laws import FAR, close, law
from lit_diffusion.weightings import Weighting

__all__ = ["check_weighting"]


def check_weighting(weighting: Weighting) -> None:
    """Check that a weighting is a positive, finite function of λ, evaluated per example.

    Args:
        weighting: The weighting, of any arguments.

    Raises:
        AssertionError: If a law is violated, with its name and the numbers.

    Example:
        >>> check_weighting(SigmoidWeighting(bias=-1.0))
    """
    law(isinstance(weighting, Weighting), weighting, "expected an instance of Weighting.")
    for dtype in (torch.float32, torch.float64):
        logsnr = torch.linspace(-FAR, FAR, 801, dtype=dtype)
        weight = weighting(logsnr)
        law(weight.dtype == dtype, weighting, f"w has λ's dtype {dtype}, got {weight.dtype}.")
        law(weight.shape == logsnr.shape, weighting, "w has one value for each λ.")
        law(bool(weight.isfinite().all()), weighting, f"w is finite on [−{FAR}, {FAR}].")
        smallest = float(weight.min())
        law(smallest > 0, weighting, f"w is positive, got {smallest:.3g}.")
        backwards = weighting(logsnr.flip(0)).flip(0)
        law(close(backwards, weight, 1e-6), weighting, "w(λ) depends on that λ alone.")
