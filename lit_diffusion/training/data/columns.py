"""The columns of a data set that make an example: its image, its label, and further conditions.

An image is bytes and a matter of its own (see `images`). A label is one
integer. A condition is whatever else the network is to know: a number, or nested lists of numbers
of one shape for the whole split. What a condition looks like, its shape and whether it is integers
or not, the first example that fits decides; those after it must look alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

BATCH = ("image", "label", "index", "total", "batch")  # what a batch calls something else

Row = tuple[Any, Any, tuple[Any, ...]]  # an image as stored, a label or None, the conditions


class MisfitError(ValueError):
    """What was expected of an example, what came, and what to do."""


class Columns(NamedTuple):
    """Names of the columns that are read: of the images, of the labels, of the conditions."""

    image: str
    label: str | None = None
    conditions: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Each of them once."""
        return list({key: 0 for key in (self.image, self.label, *self.conditions) if key})

    def check(self, split: str, found: Sequence[str]) -> None:
        """Refuse a split that lacks one.

        Args:
            split: Its name.
            found: Its columns.
        """
        wanted = [
            ("data.image_key", self.image, ""),
            ("data.label_key", self.label, "; null for no labels"),
        ]
        wanted += [("data.condition_keys", key, "") for key in self.conditions]
        for argument, column, hint in wanted:
            if column and column not in found:
                raise ValueError(
                    f"expected a column {column!r} in split {split!r}, got {', '.join(found)}; "
                    f"set {argument}{hint}"
                )

    def rows(self, table: Mapping[str, Sequence[Any]]) -> list[Row]:
        """Return the rows of a table that is given column by column.

        Args:
            table: Values by the names of their columns.
        """
        images = table[self.image]
        labels = table[self.label] if self.label else repeat(None, len(images))
        further: Any = repeat((), len(images))
        if self.conditions:
            further = zip(*(table[key] for key in self.conditions), strict=True)
        return list(zip(images, labels, further, strict=True))


def whole_number(label: Any) -> int:
    """Return a label, which must be an integer.

    Args:
        label: As it is stored.

    Raises:
        MisfitError: If it is not.
    """
    if label is None:
        raise MisfitError("an integer label, got none; remove the row")
    whole = isinstance(label, int | np.integer) and not isinstance(label, bool)
    if not whole or not -(2**63) <= label < 2**63:
        raise MisfitError(
            f"an integer label, got {str(label)[:50]!r}; set data.label_key to a column of "
            "integers, or to null for none"
        )
    return int(label)


def numbers(stored: Any, column: str, like: np.ndarray | None = None) -> np.ndarray:
    """Return a condition as an array: int64 if all of it are integers or booleans, else float32.

    Args:
        stored: A number, or nested lists of numbers of one shape.
        column: Its name.
        like: What it must look like, in shape and type; None for anything.

    Raises:
        MisfitError: If it has no numbers, other things than numbers, or ones that are not finite,
            or looks different.

    Example:
        >>> numbers([[1, 2, 3], [4, 5, 0.5]], "attributes")
        array([[1. , 2. , 3. ],
               [4. , 5. , 0.5]], dtype=float32)
    """
    if stored is None:
        raise MisfitError(f"numbers in column {column!r}, got none; remove the row")
    wanted, came = f"numbers in column {column!r}", f"{type(stored).__name__} {str(stored)[:50]!r}"
    hint = "mend the row, or name columns of numbers in data.condition_keys"
    try:
        array = np.asarray(stored)
    except ValueError:
        raise MisfitError(
            f"{wanted}, got lists of uneven lengths, {str(stored)[:50]}; {hint}"
        ) from None
    plain = isinstance(stored, int | float | list | tuple | np.ndarray | np.generic)
    if not plain or array.dtype.kind not in "biuf":
        raise MisfitError(f"{wanted}, got {came}; {hint}")
    if array.size == 0:
        raise MisfitError(f"{wanted}, got an empty list; {hint}")
    if like is not None and array.shape != like.shape:
        raise MisfitError(
            f"{wanted} of shape {like.shape} as in the first example, got shape {array.shape}; "
            f"{hint}"
        )
    floats = array.dtype.kind == "f" or (array.dtype.kind == "u" and array.max() >= 2**63)
    if floats and like is not None and like.dtype == np.int64:
        raise MisfitError(
            f"integers in column {column!r} as in the first example, got {came}; store all of it "
            "as floats"
        )
    if not floats and (like is None or like.dtype == np.int64):
        return array.astype(np.int64)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise MisfitError(f"finite {wanted}, got {came}; {hint}")
    return array
