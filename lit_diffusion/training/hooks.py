"""Hooks that nobody wrote: Lightning calls them all, and here they cost nothing.

A run has about ten callbacks, and a step seven hooks for each, nearly all of them empty. Each call
is a few microseconds of book-keeping, which a step of a small network notices.
"""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L

__all__ = ["leave_out_empty_hooks"]

OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def leave_out_empty_hooks(callbacks: Iterable[L.Callback]) -> None:
    """Let a trainer pass over the hooks of a step that a callback does not have itself.

    Lightning calls what is callable, so what is inherited empty becomes None.

    Args:
        callbacks: Those of a trainer.

    Example:
        >>> class Mine(L.Callback):
        ...     def on_after_backward(self, trainer, pl_module):
        ...         ...
        >>> mine = Mine()
        >>> leave_out_empty_hooks([mine])
        >>> callable(mine.on_after_backward), callable(mine.on_train_batch_end)
        (True, False)
    """
    for callback in callbacks:
        for name in OF_A_STEP:
            if getattr(callback, name, None) == getattr(L.Callback, name).__get__(callback):
                setattr(callback, name, None)
