"""Compile the network at the start of a run."""

from __future__ import annotations

from typing import Any

import lightning as L

from lit_diffusion.training.step.compilation import compile_in_place

__all__ = ["Compile"]


class Compile(L.Callback):
    """Compiles the network, and in training the noise, the loss and the gradient as well.

    Useful on GPUs, where it avoids most memory traffic between two matrix products. On a CPU
    convolutions take nearly all the time, and nothing is gained. The first step takes from half a
    minute to several minutes, but only once for a network and its versions, since the kernels are
    cached (in ~/.cache/lit_diffusion/compiled, or in TORCHINDUCTOR_CACHE_DIR). Weights and
    checkpoints are the same as without compilation; numbers agree to rounding.

    If compilation is impossible, because there is no compiler or the GPU is too old, the run
    continues without it, with a warning.

    Args:
        max_autotune: Try several kernels for each product and keep the fastest. The first step
            then takes many minutes, so this is for long runs.
        required: Whether to stop if compilation is impossible.

    Raises:
        ValueError: If compilation is required and impossible.
    """

    def __init__(self, max_autotune: bool = False, required: bool = False) -> None:
        self.max_autotune = max_autotune
        self.required = required

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Compile in place; the compiler runs at the first call of the network."""
        # Not the modes with CUDA graphs: these reuse the memory of the outputs of a step, which
        # callbacks keep until the next log step.
        mode = "max-autotune-no-cudagraphs" if self.max_autotune else None
        compile_in_place(pl_module, trainer.strategy.root_device, self.required, mode)
