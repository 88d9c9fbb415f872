"""The checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["LastCheckpoint"]


class LastCheckpoint(Checkpoint):
    """Writes checkpoints/last.ckpt in the run folder: every n steps, at validation, at the end.

    One file, replaced each time. Add Lightning's `ModelCheckpoint` to keep more of them.

    Args:
        every_n_steps: Optimizer steps between two writings, at least 1.

    Raises:
        ValueError: If every_n_steps is below 1.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"LastCheckpoint: every_n_steps must be at least 1, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self._path: Path | None = None
        self._saved_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the file."""
        folder = trainer.log_dir  # a collective: every rank asks
        if folder is None:
            folder = trainer.default_root_dir
        self._path = Path(folder) / "checkpoints" / "last.ckpt"

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self._path, weights_only=False)  # with the optimizer

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that was resumed has this step already."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Save every n optimizer steps."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._saved_step:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was validated, even if this step is saved: the validation is now done."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end, unless it is saved."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Where the run lives."""
        return {"run": "" if self._path is None else str(self._path.parents[1])}
