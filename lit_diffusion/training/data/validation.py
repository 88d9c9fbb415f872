"""Validation: the same batches every time, each example once, whatever the number of ranks.

The examples are numbered through after the bad ones are left out, so that the noise of each can be
keyed by its number, and cut into as many batches on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lit_diffusion.training.data.bad_examples import Bad, BadExamples
from lit_diffusion.training.data.images import ImageDecoder
from lit_diffusion.training.data.stream import Example


class FixedBatches:
    """Batches that are made once and come in the same order every time.

    Args:
        decode: Makes a batch of examples.
        examples: All examples in use, the same on every rank.
        batch_size: Most examples in a batch.
        rank: This rank.
        world: How many ranks there are.
    """

    def __init__(
        self,
        decode: ImageDecoder,
        examples: list[Example],
        batch_size: int,
        rank: int,
        world: int,
    ) -> None:
        total = len(examples)
        if total < world:
            raise ValueError(
                f"expected at least one validation example for each of {world} ranks, got "
                f"{total}; use fewer ranks or a larger split than {decode.split!r}"
            )
        # As many batches on every rank, or a collective call in validation would hang.
        steps = min(-(-total // (world * batch_size)), total // world)
        mine = np.array_split(np.arange(total), world)[rank]
        self.batches: list[dict[str, Any]] = []
        for index in np.array_split(mine, steps):
            batch = decode([examples[i] for i in index])
            self.batches.append(batch | {"index": torch.from_numpy(index), "total": total})

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Shallow copies: who replaces an entry of a batch must not change the next pass.
        return (dict(batch) for batch in self.batches)


def usable(
    decode: ImageDecoder, examples: Iterator[Example | Bad], report: BadExamples, tell: bool
) -> list[Example]:
    """Return the examples without the bad ones.

    Every rank looks at all of them, so that all agree on how many there are and in which order.

    Args:
        decode: Tells which are bad.
        examples: What was read.
        report: Is told of the bad ones, and says when they are too many.
        tell: Whether this rank is the one that names them.
    """
    kept, bad = [], []
    for example in examples:
        (decoded,) = decode.sift([example])
        if isinstance(decoded, Bad):
            bad.append(decoded)
        else:
            kept.append(example)
    lost = sum(one.rows for one in bad)
    report.add(bad if tell else [])
    report.judge(len(kept) + lost, lost)
    return kept
