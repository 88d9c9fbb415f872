"""Names of files, folders and runs are found as they are, never read as patterns."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_diffusion.training.run import whole_file
from lit_diffusion.training.run.newest import last_checkpoint
from lit_diffusion.training.run.whole_file import remove_orphans, unfinished_path
from lit_diffusion.training.run.whole_folder import remove_unfinished

NAMES = pytest.mark.parametrize("name", ["plain", "run[1]", "*"])


@pytest.fixture(scope="module")
def ended():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_behind(path, process):
    """The temporary path of another process."""
    *name, _, unique, end = unfinished_path(path).name.split(".")
    return path.with_name(".".join([*name, str(process), unique, end]))


@NAMES
def test_only_the_leftovers_of_this_folder_are_removed(tmp_path, name, ended):
    own, other = (left_behind(tmp_path / n, ended) for n in (name, f"{name}.other"))
    own.mkdir()
    other.mkdir()
    remove_unfinished(tmp_path / name)
    assert not own.exists()
    assert other.exists()


@NAMES
def test_only_the_leftovers_of_this_file_are_removed(tmp_path, name, ended):
    own, other = (left_behind(tmp_path / n, ended) for n in (name, f"{name}.other"))
    own.touch()
    other.touch()
    remove_orphans(tmp_path / name)
    assert not own.exists()
    assert other.exists()


def test_what_a_live_process_is_writing_is_no_orphan(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    mine = unfinished_path(path)
    mine.touch()
    remove_orphans(path)
    assert mine.exists()
    # Of another machine nothing is known, so it must be a day old.
    monkeypatch.setattr(whole_file, "_machine", lambda: "0" * 8)
    remove_orphans(path)
    assert mine.exists()
    monkeypatch.setattr(whole_file, "DAY", -1.0)
    remove_orphans(path)
    assert not mine.exists()


def test_the_checkpoint_of_a_run_with_brackets_is_found(tmp_path):
    path = tmp_path / "run[1]" / "now" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    assert last_checkpoint(tmp_path, "run1") is None
    with pytest.warns(UserWarning, match="Skipped a checkpoint"):  # found, and empty
        last_checkpoint(tmp_path, "run[1]")


BAD = ["", " ", ".", "..", "../x", "/tmp/x", "a//b", "a/", ".hidden", "a/../b", "a\nb", "a\0b"]


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_a_name_that_is_no_folder_below_the_root_is_refused(cli, tmp_path, name):
    Path("name.yaml").write_text(yaml.safe_dump({"name": name}))
    code, out, err = cli("fit", "--config", "name.yaml", "--data.path=digits8x8")
    assert (code, out) == (2, "")
    assert err.startswith("lit-diffusion: error: --name must be a name such as digits")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["name.yaml"]
