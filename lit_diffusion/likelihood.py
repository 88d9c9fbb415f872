"""The variational bound on −log p(x): how many bits the model needs to encode the data.

Letters: x data (B, *); z_λ noisy data; λ_max the cleanest level (t = 0), λ_min the noisiest
(t = 1).

A diffusion model is a chain of latent variables, so its likelihood has a variational bound of
three terms, all in nats per dimension here (divide by ln 2 for bits)::

    prior            KL(q(z_λmin | x) ‖ N(0, I))           what the noisiest z reveals of x
    diffusion        ½ ∫ E‖ε̂ − ε‖² dλ                       the error of the denoising steps
                     T/2 E_t[ expm1(λ_s − λ_t) ‖ε̂ − ε‖² ]   … of a chain of T steps
    reconstruction   −E log p(x | z_λmax)                   the decoder's, see `decoders`

The integral depends on the schedule only through its ends. For a good denoiser the sum is an upper
Riemann sum and decreases to the integral as T grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_diffusion.decoders import Decoder
from lit_diffusion.gaussian import Generators, noise_like, prior_kl
from lit_diffusion.loss import weighted_error
from lit_diffusion.predictions import Denoised
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.times import sample_times
from lit_diffusion.weightings import ELBOWeighting

__all__ = ["BoundTerms", "variational_bound"]


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
        """The sum of the terms, an upper bound on −log p(x)."""
        return self.prior + self.diffusion + self.reconstruction

    @property
    def bits_per_dim(self) -> Tensor:
        """The sum in bits per dimension."""
        return self.total / math.log(2)


def variational_bound(
    denoiser: Callable[..., Denoised],
    x: Tensor,
    schedule: NoiseSchedule,
    decoder: Decoder | None = None,
    num_timesteps: int | None = None,
    generator: Generators = None,
    t: Tensor | None = None,
    **cond: Any,
) -> BoundTerms:
    """Estimate the bound in its denoising form, with one sample of λ and ε per example.

    The diffusion term compares the model's step q(z_s | z_t, x = x̂) with the true posterior, two
    Gaussians of the same variance. It is therefore small where the model is good, and its estimate
    from a single λ has a finite variance even in the limit of infinitely many steps.

    Args:
        denoiser: Called as denoiser(z, logsnr, **cond).
        x: Data.
        schedule: Its ends are those of the process. In between it is the density λ is sampled
            from, and with `num_timesteps` it determines the levels of the chain.
        decoder: The distribution of the data given the cleanest z; None omits the reconstruction.
        num_timesteps: Number T of steps, at least 1; None means continuous time. DDPM's own bound
            is that of `BetaSchedule()` with 999.
        generator: Source of all noise: None, one generator, or one per example (then pass t).
        t: Times; None samples them, stratified over the batch.
        **cond: Passed on to the denoiser (label=…).

    Shapes:
        x (B, *); t (B,); terms (B,).

    Raises:
        ValueError: If the data do not lie on the decoder's grid, num_timesteps is below 1, or a
            term is not finite (the message names it and its λ).

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
    _prepare(schedule, decoder, x, num_timesteps)
    t = sample_times(x, generator) if t is None else t
    eps = noise_like(x, generator)
    one = ELBOWeighting()
    diffusion = weighted_error(
        denoiser, x, schedule, one, num_timesteps, t.to(x.device), eps, **cond
    )
    cleanest, noisiest = _ends(schedule, x)
    terms = BoundTerms(
        prior=prior_kl(x, noisiest),
        diffusion=diffusion.loss,
        reconstruction=_reconstruction(decoder, denoiser, x, cleanest, generator, cond),
    )
    return _finite(terms, noisiest, diffusion.logsnr, cleanest)


def _prepare(
    schedule: NoiseSchedule, decoder: Decoder | None, x: Tensor, num_timesteps: int | None
) -> None:
    """Reject arguments that would give a wrong number."""
    if num_timesteps is not None and (num_timesteps < 1 or num_timesteps != int(num_timesteps)):
        raise ValueError(
            f"num_timesteps must be a whole number of at least 1 step, got {num_timesteps}."
        )
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


def _finite(terms: BoundTerms, noisiest: Tensor, sampled: Tensor, cleanest: Tensor) -> BoundTerms:
    """The terms in float64, or an error that names the first non-finite term and its λ."""
    terms = BoundTerms(*(term.double() for term in terms))
    if not bool(terms.total.isfinite().all()):
        for name, term, logsnr in zip(
            terms._fields, terms, (noisiest, sampled, cleanest), strict=True
        ):
            bad = (~term.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"The {name} term of the bound is {float(term[bad[0]])} at "
                    f"λ = {float(logsnr[bad[0]]):.6g} ({len(bad)} of {len(term)} examples): "
                    "expected a finite number; check the network's output there, and the data."
                )
    return terms
