"""The parser of the commands that Lightning's command line runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lit_diffusion.training.commands.fit_setup.loggers import RUN_FOLDER, takes_run_folder
from lit_diffusion.training.commands.shell.parsing import CommandParser

__all__ = ["DiffusionParser", "add_run_arguments"]


class DiffusionParser(CommandParser, LightningArgumentParser):
    """The parser of LightningCLI, with errors of one line; loggers know where to write."""

    def add_class_arguments(self, theclass: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class; a logger writes to the run folder by default.

        Args:
            theclass: The class.
            *args: As of the parser of Lightning.
            **kwargs: As of the parser of Lightning.
        """
        added: list[str] = super().add_class_arguments(theclass, *args, **kwargs)
        if takes_run_folder(theclass):
            self.set_defaults(save_dir=RUN_FOLDER)
        return added

    def add_lightning_class_args(
        self,
        lightning_class: Any,
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Add the arguments of model, trainer or data; and of data that may be a data set.

        Args:
            lightning_class: As of the parser of Lightning.
            nested_key: As of the parser of Lightning.
            subclass_mode: As of the parser of Lightning.
            required: As of the parser of Lightning.
        """
        if nested_key == "data" and subclass_mode:
            self.add_subclass_arguments(
                lightning_class, "data", fail_untyped=False, required=required
            )
            return ["data"]
        added: list[str] = super().add_lightning_class_args(
            lightning_class, nested_key, subclass_mode, required
        )
        return added


def add_run_arguments(parser: LightningArgumentParser) -> None:
    """Add what a command has beside trainer, model and data: the run's name, plug-ins, files.

    Args:
        parser: Of the command.
    """
    parser.add_argument(
        "--name",
        type=str,
        default="run",
        help="The run goes to <default_root_dir>/<name>/<time>.",
    )
    parser.add_argument(
        "--plugins",
        type=list[str] | str,
        default=[],
        help="Modules with classes of your own, such as my_plugins for ./my_plugins.py.",
    )
    parser.add_argument(
        "--init_from",
        type=str | None,
        default=None,
        help="fit: start with the network's weights of this checkpoint, run folder or "
        "exported folder, as far as names and shapes agree; a resumed run has its own.",
    )
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="predict: the folder of the samples; predicted/ in the run folder by default.",
    )
