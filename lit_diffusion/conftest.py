"""Doctests run with the public names in reach and a seed set."""

from types import ModuleType
from typing import Any

import pytest
import torch

import lit_diffusion


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    public = {name: getattr(lit_diffusion, name) for name in dir(lit_diffusion)}
    # Not the rooms: `nn` is torch's in an example.
    doctest_namespace |= {k: v for k, v in public.items() if not isinstance(v, ModuleType)}
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)
