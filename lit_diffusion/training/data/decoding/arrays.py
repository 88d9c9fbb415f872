"""Decode stored numbers to a tensor: signals, volumes, sets of points, vectors and latents.

An example is a list of numbers, lists of lists of them, or an array in numpy's file format (.npy),
in the row or in a file that it names. What does not fit is a bad example. Only these encodings of
one array are undone:

    C = 1      the axis of the channel may be missing
    signal     the channels may come last, (L, C), and likewise in volumes, and in latents that
               are no .npy files, which are written by programs that put them first
    points     are stored as a list of points, (N, C)

Numbers become float32; latents in float16 remain so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_diffusion.training.data.decoding.images import ImageDecoder
from lit_diffusion.training.data.reading.columns import MisfitError
from lit_diffusion.training.data.reading.image_headers import NPY, read_npy


class ArrayDecoder(ImageDecoder):
    """Turns undecoded examples into tensors of floats, or states why one does not fit.

    Args:
        kind: signal, volume, points, vector or latents.
        **arguments: As of `ImageDecoder`.
    """

    def __init__(self, kind: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.kind = kind

    def _image(self, stored: Any) -> Tensor:
        what = f"numbers of data.kind {self.kind}"
        if isinstance(stored, dict):
            data = stored.get("bytes")
            stored = self.paths.read(stored.get("path")) if data is None else data
        if stored is None or (isinstance(stored, bytes) and not stored):
            raise MisfitError(f"{what}, got none; remove the row")
        if isinstance(stored, bytes):
            if not stored.startswith(NPY):
                raise MisfitError(
                    f"{what}, in lists or in .npy format, got a file of {len(stored)} bytes; set "
                    "data.kind to image if these are pictures"
                )
            array = self._arranged(read_npy(stored), last=self.kind != "latents")
        else:
            array = self._arranged(_array(stored, what), last=True)
        return torch.from_numpy(self._checked(array))

    def _arranged(self, array: npt.NDArray[Any], last: bool) -> npt.NDArray[Any]:
        """Undo the encodings that are allowed, and check the shape."""
        shape = self.shape
        if self.kind == "points" and array.shape == shape[::-1]:
            return array.T
        if array.shape == shape:
            return array
        if shape == (1, *array.shape):
            return array[None]
        moved = np.moveaxis(array, -1, 0) if array.ndim else array
        if last and self.kind != "points" and moved.shape == shape:
            return moved
        wanted = _times(shape[::-1] if self.kind == "points" else shape)
        raise MisfitError(
            f"numbers of data.kind {self.kind} and shape {wanted}, got {_times(array.shape)}; set "
            "data.shape, or data.kind, or convert the data"
        )

    def _checked(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return finite floats."""
        half = self.kind == "latents" and array.dtype == np.float16
        with np.errstate(over="ignore"):  # what overflows is found below
            array = array.astype(np.float16 if half else np.float32, order="C")
        if not np.isfinite(array).all():
            raise MisfitError(
                f"finite numbers, got NaN, infinity or values too large for {array.dtype}; remove "
                "the row"
            )
        return array


def _array(stored: Any, what: str) -> npt.NDArray[Any]:
    """Return numbers, or lists of them, as an array."""
    if not isinstance(stored, int | float | list | tuple | np.ndarray | np.generic):
        raise MisfitError(
            f"{what}, got {type(stored).__name__} {str(stored)[:50]!r}; set data.image_key to a "
            "column of numbers, or data.kind to what its values are"
        )
    try:
        array = np.asarray(stored)
    except ValueError:
        raise MisfitError(
            f"{what}, got lists of uneven lengths; set data.kind, or repair or remove the row"
        ) from None
    if array.dtype.kind == "O":
        raise MisfitError(f"{what}, got a missing value among them; repair or remove the row")
    if array.dtype.kind not in "biuf":
        raise MisfitError(
            f"{what}, got {str(stored)[:50]!r}; set data.image_key to a column of numbers"
        )
    return array


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(str(size) for size in shape) or "a single number"
