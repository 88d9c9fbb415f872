"""Compile the network as a run begins."""

from __future__ import annotations

from typing import Any

import lightning as L

from lit_diffusion.training.compilation import compile_in_place

__all__ = ["Compile"]


class Compile(L.Callback):
    """Compiles the network, and in training the noise, the loss and their gradient with it.

    For GPUs, where it saves most of the trips through memory between two matrix products; on a
    CPU convolutions take nearly all the time, and nothing is won. The first step takes from half a
    minute to some minutes; of the same network in the same versions only the first time, since
    the kernels are kept (in ~/.cache/lit_diffusion/compiled, or where TORCHINDUCTOR_CACHE_DIR
    says). Weights and checkpoints are those of a run without; numbers agree to rounding.

    Where nothing can be compiled, for want of a compiler or on a GPU that is too old, a run goes
    on without, and says so.

    Args:
        max_autotune: Try several kernels for each product and keep the fastest: a first step of
            many minutes, for long runs.
        required: Whether to stop where nothing can be compiled.

    Raises:
        ValueError: If nothing can be compiled and it is required.
    """

    def __init__(self, max_autotune: bool = False, required: bool = False) -> None:
        self.max_autotune = max_autotune
        self.required = required

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Compile in place; until the first call nothing happens."""
        # Not the modes with graphs of CUDA: these reuse the memory of what a step returns, which
        # callbacks keep until the next log step.
        mode = "max-autotune-no-cudagraphs" if self.max_autotune else None
        compile_in_place(pl_module, trainer.strategy.root_device, self.required, mode)
