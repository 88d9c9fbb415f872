"""Doctests see the public names and start from a fixed seed."""

from types import ModuleType
from typing import Any

import pytest
import torch

import lit_diffusion


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    public = {name: getattr(lit_diffusion, name) for name in dir(lit_diffusion)}
    # No modules: in an example `nn` is that of torch.
    doctest_namespace |= {k: v for k, v in public.items() if not isinstance(v, ModuleType)}
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)
