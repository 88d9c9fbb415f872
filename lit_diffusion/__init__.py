"""lit_diffusion: train diffusion models, and know what the objective does.

The public names are those that each room of the house lists in its own ``__all__``; they are
fetched when first asked for, so that ``lit-diffusion --version`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lit_diffusion.averaging import *
    from lit_diffusion.decoders import *
    from lit_diffusion.denoisers import *
    from lit_diffusion.gaussian import *
    from lit_diffusion.grey_levels import *
    from lit_diffusion.likelihood import *
    from lit_diffusion.loss import *
    from lit_diffusion.models import *
    from lit_diffusion.nn import *
    from lit_diffusion.objective import *
    from lit_diffusion.predictions import *
    from lit_diffusion.probability_flow import *
    from lit_diffusion.published import *
    from lit_diffusion.registry import *
    from lit_diffusion.samplers import *
    from lit_diffusion.schedules import *
    from lit_diffusion.times import *
    from lit_diffusion.weightings import *

_ROOMS = (
    "gaussian",
    "times",
    "schedules",
    "weightings",
    "predictions",
    "denoisers",
    "grey_levels",
    "decoders",
    "loss",
    "objective",
    "published",
    "likelihood",
    "probability_flow",
    "samplers",
    "models",
    "nn",
    "averaging",
    "registry",
)


def __getattr__(name: str) -> Any:
    """Look a public name up in the rooms, in the order of the theory."""
    if name == "__all__":
        return [public for public in __dir__() if not public.startswith("_")]
    if not name.startswith("_"):
        for room in _ROOMS:
            module = importlib.import_module(f"lit_diffusion.{room}")
            if name == room:
                return module
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module 'lit_diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names of every room."""
    rooms = [importlib.import_module(f"lit_diffusion.{room}") for room in _ROOMS]
    return sorted({"__version__", *_ROOMS, *(name for room in rooms for name in room.__all__)})
