"""The optimizer of a model: its parameter groups, its learning rate, and how it is clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["clip_each_group", "match_memory_format", "parameter_groups", "with_learning_rates"]


def parameter_groups(
    parameters: Iterable[nn.Parameter], schedule: nn.Module, schedule_lr: float | None
) -> list[dict[str, Any]] | list[nn.Parameter]:
    """The parameters that learn; a learned noise schedule is a group without weight decay.

    Args:
        parameters: All of the model.
        schedule: The noise schedule, whose parameters are among them.
        schedule_lr: Its learning rate; None means the optimizer's.
    """
    learned = [p for p in schedule.parameters() if p.requires_grad]
    apart = set(learned)
    network = [p for p in parameters if p.requires_grad and p not in apart]
    if not learned:
        return network
    rate = {} if schedule_lr is None else {"lr": schedule_lr}
    groups: list[dict[str, Any]] = [{"params": network}]
    return [*groups, {"params": learned, "weight_decay": 0.0, **rate}]


def with_learning_rates(
    optimizer: torch.optim.Optimizer,
    make: Callable[..., Any] | None,
    max_steps: int,
    epochs: int = 1,
) -> Any:
    """The optimizer and its learning-rate schedule, as Lightning takes them.

    Args:
        optimizer: The optimizer.
        make: Makes the schedule from the optimizer; None means a constant rate.
        max_steps: Optimizer steps of the run; −1 if it is not given.
        epochs: Epochs from one validation to the next, after which a schedule that depends on
            val/loss is updated; all others are updated at each optimizer step.

    Raises:
        ValueError: If the rate decays and the end of the run is not known.
    """
    optimizer.register_load_state_dict_post_hook(match_memory_format)
    if make is None:
        return optimizer
    scheduler = make(optimizer)
    if getattr(scheduler, "total_steps", 0) is None:
        if max_steps < 1 and scheduler.decay:
            raise ValueError(
                "A learning rate that decays needs the end of the run: set trainer.max_steps, or "
                "total_steps of the lr_scheduler."
            )
        scheduler.total_steps = max_steps
    when: dict[str, Any] = {"interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        monitor = getattr(scheduler, "monitor", "val/loss")  # that of Lightning's subclass
        when = {"interval": "epoch", "frequency": epochs, "monitor": monitor}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **when}}


def clip_each_group(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clip the gradient of each parameter group to a norm, in one fused pass for each.

    Each group by itself: the gradient of a learned schedule must not shorten the network's steps.

    Args:
        optimizer: Has the groups.
        max_norm: The largest norm, above 0.
    """
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], max_norm)


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments that were just loaded the memory format of their weights.

    A checkpoint keeps the format it was saved in. A fused optimizer assumes that both are equal
    and would otherwise pair the wrong numbers without an error.

    Args:
        optimizer: After `load_state_dict`.
    """
    for weight, kept in optimizer.state.items():
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                kept[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
