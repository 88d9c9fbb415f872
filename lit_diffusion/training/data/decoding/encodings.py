"""What is only an encoding is undone: palettes, CMYK, single bits, an alpha that is opaque.

A file's mode says how it is stored, and not what it shows. A palette of greys is a grey picture; a
palette with a transparent colour has an alpha channel, and so has a picture one colour of which is
declared transparent. Whether an alpha channel means anything is a question to the pixels.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

# What PIL may decode. It knows forty more, among them some that start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Formats whose greys are a palette, although PIL shows some of them without it.
PALETTES = ("GIF", "BMP")


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats that may be decoded, and that this version of PIL has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def channels_of(picture: Any, encoding: str | None, channels: int) -> tuple[npt.NDArray[Any], str]:
    """Return the pixels of a picture without what is only encoding, and what they are.

    Args:
        picture: Of PIL, upright.
        encoding: The file's format, as PIL names it.
        channels: Wanted number of channels, which decides between equal ways to say the same.

    Shapes:
        result (H, W) or (H, W, C).
    """
    mode = picture.mode
    palette = mode in ("P", "PA") or (encoding in PALETTES and mode in ("1", "L"))
    if mode == "PA" or picture.has_transparency_data:
        grey = mode in ("1", "L", "LA", "La") and not (palette and channels > 2)
        picture = picture.convert("LA" if grey else "RGBA")
    elif mode in ("P", "CMYK", "YCbCr", "HSV", "LAB") or (palette and channels > 1):
        picture = picture.convert("RGB")
    elif mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("LA", "RGBA"):
        opaque = picture.getextrema()[-1] == (255, 255)
        if opaque and channels < len(picture.mode):
            picture = picture.convert(picture.mode[:-1])
        elif not opaque:
            mode += " with transparent pixels"
    array = np.asarray(picture)
    if palette and channels < 3 and array.ndim == 3 and array.shape[-1] > 2:
        red, green, blue = array[..., 0], array[..., 1], array[..., 2]
        if np.array_equal(red, green) and np.array_equal(green, blue):
            array = array[..., 2:] if array.shape[-1] == 4 else blue
    return array, f"mode {mode}"
