"""Data with random access: a table of ``datasets`` that lies in its cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_diffusion.training.data.reading.columns import Columns
from lit_diffusion.training.data.reading.order import ORDER, Position, Window, permutation
from lit_diffusion.training.data.reading.shards import READ_SIZE
from lit_diffusion.training.data.reading.source import Example, Source


class TableSource(Source):
    """A split with random access, so that a window is the lane's whole part of the epoch.

    Args:
        dataset: A map-style ``datasets.Dataset``, undecoded.
        columns: The columns to read.
    """

    shards = 1

    def __init__(self, dataset: Any, columns: Columns) -> None:
        self.dataset = dataset
        self.columns = columns
        self.rows = len(dataset)
        self.total = self.rows

    @property
    def fingerprint(self) -> str | None:
        """Hash of the table, whose path in the cache names the files' versions and the split.

        The files enter by their names, times and content, those of the hub by their commit. A
        table in memory enters as a whole.
        """
        from datasets.fingerprint import Hasher  # type: ignore[import-untyped]

        return f"{Hasher.hash((self.dataset, self.content))} {self.divided}".strip()

    def windows(
        self, lane: int, lanes: int, seed: int, size: int, start: Position
    ) -> Iterator[Window]:
        """Yield the lane's part of a permutation of all examples, as one window."""
        if not start.cursors:
            order = permutation(self.rows, seed, ORDER, start.epoch)
            begin, end = self.rows * lane // lanes, self.rows * (lane + 1) // lanes
            yield Window(order[begin:end].tolist(), ((1, 0),), [])

    def fetch(self, items: list[Any]) -> list[Example]:
        """Look the examples up by their indices."""
        rows = self.columns.rows(self.dataset[items])
        return [Example(item, *row) for item, row in zip(items, rows, strict=True)]

    def head(self, n: int | None) -> Iterator[Example]:
        """Yield the first n examples (None: all) in stored order."""
        n = self.rows if n is None else min(n, self.rows)
        for begin in range(0, n, READ_SIZE):
            yield from self.fetch(list(range(begin, min(begin + READ_SIZE, n))))

    def where(self, index: int) -> tuple[str, int]:
        """Return the file of an example, if each image is a file of its own."""
        if self.named:
            image = self.dataset[index][self.columns.image]
            if isinstance(image, dict) and image.get("path"):
                return str(image["path"]), 0
        return "", index
