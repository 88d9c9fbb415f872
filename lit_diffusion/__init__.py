"""lit_diffusion: train diffusion models, and know what the objective does.

The public names are those that the modules and packages below list in their own ``__all__``. They
are imported on first use, so that ``lit-diffusion --version`` does not wait for torch.
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
    from lit_diffusion.normalization import *
    from lit_diffusion.objective import *
    from lit_diffusion.predictions import *
    from lit_diffusion.probability_flow import *
    from lit_diffusion.published import *
    from lit_diffusion.registry import *
    from lit_diffusion.samplers import *
    from lit_diffusion.schedules import *
    from lit_diffusion.times import *
    from lit_diffusion.weightings import *

_MODULES = (
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
    "normalization",
    "domains",
    "registry",
)


def __getattr__(name: str) -> Any:
    """Import a public name from the first module that lists it, in the order of the theory."""
    if name == "__all__":
        return [public for public in __dir__() if not public.startswith("_")]
    if not name.startswith("_"):
        for path in _MODULES:
            module = importlib.import_module(f"lit_diffusion.{path}")
            if name == path:
                return module
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module 'lit_diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names of all modules."""
    modules = [importlib.import_module(f"lit_diffusion.{path}") for path in _MODULES]
    return sorted(
        {"__version__", *_MODULES, *(name for module in modules for name in module.__all__)}
    )
