"""metrics.csv: a row for each step at which something was logged, a column for each name."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_diffusion.training.run.tolerance import may_fail
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["RunLogger"]

Row = dict[str, Any]


class RunLogger(Logger):
    """Logs to metrics.csv in the run folder; a resumed run continues it at the checkpoint's step.

    Each row is on the disk as soon as it is logged, so that a kill loses at most the row that is
    being written. Unlike Lightning's CSVLogger it keeps the rows of the session before.

    Args:
        folder: The run folder.
        resume_step: Step of the checkpoint that is resumed from; rows from this step on, which
            the run logs again, are removed. None removes all rows.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> logger = RunLogger(folder)
        >>> logger.log_metrics({"train/loss": 0.5}, step=0)
        >>> logger.log_metrics({"train/loss": 0.25}, step=1)
        >>> print((folder / "metrics.csv").read_text())
        step,train/loss
        0,0.5
        1,0.25
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._resume_step = resume_step
        self._columns: list[str] | None = None  # None until the file has been opened
        self._last: Row = {}
        self._resumed: list[
            dict[str, str]
        ] = []  # the rows of the last step before the resumed one
        self._waiting: list[Row] = []  # rows that are not in the file yet

    # Lightning joins save_dir, name and version to the folder of the run and its checkpoints,
    # except for its own loggers, so the first must be all of it.

    @property
    def save_dir(self) -> str:
        """The run folder, which is also `trainer.log_dir`."""
        return str(self._folder)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @property
    def name(self) -> str:
        """Empty: the name of the run is part of `save_dir`."""
        return ""

    @property
    def version(self) -> str:
        """Empty, for the same reason."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row, unless it repeats the last one, or one of the step that was resumed.

        Lightning's LearningRateMonitor logs at every micro-batch of an accumulated step, and the
        weights of a run that is resumed at its end are measured once more.

        Args:
            metrics: Names and numbers.
            step: Where they belong; None means 0.
        """
        row: Row = {"step": step or 0}
        for name, value in metrics.items():
            row[name] = value.item() if isinstance(value, Tensor) else value
        if row == self._last or {name: str(row[name]) for name in row} in self._resumed:
            return
        self._last = row
        self._waiting.append(row)
        self._write()

    def _write(self) -> None:
        """Write the rows that wait; if that fails, they wait for the next one."""
        with may_fail(self._path):
            known = self._begin()
            columns = sorted({*known}.union(*self._waiting))
            if columns != known or not self._path.is_file():
                rows = self._read() if self._path.is_file() else []
                self._rewrite([*rows, *self._waiting], columns)
                self._columns = columns
            else:
                self._append(columns)
            self._waiting.clear()

    def _append(self, columns: list[str]) -> None:
        """Append the rows that wait, all of them or none."""
        text = io.StringIO()
        csv.DictWriter(text, columns).writerows(self._waiting)
        size = self._path.stat().st_size
        try:
            with self._path.open("ab", buffering=0) as file:
                whole = text.getvalue().encode()
                if file.write(whole) < len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            raise

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has them."""

    @rank_zero_only
    def save(self) -> None:
        """Remove the rows that a resumed run logs again; Lightning calls this at the start."""
        if self._columns is None:
            with may_fail(self._path):
                self._begin()

    @property
    def _path(self) -> Path:
        return self._folder / "metrics.csv"

    def _begin(self) -> list[str]:
        """The columns of the file; the first time, keep only the rows before the resumed step."""
        if self._columns is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = self._earlier_rows()
            columns = sorted(set().union(*rows))
            last = str((self._resume_step or 0) - 1)
            self._resumed = [one for one in rows if one["step"] == last]
            if rows:
                self._rewrite(rows, columns)
            else:
                self._path.unlink(missing_ok=True)
            self._columns = columns
        return self._columns

    def _earlier_rows(self) -> list[Row]:
        if self._resume_step is None or not self._path.is_file():
            return []
        # A row that a kill cut short is one that will be logged again.
        whole = [row for row in self._read() if None not in row.values() and row["step"].isdigit()]
        rows = [{k: v for k, v in row.items() if v != ""} for row in whole]
        return [row for row in rows if int(row["step"]) < self._resume_step]

    def _read(self) -> list[Row]:
        with self._path.open(newline="") as lines:
            return list(csv.DictReader(lines))

    def _rewrite(self, rows: list[Row], columns: list[str]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, text.getvalue())
