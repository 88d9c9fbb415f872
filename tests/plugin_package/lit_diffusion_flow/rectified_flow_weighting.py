"""The flow-matching loss under any density of times, as a weighting.

Letters: logsnr = λ; s the time of the flow path z = (1 − s)x + sε, so that e^(−λ/2) = s/(1 − s);
v = ε − x the prediction.

At a given z the two errors of a denoiser are related, (1 − s)(x̂ − x) + s(ε̂ − ε) = 0, hence

    v̂ − v = (ε̂ − ε) − (x̂ − x) = (ε̂ − ε)(1 + s/(1 − s)) = (1 + e^(−λ/2)) (ε̂ − ε)
    E_p ‖v̂ − v‖² = ∫ p(λ) (1 + e^(−λ/2))² E‖ε̂ − ε‖² dλ

which is the weighted loss with w(λ) = p(λ) (1 + e^(−λ/2))².
"""

from __future__ import annotations

import torch
from lit_diffusion import NoiseSchedule, Weighting
from torch import Tensor

from lit_diffusion_flow.mode_schedule import ModeSchedule

__all__ = ["RectifiedFlowWeighting"]


class RectifiedFlowWeighting(Weighting):
    """The flow-matching loss under the density p of a schedule: w(λ) = p(λ) (1 + e^(−λ/2))².

    The objective of a rectified flow whose times are not sampled uniformly, as in Stable
    Diffusion 3. There the density is part of the objective; here λ can be sampled from any other
    density and the objective stays the same. `FlowSchedule()` gives plain flow matching,
    `NormalSchedule(0, 2)` the logit-normal of Stable Diffusion 3.

    Args:
        schedule: Schedule whose density is the weight; None means `ModeSchedule()`. Outside its
            range the weight is 0.

    References:
        Esser et al. (2024), Scaling Rectified Flow Transformers for High-Resolution Image
        Synthesis, arXiv:2403.03206, section 3.1.

    Example:
        >>> RectifiedFlowWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.9795, 1.8964, 0.1326])
    """

    def __init__(self, schedule: NoiseSchedule | None = None) -> None:
        super().__init__()
        self.schedule = ModeSchedule() if schedule is None else schedule

    def forward(self, logsnr: Tensor) -> Tensor:
        """p(λ) (1 + e^(−λ/2))²."""
        density = self.schedule.log_prob(logsnr).exp()
        return (density * (1 + torch.exp(-logsnr.double() / 2)) ** 2).to(logsnr.dtype)
