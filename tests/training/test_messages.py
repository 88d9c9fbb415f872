"""What the package reports: through one logger, once for all ranks, once on stderr."""

import logging
import subprocess
import sys

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lit_diffusion.training.run.messages import inform, warn

NAME = "lit_diffusion"


@pytest.mark.filterwarnings("ignore:a warning")
def test_a_program_sees_records_of_one_logger(caplog):
    caplog.set_level(logging.INFO, NAME)
    inform("information")
    warn("a warning")
    assert caplog.record_tuples == [
        (NAME, logging.INFO, "information"),
        (NAME, logging.WARNING, "a warning"),
    ]
    assert {record.filename for record in caplog.records} == {"test_messages.py"}  # who called


def test_other_ranks_are_silent(caplog, monkeypatch):
    caplog.set_level(logging.INFO, NAME)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    inform("information")
    warn("a warning")
    assert not caplog.records


@pytest.mark.slow
def test_without_a_handler_warnings_are_shown_and_information_is_not():
    code = (
        "from lit_diffusion.training.run.messages import inform, warn; "
        "inform('information'); warn('a warning')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "inform" in line or "warn" in line] == [
        "a warning"
    ]


def test_the_command_line_shows_each_message_once(cli, configs, capsys):
    root, logger = logging.getLogger(), logging.getLogger(NAME)
    handler = logging.StreamHandler(sys.stderr)  # as a plug-in may have installed
    root.addHandler(handler)
    before = logger.level, logger.propagate, list(logger.handlers)
    try:
        code, _, err = cli(
            *("fit", "--config", configs / "digits.yaml", "--ckpt_path=last"),
            *("--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"),
            *(
                "--model.network.channels=[8,8]",
                "--model.network.attention=[]",
                "--model.sampler.steps=2",
            ),
        )
    finally:
        root.removeHandler(handler)
    assert code == 0, err
    assert err.count("No checkpoint below") == 1
    assert "No checkpoint below runs/digits yet: starting a new run." in err.splitlines()
    assert (logger.level, logger.propagate, logger.handlers) == before


@pytest.mark.filterwarnings("ignore:Skipped a checkpoint")
def test_the_command_line_marks_a_warning(cli, tmp_path):
    broken = tmp_path / "runs" / "broken" / "1" / "checkpoints" / "last.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_text("no checkpoint")
    code, _, err = cli("sample", "--ckpt_path=last", "--out=grid.png")
    assert code == 2
    first, second = err.splitlines()
    assert first.startswith("Warning: Skipped a checkpoint: ")
    assert second.startswith("lit-diffusion: error: there is no checkpoint below runs;")
