"""The command line: LightningCLI, with plug-ins by bare class name and a folder for each run.

A program with its own subclass of LitDiffusion or ImageDataModule has the same command line by
calling `main(MyLit, MyData)`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_diffusion.registry import load_plugins
from lit_diffusion.samplers import Sampler
from lit_diffusion.training import randomness
from lit_diffusion.training.callbacks import LastCheckpoint, SampleGrid
from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.data import ImageDataModule
from lit_diffusion.training.description import allow, allowed_modules
from lit_diffusion.training.logging import (
    RunLogger,
    SaveConfig,
    last_checkpoint,
    new_run_folder,
    run_loggers,
)
from lit_diffusion.training.module import LitDiffusion, load_checkpoint

__all__ = ["DiffusionCLI", "main"]

#: What a user's mistake raises; anything else is ours, and shows its traceback.
MISTAKES = (ValueError, KeyError, OSError, MisconfigurationException)


def fail(message: str) -> NoReturn:
    """Say in one line what went wrong, and leave with exit code 2."""
    line = " ".join(message.split())
    sys.stderr.write(f"lit-diffusion: error: {line}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def _subclass_names(base: type) -> set[str]:
    children: list[type] = base.__subclasses__()
    names = {cls.__name__ for cls in children if not cls.__name__.startswith("_")}
    return names.union(*map(_subclass_names, children)) if children else names


def _plain(message: str) -> str:
    """The sentence that matters in a parser's message, with a suggestion for a misspelt name."""
    name = re.search(r"Expected a dot import path string: (\w+)", message)
    if name:
        known = _subclass_names(torch.nn.Module) | _subclass_names(Sampler)
        from lit_diffusion.predictions import Prediction

        for base in (Prediction, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler):
            known |= _subclass_names(base)
        from lightning.pytorch.callbacks import Callback

        known |= _subclass_names(Callback)
        key = re.search(r'[Pp]arser key "([^"]*)"|Key "([^"]*)"', message)
        where = f" for {next(filter(None, key.groups()))}" if key else ""
        near = difflib.get_close_matches(name[1], known, n=3, cutoff=0.6)
        hint = (
            f"Did you mean {' or '.join(near)}?"
            if near
            else "`lit-diffusion plugins` lists what there is; a class of your own needs --plugins."
        )
        return f"No class named {name[1]!r}{where}. {hint}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    telling = [
        line
        for line in lines
        if re.search(r"not accepted|Expected|Got value|required|[Ii]nvalid|[Uu]nable|must|not ", line)
    ]
    kept = dict.fromkeys(lines[:1] + telling[:3])
    return " ".join(kept)[:600]


class DiffusionParser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, without the usage."""
        if os.environ.get("LIT_DIFFUSION_TRACEBACK"):
            raise ValueError(message) from ex
        fail(_plain(str(message)))


class _Bar(TQDMProgressBar):
    """Lightning's bar without the logger's version, which is the run folder's name cut short."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class DiffusionCLI(LightningCLI):
    """fit, validate, test and predict for a LitDiffusion and its data."""

    def __init__(self, model_class: type[LitDiffusion], data_class: type[ImageDataModule]) -> None:
        self.run_folder: Path | None = None
        self.resume_step: int | None = None
        super().__init__(
            model_class,
            data_class,
            parser_class=DiffusionParser,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "default_root_dir": "runs",
                "use_distributed_sampler": False,
                "max_epochs": -1,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's name, plug-ins, and the one link: the data's shape is the model's."""
        parser.add_argument(
            "--name", type=str, default="run", help="The run goes to <default_root_dir>/<name>/<time>."
        )
        parser.add_argument(
            "--plugins",
            type=list[str] | str,
            default=[],
            help="Modules with classes of your own, such as my_plugins for ./my_plugins.py.",
        )
        parser.link_arguments("data.image_shape", "model.image_shape")

    def _parse_ckpt_path(self) -> None:
        """Resolve `last`, check the file, and take the model of a checkpoint that is evaluated."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if path is None:
            return
        if path == "last":
            root = Path(config.trainer.default_root_dir) / config.name
            found = last_checkpoint(root)
            if found is None:
                rank_zero_info(f"No checkpoint below {root} yet: starting afresh.")
                config.ckpt_path = None
                return
            rank_zero_info(f"Going on from {found}.")
            config.ckpt_path = path = str(found)
        checkpoint = load_checkpoint(path)
        if self.config.subcommand == "fit":
            self.resume_step = checkpoint["global_step"]
            if Path(path).parent.name == "checkpoints":
                self.run_folder = Path(path).parents[1]
            return
        described = dict(checkpoint[LitDiffusion.CHECKPOINT_HYPER_PARAMS_KEY])
        described.pop("image_shape", None)  # the data's, by the link
        self.config = self.parser.parse_object(
            {self.config.subcommand: {"model": described}}, self.config
        )

    def before_instantiate_classes(self) -> None:
        """Hand the shape of the data to the network, if it takes one."""
        config = self.config[self.subcommand]
        network = config.model.get("network")
        if network is not None:
            module, _, name = network.class_path.rpartition(".")
            cls = getattr(importlib.import_module(module), name)
            if "image_shape" in inspect.signature(cls).parameters:
                network.init_args = network.get("init_args") or jsonargparse.Namespace()
                network.init_args.image_shape = tuple(config.data.image_shape)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; the model keeps its config."""
        super().instantiate_classes()
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        model = yaml.safe_load(text)["model"]
        model["image_shape"] = list(self.model.image_shape)
        self.model.remember(**model)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the trainer, with the run folder, its loggers, and the callbacks nobody misses."""
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        callbacks = trainer.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        if self.run_folder is None:
            self.run_folder = new_run_folder(Path(trainer.default_root_dir) / config.name)
        if trainer.logger in (None, True) and not trainer.fast_dev_run:
            kwargs["logger"] = run_loggers(self.run_folder, self.resume_step)
        if trainer.enable_checkpointing is not False and not any(
            isinstance(callback, Checkpoint) for callback in callbacks
        ):
            callbacks.append(LastCheckpoint())
        if trainer.enable_progress_bar is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            # Refreshed at every step the bar alone would cost most of a millisecond.
            callbacks.append(_Bar(refresh_rate=20))
        trainer.callbacks = callbacks
        return super().instantiate_trainer(**kwargs)

    def _discard_if_empty(self) -> None:
        """Remove the folder of a run that failed before it had anything to keep."""
        folder = self.run_folder
        if rank_zero_only.rank != 0 or folder is None or self.resume_step is not None:
            return
        if "wandb" in sys.modules:
            with contextlib.suppress(Exception):
                sys.modules["wandb"].finish(exit_code=1, quiet=True)
        kept = ("checkpoints/*", "samples/*", "metrics.csv")
        if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in kept):
            shutil.rmtree(folder)
            for parent in (folder.parent, folder.parent.parent):
                with contextlib.suppress(OSError):
                    parent.rmdir()  # only if it is empty

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            self._discard_if_empty()
            raise
        self._summarise()

    def _summarise(self) -> None:
        """Name what there is to look at; the last line is the run folder."""
        if not self.trainer.is_global_zero or self.run_folder is None:
            return
        losses = {k: float(v) for k, v in self.trainer.callback_metrics.items() if "/loss" in k}
        for name, value in losses.items():
            _say(f"{name}: {value:.4f} nats per dimension")
        if not any(isinstance(logger, RunLogger) for logger in self.trainer.loggers):
            return
        for callback in self.trainer.callbacks:
            if isinstance(callback, SampleGrid) and callback.last_path is not None:
                _say(f"Samples: {callback.last_path}")
        _say(f"Run folder: {self.run_folder}")


def _quiet() -> None:
    """Keep what a user cannot act on out of the way of what he can."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # The model is told its config after it is made, so nothing is lost.
    warnings.filterwarnings("ignore", message=".*cannot be kept in checkpoints")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _import_plugins(argv: list[str]) -> None:
    """Import the modules named by --plugins or a config's plugins:, before parsing needs them."""
    named: list[str] = []

    def add(value: Any) -> None:
        if isinstance(value, str):
            value = yaml.safe_load(value) if value.startswith("[") else value.split(",")
        named.extend(str(module).strip() for module in value or [])

    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        if flag == "--plugins":
            add(value)
        elif flag in ("--config", "-c") and Path(value).is_file():
            with contextlib.suppress(yaml.YAMLError):
                config = yaml.safe_load(Path(value).read_text())
                add(config.get("plugins") if isinstance(config, dict) else None)
    load_plugins()
    for module in named:
        allow(module)
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            fail(f"No plug-in module {module!r}: expected {module}.py here, or an installed package.")
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=allowed_modules()
    )


def _sample(argv: list[str]) -> None:
    """Draw images from a checkpoint alone."""
    parser = DiffusionParser(prog="lit-diffusion sample", description=_sample.__doc__)
    parser.add_argument("--ckpt_path", type=str, required=True, help="The checkpoint.")
    parser.add_argument("--num_samples", type=int, default=64, help="How many images.")
    parser.add_argument(
        "--out", type=str, default="samples.png", help="A .png for one grid, or a folder for many."
    )
    parser.add_subclass_arguments(
        Sampler,
        "sampler",
        required=False,
        help="How to draw, such as DDIMSampler; the model's own by default.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Image i is a function of (seed, i).")
    parser.add_argument(
        "--label", type=int | None, default=None, help="Class of all images; drawn by default."
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="Strength; 1 for none.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images at a time.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")
    parser.add_argument("--plugins", type=list[str] | str, default=[], help="As for fit.")
    config = parser.instantiate_classes(parser.parse_args(argv))
    out = Path(config.out)
    if config.num_samples < 1 or config.batch_size < 1:
        fail(
            "--num_samples and --batch_size must be at least 1, "
            f"got {config.num_samples} and {config.batch_size}."
        )
    if out.suffix not in ("", ".png"):
        fail(f"--out must be a .png file or a folder, got {out}.")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LitDiffusion.load_from_checkpoint(config.ckpt_path).to(device)
    from tqdm import tqdm

    images = []
    for first in range(0, config.num_samples, config.batch_size):
        indices = list(range(first, min(first + config.batch_size, config.num_samples)))
        noise = randomness.generators(config.seed, "sample", indices)
        progress = lambda levels: tqdm(levels, desc=f"images {indices[0]}-{indices[-1]}")  # noqa: E731, B023
        batch = model.sample(
            len(indices),
            noise,
            label=config.label,
            sampler=config.get("sampler"),
            guidance=config.guidance,
            progress=progress,
        )
        images.append(batch.cpu())
    whole = torch.cat(images)
    if out.suffix == ".png":
        save_grid(whole, out, columns=max(1, round(len(whole) ** 0.5)))
    else:
        from torchvision.transforms.functional import to_pil_image

        out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(whole):
            pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            to_pil_image(pixels).save(out / f"{i:06d}.png")
    _say(str(out))


def main(
    model_class: type[LitDiffusion] = LitDiffusion,
    data_class: type[ImageDataModule] = ImageDataModule,
) -> None:
    """Run a command of `lit-diffusion`.

    Args:
        model_class: The model to train, LitDiffusion or a subclass of it.
        data_class: The data, ImageDataModule or a subclass of it.
    """
    argv = sys.argv[1:]
    _quiet()
    try:
        _import_plugins(argv)
        if argv[:1] == ["sample"]:
            _sample(argv[1:])
        else:
            DiffusionCLI(model_class, data_class)
    except MISTAKES as error:
        if os.environ.get("LIT_DIFFUSION_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        fail(f"{text} (LIT_DIFFUSION_TRACEBACK=1 shows where.)")
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        fail(f"The checkpoint's weights do not fit the model of this config: {error}"[:600])
