"""How well the classes are mixed in training batches.

Data that are sorted by class and stored in one shard are shuffled within windows only, and a
window may contain a class or two. Training then drifts from class to class, and no loss shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ClassMix"]

LOOKS = (16, 64, 256)  # after so many batches
FEW = 0.5  # share of the classes of a random batch, below which they are not mixed


class ClassMix:
    """Compares the classes in each batch with those of random batches of all examples seen.

    Of B random examples, of which a class has the share p, the expected number of classes is
    Σ 1 − (1 − p)^B.

    Example:
        >>> mix = ClassMix()
        >>> found = [mix.add(torch.full((32,), k // 8)) for k in range(64)]
        >>> next(filter(None, found))
        'a batch of 32 has 1.0 classes on average, of 8 in the first 64 batches; a random one would
        have 7.9'
    """

    def __init__(self) -> None:
        self._batches = 0
        self._examples = 0
        self._distinct = 0
        self._count = torch.zeros(0, dtype=torch.int64)

    def add(self, label: Tensor) -> str | None:
        """Count a batch; return what is wrong, once, when enough have been seen to judge.

        Args:
            label: The classes of its examples, from 0.

        Shapes:
            label (B,), of integers, on the CPU.
        """
        if self._batches >= LOOKS[-1] or label.dim() != 1 or bool((label < 0).any()):
            return None
        self._batches += 1
        self._examples += len(label)
        count = torch.bincount(label, minlength=len(self._count))
        self._distinct += int((count > 0).sum())
        count[: len(self._count)] += self._count
        self._count = count
        if self._batches not in LOOKS:
            return None
        size = self._examples / self._batches
        share = self._count.double() / self._examples
        expected = float((1 - (1 - share) ** size).sum())
        seen, classes = self._distinct / self._batches, int((self._count > 0).sum())
        if classes < 3 or seen > FEW * expected:
            return None
        said = (
            f"a batch of {size:.0f} has {seen:.1f} classes on average, of {classes} in the first "
            f"{self._batches} batches; a random one would have {expected:.1f}"
        )
        self._batches = LOOKS[-1]  # once is enough
        return said
