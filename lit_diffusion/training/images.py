"""From a stored image to a tensor: decoded, checked, and never repaired in silence.

C channels, H rows, W columns. What is only an encoding is undone (a palette, CMYK, one bit a
pixel, an alpha channel that is opaque everywhere). Anything else that does not fit is an error
that names the example: to resize or recolour it here would change what is being modelled.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.training.stream import Example, Source


class ImageDecoder:
    """Make one uint8 batch of examples, or say which example does not fit and why.

    Args:
        source: Where the examples come from; it knows their names.
        split: The split's name, for messages.
        shape: (C, H, W) that every image must have.
        labels: Whether the batch has labels.
    """

    def __init__(
        self, source: Source, split: str, shape: tuple[int, int, int], labels: bool
    ) -> None:
        self.source = source
        self.split = split
        self.shape = shape
        self.labels = labels

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """Return {"image": uint8 (B, C, H, W), "label": int64 (B,)}."""
        batch = {"image": torch.stack([self._image(example) for example in examples])}
        if self.labels:
            batch["label"] = torch.tensor([self._label(example) for example in examples])
        return batch

    def _image(self, example: Example) -> Tensor:
        stored = example.image
        if isinstance(stored, dict):
            stored = stored.get("bytes") or self._read(example, stored.get("path"))
        if isinstance(stored, bytes):
            return self._decode(example, stored)
        if isinstance(stored, list | np.ndarray):
            return self._fit(example, np.asarray(stored), "an array")
        raise self._error(
            example, f"an image, got {type(stored).__name__}; set data.image_key to its column"
        )

    def _label(self, example: Example) -> int:
        if isinstance(example.label, int | np.integer) and not isinstance(example.label, bool):
            return int(example.label)
        raise self._error(
            example,
            f"an integer label, got {example.label!r}; set data.label_key to a column of "
            "integers, or to null for none",
        )

    def _decode(self, example: Example, data: bytes) -> Tensor:
        import torchvision
        from PIL import Image

        # torchvision is three times as fast; PIL knows more formats and says what a mode means.
        try:
            image = torchvision.io.decode_image(
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
            )
        except RuntimeError as error:
            image, problem = None, error
        if image is not None and image.shape == self.shape and image.dtype == torch.uint8:
            return image
        try:
            with Image.open(io.BytesIO(data)) as picture:
                if image is None and picture.format in ("PNG", "JPEG", "GIF", "WEBP"):
                    raise problem  # a format torchvision reads: broken, though PIL might shrug
                mode, frames = picture.mode, getattr(picture, "n_frames", 1)
                array = np.asarray(self._meant(picture))
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise self._error(
                example, f"an image that can be decoded, got {len(data)} bytes: {reason}"
            ) from error
        if frames > 1:
            raise self._error(example, f"one image, got an animation of {frames}")
        return self._fit(example, array, f"mode {mode}")

    def _meant(self, picture: Any) -> Any:
        """Undo what is only an encoding: palettes, CMYK, single bits, an alpha that is all 1."""
        if picture.mode == "P":
            picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        elif picture.mode in ("CMYK", "YCbCr", "HSV", "LAB"):
            picture = picture.convert("RGB")
        elif picture.mode == "1":
            picture = picture.convert("L")
        opaque = picture.mode in ("LA", "RGBA") and picture.getextrema()[-1] == (255, 255)
        if opaque and self.shape[0] < len(picture.mode):
            picture = picture.convert(picture.mode[:-1])
        return picture

    def _fit(self, example: Example, array: np.ndarray, kind: str) -> Tensor:
        if array.ndim == 2:
            array = array[None]
        elif array.ndim == 3 and array.shape != self.shape:
            array = array.transpose(2, 0, 1)
        if (
            array.dtype.kind not in "iu"
            or array.min() < 0
            or array.max() > 255
            or kind == "mode I;16"
        ):
            raise self._error(
                example,
                f"bytes (integers in 0 … 255), got {array.dtype} ({kind}); convert the data",
            )
        if array.shape != self.shape:
            raise self._error(
                example,
                f"an image of channels × height × width {_times(self.shape)}, got "
                f"{_times(array.shape)} ({kind}); set data.image_shape, or convert the data",
            )
        return torch.from_numpy(array.astype(np.uint8))

    def _read(self, example: Example, path: str | None) -> bytes:
        import fsspec

        if not path:
            raise self._error(example, "an image, got none; remove the row")
        with fsspec.open(path, "rb") as file:
            return file.read()

    def _error(self, example: Example, sentence: str) -> ValueError:
        name = self.source.name(example.index)
        return ValueError(f"{name} of split {self.split!r}: expected {sentence}")


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(str(size) for size in shape)
