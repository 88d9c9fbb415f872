"""The base class of all sources: the undecoded examples of one split, in any order."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lit_diffusion.training.data.reading.bad_examples import Bad
from lit_diffusion.training.data.reading.content import digests
from lit_diffusion.training.data.reading.order import Position, Window


@dataclass(frozen=True, slots=True)
class Example:
    """One undecoded row: its index in the split; image, label and conditions as stored."""

    index: int
    image: Any
    label: Any
    conditions: tuple[Any, ...] = ()


class Source(ABC):
    """Reads the examples of one split, undecoded.

    A source can be pickled, so that workers may be spawned as well as forked.

    Attributes:
        total: Number of examples, None if only reading all of them would show it.
        shards: Number of parts in which the data are stored.
        lost: What was found unreadable when the source was opened.
        files: Paths and URLs of the files that the split consists of.
        named: Whether their names and folders are part of the data.
        divided: Which part of a larger source this is; empty for the whole.
        fingerprint: Name of the content, the same for no other content; None if unknown.
    """

    total: int | None
    shards: int
    lost: tuple[Bad, ...] = ()
    files: tuple[str, ...] = ()
    named = False
    divided = ""

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """Digests of the content, see `digests`; they depend on neither path nor time."""
        return digests(self.files, self.named)

    @property
    def fingerprint(self) -> str | None:
        """Name of the content, the same for no other content; None if unknown."""
        return None

    @abstractmethod
    def windows(
        self, lane: int, lanes: int, seed: int, size: int, start: Position
    ) -> Iterator[Window]:
        """Yield the windows of a lane's epoch in order, from a position on.

        Args:
            lane: Index of the lane.
            lanes: Number of lanes.
            seed: Seed of the order.
            size: Examples in a window, at most.
            start: Position of the first window.
        """

    @abstractmethod
    def fetch(self, items: list[Any]) -> list[Example]:
        """Return the examples that some items of a window stand for.

        Args:
            items: Items of windows.
        """

    @abstractmethod
    def head(self, n: int | None) -> Iterator[Example | Bad]:
        """Yield the first n examples in stored order.

        Args:
            n: How many, None for all.
        """

    def where(self, index: int) -> tuple[str, int]:
        """Return the file of an example, "" if there is none, and its row there.

        Args:
            index: Of the example in the split.
        """
        return "", index
