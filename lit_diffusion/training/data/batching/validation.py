"""Examples read in order: the fixed batches of validation, and whole splits for statistics.

The validation examples are numbered after the bad ones are left out, so that the noise of each can
be keyed by its number, and divided into equally many batches on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lit_diffusion.training.data.decoding.split import Split, chunks, sift
from lit_diffusion.training.data.reading.bad_examples import (
    Bad,
    BadExample,
    BadExamples,
    lost_rows,
)
from lit_diffusion.training.data.reading.source import Example


class FixedBatches:
    """Batches that are made once and come in the same order every time.

    Args:
        split: The data.
        examples: All usable examples, the same on every rank.
        batch_size: Examples in a batch, at most.
        rank: This rank.
        world: Number of ranks.

    Raises:
        ValueError: If there are fewer examples than ranks.
    """

    def __init__(
        self,
        split: Split,
        examples: Sequence[Example | Bad],
        batch_size: int,
        rank: int,
        world: int,
    ) -> None:
        total = len(examples)
        if total < world:
            raise ValueError(
                f"expected at least one validation example for each of {world} ranks, got "
                f"{total}; use fewer ranks or a larger split than {split.name!r}"
            )
        # Equally many batches on every rank, or a collective call in validation would hang.
        steps = min(-(-total // (world * batch_size)), total // world)
        mine = np.array_split(np.arange(total), world)[rank]
        self.batches: list[dict[str, Any]] = []
        for index in np.array_split(mine, steps):
            batch: dict[str, Any] = dict(split.batch([examples[i] for i in index]))
            self.batches.append(batch | {"index": torch.from_numpy(index), "total": total})

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Shallow copies, so that a replaced entry of a batch does not change the next pass.
        return (dict(batch) for batch in self.batches)


def usable(
    split: Split, examples: Iterable[Example | Bad], bad_examples: BadExamples, report: bool
) -> list[Example | Bad]:
    """Return the examples without the bad ones.

    Every rank decodes all of them, so that all agree on their number and order.

    Args:
        split: The data.
        examples: Examples of it.
        bad_examples: Reports the bad ones, and raises an error if they are too many.
        report: Whether this rank is the one that reports them.
    """
    kept: list[Example | Bad] = []
    bad: list[Bad] = []
    for example in examples:
        (decoded,) = split.decode([example])
        if isinstance(decoded, Bad):
            bad.append(decoded)
        else:
            kept.append(example)
    lost = lost_rows(bad)
    bad_examples.add(bad if report else [])
    bad_examples.judge(len(kept) + lost, lost)
    return kept


def in_order(
    split: Split, batch_size: int, rank: int, world: int, bad_examples: BadExamples, skip: bool
) -> Iterator[dict[str, Any]]:
    """Yield every world-th batch of a split in stored order, and its global index as "batch".

    Args:
        split: The data.
        batch_size: Examples in a batch before the bad ones are left out.
        rank: This rank; the batches of others are read and not decoded.
        world: Number of ranks.
        bad_examples: Reports the bad ones, and raises an error if they are too many.
        skip: Leave out bad examples.

    Raises:
        BadExample: For the first bad one, if none may be left out.
    """
    read = lost = 0
    for number, examples in enumerate(chunks(split.source.head(None), batch_size)):
        if number % world != rank:
            continue
        kept, bad = sift(split.decode(examples))
        if bad and not skip:
            raise BadExample(bad[0], split.name)
        bad_examples.add(bad)
        read, lost = read + len(examples), lost + len(bad)
        bad_examples.judge(read, lost)
        if kept:
            yield {**split.decoder.collate(kept), "batch": number}
