"""The config of a run, config.yaml: every setting written out, so that the run can be repeated."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lit_diffusion.description import public_path
from lit_diffusion.training.run.dashboard import Dashboard
from lit_diffusion.training.run.metrics_csv import RunLogger
from lit_diffusion.training.run.secrets import masked
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["SaveConfig", "config_text", "with_public_paths"]


def with_public_paths(config: str) -> str:
    """A config in which each class has the shortest path from which it can be imported.

    The parser keeps a longer path as the user wrote it, which may name a file that moves.

    Args:
        config: The text of a config whose classes have been imported.

    Example:
        >>> with_public_paths("class_path: lit_diffusion.weightings.base.Weighting")
        'class_path: lit_diffusion.Weighting'
    """

    def shortest(found: re.Match[str]) -> str:
        module, _, name = found[2].rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        return found[1] + (public_path(cls) if isinstance(cls, type) else found[2])

    return re.sub(r"(\bclass_path: )([\w.]+)", shortest, config)


def config_text(parser: Any, config: Any) -> str:
    """A parsed config as text, with every default, and without the secrets in addresses.

    Args:
        parser: Has parsed it.
        config: As parsed.
    """
    return str(parser.dump(masked(config), skip_none=False))


class SaveConfig(SaveConfigCallback):
    """Saves the whole config as config.yaml in the run folder, and to W&B.

    That of a resumed run does not name the checkpoint: repeated elsewhere it would continue in the
    folder of the first run. And it is saved only once the checkpoint is restored, since a run that
    is refused leaves nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self._resumes = self.config.get("ckpt_path") is not None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save the config, unless a run is resumed, or measured again where it ended."""
        if not (self._resumes and (stage == "fit" or getattr(pl_module, "finishing", False))):
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Save the config of a resumed run."""
        if self._resumes:
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save the config, on rank 0.

        Args:
            trainer: Has the loggers.
            pl_module: The model.
            stage: fit, validate, test or predict.
        """
        config = self.config.clone()
        if stage == "fit":
            config.ckpt_path = None
        text = with_public_paths(config_text(self.parser, config))
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
