"""Bad examples: how they are recorded, where they are reported, and when they end a run.

Among millions of images from the web some are broken. To stop at each would make large runs
impossible; to skip them silently would hide a failing disk or a wrongly chosen column. So a bad
example is skipped, named in a warning, counted, and listed once in a file, and a run ends when
more than a stated share of what it has read was bad.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from lightning.fabric.utilities.rank_zero import rank_prefixed_message

from lit_diffusion.training.run.messages import logger
from lit_diffusion.training.run.secrets import without_secrets
from lit_diffusion.training.run.tolerance import may_fail

FEW = 5  # named in warnings and errors; the file lists all
ENOUGH = 10  # fewer bad examples than this are never too many


class Bad(NamedTuple):
    """`rows` rows that cannot be used, from `row` of `file` on; why, and in which epoch."""

    file: str
    row: int
    rows: int
    reason: str
    epoch: int = 0

    @property
    def name(self) -> str:
        """Its place, for messages."""
        if self.rows > 1:
            span = f"rows {self.row} to {self.row + self.rows - 1}"
        else:
            span = f"{'row' if self.file else 'example'} {self.row}"
        return f"{span} of {self.file}" if self.file else span


class BadExample(ValueError):  # noqa: N818
    """An example cannot be used; the message gives its place and the reason."""

    def __init__(self, bad: Bad, split: str) -> None:
        super().__init__(f"{bad.name}, split {split!r}: {bad.reason}")
        self.bad = bad


def one_line(error: BaseException) -> str:
    """Return an error in one short line, the same each time, and without secrets.

    Args:
        error: The error.

    Example:
        >>> one_line(OSError("no such file"))
        'OSError: no such file'
    """
    line = next(iter(str(error).splitlines()), "")
    line = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "", line)
    line = re.sub(r"^.*\.cpp:\d+, ", "", line)
    return f"{type(error).__name__}: {without_secrets(line).strip()[:200]}"


def lost_rows(bad: Iterable[Bad]) -> int:
    """Return the number of rows that are lost with some bad examples.

    Args:
        bad: Each of one row or more.
    """
    return sum(one.rows for one in bad)


class BadExamples:
    """Reports the bad examples of one split: as warnings, in a file, and as an error if too many.

    The file is `bad_examples.csv`. It lists each example once, with the epoch in which it was
    first met, even if other ranks or resumed runs meet it again.

    Args:
        split: Name of the split.
        share: Largest share of the rows read that may be bad, from 0 to 1.
        folder: Folder of the file, None for no file.
        rank: This rank, for the warnings; None if it is the only one.
    """

    def __init__(
        self, split: str, share: float, folder: str | Path | None, rank: int | None = None
    ) -> None:
        self.split = split
        self.share = share
        self.file = None if folder is None else Path(folder) / "bad_examples.csv"
        self.rank = rank
        self.first: list[Bad] = []
        self.known: set[tuple[str, str, str]] = set()
        self.end = 0  # bytes of the file that are in `known`

    def add(self, found: Sequence[Bad]) -> None:
        """Report bad examples: the first few as warnings, all of them in the file.

        Args:
            found: What was met since the last call.
        """
        for bad in found:
            if len(self.first) < FEW:
                self.first.append(bad)
                more = "" if self.file is None else f" (all are listed in {self.file})"
                logger.warning(
                    rank_prefixed_message(
                        f"skipped {bad.name}, split {self.split!r}: {bad.reason}{more}", self.rank
                    )
                )
        if found and self.file is not None:
            with may_fail(self.file):
                self._write(self.file, found)

    def judge(self, read: int, bad: int) -> None:
        """Raise an error if too many examples are bad.

        Args:
            read: Examples read so far, bad ones included.
            bad: How many of them are bad.

        Raises:
            ValueError: If there are ten or more bad ones, and more than the allowed share.
        """
        if bad >= ENOUGH and bad > self.share * read:
            few = "; ".join(f"{one.name}: {one.reason}" for one in self.first)
            raise ValueError(
                f"expected a share of at most {self.share:g} of split {self.split!r} to be bad, "
                f"got {bad} of the {read} examples read so far; repair the data, or raise "
                f"data.max_bad_share; the first: {few or 'met before the run was resumed'}"
            )

    def _write(self, path: Path, found: Sequence[Bad]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))  # all ranks write to one file
        with lock, path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(self.end)
            self.known |= {(row[0], row[1], row[2]) for row in csv.reader(file)}
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(["split", "file", "row", "rows", "reason", "epoch"])
            for bad in found:
                key = (self.split, bad.file, str(bad.row))
                if key not in self.known:
                    self.known.add(key)
                    writer.writerow([self.split, *bad])
            file.flush()
            self.end = file.tell()
