"""Compile a model in place, so that its operations are fused into a few kernels.

In place, so that weights keep their names and checkpoints can be exchanged with those of a model
that is not compiled. Compiled kernels are cached in a folder that outlives the machine's temporary
files, so that the next start of the same network takes seconds instead of a minute.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lit_diffusion.models import SamplingModel
from lit_diffusion.training.run.messages import warn

__all__ = ["compile_in_place", "why_not"]

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # where torch looks for what it compiled before


def compile_in_place(
    model: SamplingModel, device: torch.device, required: bool = False, mode: str | None = None
) -> bool:
    """Compile a model's network, and its loss with the network in it, at their first call.

    Where nothing can be compiled the model is left as it is, with a warning. Returns whether the
    model is compiled.

    Args:
        model: The model.
        device: Where it will run.
        required: Whether to raise an error where nothing can be compiled.
        mode: The mode of `torch.compile`.

    Raises:
        ValueError: If nothing can be compiled and it is required.
    """
    if model.denoiser.network._compiled_call_impl is not None:
        return True
    if (reason := why_not(device)) is not None:
        if required:
            raise ValueError(
                f"nothing can be compiled for {device} ({reason}): install what is missing, or do "
                "not ask for it."
            )
        warn(
            f"nothing can be compiled for {device} ({reason}): continuing without, which "
            "is slower and otherwise the same."
        )
        return False
    model.denoiser.network.compile(mode=mode)
    model.loss.compile(mode=mode)
    return True


def compile_cache_folder() -> Path:
    """Where compiled kernels are kept if TORCHINDUCTOR_CACHE_DIR is not set."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_diffusion/compiled"
    )


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, in a few words; None if it can.

    Found by compiling a very small function, since only torch knows what is needed: a C++
    compiler, Triton, the headers of Python, a GPU that is not too old.

    Args:
        device: Where the model is.
    """
    os.environ.setdefault(FOLDER, str(compile_cache_folder()))

    @torch.compile
    def probe(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    try:
        probe(torch.ones(8, device=device))
    except Exception as error:
        # However it is wrapped, the first line of the innermost cause is the one to act on.
        innermost: BaseException = error
        cause: BaseException | None = error
        while cause is not None:
            innermost, cause = cause, getattr(cause, "inner_exception", None) or cause.__cause__
        lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
        return f"{type(innermost).__name__}: {lines[0] if lines else 'no reason given'}"
    return None
