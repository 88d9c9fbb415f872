"""What is taken from private parts of libraries is still there, and still means the same."""

import csv
import subprocess

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from test_module import tiny_data, tiny_model, trainer

from lit_diffusion.training.lightning_internals import logged_step, wandb_process


class Steps(L.Callback):
    """Logs the step that a row is said to have into that row."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.log("said", float(logged_step(trainer)), on_step=True, on_epoch=False)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            trainer.logger.log_metrics({"in_validation": 1.0}, logged_step(trainer))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_of_a_row(tmp_path, accumulate):
    """If this fails, Lightning counts the steps of its rows by another name or in another way."""
    logger = CSVLogger(tmp_path)
    fit = trainer(
        tmp_path, logger=logger, callbacks=[Steps()], max_steps=6, val_check_interval=2,
        accumulate_grad_batches=accumulate, check_val_every_n_epoch=None,
    )  # fmt: skip
    fit.fit(tiny_model(), tiny_data(steps_per_epoch=6))
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as lines:
        rows = list(csv.DictReader(lines))
    said = [(int(row["step"]), float(row["said"])) for row in rows if row["said"]]
    assert len(said) >= 5
    assert all(step == number for step, number in said), said
    validated = {int(row["step"]) for row in rows if row["val/loss"]}
    assert validated == {int(row["step"]) for row in rows if row["in_validation"]}


def test_the_process_of_wandb(tmp_path, monkeypatch):
    """If this fails, W&B keeps its process elsewhere: a W&B that hangs would hold up a run."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path)
    try:
        process = wandb_process()
        assert isinstance(process, subprocess.Popen)
        assert process.poll() is None
    finally:
        run.finish()
        wandb.teardown()
