"""All that this library uses of the private parts of Lightning and of W&B, and why.

Each function stands for one private name. `tests/training/test_lightning_internals.py` compares
each with what a user sees of the library, and so fails by name when a release changes it.
"""

from __future__ import annotations

from typing import Any

import lightning as L

__all__ = ["logged_step", "wandb_process"]


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


def wandb_process() -> Any:
    """The process that W&B has started for this one, a `subprocess.Popen`.

    W&B waits for it without limit: with the process stopped (SIGSTOP), `run.finish()` of W&B 0.31
    did not return within ten minutes and the program did not obey SIGTERM; with the process killed
    it ended at once. W&B has no public way to end its process when that no longer answers.
    """
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton()._connection._proc._process  # type: ignore[union-attr]
