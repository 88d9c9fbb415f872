"""Denoisers: given noisy data z at λ, estimate the data x̂ and the noise ε̂.

This is the interface between networks on one side and losses, samplers and likelihoods on the
other. Whatever changes an estimate (preconditioning, guidance, clipping) is a denoiser that wraps
another, so that no sampler needs to know about it.

Letters: z noisy data (B, *), logsnr = λ (B,), label (B,) with −1 for "no label".
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.exact import at_least_float32
from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data
from lit_diffusion.predictions import Denoised, Prediction, VPrediction

__all__ = [
    "ClippedDenoiser",
    "Denoiser",
    "GaussianDenoiser",
    "GuidedDenoiser",
    "drop_condition",
]


class Denoiser(nn.Module):
    """A network together with what it predicts: (z, λ) → (x̂, ε̂).

    Args:
        network: Called as network(z, logsnr, **cond), z and λ in float32 or better; returns a
            tensor of z's shape. With weights in bfloat16 or float16 it runs under autocast.
        prediction: What the network outputs; None means `VPrediction()`.

    Example:
        >>> class Network(torch.nn.Module):
        ...     def forward(self, z, logsnr):
        ...         return torch.zeros_like(z)
        >>> denoiser = Denoiser(Network(), EpsPrediction())
        >>> denoiser(torch.ones(1, 2), torch.zeros(1)).x
        tensor([[1.4142, 1.4142]])
    """

    def __init__(self, network: nn.Module, prediction: Prediction | None = None) -> None:
        super().__init__()
        self.network = network
        self.prediction = VPrediction() if prediction is None else prediction

    def forward(self, z: Tensor, logsnr: Tensor, **cond: Any) -> Denoised:
        """Estimate data and noise.

        Args:
            z: Noisy data.
            logsnr: λ of each example.
            **cond: Passed on to the network (label=…).

        Shapes:
            z (B, *); logsnr (B,); x̂ and ε̂ (B, *), float32 or better even under autocast.
        """
        z = scaled = at_least_float32(z)
        if type(self.prediction).input_scale is not Prediction.input_scale:  # it is 1 for most
            scaled = broadcast_to_data(self.prediction.input_scale(logsnr), z) * z
        with _entry(self.network, z.device):
            out = self.network(scaled, logsnr.to(scaled.dtype), **cond)
        return self.prediction.decode(at_least_float32(out), z, logsnr)


def _entry(network: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """How z and λ in float32 enter a network: by autocast, if all of its weights are narrower.

    Casting them outside would round λ, and the grey levels that `FourierFeatures` resolves.
    """
    dtype = None
    for parameter in network.parameters():
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        dtype = parameter.dtype
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def drop_condition(cond: dict[str, Any], dropped: Tensor) -> dict[str, Any]:
    """Remove the condition of some examples, as the network then receives it.

    A dropped label becomes −1, and the rows of any other tensor become zero. As zero may also be a
    valid value, the network receives the mask as a further input, `dropped`. Training drops the
    condition of a few examples, guidance that of all.

    Args:
        cond: The condition, tensors by name; None counts as not given.
        dropped: The examples whose condition is removed.

    Shapes:
        dropped (B,), bool; each condition (B, *).

    Raises:
        TypeError: If a condition is not a tensor.

    Example:
        >>> cond = {"label": torch.tensor([3, 5]), "angle": torch.tensor([[0.1, 0.2], [0.3, 0.4]])}
        >>> drop_condition(cond, torch.tensor([False, True]))  # doctest: +NORMALIZE_WHITESPACE
        {'label': tensor([ 3, -1]),
         'angle': tensor([[0.1000, 0.2000], [0.0000, 0.0000]]),
         'dropped': tensor([False,  True])}
    """
    shown = {}
    for name, value in cond.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Expected a tensor with one row per example for the condition {name!r}, which "
                f"is dropped for some examples, got {type(value).__name__}: encode it first."
            )
        if name == "label":
            shown[name] = torch.where(dropped, -1, value)
        elif name != "dropped":
            shown[name] = value.masked_fill(broadcast_to_data(dropped, value).bool(), 0)
    if shown.keys() - {"label"}:
        before = cond.get("dropped")
        shown["dropped"] = dropped if before is None else dropped | before
    return shown


class GuidedDenoiser(nn.Module):
    """Classifier-free guidance: ε̂ = ε̂_u + scale·(ε̂_c − ε̂_u).

    Moves samples towards what the condition makes likely, at the cost of diversity. Scale 1 is the
    conditional denoiser, 0 the unconditional one. An interval excludes the noisiest and the
    cleanest levels, where guidance reduces diversity without a benefit.

    Args:
        denoiser: A denoiser trained with the condition dropped for some examples; called once with
            the condition and once without (see `drop_condition`).
        scale: Guidance scale, 1 for none.
        interval: Guide only where interval[0] ≤ λ ≤ interval[1]; None means everywhere.

    References:
        Ho & Salimans (2022), Classifier-Free Diffusion Guidance, arXiv:2207.12598, Eq. 6;
        Kynkäänniemi et al. (2024), Applying Guidance in a Limited Interval, arXiv:2404.07724.

    Example:
        >>> plain = GaussianDenoiser(std=0.5)
        >>> z, logsnr = torch.ones(1, 2), torch.zeros(1)
        >>> torch.equal(GuidedDenoiser(plain, scale=1.0)(z, logsnr).eps, plain(z, logsnr).eps)
        True
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scale: float = 1.0,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if interval is not None and not interval[0] < interval[1]:
            raise ValueError(
                f"The guidance interval must be (low, high) in λ with low < high, got {interval}."
            )
        self.denoiser = denoiser
        self.scale = scale
        self.interval = interval
        self._dropped: tuple[Any, dict[str, Any]] = None, {}

    def forward(self, z: Tensor, logsnr: Tensor, **cond: Any) -> Denoised:
        """Estimate data and noise, guided by the condition.

        Args:
            z: Noisy data.
            logsnr: λ of each example.
            **cond: The condition; it is dropped in the unconditional call.

        Shapes:
            z (B, *); logsnr (B,); x̂ and ε̂ (B, *).
        """
        conditional = self.denoiser(z, logsnr, **cond)
        if self.scale == 1 or not cond:
            return conditional
        unconditional = self.denoiser(z, logsnr, **self._without(cond, z))
        scale = torch.full_like(logsnr, self.scale)
        if self.interval is not None:
            low, high = self.interval
            scale = torch.where((logsnr >= low) & (logsnr <= high), scale, torch.ones_like(scale))
        weight = broadcast_to_data(scale, z)
        return Denoised(
            *(u + weight * (c - u) for u, c in zip(unconditional, conditional, strict=True))
        )

    def _without(self, cond: dict[str, Any], z: Tensor) -> dict[str, Any]:
        """The condition with all rows dropped: the same tensors at each level of a sampler.

        They do not depend on the values of the condition, and a text that is the same tensor is
        encoded once.
        """
        looks = {
            name: (value.shape, value.dtype, value.device)
            for name, value in cond.items()
            if isinstance(value, Tensor)
        }
        key = looks, len(z), z.device, torch.is_inference_mode_enabled()
        if self._dropped[0] != key or looks.keys() != cond.keys():
            dropped = torch.ones(len(z), dtype=torch.bool, device=z.device)
            self._dropped = key, drop_condition(cond, dropped)
        return self._dropped[1]


class ClippedDenoiser(nn.Module):
    """A denoiser whose x̂ is clipped to the range of the data: |x̂| ≤ limit.

    At high noise the x̂ = (z − σ ε̂)/α of an ε-prediction can lie far outside the range and lead a
    sampler astray. ε̂ is recomputed to be consistent: ε̂ = (z − α x̂)/σ.

    Args:
        denoiser: The denoiser to clip.
        limit: Largest |x̂|, above 0; 1 for images.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239 (their
        published sampler clips x̂).

    Example:
        >>> clipped = ClippedDenoiser(GaussianDenoiser(std=10.0))
        >>> clipped(torch.full((1, 1), 5.0), torch.tensor([4.0])).x
        tensor([[1.]])
    """

    def __init__(self, denoiser: nn.Module, limit: float = 1.0) -> None:
        super().__init__()
        if not limit > 0:
            raise ValueError(f"The limit on |x̂| must be above 0, got {limit}.")
        self.denoiser = denoiser
        self.limit = limit

    def forward(self, z: Tensor, logsnr: Tensor, **cond: Any) -> Denoised:
        """Estimate data and noise.

        Args:
            z: Noisy data.
            logsnr: λ of each example.
            **cond: Passed on.

        Shapes:
            z (B, *); logsnr (B,); x̂ and ε̂ (B, *).
        """
        x, eps = self.denoiser(z, logsnr, **cond)
        alpha, sigma = alpha_sigma(logsnr)
        clipped = x.clamp(-self.limit, self.limit)
        # Where nothing was clipped, keep ε̂: (z − αx̂)/σ loses digits at high λ.
        agreeing = (z - broadcast_to_data(alpha, z) * clipped) / broadcast_to_data(sigma, z)
        return Denoised(clipped, torch.where(clipped == x, eps, agreeing))


class GaussianDenoiser(nn.Module):
    """The exact denoiser of data x ~ N(mean, std²): what a perfect network would output.

    With v = α² std² + σ² the variance of z: ε̂ = σ (z − α mean)/v and
    x̂ = mean + α std² (z − α mean)/v. Everything about it is known in closed form, so losses and
    samplers are tested on it.

    Args:
        std: Standard deviation of the data, above 0.
        mean: Mean of the data.

    Example:
        >>> denoised = GaussianDenoiser(std=1.0)(torch.ones(1, 2), torch.zeros(1))
        >>> denoised.x, denoised.eps
        (tensor([[0.7071, 0.7071]]), tensor([[0.7071, 0.7071]]))
    """

    def __init__(self, std: float = 0.5, mean: float = 0.0) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"GaussianDenoiser: std must be above 0, got {std}.")
        self.std = std
        self.mean = mean

    def forward(self, z: Tensor, logsnr: Tensor, **cond: Any) -> Denoised:
        """Estimate data and noise.

        Args:
            z: Noisy data.
            logsnr: λ of each example.
            **cond: Ignored: Gaussian data have no classes.

        Shapes:
            z (B, *); logsnr (B,); x̂ and ε̂ (B, *).
        """
        alpha, sigma = alpha_sigma(logsnr)
        variance = (alpha * self.std) ** 2 + sigma**2
        centred = z - broadcast_to_data(alpha * self.mean, z)
        return Denoised(
            x=self.mean + broadcast_to_data(alpha * self.std**2 / variance, z) * centred,
            eps=broadcast_to_data(sigma / variance, z) * centred,
        )
