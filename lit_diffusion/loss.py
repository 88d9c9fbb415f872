"""The loss: one estimator for every objective.

    L_w(x) = ½ ∫ w(λ) E‖ε̂ − ε‖² dλ = ½ E_{λ~p}[ w(λ)/p(λ) · E‖ε̂ − ε‖² ]

The weighting w is what is optimised. The schedule's density p is only where the integral is
sampled: it divides out, so the value and its gradient do not depend on it, but their variance
does. What the network predicts does not enter at all, for the loss sees only x̂ and ε̂.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_diffusion.gaussian import diffuse, expand
from lit_diffusion.noise_schedule import NoiseSchedule, lattice
from lit_diffusion.schedules import CosineSchedule
from lit_diffusion.weightings import ELBOWeighting, Weighting

__all__ = ["DiffusionLoss", "LossTerms"]


class LossTerms(NamedTuple):
    """The loss of each example, and what it was made of.

    `loss` is ½ w/p · eps_error; at w = 1 it estimates the diffusion term of the bound in nats
    per dimension. `eps_error` is the *mean* of (ε̂ − ε)² over the dimensions of the data.

    Shapes:
        loss, logsnr and eps_error (B,).
    """

    loss: Tensor
    logsnr: Tensor
    eps_error: Tensor


class DiffusionLoss(nn.Module):
    """The weighted loss ½ w(λ)/p(λ) · mean (ε̂ − ε)², with λ drawn from the schedule.

    Args:
        schedule: Density p that λ is drawn from; None means `CosineSchedule()`.
        weighting: Weight w on the error of ε; None means `ELBOWeighting()`.

    Raises:
        TypeError: If one of them is something else, such as a class without its brackets.

    References:
        Kingma & Gao (2023), Understanding Diffusion Objectives as the ELBO with Simple Data
        Augmentation, arXiv:2303.00848, Eq. 5-6.

    Example:
        >>> loss = DiffusionLoss(LinearSchedule(-10.0, 10.0), SigmoidWeighting())
        >>> terms = loss(GaussianDenoiser(std=1.0), torch.randn(1000, 16))
        >>> round(float(terms.loss.mean()), 1)  # ½ ∫ sigmoid(2 − λ) α² dλ = 1.16
        1.2
    """

    def __init__(
        self, schedule: NoiseSchedule | None = None, weighting: Weighting | None = None
    ) -> None:
        super().__init__()
        self.schedule = CosineSchedule() if schedule is None else schedule
        self.weighting = ELBOWeighting() if weighting is None else weighting
        for part, family in ((self.schedule, NoiseSchedule), (self.weighting, Weighting)):
            if not isinstance(part, family):
                raise TypeError(
                    f"DiffusionLoss: expected an instance of {family.__name__}, got {part!r}; "
                    "was its pair of brackets forgotten?"
                )

    def forward(
        self,
        denoiser: nn.Module,
        x: Tensor,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        **cond: Any,
    ) -> LossTerms:
        """Estimate the loss of each example by one draw of λ and ε.

        Args:
            denoiser: Called as denoiser(z, logsnr, **cond).
            x: Data.
            t: Times at which the schedule gives λ; None draws a stratified lattice.
            eps: Noise; None draws it.
            **cond: Handed to the denoiser (label=…).

        Shapes:
            x and eps (B, *); t (B,); terms (B,).

        Raises:
            ValueError: If x has no dimension beside the batch, or is not floating point.
        """
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(
                "Expected floating-point data of shape (B, *) with at least one dimension beside "
                f"the batch, got {x.dtype} of shape {tuple(x.shape)}; images go to [−1, 1] first."
            )
        if t is None:
            t = lattice(len(x), torch.rand((), dtype=torch.float64, device=x.device))
        if eps is None:
            eps = torch.randn_like(x)
        logsnr, log_prob = self.schedule.at(t.to(x.device))
        # λ is B numbers: rounding it once, to the precision of the error, is all that is lost.
        z = diffuse(x, eps, logsnr)
        error = denoiser(z, logsnr, **cond).eps - eps
        eps_error = error.square().flatten(1).mean(1)
        ratio = self.weighting(logsnr) * torch.exp(-log_prob)
        return LossTerms(0.5 * expand(ratio, eps_error) * eps_error, logsnr, eps_error)
