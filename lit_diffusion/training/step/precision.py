"""Fall back to float32 where bfloat16 is requested of a device that does not have it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from lit_diffusion.training.run.environment import device_name
from lit_diffusion.training.run.messages import warn

__all__ = ["has_bfloat16", "settle_precision"]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; a CPU always does, if need be slowly.

    Args:
        device: Any.

    Example:
        >>> has_bfloat16(torch.device("cpu"))
        True
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    return True


def settle_precision(trainer: Any) -> None:
    """Fall back to float32, with a warning, if a trainer's device has no bfloat16.

    bf16-mixed is for speed, and such a device would emulate it slowly, or fail. The weights are
    float32 either way. No plug-in handed to the trainer can decide this, since the device is known
    only once the trainer is made.

    Args:
        trainer: The trainer, before it prepares the model for the device.

    Raises:
        ValueError: If the weights themselves were to be bfloat16, or the strategy has a precision
            plug-in of its own: falling back would then be a different training. Also for weights
            in float16, whose range is too small for the gradients and moments of training.
    """
    precision, device = str(trainer.precision), trainer.strategy.root_device
    if precision == "16-true":
        raise ValueError(
            "trainer.precision=16-true: expected weights in a type that can be trained, got "
            "float16, in which small gradients become 0; set trainer.precision=16-mixed, which "
            "scales them, or bf16-true."
        )
    if not precision.startswith("bf16") or has_bfloat16(device):
        return
    lacks = f"{device_name(device)} has no bfloat16 arithmetic"
    if type(trainer.precision_plugin) is not MixedPrecision:
        raise ValueError(
            f"trainer.precision={precision}: {lacks}; set trainer.precision=16-mixed, which is "
            "its half precision, or 32-true."
        )
    warn(f"{lacks}: training in float32 (trainer.precision=16-mixed is its half precision).")
    trainer.strategy.precision_plugin = Precision()
