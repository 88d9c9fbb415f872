"""The Trainer of the command line, on which a number of batches is a number of batches."""

from __future__ import annotations

from typing import Any

import lightning as L

__all__ = ["RunTrainer"]


class RunTrainer(L.Trainer):
    """Lightning's Trainer, to which 1 is one batch and 1.0 all of them, as in Python.

    Python's `typing` may return `Union[float, int]` for `Union[int, float]`, if a library has made
    that one before, and the parser takes the first type that fits: 1 would become 1.0. The order
    in `int | float` is kept.

    Args:
        limit_train_batches: Batches of an epoch, as a number or a share; null for all.
        limit_val_batches: Batches of a validation, as a number or a share; null for all.
        limit_test_batches: Batches of a test, as a number or a share; null for all.
        limit_predict_batches: Batches of a prediction, as a number or a share; null for all.
        overfit_batches: Train and validate on the first batches only, a number or a share of each;
            0 for all.
        val_check_interval: Batches from one validation to the next, or a share of an epoch, or a
            time; null for once in an epoch.
        **kwargs: As for Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0,
        val_check_interval: int | float | str | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **kwargs,
        )
