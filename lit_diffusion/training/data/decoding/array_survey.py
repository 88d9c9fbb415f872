"""What stored arrays are: their shapes and values, and along which axes neighbours are alike.

A series, a picture and a table of numbers may have the same shape. What tells them apart is that
the neighbours in a series or a picture are nearly equal, and the columns of a table are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Arrays", "survey_arrays"]


class Arrays(NamedTuple):
    """What some arrays are.

    Attributes:
        shapes: Number of arrays of each shape, as they are stored.
        dtypes: Number of arrays of each type.
        likeness: Correlation of neighbours along each axis of the most frequent shape.
        std: Standard deviation of all finite values.
    """

    shapes: Counter[tuple[int, ...]]
    dtypes: Counter[str]
    likeness: tuple[float, ...]
    std: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The most frequent shape."""
        return self.shapes.most_common(1)[0][0]

    @property
    def floats(self) -> bool:
        """Whether there are floats among them."""
        return any(name.startswith(("float", "bfloat")) for name in self.dtypes)


def survey_arrays(arrays: Sequence[npt.NDArray[Any]]) -> Arrays:
    """Describe arrays.

    Args:
        arrays: At least one, of numbers.

    Example:
        >>> waves = np.sin(np.arange(100) / 5 + np.arange(9)[:, None])
        >>> survey_arrays(list(waves)).likeness[0] > 0.9
        True
    """
    shapes = Counter(array.shape for array in arrays)
    shape = shapes.most_common(1)[0][0]
    alike = np.stack([one for one in arrays if one.shape == shape]).astype(np.float64)
    alike = np.where(np.isfinite(alike), alike, 0.0)
    centred = alike - (alike.mean(0) if len(alike) > 1 else alike.mean())
    return Arrays(
        shapes,
        Counter(array.dtype.newbyteorder("=").name for array in arrays),
        tuple(_correlation(centred, axis) for axis in range(1, centred.ndim)),
        float(alike.std()),
    )


def _correlation(values: npt.NDArray[np.float64], axis: int) -> float:
    """Correlation of values with their next neighbours along an axis; 0 if there are none."""
    n = values.shape[axis]
    one = np.take(values, range(n - 1), axis)
    other = np.take(values, range(1, n), axis)
    size = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / size) if size else 0.0
