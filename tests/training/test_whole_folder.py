"""Folders that are written whole: what is left over is removed by its own name, never a pattern."""

import pytest

from lit_diffusion.training.run.whole_folder import remove_unfinished


@pytest.mark.parametrize("name", ["plain", "run[1]", "*"])
def test_only_the_leftovers_of_this_folder_are_removed(tmp_path, name):
    own, other = tmp_path / f".{name}.1.a.tmp", tmp_path / ".other.1.a.tmp"
    own.mkdir()
    other.mkdir()
    remove_unfinished(tmp_path / name)
    assert not own.exists()
    assert other.exists()
