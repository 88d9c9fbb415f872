"""Libraries that only some models need, and that an extra of the package installs."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_diffusers", "import_transformers"]


def import_diffusers() -> Any:
    """The diffusers library.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    return _imported("diffusers", "Models of diffusers need", "diffusers")


def import_transformers() -> Any:
    """The transformers library.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    return _imported("transformers", "Text encoders of transformers need", "text")


def _imported(library: str, what: str, extra: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} that package: pip install 'lit-diffusion[{extra}]'.", name=error.name
        ) from error
