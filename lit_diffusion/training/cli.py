"""The command line: parsing, dispatch, and one line for every mistake.

A program with its own subclass of LitDiffusion or ImageDataModule has the same command line by
calling `main(MyLit, MyData)`.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_diffusion.training.batch_fit import lacks_memory, say_what_fits
from lit_diffusion.training.commands.compare import compare
from lit_diffusion.training.commands.ema import ema
from lit_diffusion.training.commands.encode import decode, encode
from lit_diffusion.training.commands.evaluate import evaluate
from lit_diffusion.training.commands.export import export
from lit_diffusion.training.commands.fit import DiffusionCLI
from lit_diffusion.training.commands.import_diffusers import import_pipeline
from lit_diffusion.training.commands.objective import objective
from lit_diffusion.training.commands.parsing import explain, fail, import_plugins
from lit_diffusion.training.commands.replay import replay
from lit_diffusion.training.commands.report import report
from lit_diffusion.training.commands.sample import sample
from lit_diffusion.training.data.module import ImageDataModule
from lit_diffusion.training.module import LitDiffusion

__all__ = ["main"]

#: What a user's mistake raises; anything else is ours, and shows its traceback.
MISTAKES = (ValueError, KeyError, OSError, ModuleNotFoundError, MisconfigurationException)

#: Commands that need nothing but their words; each returns what there is to say.
COMMANDS = {
    "compare": compare,
    "decode": decode,
    "ema": ema,
    "encode": encode,
    "report": report,
    "sample": sample,
    "export": export,
    "import": import_pipeline,
}


def _quiet() -> None:
    """Keep what a user cannot act on out of the way of what he can."""
    warnings.formatwarning = _one_line
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # The model is told its config after it is made, so nothing is lost.
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
    """Our own warnings are sentences for the user, who has no use for the line of code."""
    if filename.startswith(_OURS):
        return f"Warning: {' '.join(str(message).split())}\n"
    return _USUAL(message, category, filename, lineno, line)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


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
        import_plugins(argv)
        command = argv[0] if argv else ""
        if command in COMMANDS:
            _say(str(COMMANDS[command](argv[1:])))
        elif command == "replay":
            text, code = replay(argv[1:], functools.partial(DiffusionCLI, model_class, data_class))
            if text:
                _say(text)
            raise SystemExit(code)
        elif command == "evaluate":
            _say(evaluate(argv[1:], data_class))
        elif command == "objective":
            _say(objective(argv[1:], model_class, data_class))
        else:
            DiffusionCLI(model_class, data_class)
    except MISTAKES as error:
        if os.environ.get("LIT_DIFFUSION_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        fail(f"{explain(str(text))} (LIT_DIFFUSION_TRACEBACK=1 shows where.)")
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error) and not os.environ.get("LIT_DIFFUSION_TRACEBACK"):
            fail(say_what_fits(error, command))
        if "Error(s) in loading state_dict" in str(error):
            fail(f"The checkpoint's weights do not fit the model of this config: {error}"[:600])
        if "more than one stateful callback" in str(error):
            fail(f"A callback is listed twice: {str(error).partition('.')[0]}.")
        raise
