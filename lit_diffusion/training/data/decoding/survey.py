"""A survey of a data set: what its image files are, and what training would see of them.

    undecoded examples  →  Files     formats, sizes, modes: as they are stored
    decoded examples    →  Pixels    values, labels, and those that are bad, with reasons

The first is read from the headers of a sample in random order, and a proposal of shape and
transform is made from it. The second passes through the data module of that proposal, so that what
it calls bad is what training will call bad.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_diffusion.training.data.decoding.array_survey import Arrays, survey_arrays
from lit_diffusion.training.data.decoding.encodings import formats
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.reading.bad_examples import Bad
from lit_diffusion.training.data.reading.image_headers import NPY, read_npy
from lit_diffusion.training.data.reading.image_paths import ImagePaths
from lit_diffusion.training.data.reading.order import WINDOW, Position, permutation
from lit_diffusion.training.data.reading.source import Example, Source

__all__ = ["Files", "Pixels", "sample_of", "survey_files", "survey_pixels"]

COMPARED = 64  # colour images whose channels are compared: are they grey?
SHOWN = 64  # images kept for a contact sheet
CHUNK = 64  # examples read at once
GREY = ("L", "LA", "La", "1")


class Files(NamedTuple):
    """What some image files are, by their headers.

    Attributes:
        formats: Number of files of each format.
        sizes: Number of images of each (height, width), upright.
        modes: Number of images of each mode of PIL, and of 16-bit ones.
        grey: Whether all of them are grey, also those that are stored in colour.
        arrays: What the arrays are, if the examples are no pictures; None if they are.
        read: Number of files whose header can be read.
        transparent: Number of images with an alpha channel that is not opaque.
    """

    formats: Counter[str]
    sizes: Counter[tuple[int, int]]
    modes: Counter[str]
    grey: bool
    arrays: Arrays | None
    read: int
    transparent: int = 0


class Pixels(NamedTuple):
    """What training sees of some examples.

    Attributes:
        looked: Number of examples looked at.
        bad: Name and reason of each that cannot be used.
        lost: Number of rows that cannot be used: an unreadable file has many.
        levels: The values of bytes that occur, increasing; none of floats.
        mean: Mean of x in [−1, 1], or of the floats as they are stored.
        std: Standard deviation of the same.
        labels: Number of examples of each label.
        images: Some of them, as bytes or floats, (n, C, *).
        image_labels: Their labels, (n,); None if the data have none.
    """

    looked: int
    bad: list[tuple[str, str]]
    lost: int
    levels: tuple[int, ...]
    mean: float
    std: float
    labels: Counter[int]
    images: Tensor
    image_labels: Tensor | None


def sample_of(source: Source, number: int) -> list[Example | Bad]:
    """Return some examples of a split in random order, undecoded, each once.

    Args:
        source: The split.
        number: At most so many.
    """
    return list(islice(_shuffled(source), number))


def _shuffled(source: Source) -> Iterator[Example | Bad]:
    for k, window in enumerate(source.windows(0, 1, 0, 2048, Position())):
        yield from window.bad
        order = permutation(len(window.items), 0, WINDOW, 0, 0, k)
        for begin in range(0, len(order), CHUNK):
            yield from source.fetch([window.items[i] for i in order[begin : begin + CHUNK]])


def survey_files(examples: Iterable[Example | Bad], paths: ImagePaths) -> Files:
    """Read the headers of image files.

    Args:
        examples: Undecoded.
        paths: Reads the images that they name by paths.
    """
    kinds: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    grey, compared, transparent = True, 0, 0
    arrays: list[npt.NDArray[Any]] = []
    for example in examples:
        if isinstance(example, Bad):
            continue
        try:
            stored = _array_or_file(example.image, paths)
            picture = stored if isinstance(stored, bytes) else picture_of_bytes(stored)
            if picture is None:
                arrays.append(np.asarray(stored))
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                header = _header(picture)
                if header.mode not in GREY and grey and compared < COMPARED:
                    compared += 1
                    grey = _is_grey(picture)
                transparent += header.alpha and _is_transparent(picture)
        except Exception:  # decoders raise anything; the second pass gives the reason
            continue
        kinds[header.format] += 1
        sizes[header.size] += 1
        modes[header.mode] += 1
    found = survey_arrays(arrays) if len(arrays) > kinds.total() else None
    return Files(kinds, sizes, modes, grey, found, kinds.total(), transparent)


def picture_of_bytes(array: npt.NDArray[Any]) -> Any:
    """Return an array as a picture of PIL; None if it is none of bytes in a known mode.

    Args:
        array: As it is stored.

    Shapes:
        array (H, W), (H, W, C) or (C, H, W).
    """
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        return None
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        return None
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def survey_pixels(split: Split, examples: list[Example | Bad]) -> Pixels:
    """Decode examples as training does, and describe what it sees.

    Args:
        split: Of the data module.
        examples: Undecoded examples of it.
    """
    bad: list[tuple[str, str]] = []
    lost = 0
    count = np.zeros(256, dtype=np.int64)
    moments = np.zeros(3)  # number, sum and sum of squares of floats
    labels: Counter[int] = Counter()
    images: list[Tensor] = []
    shown_labels: list[int | None] = []
    for begin in range(0, len(examples), CHUNK):
        some = examples[begin : begin + CHUNK]
        for example, one in zip(some, split.decode(some), strict=True):
            if isinstance(one, Bad):
                bad.append((_name(example, one), one.reason))
                lost += one.rows
                continue
            if one.image.is_floating_point():
                values = one.image.double().numpy()
                moments += (values.size, values.sum(), (values**2).sum())
            else:
                count += np.bincount(one.image.numpy().ravel(), minlength=256)
            if one.label is not None:
                labels[one.label] += 1
            if len(images) < SHOWN:
                images.append(one.image)
                shown_labels.append(one.label)
    if moments[0]:
        mean = float(moments[1] / moments[0])
        std = math.sqrt(max(0.0, moments[2] / moments[0] - mean**2))
    else:
        x = np.arange(256) / 127.5 - 1
        share = count / max(1, count.sum())
        mean = float(share @ x)
        std = float(np.sqrt(share @ (x - mean) ** 2))
    return Pixels(
        looked=len(examples),
        bad=bad,
        lost=lost,
        levels=tuple(np.flatnonzero(count).tolist()),
        mean=mean,
        std=std,
        labels=labels,
        images=torch.stack(images) if images else torch.empty(0),
        image_labels=torch.tensor(shown_labels) if labels and images else None,
    )


def _name(example: Example | Bad, bad: Bad) -> str:
    """Of an image that is a file, its path; else the row of its file."""
    image = None if isinstance(example, Bad) else example.image
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        return str(image["path"])
    return bad.name


class _Header(NamedTuple):
    format: str
    mode: str
    size: tuple[int, int]
    alpha: bool


def _header(data: Any) -> _Header:
    """What a file, or the picture of an array, says of itself."""
    if not isinstance(data, bytes):
        alpha = data.mode == "RGBA"
        return _Header("array of bytes", data.mode, (data.height, data.width), alpha)
    with _opened(data) as picture:
        width, height = picture.size
        if picture.getexif().get(0x0112, 1) > 4:  # the orientation exchanges the sides
            width, height = height, width
        deep = picture.format == "PNG" and data[24] == 16
        mode = f"{picture.mode}, 16 bit" if deep else picture.mode
        alpha = picture.has_transparency_data
        return _Header(picture.format or "?", mode, (height, width), alpha)


def _opened(data: Any) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=formats()) if isinstance(data, bytes) else data


def _is_grey(data: Any) -> bool:
    with _opened(data) as picture:
        red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)
    return np.array_equal(red, green) and np.array_equal(green, blue)


def _is_transparent(data: Any) -> bool:
    with _opened(data) as picture:
        return bool(picture.convert("RGBA").getextrema()[-1] != (255, 255))


def _array_or_file(stored: Any, paths: ImagePaths) -> bytes | npt.NDArray[Any]:
    """Return what an example has: the bytes of the file of a picture, or an array of numbers."""
    if isinstance(stored, dict):
        data = stored.get("bytes")
        stored = paths.read(stored.get("path")) if data is None else data
    if isinstance(stored, bytes):
        return read_npy(stored) if stored.startswith(NPY) else stored
    array = np.asarray(stored)
    if array.dtype.kind not in "iuf" or not array.ndim:
        raise TypeError(f"expected a file or an array of numbers, got {type(stored).__name__}")
    return array
