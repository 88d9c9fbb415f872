"""Buckets: a few sizes of images, each picture in that of its own aspect ratio.

A square crop of a tall picture loses half of it, and a model of such crops has learnt that heads
are cut off. With buckets each picture is resized to the size whose aspect ratio is nearest, and
little is cropped. A batch has one shape, so its examples come from one bucket, see
`lit_diffusion.training.data.batching.buckets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lit_diffusion.training.data.decoding.transforms import Fit

__all__ = ["Buckets"]


class Buckets:
    """Resizes and crops each picture to the size in a list whose aspect ratio is nearest.

    The distance of two aspect ratios is |ln (h / w) − ln (H / W)|, so that twice as wide is as far
    as twice as tall. Among sizes of one ratio that of the nearest area counts.

    Args:
        sizes: (height, width) of each bucket; empty for none.

    Example:
        >>> buckets = Buckets([(64, 64), (48, 80), (80, 48)])
        >>> buckets.nearest(600, 800), buckets.nearest(1000, 1100), buckets.nearest(300, 100)
        ((48, 80), (64, 64), (80, 48))
    """

    def __init__(self, sizes: Sequence[Sequence[int]] = ()) -> None:
        self.sizes = tuple((height, width) for height, width in sizes)

    def __bool__(self) -> bool:
        return bool(self.sizes)

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the bucket of a picture.

        Args:
            height: Of the picture.
            width: Of the picture.
        """

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            ratio = math.log(size[0] * width) - math.log(size[1] * height)
            area = math.log(size[0] * size[1]) - math.log(height * width)
            return round(abs(ratio), 9), abs(area)  # 64 : 64 is 128 : 128, whatever is rounded

        return min(self.sizes, key=distance)

    def __call__(self, picture: Tensor) -> Tensor:
        """Return the picture in the size of its bucket, its middle if it has another ratio.

        Args:
            picture: Bytes.

        Shapes:
            picture (C, h, w); result (C, H, W).
        """
        return Fit(size=self.nearest(*picture.shape[1:]))(picture)

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """Return (C, H, W) of the images of each bucket.

        Args:
            channels: Their number C.
        """
        return [(channels, *size) for size in self.sizes]
