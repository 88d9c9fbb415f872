"""The checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["LastCheckpoint"]

#: What a job is told to make room by: kill and torchrun send the first, SLURM's --signal any.
SIGNALS = ("SIGTERM", "SIGUSR1")


class LastCheckpoint(Checkpoint):
    """Writes checkpoints/last.ckpt in the run folder: every n steps, at validation, at the end.

    One file, replaced each time as a whole. Add Lightning's `ModelCheckpoint` to keep more of
    them. If one cannot be written, because the disk is full, the run goes on with a warning and
    tries again at the next occasion; only the last one must succeed.

    Args:
        every_n_steps: Optimizer steps between two writings, at least 1.
        save_on_signal: At SIGTERM or SIGUSR1 write a checkpoint after the step (in validation:
            after it), on all ranks alike whichever was told, and leave with code 128 + signal. A
            second signal ends the process at once.

    Raises:
        ValueError: If every_n_steps is below 1.
    """

    # A checkpoint is taken where training resumes without a seam: after an optimizer step, but
    # not between it and its validation, which would be passed over; not between two
    # micro-batches, since gradients are not saved; not between two epochs, which Lightning may
    # then count wrongly; and not between the last step and the end of training, where other
    # callbacks write, and which a run resumed there would not come to. It is then taken later.

    def __init__(self, every_n_steps: int = 1000, save_on_signal: bool = True) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"LastCheckpoint: every_n_steps must be at least 1, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self.save_on_signal = save_on_signal
        self._path: Path | None = None
        self._saved_step = -1
        self._last_step = 0
        self._late = False  # whether one was due at a seam
        self._signal = 0
        self._process = 0
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the file."""
        folder = trainer.log_dir  # a collective: every rank asks
        if folder is None:
            folder = trainer.default_root_dir
        self._path = Path(folder) / "checkpoints" / "last.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that was resumed has this step already."""
        self._saved_step = self._last_step = trainer.global_step
        if trainer.fast_dev_run:
            return
        if trainer.num_training_batches == 1 and trainer.max_steps != 1:
            rank_zero_warn(
                "LastCheckpoint: with epochs of one batch there are checkpoints at validations "
                "and at the end only; set data.steps_per_epoch to 2 or more."
            )
        self._signal, self._process = 0, os.getpid()
        if self.save_on_signal and threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in SIGNALS):
                if number is not None:
                    self._handlers[number] = signal.signal(number, self._note)

    # When -------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Save every n optimizer steps, and leave if a rank was told to."""
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        leave = self._told(trainer)
        if (step % self.every_n_steps == 0 or self._late or leave) and step != self._saved_step:
            if _at_a_seam(trainer):
                self._late = True
                return
            # The step's row is logged after this hook. Killed in between, it would be lost.
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
        if leave:
            self._leave(trainer, leave)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was validated, as soon as its step is whole."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.fit_loop._should_accumulate():
            self._late = True
            return
        leave = self._told(trainer)
        self._save(trainer)
        if leave:
            self._leave(trainer, leave)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end, unless it is saved."""
        if trainer.global_step != self._saved_step:
            self._save(trainer, required=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give signals back to whoever had them."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save(self, trainer: L.Trainer, required: bool = False) -> None:
        if trainer.fast_dev_run:
            return
        try:
            trainer.save_checkpoint(self._path, weights_only=False)  # with the optimizer
        except OSError as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
            if required:
                raise
            rank_zero_warn(f"{error} Training goes on.")
        else:
            self._saved_step, self._late = trainer.global_step, False

    # Signals ----------------------------------------------------------------------------------

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process or self._signal:  # a worker, or the second time
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = number

    def _told(self, trainer: L.Trainer) -> int:
        """The signal that some rank has got, 0 for none: a collective."""
        if trainer.world_size == 1 or not self.save_on_signal:
            return self._signal
        told = trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False)
        return (self._signal or signal.SIGTERM) if told else 0

    def _leave(self, trainer: L.Trainer, number: int) -> None:
        """End the process. What the trainer does at a failure, it does here: nothing is left."""
        if not trainer.is_global_zero:
            # A launcher that sees a rank fail would kill rank 0 before it has put things away.
            raise SystemExit(0)
        step = trainer.global_step
        saved = f"step {step} is saved, go on with --ckpt_path last"
        lost = f"step {step} could not be saved"
        sys.stderr.write(
            f"{signal.Signals(number).name}: {saved if self._saved_step == step else lost}.\n"
        )
        raise SystemExit(128 + number)

    def state_dict(self) -> dict[str, Any]:
        """Where the run lives."""
        return {"run": "" if self._path is None else str(self._path.parents[1])}


def _at_a_seam(trainer: L.Trainer) -> bool:
    """Whether a run that is resumed after this batch would not be the same run."""
    if trainer.global_step == trainer.max_steps:
        return True
    loop = trainer.fit_loop
    if loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and sum(trainer.num_val_batches):
        return True
    # From an epoch's last batch Lightning goes on in the right epoch in few cases only.
    return loop.epoch_loop.batch_progress.is_last_batch
