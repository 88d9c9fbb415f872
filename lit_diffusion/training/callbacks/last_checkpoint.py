"""Save the checkpoint to resume from: regularly, at validations, on signals and at the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lit_diffusion.training.run.checkpoints import WholeCheckpointIO
from lit_diffusion.training.run.folder import is_first_rank
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.trainer import output_folder
from lit_diffusion.training.run.whole_file import sync

__all__ = ["LastCheckpoint"]

#: Signals that end a job early: Ctrl-C sends the first, kill and torchrun the second, SLURM's
#: --signal the second or third.
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
TWICE = 1.0  # seconds within which a second signal is the first one again
PENDING = "last.ckpt.pending"  # not found by a search for *.ckpt


class LastCheckpoint(Checkpoint):
    """Saves checkpoints/last.ckpt in the run folder: every n steps, at validation, at the end.

    It is one file, replaced as a whole each time; add Lightning's `ModelCheckpoint` to keep more.
    If it cannot be written, for instance because the disk is full, the run continues with a
    warning and tries again at the next opportunity; only the last one must succeed.

    Args:
        every_n_steps: Optimizer steps between two checkpoints, at least 1.
        save_on_signal: On Ctrl-C (SIGINT), SIGTERM or SIGUSR1 to any rank, save a checkpoint after
            the step (during validation: after it) and exit with code 128 + signal, without a
            measurement of the last weights. A second signal, a second later or more, ends the
            process at once.

    Raises:
        ValueError: If every_n_steps is below 1.
    """

    # A run resumed from a checkpoint must be the run that was never interrupted. So it is saved
    # after an optimizer step, but not between the step and its validation, which would be skipped;
    # not between two micro-batches, since gradients are not saved; not between two epochs, which
    # Lightning may then count wrongly; and not between the last step and the end of training,
    # where other callbacks write. It is then saved later.
    #
    # Lightning logs the row of a step after this callback's last hook of the step. A checkpoint
    # that appeared before its row would lose it if the run is killed in between, so it waits
    # under another name until the next step starts.

    def __init__(self, every_n_steps: int = 1000, save_on_signal: bool = True) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"LastCheckpoint: every_n_steps must be at least 1, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self.save_on_signal = save_on_signal
        self._path = Path()
        self._enabled = True  # False with fast_dev_run, which writes nothing
        self._saved_step = -1
        self._last_step = 0
        self._late = False  # whether one is due, but could not be saved yet
        self._pending = False  # whether last.ckpt.pending waits for its row to be logged
        self._between_steps = True  # whether the last batch completed an optimizer step
        self._leaving = 0  # the signal to end by
        self._signal = 0
        self._noted = 0.0  # when
        self._saved_all: L.Trainer | None = None  # in the measurements after the last checkpoint
        self._process = 0
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the path of the file."""
        folder = output_folder(trainer)
        self._enabled = folder is not None
        self._path = (folder or Path()) / "checkpoints" / "last.ckpt"
        whole = isinstance(trainer.strategy.checkpoint_io, WholeCheckpointIO)
        if stage == "fit" and self._enabled and not whole:
            warn(
                "LastCheckpoint: a kill while last.ckpt is written may destroy it; to prevent "
                "that, give the trainer plugins=[WholeCheckpointIO()]."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step of a resumed run, and install the signal handlers."""
        self._saved_step = self._last_step = trainer.global_step
        if not self._enabled:
            return
        if trainer.num_training_batches == 1 and trainer.max_steps != 1:
            warn(
                "LastCheckpoint: with epochs of one batch, checkpoints are saved only at "
                "validations and at the end; set data.steps_per_epoch to 2 or more."
            )
        self._signal, self._leaving, self._process = 0, 0, os.getpid()
        self._saved_all = None
        self._pending, self._late, self._between_steps = False, False, True
        if self.save_on_signal and threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:  # as of a job in the background
                    self._handlers[number] = signal.signal(number, self._note)

    # When -------------------------------------------------------------------------------------

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save every n optimizer steps, and if a rank has received a signal."""
        step = trainer.global_step
        self._between_steps = step != self._last_step
        if not self._between_steps:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        self._leaving = self._received(trainer)
        ends = step == trainer.max_steps or trainer.should_stop
        due = step % self.every_n_steps == 0 or self._late or self._leaving or ends
        if due and step != self._saved_step:
            if trainer.is_last_batch or _validates(trainer, batch_idx):
                self._late, self._leaving = True, 0
            else:
                self._pending = self._save(trainer, self._path.with_name(PENDING), again=ends)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Publish the checkpoint of the previous step, and end if a rank has received a signal."""
        self._publish(trainer)
        if self._leaving:
            self._leave(trainer, self._leaving)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove a checkpoint from before the validation, which a resumed run would skip."""
        self._drop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the validated weights, now or when their optimizer step is complete."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if not self._between_steps:
            self._late = True
            return
        number = self._received(trainer)
        if trainer.global_step != self._saved_step:  # else it is after the end of training
            self._save(trainer, self._path)
        if number:
            self._leave(trainer, number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, unless it is saved, before its weights are measured."""
        self._publish(trainer)
        if trainer.global_step != self._saved_step:
            self._save(trainer, self._path, required=True)
        if number := self._received(trainer):
            self._leave(trainer, number)
        if trainer.world_size == 1:  # several ranks can only leave together
            self._saved_all = trainer

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Publish the checkpoint that was saved before the error."""
        self._publish(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save(
        self, trainer: L.Trainer, path: Path, required: bool = False, again: bool = False
    ) -> bool:
        """Write a checkpoint, a required one or one that is tried again; return whether it is."""
        if not self._enabled:
            return False
        try:
            trainer.save_checkpoint(path, weights_only=False)  # with the optimizer
        except OSError as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
            if required:
                raise
            if not again:
                warn(f"{error} Training continues.")
            return False
        self._saved_step, self._late = trainer.global_step, False
        return True

    def _publish(self, trainer: L.Trainer) -> None:
        """Rename the pending checkpoint, now that the row of its step is logged."""
        if self._pending and trainer.is_global_zero:
            self._path.with_name(PENDING).replace(self._path)
            sync(self._path.parent)
        self._pending = False

    def _drop(self, trainer: L.Trainer) -> None:
        """Remove a pending checkpoint, since a later one will follow."""
        if self._pending:
            self._pending, self._saved_step = False, -1
            if trainer.is_global_zero:
                self._path.with_name(PENDING).unlink()

    # Signals ----------------------------------------------------------------------------------

    def _note(self, number: int, frame: Any) -> None:
        """Keep a signal until the step is complete; leave now if nothing remains to be saved."""
        other = os.getpid() != self._process  # a process that was forked from this one
        # `timeout` sends its signal to the process and to its group, one right after the other;
        # torchrun at a terminal passes on a Ctrl-C that its processes have received themselves.
        if other or (self._signal and time.monotonic() - self._noted > TWICE):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._signal:
            return
        self._signal, self._noted = number, time.monotonic()
        if self._saved_all is not None:
            self._leave(self._saved_all, number)
        if number == signal.SIGINT and is_first_rank():
            # Neither logging nor print may be called from within themselves.
            os.write(2, b"\nCtrl-C: saving after this step; once more ends the run at once.\n")

    def _received(self, trainer: L.Trainer) -> int:
        """The signal that some rank has received, 0 for none; a collective."""
        if trainer.world_size == 1 or not self.save_on_signal:
            return self._signal
        some = trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False)
        return (self._signal or signal.SIGTERM) if some else 0

    def _leave(self, trainer: L.Trainer, number: int) -> None:
        """End the process; the trainer cleans up as after an error."""
        if not trainer.is_global_zero:
            # A launcher kills rank 0 before it has cleaned up if another rank fails.
            raise SystemExit(0)
        step = trainer.global_step
        saved = f"step {step} is saved; continue with --ckpt_path last"
        lost = f"step {step} could not be saved"
        warn(f"{signal.Signals(number).name}: {saved if self._saved_step == step else lost}.")
        raise SystemExit(128 + number)

    def state_dict(self) -> dict[str, Any]:
        """The run folder."""
        return {"run": str(self._path.parents[1]) if self._path.name else ""}


def _validates(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation may follow this batch, which is not the last one of an epoch."""
    interval = trainer.val_check_batch
    if not trainer.enable_validation or not isinstance(interval, int):
        return False
    if trainer.should_stop:
        return True
    of_epoch = trainer.check_val_every_n_epoch is not None
    batches = (batch_idx if of_epoch else trainer.fit_loop.total_batch_idx) + 1
    return batches % interval == 0
