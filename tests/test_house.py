"""The dependency rule, and the promises of the face."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lit_diffusion

ROOT = Path(__file__).parents[1]
MATHS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "lit_diffusion").rglob("*.py")
    if path.stem not in {"__main__", "conftest"} and "training" not in path.parts
)
FORBIDDEN = [
    "lightning",
    "pytorch_lightning",
    "datasets",
    "torchvision",
    "torchmetrics",
    "torch_fidelity",
    "wandb",
    "jsonargparse",
    "matplotlib",
    "lit_diffusion.training",
]


def imported_by(statement):
    """What a clean interpreter has imported after a statement."""
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_the_mathematics_imports_torch_only():
    rooms = "; ".join(f"import {room}" for room in MATHS)
    modules = imported_by(f"{rooms}\nfrom lit_diffusion import *")
    assert not [name for name in FORBIDDEN if name in modules]


def test_networks_know_nothing_of_the_house():
    modules = imported_by("import lit_diffusion.nn")
    assert not [name for name in FORBIDDEN if name in modules]
    ours = {m for m in modules if m.startswith("lit_diffusion.")}
    assert all(m.startswith("lit_diffusion.nn") for m in ours), ours


def test_asking_for_the_version_does_not_wait_for_torch():
    assert "torch" not in imported_by("import lit_diffusion; lit_diffusion.__version__")


def test_nothing_imports_the_command_line():
    for path in (ROOT / "lit_diffusion").rglob("*.py"):
        if path.name != "__main__.py":
            text = path.read_text()
            assert "training.cli" not in text or path.name == "cli.py", path


@pytest.mark.parametrize("bad", ["import lightning", "import datasets", "import wandb"])
def test_ruff_teaches_the_rule(bad, tmp_path):
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
    room = tmp_path / "lit_diffusion" / "room.py"
    room.parent.mkdir()
    room.write_text(f'"""A room."""\n\n{bad}\n')
    out = subprocess.run([*ruff, str(room)], capture_output=True, text=True)
    assert out.returncode == 1
    assert "only lit_diffusion/training" in out.stdout or "belong" in out.stdout


def test_public_names_are_reached_and_unknown_ones_refused():
    for name in dir(lit_diffusion):
        assert getattr(lit_diffusion, name) is not None
    assert {"CosineSchedule", "DiffusionLoss", "WEIGHTINGS", "DDIMSampler"} <= set(
        dir(lit_diffusion)
    )
    with pytest.raises(AttributeError, match="CosinSchedule"):
        _ = lit_diffusion.CosinSchedule
