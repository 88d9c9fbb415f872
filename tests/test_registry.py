"""Plug-ins are found by name, near misses are named, broken packages are survived."""

import subprocess
import sys
import textwrap
import warnings

import pytest

from lit_diffusion import (
    PREDICTIONS,
    SCHEDULES,
    WEIGHTINGS,
    CosineSchedule,
    arguments,
    load_plugins,
)


def test_a_registry_is_a_read_only_mapping():
    assert SCHEDULES["CosineSchedule"] is CosineSchedule
    assert "CosineSchedule" in SCHEDULES
    assert "NoiseSchedule" not in SCHEDULES  # abstract
    assert len(SCHEDULES) == len(list(SCHEDULES))
    with pytest.raises(TypeError):
        SCHEDULES["Mine"] = CosineSchedule
    assert "CosineSchedule" in repr(SCHEDULES)


@pytest.mark.parametrize(
    ("registry", "name", "near"),
    [
        (SCHEDULES, "CosinSchedule", "CosineSchedule"),
        (WEIGHTINGS, "MinSNRWeigting", "MinSNRWeighting"),
        (PREDICTIONS, "EpsilonPrediction", "EpsPrediction"),
    ],
)
def test_an_unknown_name_names_the_nearest(registry, name, near):
    with pytest.raises(KeyError, match=f"Did you mean.*{near}"):
        registry[name]


def test_arguments_need_attributes():
    class Forgets:
        def __init__(self, width: int = 3) -> None:
            pass

    with pytest.raises(TypeError, match="does not keep its argument 'width'"):
        arguments(Forgets())


def package(folder, name, code, entry):
    """An installed package, as an importer sees one."""
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lit_diffusion.plugins]\n{name} = {entry}\n")


GOOD = '''
    """A guest."""
    import torch
    from lit_diffusion import Weighting

    class GuestWeighting(Weighting):
        """A guest's weighting: 2."""

        def forward(self, logsnr):
            return 2 * torch.ones_like(logsnr)
'''


def run(folder, code):
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{textwrap.dedent(code)}"
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True
    )


def test_an_installed_package_joins_and_a_broken_one_is_named(tmp_path):
    package(tmp_path, "guest_diffusion", GOOD, "guest_diffusion")
    package(tmp_path, "broken_diffusion", "import does_not_exist", "broken_diffusion")
    done = run(
        tmp_path,
        """
        from lit_diffusion import WEIGHTINGS, load_plugins
        print(WEIGHTINGS["GuestWeighting"](), load_plugins())
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "GuestWeighting()" in done.stdout
    assert "guest_diffusion" in done.stdout
    assert "'broken_diffusion'" in done.stderr
    assert "left out" in done.stderr


def test_two_classes_of_one_name_are_refused_with_both_paths(tmp_path):
    package(tmp_path, "guest_diffusion", GOOD, "guest_diffusion")
    (tmp_path / "second.py").write_text(textwrap.dedent(GOOD))
    done = run(
        tmp_path,
        """
        import second
        from lit_diffusion import WEIGHTINGS
        WEIGHTINGS["GuestWeighting"]
        """,
    )
    assert "guest_diffusion.GuestWeighting, second.GuestWeighting" in done.stderr


def test_loading_is_silent_without_plugins():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load_plugins(), tuple)
