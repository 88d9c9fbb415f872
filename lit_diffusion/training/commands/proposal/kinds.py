"""What kind of data some arrays are, and the shape in which training has them.

(L,)          series, if neighbours are alike        signal (1, L)
              numbers                                vector (L,)
(C, L)        a few channels of a series             signal (C, L)
(N, 2 or 3)   places, in no order                    points (2 or 3, N)
(H, W)        both axes long, neighbours alike       latents (1, H, W)
(C, H, W)     1 or 3 channels, first or last         latents (C, H, W)
              4 to 16 channels of a square           latents (C, H, W)
              three axes of space                    volume (1, D, H, W)
(C, D, H, W)  channels, first or last                volume (C, D, H, W)

Pictures of floats are of the kind latents, which keeps floats as they are.
"""

from __future__ import annotations

from typing import NamedTuple

from lit_diffusion.training.data.decoding.array_survey import Arrays

__all__ = ["Kind", "propose_kind"]

ALIKE = 0.5  # correlation of neighbours in a series or a picture
SHORTEST = 16  # series
FEW = 16  # channels, at most
PLACES = (2, 3)  # numbers of a point


class Kind(NamedTuple):
    """A kind of data.

    Attributes:
        kind: As `data.kind`.
        shape: As `data.shape`.
        why: The reason, in a few words.
    """

    kind: str
    shape: tuple[int, ...]
    why: str


def propose_kind(arrays: Arrays) -> Kind:
    """Propose a kind and a shape for arrays that are no pictures of bytes.

    Args:
        arrays: What they are.

    Example:
        >>> from collections import Counter
        >>> propose_kind(Arrays(Counter({(64, 3): 9}), Counter(float32=9), (0.1, 0.0), 1.0)).shape
        (3, 64)
    """
    shape, likeness = arrays.shape, arrays.likeness
    stored = " × ".join(map(str, shape))
    if len(shape) == 1:
        alike = f"neighbouring numbers have a correlation of {likeness[0]:.2f}"
        if shape[0] >= SHORTEST and likeness[0] > ALIKE:
            return Kind("signal", (1, *shape), alike)
        return Kind("vector", shape, f"rows of {stored} numbers: {alike}")
    if len(shape) == 2:
        return _of_two_axes(shape, likeness, stored)
    if len(shape) == 3:
        if shape[2] in (1, 3):
            return Kind("latents", (shape[2], *shape[:2]), f"stored as {stored}, channels last")
        if shape[0] in (1, 3):
            return Kind("latents", shape, f"stored as {stored}")
        if 4 <= shape[0] <= FEW and shape[1] == shape[2] and shape[0] < shape[1]:
            return Kind("latents", shape, f"stored as {stored}, {shape[0]} channels of a square")
        return Kind("volume", (1, *shape), f"stored as {stored}, one channel")
    if len(shape) == 4 and shape[3] <= 4 < shape[0]:
        return Kind("volume", (shape[3], *shape[:3]), f"stored as {stored}, channels last")
    return Kind("volume", shape, f"stored as {stored}")


def _of_two_axes(shape: tuple[int, ...], likeness: tuple[float, ...], stored: str) -> Kind:
    a, b = shape
    if b <= FEW < a and likeness[0] > ALIKE:
        return Kind("signal", (b, a), f"stored as {stored}, neighbours of the first axis alike")
    if b in PLACES and a > b:
        return Kind("points", (b, a), f"stored as {stored}: {a} places of {b} numbers")
    if min(a, b) > FEW and min(likeness) > ALIKE:
        return Kind("latents", (1, a, b), f"stored as {stored}, neighbours of both axes alike")
    return Kind("signal", shape, f"stored as {stored}: channels × length")
