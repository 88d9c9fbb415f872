"""What several test files share."""

import os
from pathlib import Path

import pytest

os.environ["WANDB_MODE"] = "disabled"  # the one test of W&B sets its own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def configs():
    """The folder of configs."""
    return ROOT / "configs"


@pytest.fixture
def shared():
    """The folder of larger real data sets, where there is one."""
    if not SHARED.is_dir():
        pytest.skip("needs the project's shared data sets, which are not here")
    return SHARED
