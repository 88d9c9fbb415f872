"""The laws of weightings."""

from __future__ import annotations

import torch

from lit_diffusion.testing.laws import FAR, close, law
from lit_diffusion.weightings import Weighting

__all__ = ["check_weighting"]


def check_weighting(weighting: Weighting) -> None:
    """Check that a weighting is a positive, finite function of λ, evaluated per example.

    It is differentiable, as a schedule that learns its shape needs: the gradient of w is its
    derivative, except at a kink. In float32 a small w may underflow to 0.

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
        positive = smallest > 0 if dtype == torch.float64 else smallest >= 0
        law(positive, weighting, f"w is positive, got {smallest:.3g}.")
        backwards = weighting(logsnr.flip(0)).flip(0)
        law(close(backwards, weight, 1e-6), weighting, "w(λ) depends on that λ alone.")
    _check_derivative(weighting)


def _check_derivative(weighting: Weighting) -> None:
    """The gradient of w against a central difference, relative to w."""
    step = 1e-4
    logsnr = torch.linspace(-9.03, 8.57, 101, dtype=torch.float64).requires_grad_()
    weight = weighting(logsnr)
    gradient = torch.zeros_like(logsnr)
    if weight.requires_grad:  # else w is constant as far as anyone can follow it
        found = torch.autograd.grad(weight.sum(), logsnr, allow_unused=True)[0]
        gradient = gradient if found is None else found
    with torch.no_grad():
        difference = (weighting(logsnr + step) - weighting(logsnr - step)) / (2 * step)
        error = float(((gradient - difference).abs() / weight).quantile(0.95))
    law(error < 1e-4, weighting, f"the gradient of w is dw/dλ, off by {error:.2g} w.")
