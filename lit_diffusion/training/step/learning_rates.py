"""Learning-rate schedules that torch does not have."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["WarmupDecayLR"]


class WarmupDecayLR(LRScheduler):
    """Linear warm-up, a plateau, then linear decay to zero at the last step.

    Warm-up lets Adam's averages settle; the decay trades the last share of the steps for a
    sharper optimum. Steps are optimizer steps.

    Args:
        optimizer: The optimizer whose learning rates are set.
        warmup: Optimizer steps until the full learning rate is reached.
        decay: Share of all steps, at the end, over which it falls to zero; 0 for none.
        total_steps: All optimizer steps; None means the trainer's max_steps.

    References:
        Goyal et al. (2017), Accurate, Large Minibatch SGD, arXiv:1706.02677, section 2.2.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = WarmupDecayLR(optimizer, warmup=2, decay=0.5, total_steps=8)
        >>> [round(scheduler.factor(step), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: int = 0,
        decay: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        if warmup < 0 or not 0 <= decay <= 1:
            raise ValueError(
                "WarmupDecayLR: expected warmup of 0 or more and decay in [0, 1], "
                f"got warmup={warmup} and decay={decay}."
            )
        self.warmup = warmup
        self.decay = decay
        self.total_steps = total_steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Share of the full learning rate at a step.

        Args:
            step: Optimizer steps taken so far.
        """
        rise = min(1.0, (step + 1) / (self.warmup + 1e-12)) if self.warmup else 1.0
        if not self.decay or self.total_steps is None:
            return rise
        fall = (self.total_steps - step) / (self.decay * self.total_steps)
        return max(0.0, min(rise, fall, 1.0))

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each parameter group."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]
