"""What callbacks ask the Trainer: where to write, how often to log, and who else is there.

Lightning documents these attributes but sets them where a type checker cannot see it.
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer

__all__ = ["all_callbacks", "check_trainer", "log_interval", "output_folder"]


def output_folder(trainer: Trainer) -> Path | None:
    """The folder that callbacks write to; None with `fast_dev_run`, which writes nothing.

    It is that of the first logger, else `default_root_dir`. A collective: every rank must ask,
    and gets the answer of rank 0.

    Args:
        trainer: The trainer.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    return None if trainer.fast_dev_run else Path(folder)  # type: ignore[attr-defined]


def log_interval(trainer: Trainer) -> int:
    """The number of optimizer steps from one logged step to the next.

    Args:
        trainer: The trainer.
    """
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def check_trainer(trainer: Trainer) -> None:
    """Refuse numbers with which Lightning would train, but not as anyone wants it.

    Clipping to a negative norm reverses the gradient.

    Args:
        trainer: The trainer.

    Raises:
        ValueError: If a number is outside its range.
    """
    clip = trainer.gradient_clip_val
    if clip is not None and not clip >= 0:
        raise ValueError(
            f"trainer.gradient_clip_val must be at least 0, which is off, got {clip}."
        )
    for name in ("accumulate_grad_batches", "log_every_n_steps"):
        if (value := getattr(trainer, name)) < 1:
            raise ValueError(f"trainer.{name} must be at least 1, got {value}.")


def all_callbacks(trainer: Trainer) -> list[Callback]:
    """The callbacks of a run in the order in which their hooks are called.

    Args:
        trainer: The trainer.
    """
    return list(trainer.callbacks)  # type: ignore[attr-defined]
