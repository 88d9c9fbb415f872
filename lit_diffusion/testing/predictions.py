"""The laws of predictions."""

from __future__ import annotations

import torch

from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data, diffuse
from lit_diffusion.predictions import Prediction
from lit_diffusion.testing.laws import FAR, close, is_frozen, law

__all__ = ["check_prediction"]


def check_prediction(prediction: Prediction) -> None:
    """Check that a prediction is an invertible row: its target and z determine x and ε.

    Args:
        prediction: The prediction, of any arguments.

    Raises:
        AssertionError: If a law is violated, with its name and the numbers.

    Example:
        >>> check_prediction(EDMPrediction(data_std=0.3))
    """
    law(isinstance(prediction, Prediction), prediction, "expected an instance of Prediction.")
    law(is_frozen(prediction), prediction, "a prediction is a frozen dataclass.")
    generator = torch.Generator().manual_seed(0)
    for level in (-FAR, -9.0, -2.0, 0.0, 2.0, 9.0, FAR):
        # Four different sizes, so that a coefficient on the wrong axis is noticed.
        logsnr = level + torch.linspace(-0.1, 0.1, 2, dtype=torch.float64)
        x, eps, out_error = torch.randn(
            3, 2, 3, 4, 5, generator=generator, dtype=torch.float64
        ).unbind()
        a, b = prediction.coefficients(logsnr)
        alpha, sigma = alpha_sigma(logsnr)
        det = (a * sigma - b * alpha).abs()
        law(bool((det > 1e-6).all()), prediction, f"det ≠ 0 at λ = {level}, got {det.tolist()}.")

        z, target = diffuse(x, eps, logsnr), prediction.target(x, eps, logsnr)
        expected = broadcast_to_data(a, x) * x + broadcast_to_data(b, x) * eps
        law(close(target, expected, 1e-12), prediction, "target = a x + b ε.")
        decoded = prediction.decode(target, z, logsnr)
        same = close(decoded.x, x, 1e-6) and close(decoded.eps, eps, 1e-6)
        law(same, prediction, f"decode(target) gives x and ε back at λ = {level}.")

        wrong = prediction.decode(target + out_error, z, logsnr)
        ratio = (wrong.eps - eps).square().sum((1, 2, 3)) / out_error.square().sum((1, 2, 3))
        scale = prediction.eps_error_scale(logsnr)
        law(close(ratio / scale, torch.ones(2), 1e-4), prediction, "eps_error_scale is true.")
        back = broadcast_to_data(alpha, z) * wrong.x + broadcast_to_data(sigma, z) * wrong.eps
        law(close(back, z, 1e-6), prediction, f"α x̂ + σ ε̂ = z at λ = {level}.")
        positive = bool((prediction.input_scale(logsnr) > 0).all())
        law(positive, prediction, "input_scale is positive.")
