"""Examples read in order: the fixed batches of validation, and whole splits for statistics.

The validation examples are numbered after the bad ones are left out, so that the noise of each can
be keyed by its number, and divided into equally many batches on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lit_diffusion.training.data.decoding.split import Split, chunks, sift
from lit_diffusion.training.data.reading.bad_examples import (
    Bad,
    BadExample,
    BadExamples,
    lost_rows,
)
from lit_diffusion.training.data.reading.source import Example

Integers = npt.NDArray[np.int64]


def divided(total: int, batch_size: int, world: int) -> list[list[Integers]]:
    """Return the numbers of the examples in each batch of each rank.

    Equally many batches on every rank, or a collective call in validation would hang.

    Args:
        total: Number of examples.
        batch_size: Examples in a batch, at most.
        world: Number of ranks.
    """
    steps = min(-(-total // (world * batch_size)), total // world)
    return [np.array_split(mine, steps) for mine in np.array_split(np.arange(total), world)]


def divided_by_shape(
    shapes: Sequence[tuple[int, ...]], batch_size: int, world: int
) -> list[list[Integers]]:
    """Return the same where each batch must have one shape.

    Each shape has as many batches as it needs, in stored order; more where the ranks would not
    have equally many, and larger ones where there are too few examples for that.

    Args:
        shapes: Of the image of each example.
        batch_size: Examples in a batch, at most.
        world: Number of ranks.

    Raises:
        ValueError: If there are too few examples for the ranks.

    Example:
        >>> wide, tall = (1, 4, 6), (1, 6, 4)
        >>> for mine in divided_by_shape([wide, tall, wide, wide, tall], batch_size=2, world=2):
        ...     print([batch.tolist() for batch in mine])
        [[0, 2], [1]]
        [[3], [4]]
    """
    members = [
        np.array([i for i, other in enumerate(shapes) if other == shape])
        for shape in dict.fromkeys(shapes)
    ]
    counts = [-(-len(mine) // batch_size) for mine in members]
    steps = min(-(-sum(counts) // world), len(shapes) // world)
    if steps * world < len(members):
        raise ValueError(
            f"expected enough validation examples for equally many batches of one shape on each "
            f"of {world} ranks, got {len(shapes)} examples of {len(members)} shapes; use fewer "
            "ranks, or more examples (data.val_examples)"
        )

    def examples_each(k: int) -> float:
        return len(members[k]) / counts[k]

    buckets = range(len(members))
    while sum(counts) < steps * world:
        counts[max(buckets, key=examples_each)] += 1
    while sum(counts) > steps * world:
        counts[min((k for k in buckets if counts[k] > 1), key=examples_each)] -= 1
    batches = [
        batch
        for mine, count in zip(members, counts, strict=True)
        for batch in np.array_split(mine, count)
    ]
    return [batches[rank::world] for rank in range(world)]


class FixedBatches:
    """Batches that are made once and come in the same order every time.

    Args:
        split: The data.
        examples: All usable examples, the same on every rank.
        shapes: Of the image of each example; needed only if the data have several.
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
        shapes: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        total = len(examples)
        if total < world:
            raise ValueError(
                f"expected at least one validation example for each of {world} ranks, got "
                f"{total}; use fewer ranks or a larger split than {split.name!r}"
            )
        if shapes is None:
            ranks = divided(total, batch_size, world)
        else:
            ranks = divided_by_shape(shapes, batch_size, world)
        self.batches: list[dict[str, Any]] = []
        for index in ranks[rank]:
            batch: dict[str, Any] = dict(split.batch([examples[i] for i in index]))
            self.batches.append(batch | {"index": torch.from_numpy(index), "total": total})

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Shallow copies, so that a replaced entry of a batch does not change the next pass.
        return (dict(batch) for batch in self.batches)


def usable(
    split: Split,
    examples: Iterable[Example | Bad],
    bad_examples: BadExamples,
    report: bool,
    skip: bool = True,
) -> tuple[list[Example | Bad], list[tuple[int, ...]]]:
    """Return the examples without the bad ones, and the shape of each one's image.

    Every rank decodes all of them, so that all agree on their number and order.

    Args:
        split: The data.
        examples: Examples of it.
        bad_examples: Reports the bad ones, and raises an error if they are too many.
        report: Whether this rank is the one that reports them.
        skip: Leave out bad examples.

    Raises:
        BadExample: For the first bad one, if none may be left out.
    """
    kept: list[Example | Bad] = []
    shapes: list[tuple[int, ...]] = []
    bad: list[Bad] = []
    for example in examples:
        (decoded,) = split.decode([example])
        if isinstance(decoded, Bad):
            if not skip:
                raise BadExample(decoded, split.name)
            bad.append(decoded)
        else:
            kept.append(example)
            shapes.append(tuple(decoded.image.shape))
    lost = lost_rows(bad)
    bad_examples.add(bad if report else [])
    bad_examples.judge(len(kept) + lost, lost)
    return kept, shapes


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
