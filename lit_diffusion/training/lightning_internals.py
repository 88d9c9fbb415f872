"""Everything used of the private parts of Lightning, its parser and W&B, with the reasons.

Each function stands for one private name. `tests/training/test_lightning_internals.py` compares
each with what a user sees of the library, and so fails by name when a release changes it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lit_diffusion.description import allowed_modules

if TYPE_CHECKING:  # the command line imports this file before it knows whether it needs Lightning
    import lightning as L

__all__ = [
    "count_steps",
    "logged_as_last_step",
    "logged_step",
    "prefer_importable_classes",
    "validate_before_training",
    "wandb_process",
]


def logged_step(trainer: L.Trainer) -> int:
    """The step that Lightning writes beside the metrics it is logging at this moment.

    A picture that belongs to a row of metrics must be logged at the row's step. No public
    attribute has that number: `trainer.global_step` counts optimizer steps and is one ahead at
    the end of a step, but not in a validation in the middle of accumulated micro-batches, and a
    model with two optimizers counts each.

    Args:
        trainer: In training or in a validation during it.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


@contextlib.contextmanager
def logged_as_last_step(trainer: L.Trainer) -> Iterator[None]:
    """Log at the end of training at the step of the last row, as validations during it do.

    Lightning counts on when a step is complete, and so would log at the step of the next row,
    which a run that continues from there removes. At the end of an epoch it does the same. It
    counts the epoch as complete as well, even if the end has cut it short.

    Args:
        trainer: In `on_train_end`, after at least one step; or with the counters of a checkpoint,
            which may be those of its step or have counted on.
    """
    loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    counted_on = int(loop._batches_that_stepped >= trainer.global_step)
    loop._batches_that_stepped -= counted_on
    epochs.completed -= counted_on
    try:
        yield
    finally:
        epochs.completed += counted_on
        loop._batches_that_stepped += counted_on


def validate_before_training(trainer: L.Trainer) -> None:
    """Let a resumed run begin with the validation that was due when its checkpoint was saved.

    A checkpoint that is saved at the end of a training batch, as `ModelCheckpoint` does it, comes
    before the validation of its step, and Lightning (2.6) goes on with the next batch. It can
    resume in the middle of a validation, so the loops are put at the first batch of it.

    Args:
        trainer: At the start of training, when its loops are restored and have not run.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if not (epoch.restarted_on_train_batch_end and fit.restarted_mid_epoch):
        return
    batch, interval = epoch.batch_progress, trainer.val_check_batch
    seen: Any = epoch.val_loop.batch_progress.total
    of_epoch = trainer.check_val_every_n_epoch is not None
    batches = (epoch.batch_idx if of_epoch else epoch.total_batch_idx) + 1
    due = batch.is_last_batch if interval == float("inf") else interval and not batches % interval
    if not due or not epoch._should_check_val_epoch():
        return
    if batch.is_last_batch:  # Lightning has counted the epoch as done
        counts: Any
        for counts in (fit.epoch_progress.total, fit.epoch_progress.current):
            counts.processed -= 1
            counts.completed -= 1
    batch.increment_completed()
    seen.ready = seen.started = seen.processed + 1
    epoch.update_restart_stage()


def count_steps(trainer: L.Trainer, steps: int) -> None:
    """Set the number of optimizer steps of a trainer that evaluates the weights after so many.

    Lightning (2.6) restores its counters only to train on, and so logs an evaluation at step 0.

    Args:
        trainer: Validates, tests or predicts.
        steps: For `trainer.global_step`; rows of metrics have the number of the last step.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = max(0, steps - 1)
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps
    loop.manual_optimization.optim_step_progress.total.completed = steps


def wandb_process() -> Any:
    """The process that W&B has started for this one, a `subprocess.Popen`.

    W&B waits for it without limit: with the process stopped (SIGSTOP), `run.finish()` of W&B 0.31
    did not return within ten minutes and the program did not obey SIGTERM; with the process killed
    it ended at once. W&B has no public way to end its process when that no longer answers.
    """
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton()._connection._proc._process  # type: ignore[union-attr]


def prefer_importable_classes() -> None:
    """Let a bare class name in a config mean the class that may be imported, if others share it.

    jsonargparse resolves a bare name among all imported subclasses of the argument's type, and
    calls it ambiguous if two have it: diffusers, too, has a FourierFeatures. Its setting
    `import_path_allowlist` is only asked afterwards, and there is no public way to choose the
    candidates (4.53). Two classes that may both be imported stay ambiguous.
    """
    from jsonargparse import _typehints

    find = _typehints.get_all_subclass_paths
    if hasattr(find, "__wrapped__"):  # done before
        return

    @functools.wraps(find)
    def paths(*args: Any, **kwargs: Any) -> list[str]:
        found = find(*args, **kwargs)
        allowed = tuple(f"{module}." for module in allowed_modules())
        taken = {path.rpartition(".")[2] for path in found if path.startswith(allowed)}
        return [
            path
            for path in found
            if path.startswith(allowed) or path.rpartition(".")[2] not in taken
        ]

    _typehints.get_all_subclass_paths = paths
