"""Decode a stored image to a tensor, check it, and never repair it silently.

C channels, H rows, W columns. What is only an encoding is undone (see `encodings`, and an EXIF
orientation tag). A colour mode and transforms may be asked for (see `transforms`). Any other
mismatch makes the example a bad one, which is reported: to resize or recolour an image unasked
would change what is being modelled. The size is read from the first bytes of the file before
anything else, so that an image that claims to be huge is refused before memory is allocated for
it.

Latents are stored as floats in numpy's file format (.npy) and pass unchanged. The first example
decides whether a data set holds bytes or floats.
"""

from __future__ import annotations

import copy
import io
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_diffusion.training.data.decoding.buckets import Buckets
from lit_diffusion.training.data.decoding.encodings import channels_of, formats
from lit_diffusion.training.data.decoding.repeatable import NotRepeatableError
from lit_diffusion.training.data.decoding.transforms import CHANNELS, Transforms, converted
from lit_diffusion.training.data.reading.bad_examples import one_line
from lit_diffusion.training.data.reading.columns import (
    TEXT,
    MisfitError,
    caption,
    numbers,
    whole_number,
)
from lit_diffusion.training.data.reading.image_headers import (
    JPEG,
    NPY,
    PNG,
    jpeg_size,
    opened,
    png_chunks,
    read_npy,
)
from lit_diffusion.training.data.reading.image_paths import ImagePaths
from lit_diffusion.training.data.reading.retry import NetworkError
from lit_diffusion.training.data.reading.source import Example

# PNG chunks that leave the bytes unchanged: no palette, transparency, EXIF or further frames.
PLAIN = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME"}
PLAIN |= {b"tEXt", b"zTXt", b"iTXt"}

MOST_PIXELS = 89_478_485  # of a picture of any size; where PIL warns of a decompression bomb


@dataclass(frozen=True, slots=True)
class Decoded:
    """A usable example: its index, image (C, H, W), label or None, conditions."""

    index: int
    image: Tensor
    label: int | None
    conditions: list[npt.NDArray[Any]]


class SeveralShapesError(ValueError):
    """Pictures that must have one shape, whatever it is, have several."""


_REMEDY = "set data.shape to (channels, height, width), or convert the data"
_RESIZE = f"{_REMEDY}, or have every image resized and cropped: --data.transform+=Fit"


class ImageDecoder:
    """Turns undecoded examples into tensors, or states why one does not fit.

    Args:
        shape: (C, H, W) of every image.
        labels: Whether the examples have labels.
        conditions: Names of the further conditions, in the order of the source's columns.
        text: The column of captions and their number of bytes; they follow the other conditions.
        like: Arrays whose shape and type the conditions must have, and the "image" whose type the
            images must have, by name; what it does not contain may be anything.
        paths: Reads the images that rows name by paths; by default none may be named.
        mode: Colour mode to which the pictures are converted, L, RGB or RGBA; None for none.
        transforms: What is done to each picture; by default nothing.
        buckets: Sizes to one of which each picture is first brought; by default none.
        partial: Whether further transforms follow, so that the result may have any shape, the same
            for all pictures.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        labels: bool,
        conditions: tuple[str, ...] = (),
        like: Mapping[str, npt.NDArray[Any]] | None = None,
        paths: ImagePaths | None = None,
        mode: str | None = None,
        transforms: Transforms | None = None,
        partial: bool = False,
        text: tuple[str, int] | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self.mode = mode
        self.transforms = transforms or Transforms()
        self.partial = partial
        self.buckets = buckets or Buckets()
        self.any_size = bool(self.transforms or self.buckets) or partial  # of the stored pictures
        self.stored_channels = shape[0] if mode is None else CHANNELS[mode]
        self.paths = paths or ImagePaths()
        self.shape = shape
        self.labels = labels
        self.numbers = conditions
        self.text = text
        self.conditions = conditions if text is None else (*conditions, TEXT)
        self.like = dict(like or {})

    def expecting(self, batch: Mapping[str, Tensor]) -> ImageDecoder:
        """Return a decoder that expects examples to look like the first of a batch.

        Args:
            batch: As from `collate`.
        """
        like = {name: batch[name][0].numpy() for name in ("image", *self.conditions)}
        other = copy.copy(self)
        other.like = like
        return other

    def __call__(self, example: Example, epoch: int = 0) -> Decoded:
        """Decode one example.

        Args:
            example: As it is stored.
            epoch: In which it is used, for random transforms.

        Raises:
            MisfitError: If it cannot be used.
            NetworkError: If its image cannot be read because the network fails.
            SeveralShapesError: If what a memory map is to hold has not the shape of the first.
        """
        try:
            label = whole_number(example.label) if self.labels else None
            *stored, text = example.conditions if self.text else (*example.conditions, None)
            conditions = [
                numbers(opened(value), name, self.like.get(name))
                for name, value in zip(self.numbers, stored, strict=True)
            ]
            if self.text:
                conditions.append(caption(text, *self.text))
            image = self._image(example.image)
            first = self.like.get("image")
            if self.any_size:
                image = self._transformed(image, epoch, example.index)
            if first is not None and image.numpy().dtype != first.dtype:
                raise MisfitError(
                    f"an image of {first.dtype} as the first one's, got {image.numpy().dtype}; "
                    "store all of them alike"
                )
            return Decoded(example.index, image, label, conditions)
        except (MisfitError, NetworkError, MemoryError, SeveralShapesError, NotRepeatableError):
            raise  # the latter ones are not the example's fault
        except Exception as error:  # decoders raise anything
            came = f"{_what(example.image)}: {one_line(error)}"
            raise MisfitError(f"an image that can be decoded, got {came}") from error

    def collate(self, decoded: Sequence[Decoded]) -> dict[str, Tensor]:
        """Return {"image": uint8 (B, C, H, W), "label": int64 (B,), "index": int64 (B,)}.

        Images stored as floats stay float16 or float32. Each condition is a (B, *) tensor of
        float32 or int64, and captions are (B, T) bytes as int64, 0 for padding.

        Args:
            decoded: B usable examples.
        """
        batch = {"image": torch.stack([one.image for one in decoded])}
        if self.labels:
            batch["label"] = torch.tensor([one.label for one in decoded])
        for k, name in enumerate(self.conditions):
            batch[name] = torch.from_numpy(np.stack([one.conditions[k] for one in decoded]))
        return batch | {"index": torch.tensor([one.index for one in decoded])}

    def _image(self, stored: Any) -> Tensor:
        if isinstance(stored, dict):
            data = stored.get("bytes")
            stored = self.paths.read(stored.get("path")) if data is None else data
        if isinstance(stored, bytes):
            return self._decode(stored)
        if isinstance(stored, np.ndarray):
            last = np.moveaxis(stored, -1, 0)  # channels, or there is one that has no axis
            stored = last if stored.shape != self.shape == last.shape else stored
            return self._numbers(stored[None] if self.shape == (1, *stored.shape) else stored)
        if isinstance(stored, list):
            return self._fit(np.asarray(stored), "an array")
        if stored is None:
            raise MisfitError("an image, got none; remove the row")
        raise MisfitError(
            f"an image, got {type(stored).__name__}; set data.image_key to its column, or "
            "data.kind to vector"
        )

    def _decode(self, data: bytes) -> Tensor:
        if not data:
            raise MisfitError("an image, got none; remove the row")
        # Fast paths for plain JPEG and PNG, which most images are.
        if data.startswith(JPEG):
            self._check_size(*jpeg_size(data))
            image = _decode_jpeg(data)
            size = self.any_size or image.shape[1:] == self.shape[1:]
            if size and image.shape[0] == self.stored_channels < 4:  # four would be CMYK
                return image
        elif data.startswith(PNG):
            chunks = png_chunks(data)
            self._check_size(*struct.unpack_from(">II", data, 16))
            plain = chunks <= PLAIN and data[24:26] in (b"\x08\x00", b"\x08\x02")
            if plain and (self.mode is None or self.stored_channels == (3 if data[25] else 1)):
                return self._fit(_decode_png(data), "mode RGB" if data[25] else "mode L")
        elif data.startswith(NPY):
            return self._numbers(read_npy(data))
        return self._thoroughly(data)

    def _numbers(self, array: npt.NDArray[Any]) -> Tensor:
        """Return floats unchanged; integers are the bytes of an image stored as an array."""
        if array.dtype.kind != "f":
            return self._fit(array, "an array")
        if self.any_size or self.mode:
            raise MisfitError(
                "bytes, which data.transform, data.mode and data.buckets change, got floats; "
                "leave these out for latents"
            )
        if array.shape != self.shape:
            raise MisfitError(
                f"an array of channels × height × width {_times(self.shape)}, got "
                f"{_times(array.shape)}; {_REMEDY}"
            )
        half = array.dtype.itemsize == 2
        with np.errstate(over="ignore"):  # what overflows is found below
            array = array.astype(np.float16 if half else np.float32, order="C")
        if not np.isfinite(array).all():
            raise MisfitError(
                f"finite numbers, got NaN, infinity or values too large for {array.dtype}; remove "
                "the row"
            )
        return torch.from_numpy(array)

    def _thoroughly(self, data: bytes) -> Tensor:
        from PIL import Image, ImageOps

        with warnings.catch_warnings():
            # Ignore a decoder's remarks on a file, except that it would need gigabytes.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=formats()) as picture:
                self._check_size(*picture.size)
                if (frames := getattr(picture, "n_frames", 1)) > 1:
                    raise MisfitError(f"one image, got an animation of {frames}")
                deep = data.startswith(PNG) and data[24] == 16  # of RGB, PIL would give only 8
                if deep or picture.mode.startswith("I;16"):
                    raise MisfitError(
                        f"bytes (integers in 0 … 255), got mode {picture.mode}"
                        f"{', 16 bit' if deep else ''}; convert the data"
                    )
                upright = ImageOps.exif_transpose(picture)
                if self.mode is not None and upright.mode not in ("I", "F"):
                    return self._fit(np.asarray(upright.convert(self.mode)), f"mode {self.mode}")
                return self._fit(*channels_of(upright, picture.format, self.shape[0]))

    def _check_size(self, width: int, height: int) -> None:
        if self.any_size:
            if width * height > MOST_PIXELS:
                raise MisfitError(
                    f"an image of at most {MOST_PIXELS:,} pixels, got height × width {height} × "
                    f"{width}; convert the data"
                )
            return
        # Before EXIF orientation is applied, height and width may be exchanged.
        if (height, width) not in (self.shape[1:], self.shape[:0:-1]):
            raise MisfitError(
                f"an image of height × width {_times(self.shape[1:])}, got "
                f"{height} × {width}; {_RESIZE}"
            )

    def _transformed(self, image: Tensor, epoch: int, index: int) -> Tensor:
        """Apply the transforms and check the shape of the result."""
        if self.buckets:
            image = self.buckets(image)
            shape = (self.shape[0], *image.shape[1:])
            if self.transforms:
                image = self.transforms(image, epoch, index)
            self.transforms.check(image, shape)
            return image.contiguous()
        if self.transforms:
            image = self.transforms(image, epoch, index)
        first = self.like.get("image")
        if not self.partial:
            self.transforms.check(image, self.shape)
        elif first is not None and image.shape != first.shape:
            raise SeveralShapesError(
                "with data.streaming false, expected pictures of one shape before the first "
                f"random transform, got {_times(first.shape)} and {_times(image.shape)}; set "
                "data.streaming to true, or put Fit first in data.transform"
            )
        return image

    def _fit(self, array: npt.NDArray[Any], kind: str) -> Tensor:
        if array.ndim == 2:
            array = array[None]
        elif array.ndim == 3 and array.shape != self.shape and self._channels_last(array.shape):
            array = array.transpose(2, 0, 1)
        if array.dtype.kind not in "iu" or (
            array.size and not 0 <= array.min() <= array.max() < 256
        ):
            raise MisfitError(
                f"bytes (integers in 0 … 255), got {array.dtype} ({kind}); convert the data, or "
                "set data.kind to what these numbers are: signal, volume, points, vector or "
                "latents"
            )
        free = self.any_size or self.mode is not None
        if free and (array.ndim != 3 or not 1 <= len(array) <= 4 or not array.size):
            raise MisfitError(
                f"an image of 1 to 4 channels, got {_times(array.shape)} ({kind}); convert the "
                "data"
            )
        tensor = torch.from_numpy(array.astype(np.uint8))
        if self.mode is not None:
            tensor = converted(tensor, self.mode)
        if not self.any_size and tensor.shape != self.shape:
            colours = {1: "L", 3: "RGB", 4: "RGBA"}.get(self.shape[0])
            if tensor.shape[1:] != self.shape[1:]:
                remedy = _RESIZE
            elif colours and len(tensor) in (1, 2, 3, 4):
                remedy = f"{_REMEDY}, or have their colours converted: --data.mode={colours}"
            else:
                remedy = _REMEDY
            raise MisfitError(
                f"an image of channels × height × width {_times(self.shape)}, got "
                f"{_times(array.shape)} ({kind}); {remedy}"
            )
        return tensor

    def _channels_last(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of three axes is height × width × channels, as far as one can tell."""
        return shape[2] <= 4 or not (self.any_size or self.mode)


def mirror(images: Tensor, chosen: Tensor) -> None:
    """Flip some images left to right, in place.

    Args:
        images: In main memory.
        chosen: Which of them to flip.

    Shapes:
        images (B, C, H, W); chosen (B,), bool.
    """
    which = chosen.nonzero().squeeze(1)
    # Numpy writes them back several times as fast as torch does.
    images.numpy()[which.numpy()] = images.index_select(0, which).flip(-1).numpy()


def _decode_jpeg(data: bytes) -> Tensor:
    import torchvision  # type: ignore[import-untyped]

    stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(stored, apply_exif_orientation=True)


def _decode_png(data: bytes) -> npt.NDArray[Any]:
    from PIL import Image

    # Not torchvision: in 0.29 a damaged PNG file ends the process instead of raising an error.
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        return np.asarray(picture)


def _what(stored: Any) -> str:
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path")
    if isinstance(stored, bytes):
        return f"{len(stored)} bytes"
    return f"{stored}" if isinstance(stored, str) else type(stored).__name__


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(str(size) for size in shape)
