"""The config of a run, config.yaml: every setting written out, so that the run can be repeated."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lit_diffusion.training.run.dashboard import Dashboard
from lit_diffusion.training.run.metrics_csv import RunLogger
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["SaveConfig"]


class SaveConfig(SaveConfigCallback):
    """Saves the whole config as config.yaml in the run folder, and to W&B."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save the config, on rank 0.

        Args:
            trainer: Has the loggers.
            pl_module: The model.
            stage: fit, validate, test or predict.
        """
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                folder = Path(logger.log_dir)
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / "config.yaml"
                if file.is_file() and file.read_text() != text:
                    # A run resumed with other settings: keep what the first steps were run with.
                    file = folder / f"config-{time.strftime('%Y-%m-%d_%H-%M-%S')}.yaml"
                write_whole(file, text)
            elif isinstance(logger, Dashboard):
                logger.log_config(yaml.safe_load(text))
            elif isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(text), allow_val_change=True)
