"""The columns of a data set that form an example: its image, its label, and further conditions.

For the image see `images`. A label is one integer. A condition is any further input of the
network: a number, or nested lists of numbers of one shape for the whole split. Its shape, and
whether it is integer or floating point, are those of the first usable example; all others must
have the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lit_diffusion.nn.text import text_bytes

TEXT_LENGTH = 256  # bytes of the longest caption, if nothing else is said
# Entries of a batch that are no conditions.
BATCH = ("image", "label", "index", "total", "batch", "augment")
TEXT = "text"  # the entry of a batch that has the captions, whatever the name of their column

Row = tuple[Any, Any, tuple[Any, ...]]  # an image as stored, a label or None, the conditions


class MisfitError(ValueError):
    """An example does not fit: what was expected, what came, and what to do."""


class Columns(NamedTuple):
    """Names of the columns to read: the images, the labels, the conditions, the captions."""

    image: str
    label: str | None = None
    conditions: tuple[str, ...] = ()
    text: str | None = None

    @property
    def further(self) -> tuple[str, ...]:
        """The columns of all conditions, of which the captions are the last."""
        return self.conditions if self.text is None else (*self.conditions, self.text)

    @property
    def names(self) -> list[str]:
        """All names, each once."""
        return list({key: 0 for key in (self.image, self.label, *self.further) if key})

    def check(self, split: str, found: Sequence[str]) -> None:
        """Raise an error if a split lacks one of the columns.

        Args:
            split: Name of the split.
            found: Its columns.

        Raises:
            ValueError: If one is missing.
        """
        wanted = [
            ("data.image_key", self.image, ""),
            ("data.label_key", self.label, "; null for no labels"),
            ("data.text_key", self.text, "; null for no captions"),
        ]
        wanted += [("data.condition_keys", key, "") for key in self.conditions]
        for argument, column, hint in wanted:
            if column and column not in found:
                raise ValueError(
                    f"expected a column {column!r} in split {split!r}, got {', '.join(found)}; "
                    f"set {argument}{hint}"
                )

    def rows(self, table: Mapping[str, Sequence[Any]]) -> list[Row]:
        """Return the rows of a table given by its columns.

        Args:
            table: Values by the names of their columns.
        """
        images = table[self.image]
        labels = table[self.label] if self.label else repeat(None, len(images))
        further: Any = repeat((), len(images))
        if self.further:
            further = zip(*(table[key] for key in self.further), strict=True)
        return list(zip(images, labels, further, strict=True))


def whole_number(label: Any) -> int:
    """Return a label as an integer.

    Args:
        label: As it is stored.

    Raises:
        MisfitError: If it is not an integer of 64 bits.
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


def caption(stored: Any, column: str, length: int) -> npt.NDArray[np.int64]:
    """Return a caption as the bytes of its UTF-8 encoding, padded with zeros.

    A longer caption is not cut off: what a picture shows may be said at its end.

    Args:
        stored: A string.
        column: Name of its column.
        length: Number of bytes with the padding.

    Raises:
        MisfitError: If it is no string, blank, or too long.

    Example:
        >>> caption("a 7", "caption", 5)
        array([97, 32, 55,  0,  0])
    """
    where = f"a caption in column {column!r}"
    if stored is None:
        raise MisfitError(f"{where}, got none; remove the row")
    if not isinstance(stored, str):
        raise MisfitError(
            f"{where}, got {type(stored).__name__} {str(stored)[:50]!r}; set data.text_key to a "
            "column of strings, or to null for none"
        )
    try:
        return text_bytes([stored], length)[0].numpy()
    except ValueError as error:
        hint = "set data.text_length" if len(stored.encode(errors="replace")) > length else ""
        raise MisfitError(f"{where}: {error}; {hint or 'repair or remove the row'}") from None


def numbers(stored: Any, column: str, like: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Return a condition as an array: int64 if all values are integers or booleans, else float32.

    Args:
        stored: A number, or nested lists of numbers of one shape.
        column: Name of its column.
        like: Array whose shape and type it must have, None for any.

    Raises:
        MisfitError: If it has no numbers, has values that are no numbers or not finite, or is not
            like the first.

    Example:
        >>> numbers([[1, 2, 3], [4, 5, 0.5]], "attributes")
        array([[1. , 2. , 3. ],
               [4. , 5. , 0.5]], dtype=float32)
    """
    if stored is None:
        raise MisfitError(f"numbers in column {column!r}, got none; remove the row")
    wanted, came = f"numbers in column {column!r}", f"{type(stored).__name__} {str(stored)[:50]!r}"
    hint = "repair the row, or name columns of numbers in data.condition_keys"
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
