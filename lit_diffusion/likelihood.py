"""The bound: how many bits the model needs for the data.

Letters: x data (B, *); z_λ noisy data; λ_max the cleanest level (t = 0), λ_min the noisiest
(t = 1).

A diffusion model is a chain of latent variables, so its likelihood has a variational bound of
three terms, all in nats per dimension here (divide by ln 2 for bits)::

    prior            KL(q(z_λmin | x) ‖ N(0, I))           what the noisiest latent still knows
    diffusion        ½ ∫ E‖ε̂ − ε‖² dλ                       what the steps between get wrong
                     T/2 E_t[ expm1(λ_s − λ_t) ‖ε̂ − ε‖² ]   … of a chain of T steps
    reconstruction   −E log p(x | z_λmax)                   naming the data, see `decoders`

The integral depends on the schedule only through its ends. The sum, for a good denoiser, is an
upper one and falls to the integral as T grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_diffusion.decoders import Decoder
from lit_diffusion.gaussian import (
    Generators,
    alpha_sigma,
    broadcast_to_data,
    noise_like,
    posterior,
    prior_kl,
)
from lit_diffusion.loss import draw_times, weighted_error
from lit_diffusion.predictions import Denoised
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.weightings import ELBOWeighting

__all__ = ["BoundTerms", "consistency_bound", "variational_bound"]


class BoundTerms(NamedTuple):
    """The three terms of the bound on −log p(x), in nats per dimension.

    Shapes:
        prior, diffusion and reconstruction (B,).

    Example:
        >>> terms = BoundTerms(*torch.tensor([[0.1], [2.0], [0.3]]))
        >>> terms.total, terms.bits_per_dim
        (tensor([2.4000]), tensor([3.4625]))
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum: −log p(x) is at most that."""
        return self.prior + self.diffusion + self.reconstruction

    @property
    def bits_per_dim(self) -> Tensor:
        """The sum in bits."""
        return self.total / math.log(2)


def variational_bound(
    denoiser: Callable[..., Denoised],
    x: Tensor,
    schedule: NoiseSchedule,
    decoder: Decoder | None = None,
    steps: int | None = None,
    generator: Generators = None,
    t: Tensor | None = None,
    **cond: Any,
) -> BoundTerms:
    """The bound in its denoising form, each example by one draw of λ and ε.

    Every term compares the model's step q(z_s | z_t, x = x̂) with the true posterior of that step,
    a difference of two Gaussians of the same variance, so it is small where the model is good, and
    in the limit of many steps one draw of λ stays a fair sample of the whole.

    Args:
        denoiser: Called as denoiser(z, logsnr, **cond).
        x: Data.
        schedule: Its ends are those of the process; between them it says where λ is drawn, and
            with `steps` which levels the chain has.
        decoder: The distribution of the data given the cleanest z; None leaves reconstruction out.
        steps: Number T of steps, at least 1; None means continuous time. DDPM's own bound is
            `BetaSchedule()` with 999.
        generator: Source of all noise: None, one, or one per example (then give t).
        t: Times, where they are not to be drawn; λ and the steps are stratified over the batch.
        **cond: Handed to the denoiser (label=…).

    Shapes:
        x (B, *); t (B,); terms (B,).

    Raises:
        ValueError: If the data are not what the decoder decodes, steps is below 1, or a term is
            not finite (it is named, with its λ).

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, Eq. 11-17; Ho et al.
        (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Eq. 5.

    Example:
        >>> x = 0.5 * torch.randn(1000, 16)
        >>> schedule = LinearSchedule(-15.0, 15.0)
        >>> terms = variational_bound(GaussianDenoiser(0.5), x, schedule, GaussianDecoder())
        >>> round(float(terms.total.mean()), 1)  # ½ ln(2πe/4) = 0.73, the entropy
        0.7
    """
    _prepare(schedule, decoder, x, steps)
    t = draw_times(x, generator) if t is None else t
    eps = noise_like(x, generator)
    one = ELBOWeighting()
    diffusion = weighted_error(denoiser, x, schedule, one, steps, t.to(x.device), eps, **cond)
    cleanest, noisiest = _ends(schedule, x)
    terms = BoundTerms(
        prior=prior_kl(x, noisiest),
        diffusion=diffusion.loss,
        reconstruction=_reconstruction(decoder, denoiser, x, cleanest, generator, cond),
    )
    return _finite(terms, noisiest, diffusion.logsnr, cleanest)


def consistency_bound(
    denoiser: Callable[..., Denoised],
    x: Tensor,
    schedule: NoiseSchedule,
    decoder: Decoder | None = None,
    steps: int | None = 100,
    generator: Generators = None,
    t: Tensor | None = None,
    **cond: Any,
) -> BoundTerms:
    """The same bound in its consistency form: forward and backward step are to agree on z between.

    One term for each level i of the chain compares q(z_i | z_{i−1}), the step from the cleaner
    neighbour, with the model's p(z_i | z_{i+1}), the step from the noisier one. (z_{i−1}, z_{i+1})
    are drawn jointly from q, and z_i, of which both are functions, is integrated out in closed
    form. The two steps are *different* Gaussians whatever the model does, so the terms do not
    vanish for a perfect model but must cancel: the expectation of the total is that of
    `variational_bound`, and the variance of one draw grows without bound, like T ln² T (the first
    term, of the order of ln T, is met once in T draws). That is why nobody trains on it, and what
    it is here to show.

    (Written as KL(q(z_i | z_{i−1}) ‖ p(z_i | z_{i+1})), as one often sees it, the term would draw
    z_i without regard to z_{i+1}, and would not be the bound.)

    Args:
        denoiser: Called as denoiser(z, logsnr, **cond).
        x: Data.
        schedule: Its levels at t = 0, 1/T, …, 1 are those of the chain.
        decoder: The distribution of the data given the cleanest z; None leaves reconstruction out.
        steps: Number T of steps, at least 1. There is no continuous limit.
        generator: Source of all noise: None, one, or one per example (then give t).
        t: Times, where they are not to be drawn; the steps are stratified over the batch.
        **cond: Handed to the denoiser (label=…).

    Shapes:
        x (B, *); t (B,); terms (B,).

    Raises:
        ValueError: As `variational_bound`, and if steps is None.

    References:
        Luo (2022), Understanding Diffusion Models: A Unified Perspective, arXiv:2208.11970,
        Eq. 37-45; Sohl-Dickstein et al. (2015), arXiv:1503.03585.

    Example:
        >>> x = 0.5 * torch.randn(1000, 16)
        >>> terms = [
        ...     bound(GaussianDenoiser(0.5), x, LinearSchedule(-15.0, 15.0), steps=1000)
        ...     for bound in (variational_bound, consistency_bound)
        ... ]
        >>> [round(float(each.total.std())) for each in terms]
        [8, 60]
    """
    if steps is None:
        raise ValueError(
            "The consistency form has no continuous limit, its variance grows with the number of "
            "steps: give steps=T."
        )
    _prepare(schedule, decoder, x, steps)
    t = draw_times(x, generator) if t is None else t
    i = (t.to(x.device, torch.float64) * steps).floor().clamp(max=steps - 1)

    logsnr, noisier = schedule.logsnr(i / steps), schedule.logsnr((i + 1) / steps)
    cleaner = schedule.logsnr((i - 1).clamp(min=0) / steps)
    cleaner = torch.where(i == 0, math.inf, cleaner)  # the neighbour of z_0 is x itself

    # Draw the neighbours.
    alpha, sigma = alpha_sigma(cleaner)
    before = broadcast_to_data(alpha, x) * x + broadcast_to_data(sigma, x) * noise_like(
        x, generator
    )
    alpha, sigma = _transition(cleaner, noisier)
    after = broadcast_to_data(alpha, x) * before + broadcast_to_data(sigma, x) * noise_like(
        x, generator
    )

    # What both of them say of z: q(z_i | z_{i−1}, z_{i+1}) = N(mean, variance).
    alpha, sigma = _transition(cleaner, logsnr)  # of q(z_i | z_{i−1})
    alpha_on, sigma_on = _transition(logsnr, noisier)
    variance = 1 / (1 / sigma**2 + alpha_on**2 / sigma_on**2)
    forward = broadcast_to_data(alpha, x) * before
    mean = broadcast_to_data(variance / sigma**2, x) * forward
    mean = mean + broadcast_to_data(variance * alpha_on / sigma_on**2, x) * after

    backward, _ = posterior(after, denoiser(after, noisier, **cond).x, noisier, logsnr)
    _, sigma_here = alpha_sigma(logsnr)
    std = sigma_here * torch.sqrt(-torch.expm1(noisier - logsnr))  # of p(z_i | z_{i+1})

    def spread(other: Tensor) -> Tensor:
        return (mean - other).square().flatten(1).mean(1) + variance

    term = (
        torch.log(std / sigma) + spread(backward) / (2 * std**2) - spread(forward) / (2 * sigma**2)
    )

    cleanest, noisiest = _ends(schedule, x)
    last = schedule.logsnr(torch.full_like(i, 1 - 1 / steps))
    alpha, sigma = alpha_sigma(last)
    before = broadcast_to_data(alpha, x) * x + broadcast_to_data(sigma, x) * noise_like(
        x, generator
    )
    alpha, sigma = _transition(last, noisiest)
    mean_square = before.double().square().flatten(1).mean(1)
    terms = BoundTerms(
        # KL(q(z_T | z_{T−1}) ‖ N(0, I))
        prior=0.5 * (alpha**2 * mean_square + sigma**2 - 1) - torch.log(sigma),
        diffusion=steps * term,
        reconstruction=_reconstruction(decoder, denoiser, x, cleanest, generator, cond),
    )
    return _finite(terms, noisiest, logsnr, cleanest)


def _transition(cleaner: Tensor, noisier: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and standard deviation of q(z_t | z_s): α_t/α_s, √(1 − α_t²/α_s²)."""
    log_ratio = torch.nn.functional.softplus(-cleaner) - torch.nn.functional.softplus(-noisier)
    return torch.exp(log_ratio / 2), torch.sqrt(-torch.expm1(log_ratio))


def _prepare(
    schedule: NoiseSchedule, decoder: Decoder | None, x: Tensor, steps: int | None
) -> None:
    """Refuse what would give a wrong number."""
    if steps is not None and (steps < 1 or steps != int(steps)):
        raise ValueError(f"A chain has a whole number of steps, at least 1 step, got {steps}.")
    if decoder is not None and not isinstance(decoder, Decoder):
        raise TypeError(f"Expected a Decoder, such as SoftmaxDecoder(256), got {decoder!r}.")
    if decoder is not None:
        decoder.check(x)
        decoder.warn_if_costly(schedule.ends[1])


def _ends(schedule: NoiseSchedule, x: Tensor) -> tuple[Tensor, Tensor]:
    """(λ_max, λ_min) for each example."""
    cleanest, noisiest = schedule.logsnr(torch.tensor([0.0, 1.0], device=x.device))
    return cleanest.expand(len(x)), noisiest.expand(len(x))


def _reconstruction(
    decoder: Decoder | None,
    denoiser: Callable[..., Denoised],
    x: Tensor,
    logsnr: Tensor,
    generator: Generators,
    cond: dict[str, Any],
) -> Tensor:
    if decoder is None:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    return decoder.reconstruction(denoiser, x, logsnr, noise_like(x, generator), **cond)


def _finite(terms: BoundTerms, noisiest: Tensor, drawn: Tensor, cleanest: Tensor) -> BoundTerms:
    """The terms, in float64, or an error that names the first that is not finite and its λ."""
    terms = BoundTerms(*(term.double() for term in terms))
    if not bool(terms.total.isfinite().all()):
        for name, term, logsnr in zip(
            terms._fields, terms, (noisiest, drawn, cleanest), strict=True
        ):
            bad = (~term.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"The {name} term of the bound is {float(term[bad[0]])} at "
                    f"λ = {float(logsnr[bad[0]]):.6g} ({len(bad)} of {len(term)} examples): "
                    "expected a finite number; look at the network's output there, and at the "
                    "data."
                )
    return terms
