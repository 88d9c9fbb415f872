"""Training: all that knows Lightning, data sets and dashboards, and every command as a function.

The public names are imported when they are first used, so that a command waits only for what it
needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lit_diffusion.training.commands.table import COMMANDS

if TYPE_CHECKING:
    from lit_diffusion.training.callbacks import *
    from lit_diffusion.training.commands.compare import compare
    from lit_diffusion.training.commands.decode import decode
    from lit_diffusion.training.commands.ema import ema
    from lit_diffusion.training.commands.encode import encode
    from lit_diffusion.training.commands.evaluate import evaluate
    from lit_diffusion.training.commands.export import export
    from lit_diffusion.training.commands.import_diffusers import import_diffusers
    from lit_diffusion.training.commands.new import new
    from lit_diffusion.training.commands.objective import objective
    from lit_diffusion.training.commands.plugins import plugins
    from lit_diffusion.training.commands.replay import replay
    from lit_diffusion.training.commands.report import report
    from lit_diffusion.training.commands.sample import sample
    from lit_diffusion.training.data.decoding.augment import Augment
    from lit_diffusion.training.data.module import DataModule
    from lit_diffusion.training.data.own import DatasetModule
    from lit_diffusion.training.evaluation.features import ClassifierFeatures, InceptionFeatures
    from lit_diffusion.training.module import LitDiffusion
    from lit_diffusion.training.run.checkpoints import WholeCheckpointIO
    from lit_diffusion.training.step.learning_rates import WarmupDecayLR

#: Where a name is defined; all others are callbacks.
_MODULES = {
    **{one.function: f"commands.{one.function}" for one in COMMANDS.values() if one.function},
    "Augment": "data.decoding.augment",
    "ClassifierFeatures": "evaluation.features",
    "DataModule": "data.module",
    "DatasetModule": "data.own",
    "InceptionFeatures": "evaluation.features",
    "LitDiffusion": "module",
    "WarmupDecayLR": "step.learning_rates",
    "WholeCheckpointIO": "run.checkpoints",
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name == "__all__":
        return [public for public in __dir__() if not public.startswith("_")]
    if name in _MODULES or name[0].isupper():  # else a submodule, or nothing
        module = _MODULES.get(name, "callbacks")
        found = importlib.import_module(f"lit_diffusion.training.{module}")
        if name in _MODULES or name in found.__all__:
            return getattr(found, name)
    raise AttributeError(f"module 'lit_diffusion.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    callbacks = importlib.import_module("lit_diffusion.training.callbacks")
    return sorted({*_MODULES, *callbacks.__all__})
