"""Decode a stored image to a tensor, check it, and never repair it silently.

C channels, H rows, W columns. What is only an encoding is undone (a palette, CMYK, one bit per
pixel, an alpha channel that is opaque everywhere, an EXIF orientation tag). Any other mismatch
makes the example a bad one, which is reported: to resize or recolour an image here would change
what is being modelled. The size is read from the first bytes of the file before anything else, so
that an image that claims to be huge is refused before memory is allocated for it.

Latents are stored as floats in numpy's file format (.npy) and pass unchanged. The first example
decides whether a data set holds bytes or floats.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_diffusion.training.data.bad_examples import one_line
from lit_diffusion.training.data.columns import MisfitError, numbers, whole_number
from lit_diffusion.training.data.retry import NetworkError, patiently
from lit_diffusion.training.data.source import Example

PNG, JPEG, NPY = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\x93NUMPY"
# JPEG's "start of frame" segments contain the size; the others between C0 and CF are tables.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# PNG chunks that leave the bytes unchanged: no palette, transparency, EXIF or further frames.
PLAIN = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME"}
PLAIN |= {b"tEXt", b"zTXt", b"iTXt"}


@dataclass(frozen=True, slots=True)
class Decoded:
    """A usable example: its index, image (C, H, W), label or None, conditions."""

    index: int
    image: Tensor
    label: int | None
    conditions: list[npt.NDArray[Any]]


class ImageDecoder:
    """Turns undecoded examples into tensors, or states why one does not fit.

    Args:
        shape: (C, H, W) of every image.
        labels: Whether the examples have labels.
        conditions: Names of the further conditions, in the order of the source's columns.
        like: Arrays whose shape and type the conditions must have, and the "image" whose type the
            images must have, by name; what it does not contain may be anything.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        labels: bool,
        conditions: tuple[str, ...] = (),
        like: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self.shape = shape
        self.labels = labels
        self.conditions = conditions
        self.like = dict(like or {})

    def expecting(self, batch: Mapping[str, Tensor]) -> ImageDecoder:
        """Return a decoder that expects examples to look like the first of a batch.

        Args:
            batch: As from `collate`.
        """
        like = {name: batch[name][0].numpy() for name in ("image", *self.conditions)}
        return ImageDecoder(self.shape, self.labels, self.conditions, like)

    def __call__(self, example: Example) -> Decoded:
        """Decode one example.

        Args:
            example: As it is stored.

        Raises:
            MisfitError: If it cannot be used.
            NetworkError: If its image cannot be read because the network fails.
        """
        try:
            label = whole_number(example.label) if self.labels else None
            conditions = [
                numbers(value, name, self.like.get(name))
                for name, value in zip(self.conditions, example.conditions, strict=True)
            ]
            image = self._image(example.image)
            first = self.like.get("image")
            if first is not None and image.numpy().dtype != first.dtype:
                raise MisfitError(
                    f"an image of {first.dtype} as the first one's, got {image.numpy().dtype}; "
                    "store all of them alike"
                )
            return Decoded(example.index, image, label, conditions)
        except (MisfitError, NetworkError, MemoryError):
            raise  # the latter two are not the example's fault
        except Exception as error:  # decoders raise anything
            came = f"{_what(example.image)}: {one_line(error)}"
            raise MisfitError(f"an image that can be decoded, got {came}") from error

    def collate(self, decoded: Sequence[Decoded]) -> dict[str, Tensor]:
        """Return {"image": uint8 (B, C, H, W), "label": int64 (B,), "index": int64 (B,)}.

        Images stored as floats stay float16 or float32. Each condition is a (B, *) tensor of
        float32 or int64.

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
            stored = stored.get("bytes") or _read(stored.get("path"))
        if isinstance(stored, bytes):
            return self._decode(stored)
        if isinstance(stored, list | np.ndarray):
            return self._fit(np.asarray(stored), "an array")
        if stored is None:
            raise MisfitError("an image, got none; remove the row")
        raise MisfitError(
            f"an image, got {type(stored).__name__}; set data.image_key to its column"
        )

    def _decode(self, data: bytes) -> Tensor:
        if not data:
            raise MisfitError("an image, got none; remove the row")
        # Fast paths for plain JPEG and PNG, which most images are.
        if data.startswith(JPEG):
            self._check_size(*_jpeg_size(data))
            image = _decode_jpeg(data)
            if image.shape == self.shape and len(image) < 4:  # four would be CMYK
                return image
        elif data.startswith(PNG):
            chunks = _png_chunks(data)
            self._check_size(*struct.unpack_from(">II", data, 16))
            if chunks <= PLAIN and data[24:26] in (b"\x08\x00", b"\x08\x02"):
                return self._fit(_decode_png(data), "mode RGB" if data[25] else "mode L")
        elif data.startswith(NPY):
            return self._numbers(np.load(io.BytesIO(data), allow_pickle=False))
        return self._thoroughly(data)

    def _numbers(self, array: npt.NDArray[Any]) -> Tensor:
        """Return floats unchanged; integers are the bytes of an image stored as an array."""
        if array.dtype.kind != "f":
            return self._fit(array, "a .npy array")
        if array.shape != self.shape:
            raise MisfitError(
                f"an array of channels × height × width {_times(self.shape)}, got "
                f"{_times(array.shape)}; set data.image_shape, or convert the data"
            )
        if not np.isfinite(array).all():
            raise MisfitError("finite numbers, got NaN or infinity; remove the row")
        half = array.dtype.itemsize == 2
        return torch.from_numpy(array.astype(np.float16 if half else np.float32))

    def _thoroughly(self, data: bytes) -> Tensor:
        from PIL import Image, ImageOps

        with warnings.catch_warnings():
            # Ignore a decoder's remarks on a file, except that it would need gigabytes.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                self._check_size(*picture.size)
                if (frames := getattr(picture, "n_frames", 1)) > 1:
                    raise MisfitError(f"one image, got an animation of {frames}")
                deep = data.startswith(PNG) and data[24] == 16  # of RGB, PIL would give only 8
                mode = f"{picture.mode}, 16 bit" if deep else picture.mode
                if deep or picture.mode.startswith("I;16"):
                    raise MisfitError(
                        f"bytes (integers in 0 … 255), got mode {mode}; convert the data"
                    )
                array = np.asarray(self._meant(ImageOps.exif_transpose(picture)))
        return self._fit(array, f"mode {mode}")

    def _meant(self, picture: Any) -> Any:
        """Undo what is only an encoding: palettes, CMYK, single bits, an opaque alpha."""
        grey_palette = picture.format == "GIF" and picture.mode == "L" and self.shape[0] > 1
        if picture.mode == "P" or grey_palette:
            picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        elif picture.mode in ("CMYK", "YCbCr", "HSV", "LAB"):
            picture = picture.convert("RGB")
        elif picture.mode == "1":
            picture = picture.convert("L")
        opaque = picture.mode in ("LA", "RGBA") and picture.getextrema()[-1] == (255, 255)
        if opaque and self.shape[0] < len(picture.mode):
            picture = picture.convert(picture.mode[:-1])
        return picture

    def _check_size(self, width: int, height: int) -> None:
        # Before EXIF orientation is applied, height and width may be exchanged.
        if (height, width) not in (self.shape[1:], self.shape[:0:-1]):
            raise MisfitError(
                f"an image of height × width {_times(self.shape[1:])}, got "
                f"{height} × {width}; set data.image_shape, or convert the data"
            )

    def _fit(self, array: npt.NDArray[Any], kind: str) -> Tensor:
        if array.ndim == 2:
            array = array[None]
        elif array.ndim == 3 and array.shape != self.shape:
            array = array.transpose(2, 0, 1)
        if array.dtype.kind not in "iu" or (
            array.size and not 0 <= array.min() <= array.max() < 256
        ):
            raise MisfitError(
                f"bytes (integers in 0 … 255), got {array.dtype} ({kind}); convert the data"
            )
        if array.shape != self.shape:
            raise MisfitError(
                f"an image of channels × height × width {_times(self.shape)}, got "
                f"{_times(array.shape)} ({kind}); set data.image_shape, or convert the data"
            )
        return torch.from_numpy(array.astype(np.uint8))


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


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Read (width, height) from the header of a JPEG file."""
    here = 2
    while (here := data.find(0xFF, here)) >= 0 and here + 9 <= len(data):
        marker, length = struct.unpack_from(">xBH", data, here)
        if marker in FRAMES:
            height, width = struct.unpack_from(">HH", data, here + 5)
            return width, height
        here += 1 if marker == 0xFF else 2 + length  # a marker may be padded with FF
    raise MisfitError(f"an image that can be decoded, got {len(data)} bytes: it has no frame")


def _png_chunks(data: bytes) -> set[bytes]:
    """Return the kinds of chunks in a PNG file, after verifying their checksums.

    PIL ignores the checksums of the pixels' chunks and would return a damaged image.
    """
    kinds, here = set(), len(PNG)
    while b"IEND" not in kinds:
        if here + 12 > len(data):
            raise MisfitError(
                f"an image that can be decoded, got {len(data)} bytes: PNG cut short"
            )
        end = here + 8 + int.from_bytes(data[here : here + 4])
        kinds.add(data[here + 4 : here + 8])
        if zlib.crc32(data[here + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise MisfitError(f"an image that can be decoded, got {len(data)} bytes: PNG damaged")
        here = end + 4
    return kinds


def _read(path: str | None) -> bytes:
    import fsspec  # type: ignore[import-untyped]

    if not path:
        raise MisfitError("an image, got none; remove the row")

    def read() -> bytes:
        with fsspec.open(path, "rb") as file:
            return file.read()

    return patiently(path, read)


def _what(stored: Any) -> str:
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path")
    if isinstance(stored, bytes):
        return f"{len(stored)} bytes"
    return f"{stored}" if isinstance(stored, str) else type(stored).__name__


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(str(size) for size in shape)
