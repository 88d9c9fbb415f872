"""Bad examples: records of what cannot be used, where it is told, and when it is too much.

Among millions of images from the web some are broken. To stop at each would make large runs
impossible; to leave them out in silence would hide a disk that dies or a column chosen wrongly.
So a bad example is left out, named, counted, and written down once, and a run ends when more than
a stated share of what it has read was bad.
"""

from __future__ import annotations

import csv
import fcntl
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from lightning.fabric.utilities.rank_zero import rank_prefixed_message

FEW = 5  # named in warnings and errors; the file has all
ENOUGH = 10  # fewer bad examples than this are never too many


class Bad(NamedTuple):
    """Rows that cannot be used: `rows` of them from `row` of `file` on, why, and when met."""

    file: str
    row: int
    rows: int
    reason: str
    epoch: int = 0

    @property
    def name(self) -> str:
        """Where it is, in words."""
        if self.rows > 1:
            span = f"rows {self.row} to {self.row + self.rows - 1}"
        else:
            span = f"{'row' if self.file else 'example'} {self.row}"
        return f"{span} of {self.file}" if self.file else span


class BadExample(ValueError):  # noqa: N818
    """An example that cannot be used; says which one and why."""

    def __init__(self, bad: Bad, split: str) -> None:
        super().__init__(f"{bad.name}, split {split!r}: {bad.reason}")
        self.bad = bad


def one_line(error: BaseException) -> str:
    """Return what an error says, short and the same each time: no addresses, no source lines."""
    line = next(iter(str(error).splitlines()), "")
    line = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "", line)
    line = re.sub(r"^.*\.cpp:\d+, ", "", line)
    return f"{type(error).__name__}: {line.strip()[:200]}"


class BadExamples:
    """The bad examples of one split, as the user meets them: warnings, a file, an error.

    The file is `bad_examples.csv`. Each example stands in it once, with the epoch that met it
    first, whichever rank or resumed run meets it again.

    Args:
        split: Name of the split.
        share: Share of what is read that may be bad, from 0 to 1.
        folder: Where the file goes; None for no file.
        rank: This rank, None if it is the only one; for the warnings.
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
        self.end = 0  # how much of the file is in `known`

    def add(self, found: list[Bad]) -> None:
        """Tell of bad examples: the first few as warnings, all of them in the file."""
        for bad in found:
            if len(self.first) < FEW:
                self.first.append(bad)
                more = "" if self.file is None else f" (all are listed in {self.file})"
                warnings.warn(
                    rank_prefixed_message(
                        f"skipped {bad.name}, split {self.split!r}: {bad.reason}{more}", self.rank
                    ),
                    stacklevel=2,
                )
        if found and self.file is not None:
            self._write(self.file, found)

    def judge(self, read: int, bad: int) -> None:
        """Raise if `bad` of `read` examples are too many.

        Raises:
            ValueError: With the counts, the first few and their reasons.
        """
        if bad >= ENOUGH and bad > self.share * read:
            few = "; ".join(f"{one.name}: {one.reason}" for one in self.first)
            raise ValueError(
                f"expected a share of at most {self.share:g} of split {self.split!r} to be bad, "
                f"got {bad} of the {read} examples read so far; mend the data, or raise "
                f"data.max_bad_share; the first: {few or 'met before the run was resumed'}"
            )

    def _write(self, path: Path, found: list[Bad]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", newline="", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ranks write to one file, one at a time
            file.seek(self.end)
            self.known |= {tuple(row[:3]) for row in csv.reader(file)}
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
