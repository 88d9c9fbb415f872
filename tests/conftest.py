"""What several test files share."""

import logging
import os
import tempfile
import warnings
from pathlib import Path

import pytest

os.environ["WANDB_MODE"] = "disabled"  # the one test of W&B sets its own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Neither read nor write what the user keeps; it goes when the tests end.
CACHE = tempfile.TemporaryDirectory(prefix="lit_diffusion_tests_")
os.environ["HF_DATASETS_CACHE"] = CACHE.name

# A project of its own, whose tests run in a venv where it is installed.
collect_ignore = ["plugin_package"]

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


class AsPythonWarning(logging.Handler):
    """Raises a logged warning as Python's, so that pytest's filters and `pytest.warns` see it."""

    def emit(self, record):
        warnings.warn(record.getMessage(), UserWarning, stacklevel=2)


@pytest.fixture(autouse=True)
def _logged_warnings_count():
    """A warning that the package logs fails a test that does not expect it."""
    handler = AsPythonWarning(logging.WARNING)
    logging.getLogger("lit_diffusion").addHandler(handler)
    yield
    logging.getLogger("lit_diffusion").removeHandler(handler)


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
