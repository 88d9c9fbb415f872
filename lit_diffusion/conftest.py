"""Doctests run with the public names in reach and a seed set."""

from typing import Any

import pytest
import torch

import lit_diffusion


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace |= {name: getattr(lit_diffusion, name) for name in dir(lit_diffusion)}
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)
