"""Numbers that keep their precision: of noise levels, weights and losses, whatever the network's.

Half of the numbers of a diffusion model tolerate no rounding: bfloat16 distinguishes only 190 of
1000 noise levels. A module that computes them is an `ExactModule`, and the data that enter a loss
are float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ExactModule", "at_least_float32"]


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers, in float32 if their type is narrower.

    Args:
        x: Any floating-point numbers.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ExactModule(nn.Module):
    """A module whose parameters and buffers move with the model around it, but keep their type.

    `model.to(torch.bfloat16)`, `model.half()` and the precision `bf16-true` of a trainer cast the
    network, and leave these numbers as they are.

    Example:
        >>> class Levels(ExactModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("levels", torch.ones(3, dtype=torch.float64))
        >>> Levels().to(torch.bfloat16).levels.dtype
        torch.float64
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactModule:
        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        # All conversions of a module go through this method of torch, on which the public ones,
        # called for the outermost module only, depend.
        return super()._apply(moved, recurse)
