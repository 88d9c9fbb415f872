"""The command line: parse the arguments of a command, call its function, print its result.

Each command is a typed function in `commands/`; its help is made from signature and docstring. A
program with its own subclass of LitDiffusion or DataModule has the same command line by
calling `main(MyLit, MyData)`. Only the module of the command that runs is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_diffusion.description import allow
from lit_diffusion.training.commands.shell.config_check import check_config
from lit_diffusion.training.commands.shell.config_places import config_files, located
from lit_diffusion.training.commands.shell.data_class import (
    base_of,
    named_data_class,
    names_class,
    refuse_data_class,
)
from lit_diffusion.training.commands.shell.errors import UsageError, fail, one_line, unexpected
from lit_diffusion.training.commands.shell.output import lasting_output
from lit_diffusion.training.commands.shell.parsing import (
    CommandParser,
    import_plugins,
    join_numbers,
)
from lit_diffusion.training.commands.shell.shipped_configs import with_shipped_configs
from lit_diffusion.training.commands.table import COMMANDS
from lit_diffusion.training.lightning_internals import prefer_importable_classes

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule
    from lit_diffusion.training.module import LitDiffusion

__all__ = ["main"]


def main(
    model_class: type[LitDiffusion] | None = None,
    data_class: type[DataModule] | None = None,
) -> None:
    """Run a command of `lit-diffusion`.

    Args:
        model_class: The model to train, LitDiffusion or a subclass of it; None means LitDiffusion.
        data_class: The data, DataModule or a subclass of it; None means DataModule.
    """
    argv = sys.argv[1:]
    command = argv[0] if argv else ""
    trace = bool(os.environ.get("LIT_DIFFUSION_TRACEBACK"))
    _quiet()
    try:
        with lasting_output(), _messages_on_stderr():
            argv = with_shipped_configs(join_numbers(argv))
            sys.argv = [*sys.argv[:1], *argv]  # which Lightning reads, and passes to other ranks
            for path in config_files(argv):
                check_config(path)
            import_plugins(_plugins(argv))
            for cls in filter(None, (model_class, data_class)):
                allow(cls.__module__)
            prefer_importable_classes()
            code = _run(command, argv[1:], model_class, data_class)
    except UsageError as error:
        if trace:
            raise
        fail(located(str(error), argv))
    except (ValueError, KeyError, OSError, ModuleNotFoundError) as error:
        if trace:
            raise
        fail(f"{one_line(unexpected(error))} (LIT_DIFFUSION_TRACEBACK=1 shows where.)")
    except Exception as error:
        if (sentence := _explanation(error, command)) is None or trace:
            raise
        fail(sentence)
    if code:
        raise SystemExit(code)


# Commands -------------------------------------------------------------------------------------


def _run(
    name: str,
    argv: list[str],
    model_class: type[LitDiffusion] | None,
    data_class: type[DataModule] | None,
) -> int:
    """Run a command, print its result, and return the exit code."""
    command = COMMANDS.get(name)
    if command is None or command.function is None:  # one of Lightning's, or none at all
        from lit_diffusion.training.commands.fit import DiffusionCLI

        DiffusionCLI(*_classes(model_class, data_class))
        return 0
    module = importlib.import_module(f"lit_diffusion.training.commands.{command.function}")
    function: Callable[..., Any] = getattr(module, command.function)
    if name == "evaluate":
        arguments = _of_evaluate(argv, function, _classes(model_class, data_class)[1])
    elif name == "objective":
        arguments = _of_objective(argv, function, *_classes(model_class, data_class))
    else:
        skip: set[str] = {"model_class", "data_class"} if name == "replay" else set()
        parser = _parser(name, function, skip)
        if command.group is not None:
            refuse_data_class(argv, name)
            _add_data(parser, _classes(model_class, data_class)[1])
        arguments = vars(parser.instantiate(parser.parse_args(argv)))
        arguments.pop("plugins")
        if name == "replay":
            arguments |= dict(
                zip(("model_class", "data_class"), _classes(model_class, data_class), strict=True)
            )
    result = function(**arguments)
    if text := str(result):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    return 0 if getattr(result, "reproduced", True) else 1


def _classes(
    model_class: type[LitDiffusion] | None, data_class: type[DataModule] | None
) -> tuple[type[LitDiffusion], type[DataModule]]:
    """The classes of model and data, which are imported only if a command needs them.

    With them come the other classes that a config may name without their module.
    """
    for room in ("callbacks", "evaluation.features", "step.learning_rates"):
        importlib.import_module(f"lit_diffusion.training.{room}")
    from lit_diffusion.training.data.module import DataModule
    from lit_diffusion.training.module import LitDiffusion

    return model_class or LitDiffusion, data_class or DataModule


def _parser(name: str, function: Callable[..., Any], skip: set[str]) -> CommandParser:
    """The parser of a command, made from the signature and the docstring of its function."""
    command = COMMANDS[name]
    summary = (function.__doc__ or "").partition("\n")[0]
    parser = CommandParser(prog=f"lit-diffusion {name}", description=summary)
    if command.several and command.word:
        parser.add_argument(command.word, type=str, nargs="*", help="Folders of runs.")
    elif command.word:
        others: set[str | int] = {p for p in function.__annotations__ if p != command.word}
        parser.add_function_arguments(function, None, False, as_positional=True, skip=others)
    known: set[str | int] = {part for part in (command.word, command.group) if part}
    parser.add_function_arguments(function, None, False, skip=known | skip)
    parser.add_argument(
        "--plugins",
        nargs="*" if name == "plugins" else None,
        type=str if name == "plugins" else list[str] | str,
        default=[],
        help="Modules with classes of your own, such as my_plugins for ./my_plugins.py.",
    )
    return parser


def _add_data(parser: CommandParser, data_class: type[DataModule]) -> None:
    parser.add_class_arguments(data_class, "data", fail_untyped=False, sub_configs=True)


def _of_evaluate(
    argv: list[str], function: Callable[..., Any], data_class: type[DataModule]
) -> dict[str, Any]:
    """The arguments of `evaluate`, whose defaults are the settings of the checkpoint's run."""
    from lit_diffusion.training.callbacks.likelihood import Likelihood
    from lit_diffusion.training.commands.shell.choices import resolve_checkpoint, run_of
    from lit_diffusion.training.commands.shell.experiment import (
        callback_arguments,
        evaluation_defaults,
        read_experiment,
    )

    refuse_data_class(argv, "evaluate")
    # The run must be known before the rest can be parsed.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--ckpt_path", "--name", "--root", "--config"):
        first.add_argument(flag)
    known, _ = first.parse_known_args(argv)
    path = None
    if known.ckpt_path is not None:
        path = resolve_checkpoint(known.ckpt_path, known.name, known.root)
    experiment = read_experiment(known.config, path and run_of(path))
    parser = _parser("evaluate", function, {"likelihood"})
    parser.add_class_arguments(Likelihood, "likelihood")
    _add_data(parser, data_class)
    parser.set_defaults(evaluation_defaults(experiment))
    likelihood = callback_arguments(experiment, "Likelihood")
    data = experiment.get("data") or {}
    has_class = names_class(data)  # which the command refuses, unless other data are given
    for group, own in (("data", {} if has_class else data), ("likelihood", likelihood)):
        parser.set_defaults({f"{group}.{key}": value for key, value in own.items()})
    if path is None and not {"-h", "--help"} & set(argv):
        raise UsageError("evaluate needs a checkpoint: give --ckpt_path, which may be `last`.")
    arguments = vars(parser.instantiate(parser.parse_args(argv)))
    arguments.pop("plugins")
    arguments |= {"ckpt_path": path, "name": None, "root": None}  # `last` is resolved once
    for name in ("baseline_split", "reference_hash", "guidance_interval"):
        if arguments[name] is None:  # the run's own would have been the default
            arguments[name] = "none"
    if (has_class or not experiment) and not any(word.startswith("--data.p") for word in argv):
        arguments["data"] = None
    return arguments


def _of_objective(
    argv: list[str],
    function: Callable[..., Any],
    model_class: type[LitDiffusion],
    data_class: type[DataModule],
) -> dict[str, Any]:
    """The arguments of `objective`, from configs and flags as for `fit`, or of a checkpoint."""
    from jsonargparse import ActionConfigFile
    from lightning.pytorch import Trainer

    from lit_diffusion.description import build
    from lit_diffusion.training.commands.fit_setup.own_data import link_data

    of_config = ("schedule", "weighting", "prediction", "decoder")
    parser = _parser("objective", function, {*of_config, "num_timesteps"})
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="A config; later ones override earlier."
    )
    # A whole experiment is accepted, so all of its keys must be known.
    parser.add_class_arguments(
        Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True
    )
    parser.add_class_arguments(model_class, "model", fail_untyped=False, sub_configs=True)
    own = named_data_class(argv)
    if own is None:
        _add_data(parser, data_class)
    else:
        parser.add_subclass_arguments(base_of(own), "data", fail_untyped=False)
    link_data(parser, own)
    parser.add_argument("--seed_everything", type=bool | int, default=0, help="Not used.")
    parser.add_argument("--init_from", type=str | None, default=None, help="Not used.")
    config = parser.parse_args(argv)
    asked = [word.partition("=")[0] for word in argv]
    if "--ckpt_path" in asked:
        if other := [word for word in asked if word in ("-c", "--config") or "--model" in word]:
            raise UsageError(
                f"a checkpoint has its own objective: give --ckpt_path or {other[0]}, not both."
            )
        name = config.name if "--name" in asked else None  # a config may have a name as well
        given = {"ckpt_path": config.ckpt_path, "root": config.root, "out": config.out}
        return given | {"name": name}
    model = yaml.safe_load(parser.dump(config, skip_none=False))["model"]
    parts = {part: build(model[part]) for part in of_config}
    return {**parts, "num_timesteps": model["num_timesteps"], "out": config.out}


# What is read and shown around a command ------------------------------------------------------


def _plugins(argv: list[str]) -> list[str]:
    """The modules named by --plugins, or by `plugins:` in a config."""
    found: list[str] = []

    def add(value: Any) -> None:
        if isinstance(value, str):
            value = yaml.safe_load(value) if value.startswith("[") else value.split(",")
        if not isinstance(value, list | None):
            raise UsageError(f"plugins: expected a list of modules, got {value}.")
        found.extend(str(module).strip() for module in value or [])

    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        values = [value] if equals else argv[i + 1 : i + 2]
        if flag == "--plugins" and argv[0] == "plugins" and not equals:
            values = argv[i + 1 :]
        for value in values:
            if flag == "--plugins":
                add(value)
            elif flag in ("--config", "-c") and Path(value).is_file():
                with contextlib.suppress(yaml.YAMLError):
                    config = yaml.safe_load(Path(value).read_text())
                    add(config.get("plugins") if isinstance(config, dict) else None)
    return found


def _explanation(error: BaseException, command: str) -> str | None:
    """One line for an error of PyTorch or Lightning that a user can act on; None for others."""
    from lit_diffusion.training.step.batch_fit import lacks_memory, say_what_fits

    if lacks_memory(error):
        return say_what_fits(error, command)
    if "Error(s) in loading state_dict" in str(error):
        return f"The checkpoint's weights do not fit the model of this config: {error}"[:600]
    if "more than one stateful callback" in str(error):
        return f"A callback is listed twice: {str(error).partition('.')[0]}."
    if type(error).__name__ == "MisconfigurationException":
        return f"{one_line(str(error))} (LIT_DIFFUSION_TRACEBACK=1 shows where.)"
    return None


class _OneLine(logging.Formatter):
    """A message on one line, a warning marked as such."""

    def format(self, record: logging.LogRecord) -> str:
        line = " ".join(record.getMessage().split())
        return f"Warning: {line}" if record.levelno >= logging.WARNING else line


@contextlib.contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Show what the package logs, as plain lines on stderr, while a command runs.

    Logging is left as it was found, since a program may call `main` and go on.
    """
    logger = logging.getLogger("lit_diffusion")
    level, propagate = logger.level, logger.propagate
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # else a handler of the root logger would show a message again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _quiet() -> None:
    """Hide warnings of libraries that a user cannot act on."""
    warnings.formatwarning = _one_line
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Data without a validation split have no batches to validate on, as their config says.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    # Of a resumed run it is not, and a new run has a folder of its own.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # The model gets its config after it is made, so nothing is lost.
    warnings.filterwarnings("ignore", message=".*cannot be kept in checkpoints")
    # Compiling for a CPU where the tools for CUDA are installed, too.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )


_USUAL, _OURS = warnings.formatwarning, str(Path(__file__).parents[1])


def _one_line(
    message: Any, category: Any, filename: str, lineno: int, line: str | None = None
) -> str:
    """Print our own warnings without the line of code that raised them."""
    if filename.startswith(_OURS):
        return f"Warning: {' '.join(str(message).split())}\n"
    return _USUAL(message, category, filename, lineno, line)
