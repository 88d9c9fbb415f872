"""bfloat16 that was asked of a device that has none."""

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

    bf16-mixed is for speed, which such a device does not gain: it would emulate bfloat16, or
    fail. The weights are float32 with it and without.

    Args:
        trainer: Before it has made the model ready for the device.

    Raises:
        ValueError: If bfloat16 is what the weights themselves were to be, or is made by another
            strategy's own plug-in: then falling back would be another training.
    """
    precision, device = str(trainer.precision), trainer.strategy.root_device
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
