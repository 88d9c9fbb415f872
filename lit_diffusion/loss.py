"""The loss: one estimator for all objectives.

    L_w(x) = ½ ∫ w(λ) E‖ε̂ − ε‖² dλ = ½ E_{λ~p}[ w(λ)/p(λ) · E‖ε̂ − ε‖² ]

The weighting w defines the objective. The schedule's density p only determines where the integral
is sampled: it cancels in expectation, so it changes neither the loss nor its gradient but only
their variance. What the network predicts does not enter at all, since the loss sees only x̂ and ε̂.

A chain of T steps replaces the integral by a sum over its levels, each weighted by the width
expm1(λ_s − λ_t) of the step from that level, λ_t, to the next cleaner one, λ_s. Here the levels do
matter: for a good denoiser the sum is an upper Riemann sum, and decreases to the integral with T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_diffusion.decoders import Decoder
from lit_diffusion.exact import at_least_float32
from lit_diffusion.gaussian import Generators, broadcast_to_data, diffuse, noise_like, prior_kl
from lit_diffusion.predictions import Denoised
from lit_diffusion.schedules import CosineSchedule, NoiseSchedule
from lit_diffusion.times import sample_times
from lit_diffusion.weightings import ELBOWeighting, SigmoidWeighting, Weighting

__all__ = [
    "DiffusionLoss",
    "Estimate",
    "LossTerms",
    "default_weighting",
    "estimate",
    "noise_error",
    "weighted_error",
]


class LossTerms(NamedTuple):
    """The loss of each example, and the quantities it is computed from.

    `loss` is ½ w/p · eps_mse; at w = 1 it estimates the diffusion term of the bound in nats
    per dimension, or with a decoder the whole bound. `eps_mse` is the *mean* of (ε̂ − ε)² over
    the dimensions of the data.

    On request `z` is the noisy data and `denoised` what the denoiser made of it, (x̂, ε̂).

    Shapes:
        loss, logsnr and eps_mse (B,); z, x̂ and ε̂ (B, *).
    """

    loss: Tensor
    logsnr: Tensor
    eps_mse: Tensor
    z: Tensor | None = None
    denoised: Denoised | None = None


class Estimate(NamedTuple):
    """The error of the predicted noise of each example, and what it is computed from.

    Shapes:
        eps_mse (B,); z, x̂ and ε̂ (B, *).
    """

    eps_mse: Tensor
    z: Tensor
    denoised: Denoised


def estimate(
    denoiser: Callable[..., Denoised], x: Tensor, eps: Tensor, logsnr: Tensor, **cond: Any
) -> Estimate:
    """The estimate (x̂, ε̂) at z = α x + σ ε, and its error.

    Args:
        denoiser: Called as denoiser(z, logsnr, **cond).
        x: Data.
        eps: Noise.
        logsnr: λ of each example.
        **cond: Passed on to the denoiser.

    Shapes:
        x and eps (B, *); logsnr (B,).

    Example:
        >>> found = estimate(
        ...     GaussianDenoiser(0.5), torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1)
        ... )
        >>> found.z, found.denoised.eps
        (tensor([[0.7071, 0.7071, 0.7071]]), tensor([[0.8000, 0.8000, 0.8000]]))
    """
    z = diffuse(x, eps, logsnr)
    denoised = denoiser(z, logsnr, **cond)
    return Estimate((denoised.eps - eps).square().flatten(1).mean(1), z, denoised)


def default_weighting(decoder: Decoder | None = None) -> Weighting:
    """The weighting of a loss that is given none: one that fits the default schedule, the cosine.

    Under the cosine the loss of a single sample has a standard deviation of 0.85 times its mean
    with this weighting, and of 20 times with w = 1 (Gaussian data, exact denoiser).

    Args:
        decoder: With a decoder the loss is the bound, which requires w = 1.

    Example:
        >>> default_weighting()
        SigmoidWeighting(bias=2.0)
    """
    return SigmoidWeighting() if decoder is None else ELBOWeighting()


def noise_error(
    denoiser: Callable[..., Denoised], x: Tensor, eps: Tensor, logsnr: Tensor, **cond: Any
) -> Tensor:
    """Mean squared error of the predicted noise, mean (ε̂ − ε)², at z = α x + σ ε.

    Everything in the loss that operates on tensors as large as the images, without random numbers,
    so that it can be compiled as one function.

    Args:
        denoiser: Called as denoiser(z, logsnr, **cond).
        x: Data.
        eps: Noise.
        logsnr: λ of each example.
        **cond: Passed on to the denoiser.

    Shapes:
        x and eps (B, *); logsnr and result (B,).

    Example:
        >>> noise_error(GaussianDenoiser(0.5), torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1))
        tensor([0.0400])
    """
    return estimate(denoiser, x, eps, logsnr, **cond).eps_mse


def weighted_error(
    denoiser: Callable[..., Denoised],
    x: Tensor,
    schedule: NoiseSchedule,
    weighting: Weighting,
    num_timesteps: int | None,
    t: Tensor,
    eps: Tensor,
    noise_error: Callable[..., Tensor | Estimate] = noise_error,
    **cond: Any,
) -> LossTerms:
    """The estimator: ½ w(λ)/p(λ) · mean (ε̂ − ε)², or T/2 · expm1(λ_s − λ) w(λ) · mean (ε̂ − ε)².

    Args:
        denoiser: Called as denoiser(z, logsnr, **cond).
        x: Data.
        schedule: Gives λ.
        weighting: Gives w.
        num_timesteps: Number T of steps of a discrete chain; None means continuous time.
        t: Times; in discrete time t is replaced by the noisier end of its step.
        eps: Noise.
        noise_error: The function of that name, or `estimate`, or its compiled version.
        **cond: Passed on to the denoiser.

    Shapes:
        x and eps (B, *); t (B,); terms (B,).

    Example:
        >>> x, t, eps = torch.zeros(2, 3), torch.tensor([0.2, 0.7]), torch.ones(2, 3)
        >>> schedule, denoiser = LinearSchedule(-1.0, 1.0), GaussianDenoiser(0.5)
        >>> weighted_error(denoiser, x, schedule, ELBOWeighting(), None, t, eps).eps_mse
        tensor([0.0979, 0.0206])
    """
    shape: tuple[Tensor, ...] = ()
    if num_timesteps is None:
        logsnr, log_prob, shape = schedule.at_with_shape(t)
        width = torch.exp(-log_prob)
    else:
        # Here the loss itself depends on the levels, so a learned shape follows its gradient.
        index = (t.double() * num_timesteps).floor().clamp(max=num_timesteps - 1)
        logsnr = schedule.logsnr((index + 1) / num_timesteps)
        width = num_timesteps * torch.expm1(schedule.logsnr(index / num_timesteps) - logsnr)
    # λ is computed in float64 and rounded only once, to the precision of the error.
    found = noise_error(denoiser, x, eps, logsnr, **cond)
    eps_mse, z, denoised = found if isinstance(found, Estimate) else (found, None, None)
    loss = 0.5 * broadcast_to_data(weighting(logsnr) * width, eps_mse) * eps_mse
    if shape:
        _minimize_variance(shape, loss.detach())
    return LossTerms(loss, logsnr, eps_mse, z, denoised)


def _minimize_variance(shape: tuple[Tensor, ...], loss: Tensor) -> None:
    """Scale the gradient with respect to a schedule's shape by 2 L, so that it is that of E[L²].

    E[L] does not depend on the shape, hence ∇Var(L) = ∇E[L²] = E[2 L ∇L].
    """
    for part in shape:
        part.register_hook(lambda gradient: gradient * (2 * loss).to(gradient.dtype))


# By whether z and (x̂, ε̂) are asked for.
_ERRORS: dict[bool, Callable[..., Tensor | Estimate]] = {False: noise_error, True: estimate}


class DiffusionLoss(nn.Module):
    """The weighted loss ½ w(λ)/p(λ) · mean (ε̂ − ε)², with λ sampled from the schedule.

    Args:
        schedule: Density p that λ is sampled from; None means `CosineSchedule()`. Learned ends
            require a decoder and w = 1.
        weighting: Weight w on the squared error of ε; None means `SigmoidWeighting()`, which fits
            the cosine, or with a decoder `ELBOWeighting()`, the bound.
        num_timesteps: Number T of steps of a discrete chain, at least 1; λ is then one of its
            levels, and T·expm1(λ_s − λ) replaces 1/p. None means continuous time.
        decoder: Adds the other two terms of the bound, prior and reconstruction; None omits them.

    Raises:
        TypeError: If an argument has the wrong type, such as a class instead of an instance.
        ValueError: If num_timesteps is below 1 or differs from that of the weighting, or the ends
            of the schedule are learned and the loss is not the full bound.

    References:
        Kingma & Gao (2023), Understanding Diffusion Objectives as the ELBO with Simple Data
        Augmentation, arXiv:2303.00848, Eq. 5-6; Kingma et al. (2021), Variational Diffusion
        Models, arXiv:2107.00630, Eq. 14 (discrete) and 17; Ho et al. (2020), arXiv:2006.11239.

    Example:
        >>> loss = DiffusionLoss(LinearSchedule(-10.0, 10.0), SigmoidWeighting())
        >>> terms = loss(GaussianDenoiser(std=1.0), torch.randn(1000, 16))
        >>> round(float(terms.loss.mean()), 1)  # ½ ∫ sigmoid(2 − λ) α² dλ = 1.16
        1.2
    """

    def __init__(
        self,
        schedule: NoiseSchedule | None = None,
        weighting: Weighting | None = None,
        num_timesteps: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        self.schedule = CosineSchedule() if schedule is None else schedule
        self.weighting = default_weighting(decoder) if weighting is None else weighting
        self.num_timesteps = num_timesteps
        self.decoder = decoder
        self._compiled: dict[bool, Callable[..., Tensor | Estimate]] | None = None
        parts = [(self.schedule, NoiseSchedule), (self.weighting, Weighting)]
        for part, family in [*parts, *([] if decoder is None else [(decoder, Decoder)])]:
            if not isinstance(part, family):
                raise TypeError(
                    f"DiffusionLoss: expected an instance of {family.__name__}, got {part!r}: "
                    "if this is a class, call it."
                )
        if num_timesteps is not None and (
            num_timesteps < 1 or num_timesteps != int(num_timesteps)
        ):
            raise ValueError(
                f"num_timesteps must be a whole number of at least 1 step, got {num_timesteps}."
            )
        for each in self.weighting.modules():
            chain = getattr(each, "num_timesteps", None)
            if isinstance(each, Weighting) and chain is not None and chain != num_timesteps:
                raise ValueError(
                    f"{type(each).__name__} is for a chain of {chain} steps, but the loss has "
                    f"num_timesteps={num_timesteps}: give both the same number."
                )
        if self.schedule.learns_ends:
            name = type(self.schedule).__name__
            if decoder is None:
                raise ValueError(
                    f"{name}: under the diffusion term alone, its learned ends would collapse to "
                    "one point. Give a decoder, so that prior and reconstruction keep them "
                    "apart, or fix the ends."
                )
            if not isinstance(self.weighting, ELBOWeighting):
                raise ValueError(
                    f"{name}: learned ends require the bound itself, w = 1; under "
                    f"{self.weighting} they would diverge. Use ELBOWeighting, or fix the ends."
                )
        elif decoder is not None:
            decoder.warn_if_costly(self.schedule.ends[1])

    def forward(
        self,
        denoiser: nn.Module,
        x: Tensor,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: Generators = None,
        with_estimates: bool = False,
        **cond: Any,
    ) -> LossTerms:
        """Estimate the loss of each example from one sample of λ and of ε.

        Args:
            denoiser: Called as denoiser(z, logsnr, **cond).
            x: Data.
            t: Times t, with λ = λ(t); None samples them, stratified over the batch.
            eps: Noise; None samples it.
            generator: Source of all randomness: None, one generator, or one per example (which
                cannot share stratified times, so t must be given).
            with_estimates: Return z and (x̂, ε̂) as well, which takes memory.
            **cond: Passed on to the denoiser (label=…).

        Shapes:
            x and eps (B, *); t (B,); terms (B,), float32 or better.

        Raises:
            ValueError: If x has no dimension besides the batch, is not floating point, or does not
                lie on the decoder's grid (checked on the CPU only).
        """
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(
                "Expected floating-point data of shape (B, *) with at least one dimension besides "
                f"the batch, got {x.dtype} of shape {tuple(x.shape)}; scale images to [−1, 1]."
            )
        x = at_least_float32(x)
        if t is None:
            t = sample_times(x, generator)
        if eps is None:
            eps = noise_like(x, generator)
        errors = self._compiled if self.training and self._compiled else _ERRORS
        t = t.to(x.device)
        terms = weighted_error(
            denoiser,
            x,
            self.schedule,
            self.weighting,
            self.num_timesteps,
            t,
            eps,
            errors[with_estimates],
            **cond,
        )
        if self.decoder is None:
            return terms
        rest = self._rest(self.decoder, denoiser, x, generator, cond)
        return terms._replace(loss=terms.loss + rest.to(terms.loss.dtype))

    def _rest(
        self,
        decoder: Decoder,
        denoiser: nn.Module,
        x: Tensor,
        generator: Generators,
        cond: dict[str, Any],
    ) -> Tensor:
        """The prior and the reconstruction term."""
        if x.device.type == "cpu":
            decoder.check(x)
        ends = self.schedule.logsnr(torch.tensor([0.0, 1.0], device=x.device))
        cleanest, noisiest = (end.expand(len(x)) for end in ends)
        eps = noise_like(x, generator)
        reconstruction = decoder.reconstruction(denoiser, x, cleanest, eps, **cond)
        return prior_kl(x, noisiest) + reconstruction

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `noise_error`, the network included, for training.

        λ and the weights, a few numbers in float64, are not compiled. Evaluation calls the network
        as it is, whether it was compiled in place or not.

        Args:
            *args: Passed on to `torch.compile`.
            **kwargs: Passed on to `torch.compile`.
        """
        self._compiled = {key: torch.compile(f, *args, **kwargs) for key, f in _ERRORS.items()}

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not compiled, like a copied module."""
        return {**super().__getstate__(), "_compiled": None}

    def extra_repr(self) -> str:
        """The arguments that are not modules."""
        return f"num_timesteps={self.num_timesteps}, decoder={self.decoder}"
