"""How a picture is stored is undone, and judged by the pixels rather than by the file's mode."""

import numpy as np
import pytest
from image_files import stored
from PIL import Image

from lit_diffusion.training.data.decoding.images import ImageDecoder
from lit_diffusion.training.data.reading.columns import MisfitError
from lit_diffusion.training.data.reading.source import Example

GREYS = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
COLOURS = np.stack([GREYS, 255 - GREYS, GREYS // 2], -1)


def decode(data, channels):
    example = Example(0, data, None)
    return ImageDecoder((channels, 5, 7), labels=False)(example).image.numpy()


def palette(colours, **options):
    """The picture as indices into a palette; those that it does not use are coloured."""
    image = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7), "P")
    values = np.concatenate([colours.reshape(35, -1), np.tile([200, 10, 90], (5, 1))])
    image.putpalette(bytes(values.astype(np.uint8)))
    return {kind: stored(image, kind, **options) for kind in ("PNG", "GIF", "BMP", "TIFF")}


GREY_PALETTE = np.repeat(GREYS[..., None], 3, -1)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_of_greys_is_grey_or_three_equal_channels(kind):
    data = palette(GREY_PALETTE)[kind]
    assert np.array_equal(decode(data, 1)[0], GREYS)
    assert np.array_equal(decode(data, 3), np.stack([GREYS] * 3))
    data = palette(COLOURS)[kind]
    assert np.array_equal(decode(data, 3), COLOURS.transpose(2, 0, 1))
    with pytest.raises(MisfitError, match=r"1 × 5 × 7, got 3 × 5 × 7 \(mode P\)"):
        decode(data, 1)


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_greys_of_formats_that_have_only_palettes(kind):
    data = stored(Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7)), kind)
    assert np.array_equal(decode(data, 1)[0].ravel(), np.arange(35))
    assert np.array_equal(decode(data, 3)[2].ravel(), np.arange(35))


def declared(mode, colour):
    """A picture one colour of which is declared transparent, by PNG's chunk tRNS."""
    array = {"L": GREYS, "RGB": COLOURS, "1": GREYS > 99}[mode]
    return stored(Image.fromarray(array), "PNG", transparency=colour)


@pytest.mark.parametrize(
    ("mode", "used", "unused", "channels"),
    [("L", 7, 8, 1), ("RGB", (7, 248, 3), (1, 2, 3), 3)],
)
def test_a_declared_transparency_counts_if_a_pixel_uses_it(mode, used, unused, channels):
    exact = decode(declared(mode, unused), channels)
    pixels = {"L": GREYS, "RGB": COLOURS}[mode].reshape(5, 7, channels)
    assert np.array_equal(exact.transpose(1, 2, 0), pixels)
    with pytest.raises(MisfitError, match=f"mode {mode} with transparent pixels"):
        decode(declared(mode, used), channels)
    with_alpha = decode(declared(mode, used), channels + 1)
    assert np.array_equal(with_alpha[:-1], exact)
    assert with_alpha[-1].ravel().tolist() == [255, 0, *[255] * 33]


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette(kind):
    for colours, channels in ((GREY_PALETTE, 1), (COLOURS, 3)):
        data = palette(colours, transparency=3)[kind]
        with pytest.raises(MisfitError, match="with transparent pixels"):
            decode(data, channels)
        assert decode(data, channels + 1)[-1].ravel().tolist() == [*[255] * 3, 0, *[255] * 31]
        data = palette(colours, transparency=39)[kind]
        assert np.array_equal(decode(data, channels), decode(palette(colours)[kind], channels))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_an_alpha_counts_if_a_pixel_uses_it(kind):
    image = Image.fromarray(COLOURS).convert("RGBA")
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(stored(image, kind, **options), 3), COLOURS.transpose(2, 0, 1))
    image.putpixel((2, 3), (1, 2, 3, 254))
    with pytest.raises(MisfitError, match="mode RGBA with transparent pixels"):
        decode(stored(image, kind, **options), 3)
