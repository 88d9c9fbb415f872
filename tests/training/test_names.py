"""Names of files, folders and runs are found as they are, never read as patterns."""

import pytest

from lit_diffusion.training.run.folder import last_checkpoint
from lit_diffusion.training.run.whole_file import remove_orphans
from lit_diffusion.training.run.whole_folder import remove_unfinished

NAMES = pytest.mark.parametrize("name", ["plain", "run[1]", "*"])


@NAMES
def test_only_the_leftovers_of_this_folder_are_removed(tmp_path, name):
    own, other = tmp_path / f".{name}.1.a.tmp", tmp_path / ".other.1.a.tmp"
    own.mkdir()
    other.mkdir()
    remove_unfinished(tmp_path / name)
    assert not own.exists()
    assert other.exists()


@NAMES
def test_only_the_leftovers_of_this_file_are_removed(tmp_path, name):
    own, other = tmp_path / f".{name}.1.a.tmp", tmp_path / ".other.1.a.tmp"
    own.touch()
    other.touch()
    remove_orphans(tmp_path / name)
    assert not own.exists()
    assert other.exists()


def test_the_checkpoint_of_a_run_with_brackets_is_found(tmp_path):
    path = tmp_path / "run[1]" / "now" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    assert last_checkpoint(tmp_path, "run1") is None
    with pytest.warns(UserWarning, match="Skipped a checkpoint"):  # found, and empty
        last_checkpoint(tmp_path, "run[1]")
