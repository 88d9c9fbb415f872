"""The commands `fit`, `validate`, `test` and `predict`: LightningCLI, and a folder per run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_diffusion.description import check_arguments
from lit_diffusion.objective import Objective
from lit_diffusion.training.callbacks import FID, Likelihood, SampleGrid, SlicedWasserstein
from lit_diffusion.training.callbacks.defaults import with_defaults
from lit_diffusion.training.callbacks.predictions import Predictions
from lit_diffusion.training.commands.fit_setup.differences import naming_differences
from lit_diffusion.training.commands.fit_setup.loggers import make_loggers
from lit_diffusion.training.commands.fit_setup.own_data import (
    link_data,
    prepare_data,
    without_data,
)
from lit_diffusion.training.commands.fit_setup.parser import DiffusionParser, add_run_arguments
from lit_diffusion.training.commands.fit_setup.seeds import follow_seed
from lit_diffusion.training.commands.fit_setup.trainer import RunTrainer
from lit_diffusion.training.commands.fit_setup.without_config import with_default_words
from lit_diffusion.training.commands.shell.choices import (
    resolve_checkpoint,
    resolve_weights,
    run_of,
)
from lit_diffusion.training.commands.shell.data_class import base_of, named_data_class
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.data.own import promises
from lit_diffusion.training.last_weights import measure_again
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.reporting.objective import headline
from lit_diffusion.training.reporting.write import write_report
from lit_diffusion.training.restore.initial_weights import start_from
from lit_diffusion.training.restore.rebuild import refuse_other_class
from lit_diffusion.training.run.checkpoints import (
    load_checkpoint,
    model_class,
    with_whole_checkpoints,
)
from lit_diffusion.training.run.dashboard import Dashboard
from lit_diffusion.training.run.environment import begin_session, end_session, outcome
from lit_diffusion.training.run.folder import (
    NewFolder,
    check_name,
    from_here,
    is_first_rank,
    new_run_folder,
    run_loggers,
)
from lit_diffusion.training.run.messages import inform, warn
from lit_diffusion.training.run.metrics_csv import RunLogger
from lit_diffusion.training.run.newest import last_checkpoint
from lit_diffusion.training.run.relaunch import join_relaunched
from lit_diffusion.training.run.saved_config import SaveConfig, with_public_paths
from lit_diffusion.training.run.trainer import all_callbacks, log_interval
from lit_diffusion.training.run.weights import refuse_weights_alone
from lit_diffusion.training.step.precision import settle_precision

__all__ = ["DiffusionCLI"]


class DiffusionCLI(LightningCLI):
    """fit, validate, test and predict for a LitDiffusion and its data."""

    def __init__(
        self,
        model_class: type[LitDiffusion],
        data_class: type[DataModule],
        args: list[str] | None = None,
    ) -> None:
        self.trained_class = model_class
        self.own_data = named_data_class(sys.argv[1:] if args is None else args)
        self.made: LightningDataModule | None = None
        self.run_folder: Path | None = None
        self.created: NewFolder | None = None
        self.ckpt_path: str | None = None
        self.resume_step: int | None = None
        self.wandb_id: str | None = None
        self.loggers: list[Any] = []
        self.described: dict[str, Any] = {}
        super().__init__(
            model_class,
            data_class if self.own_data is None else base_of(self.own_data),
            subclass_mode_data=self.own_data is not None,
            parser_class=DiffusionParser,
            trainer_class=RunTrainer,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            load_from_checkpoint_support=False,
            auto_configure_optimizers=False,  # the optimizer is an argument of the model
            args=args,
            trainer_defaults={
                "default_root_dir": "runs",
                "max_epochs": -1,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name, plug-ins, and the link from the data's shape to the model's."""
        add_run_arguments(parser)
        link_data(parser, self.own_data)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words of the command, with what a checkpoint that they name says of the model.

        Its path leaves the config until LightningCLI is past loading hyper-parameters from it.

        Args:
            parser: Knows the arguments.
            args: The words; None means those of the process.
        """
        self.config = parser.parse_args(with_default_words(args))
        if self.config.get("subcommand"):
            config = self.config[self.config.subcommand]
            check_name(config.name)
            if config.out is not None and self.config.subcommand != "predict":
                raise UsageError(
                    f"--out is an argument of predict, not of {self.config.subcommand}."
                )
            self._resolve_checkpoint()
            config = self.config[self.config.subcommand]
            fresh = self.config.subcommand == "fit" and self.resume_step is None
            if config.init_from is not None and fresh:
                config.init_from = str(resolve_weights(config.init_from).absolute())
            self.ckpt_path, config.ckpt_path = config.get("ckpt_path"), None

    def _resolve_checkpoint(self) -> None:
        """Resolve `last`, check the file, and take the model of a checkpoint that is evaluated."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if path is None:
            return
        if path == "last":
            root = Path(config.trainer.default_root_dir)
            found = last_checkpoint(root, config.name)
            if found is None and self.config.subcommand != "fit":
                raise UsageError(
                    f"there is no checkpoint below {root / config.name}; train first."
                )
            if found is None:
                inform(f"No checkpoint below {root / config.name} yet: starting a new run.")
                config.ckpt_path = None
                return
            path = found
        path = resolve_checkpoint(path)
        config.ckpt_path = str(path)
        checkpoint = load_checkpoint(path)
        refuse_other_class(self.trained_class, model_class(checkpoint))
        self.described = checkpoint[LitDiffusion.CHECKPOINT_HYPER_PARAMS_KEY]
        if self.config.subcommand == "fit":
            refuse_weights_alone(checkpoint)
            inform(f"Resuming from {path}, step {checkpoint['global_step']}.")
            self.resume_step = checkpoint["global_step"]
            self.wandb_id = checkpoint.get("wandb_id")
            self.run_folder = run_of(path.absolute())
            return
        step = checkpoint["global_step"]
        inform(f"Using {path}, step {step}: the checkpoint's model; `--model.*` is ignored.")
        described = dict(checkpoint[LitDiffusion.CHECKPOINT_HYPER_PARAMS_KEY])
        check_arguments(self.trained_class, described)
        if self.own_data is None:
            described.pop("shape", None)  # the data's, by the link
        self.config = self.parser.parse_object(
            {self.config.subcommand: {"model": described}}, self.config
        )

    def before_instantiate_classes(self) -> None:
        """Put the checkpoint back, set the seeds, and pass the shape of the data to a network."""
        config = self.config[self.subcommand]
        follow_seed(config)
        config.ckpt_path = self.ckpt_path
        self.made = prepare_data(config, self.own_data)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; the model records its config."""
        trainer = self.config[self.subcommand].trainer
        loggers, trainer.logger = trainer.logger, None  # made once their folder exists
        with without_data(self.config[self.subcommand], made=self.made is not None):
            super().instantiate_classes()
        self.datamodule = self.made or self.datamodule
        trainer.logger = loggers
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        model = yaml.safe_load(with_public_paths(text))["model"]
        model["shape"] = list(self.model.shape)
        self.model.remember(**model)
        loss, prediction = self.model.loss, self.model.denoiser.prediction
        found = Objective(loss.schedule, loss.weighting, prediction, loss.num_timesteps)
        inform(f"Objective: {headline(found, loss.decoder)}")
        for name in ("weighting", "schedule", "prediction", "num_timesteps", "decoder"):
            before, now = self.described.get(name), self.model.hparams[name]
            if self.resume_step is not None and before != now:
                inform(f"Note: the checkpoint was trained with another {name}: {before}")
        config = self.config[self.subcommand]
        if config.init_from and self.subcommand == "fit" and self.resume_step is None:
            start_from(self.model, config.init_from)
        if not trainer.fast_dev_run:
            self._open_run(loggers)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the trainer, with the usual callbacks."""
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        callbacks = trainer.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        kwargs["logger"] = False
        kwargs["plugins"] = with_whole_checkpoints(trainer.plugins)
        trainer.callbacks = with_defaults(
            callbacks,
            checkpoints=trainer.enable_checkpointing is not False,
            progress_bar=trainer.enable_progress_bar is not False,
        )
        made = super().instantiate_trainer(**kwargs)
        join_relaunched(made)
        settle_precision(made)  # the model would do it, too, when its report has begun
        return made

    def _open_run(self, given: Any) -> None:
        """Create the run folder, unless one is resumed, and the loggers.

        Args:
            given: The user's loggers as the config describes them.
        """
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir) / config.name
        try:
            if self.run_folder is None and is_first_rank():
                self.created = new_run_folder(root)
                self.run_folder = self.created.path.absolute()
            # Only the first rank writes, and tells the others where.
            folder = self.run_folder or root
            self.loggers = run_loggers(
                folder,
                self.resume_step,
                self.wandb_id,
                make_loggers(given, folder),
                further=given is not False,
            )
            self.trainer.loggers = self.loggers
        except BaseException:
            self._finish_dashboard(exit_code=1)
            self._discard_if_empty()
            raise

    def _finish_dashboard(self, exit_code: int) -> None:
        """Close the W&B run, so that the next run of this process has its own."""
        for logger in self.loggers:
            if isinstance(logger, Dashboard):
                logger.finish(exit_code)

    def _discard_if_empty(self) -> None:
        """Remove the folder of a run that failed before it wrote anything worth keeping.

        Only a folder that this process has created: one that was there before is another run's.
        """
        kept = ("checkpoints/*", "samples/*", "predicted/*", "metrics.csv", "non_finite/*")
        if self.created is not None:
            folder = self.created.path
            if not any(any(folder.glob(pattern)) for pattern in kept):
                self.created.remove()

    def _run(self, work: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Let the trainer work, and report how that ended."""
        self._begin_report()
        try:
            work(**arguments)
        except BaseException as error:
            self._finish_dashboard(exit_code=1)
            self._discard_if_empty()
            self._end_report(outcome(error))
            if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                # Ctrl-C outside of training; Lightning makes it 1, shells expect this.
                raise SystemExit(128 + signal.SIGINT) from error
            raise
        self._finish_dashboard(exit_code=0)
        self._summarise()

    # LightningCLI calls a method of the command's name instead of the trainer's.

    def fit(self, **arguments: Any) -> None:
        """Train."""
        if (ones_own := promises(self.datamodule)) is not None:
            warn(ones_own)
        with naming_differences(self.described, self.model.hparams):
            self._run(self._fit, arguments)

    def _fit(self, **arguments: Any) -> None:
        """Train, and measure the last weights even if there was nothing left to train."""
        self.trainer.fit(**arguments)
        if self.resume_step is not None and self.trainer.global_step == self.resume_step:
            measure_again(self.trainer, self.model)

    def validate(self, **arguments: Any) -> None:
        """Measure the loss on the validation data."""
        self._run(self.trainer.validate, arguments)

    def test(self, **arguments: Any) -> None:
        """Measure the loss on the test data."""
        self._run(self.trainer.test, arguments)

    def predict(self, **arguments: Any) -> None:
        """Sample one image for each validation example; they are written, and not kept."""
        for callback in all_callbacks(self.trainer):
            if isinstance(callback, Predictions):
                callback.folder = self.config[self.subcommand].out or callback.folder
        self._run(self.trainer.predict, arguments | {"return_predictions": False})

    def _reports(self) -> bool:
        """Whether this process writes the report of a training run."""
        kept = any(isinstance(logger, RunLogger) for logger in self.trainer.loggers)
        return self.subcommand == "fit" and is_first_rank() and kept

    def _begin_report(self) -> None:
        """Record the device of the run; a failure to do so does not stop the run."""
        if self._reports() and self.run_folder is not None:
            try:
                trainer = self.trainer
                ranks = trainer.num_devices * trainer.num_nodes
                device = trainer.strategy.root_device
                begin_session(self.run_folder, device, ranks, str(trainer.precision))
            except Exception as error:
                warn(f"the environment of the run is not recorded: {error}")

    def _end_report(self, how: str) -> Path | None:
        """Write the report of the run folder, if there is one; return its path."""
        if self._reports() and self.run_folder is not None and self.run_folder.is_dir():
            try:
                end_session(self.run_folder, how, self.trainer.global_step)
                return write_report(self.run_folder)
            except Exception as error:
                warn(f"the report of this run could not be written: {error}")
        return None

    def _summarise(self) -> None:
        """Print the results and their files; the last line is the run folder."""
        if not self.trainer.is_global_zero or self.run_folder is None:
            return
        losses = {k: float(v) for k, v in self.trainer.callback_metrics.items() if "/loss" in k}
        if self.subcommand == "fit":
            steps, limit = self.trainer.global_step, self.trainer.max_steps
            none = f" before and none now: trainer.max_steps is {limit}"
            _say(f"Steps: {steps}{none if steps == (self.resume_step or 0) else ''}")
        for name, value in losses.items():
            step = self.model.validated_step
            if name.startswith("train/"):
                step = self.trainer.global_step // log_interval(self.trainer)
                step *= log_interval(self.trainer)
            _say(f"{name} at step {step}: {value:.4f} nats per dimension")
        callbacks = all_callbacks(self.trainer)
        for callback in callbacks:
            if (
                isinstance(callback, (FID, Likelihood, SlicedWasserstein))
                and callback.summary is not None
            ):
                _say(callback.summary)
        if not any(isinstance(logger, RunLogger) for logger in self.trainer.loggers):
            return
        for callback in callbacks:
            if isinstance(callback, SampleGrid) and callback.last_path is not None:
                _say(f"Samples: {from_here(callback.last_path)}")
        if (page := self._end_report("finished")) is not None:
            _say(f"Report: {from_here(page)}")
        _say(f"Run folder: {from_here(self.run_folder)}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
