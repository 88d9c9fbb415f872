"""A proposal for training on a data set: rules from what the data are to a first configuration.

    files                 →  shape, mode, transform
    shape, device         →  network, batch size, steps
    grey levels           →  the bound on the likelihood with a decoder, or sigmoid weighting
    labels                →  classes

The rules are those of the shipped configs; each number is a place to begin, not an optimum.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from lit_diffusion.grey_levels import level_values
from lit_diffusion.training.data.decoding.survey import Files, Pixels

__all__ = ["Recipe", "Shape", "grey_levels", "propose_classes", "propose_recipe", "propose_shape"]

LARGEST = 64  # side of images that are proposed as they are; beyond it, latents or a cascade
SMALL = 32  # side for photographs where there is no accelerator
FEW_LEVELS = 32
MIXED = 0.95  # share of images of one size, above which it is the size of all
IN_MEMORY = 2**31  # bytes of decoded images that are kept in memory
FEWEST = 20  # examples from which a tenth is held out


class Shape(NamedTuple):
    """The shape of the images, and what leads to it.

    Attributes:
        shape: (C, H, W).
        mode: What images are converted to, None if they are all alike already.
        fit: How an image of another size is brought to this one; None if there is none.
        why: The reason, in a few words.
    """

    shape: tuple[int, int, int]
    mode: str | None
    fit: str | None
    why: str


class Recipe(NamedTuple):
    """Network, objective and length of a training.

    Attributes:
        channels: Features of each level of the U-Net.
        blocks: Blocks per level.
        attention: Heights of the levels with attention.
        dropout: Of the network.
        levels: Grey levels of the decoder; None for 256, without a decoder.
        logsnr_max: Largest λ of the bound, where neighbouring levels are 16 σ apart.
        fourier: Exponents of the Fourier features.
        batch_size: Examples per step.
        lr: Learning rate.
        steps: Number of steps.
        every: Steps from one validation to the next.
    """

    channels: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    dropout: float
    levels: int | tuple[float, ...] | None
    logsnr_max: float
    fourier: tuple[int, ...]
    batch_size: int
    lr: float
    steps: int
    every: int


def propose_shape(files: Files, fast: bool, size: int | None = None) -> Shape:
    """Propose the shape of the images.

    Args:
        files: What the files are; at least one can be read.
        fast: Whether there is an accelerator.
        size: Side of the images, if it has been chosen.

    Example:
        >>> files = Files(Counter(PNG=9), Counter({(28, 28): 9}), Counter(L=9), True, None, 9)
        >>> propose_shape(files, fast=False)
        Shape(shape=(1, 28, 28), mode=None, fit=None, why='the size of all images')
    """
    channels, mode = (1, "L") if files.grey else (3, "RGB")
    alike = set(files.modes) <= ({"L", "1"} if files.grey else {"RGB"})  # 1 bit is an encoding
    mode_wanted = None if alike else mode
    (height, width), most = files.sizes.most_common(1)[0]
    whole = len(files.sizes) == 1
    if size is None and max(height, width) <= LARGEST and most >= MIXED * files.read:
        why = "the size of all images" if whole else f"the size of {most} of {files.read} images"
        fit = None if whole else "center_crop"
        return Shape((channels, height, width), mode_wanted, fit, why)
    if size is None:
        sides = [min(one) for one, n in files.sizes.items() for _ in range(n)]
        small = int(np.quantile(sides, 0.1, method="lower"))  # few images are enlarged
        limit = LARGEST if fast else SMALL
        usual = [side for side in (8, 16, 24, 32, 48, 64) if side <= min(small, limit)]
        size = usual[-1] if usual else small
        why = f"nine tenths of the images have sides of at least {small}"
        if small > limit:
            why = f"a size for {'an accelerator' if fast else 'a CPU'}; --size N sets another"
    else:
        why = "as chosen by --size"
    fit = None if set(files.sizes) == {(size, size)} else "center_crop"
    return Shape((channels, size, size), mode_wanted, fit, why)


def propose_classes(labels: Counter[int], names: tuple[str, ...], total: int) -> int | None:
    """Propose a number of classes; None if the labels are none.

    Args:
        labels: Number of examples of each label.
        names: Names of the classes, if the data declare them.
        total: Number of examples.

    Example:
        >>> propose_classes(Counter({0: 5, 2: 4}), (), total=9)
        3
        >>> propose_classes(Counter(range(60)), (), total=60)  # numbers of the examples
    """
    found = [label for label in labels if label != -1]
    if len(found) < 2 or min(found) < 0 or max(found) >= 100_000:
        return None
    if names:
        return len(names)
    if len(found) > 10 and 4 * len(found) > total:  # numbers of the examples, not classes
        return None
    return max(found) + 1


def grey_levels(levels: tuple[int, ...], all_seen: bool) -> int | tuple[float, ...] | None:
    """The grid of few grey levels: their number if they are evenly spaced, else their values.

    None if there are many; or if they are uneven and others may occur among the examples that
    have not been looked at.

    Args:
        levels: The bytes that occur.
        all_seen: Whether all examples have been looked at.

    Example:
        >>> grey_levels((0, 255), False), grey_levels((0, 3, 255), False), grey_levels((7,), True)
        (2, None, None)
    """
    if not 2 <= len(levels) <= FEW_LEVELS:
        return None
    for number in range(len(levels), FEW_LEVELS + 1):
        grid = ((level_values(number) + 1) * 127.5).round().int().tolist()
        if set(levels) <= set(grid):
            return number
    return tuple(round(level / 127.5 - 1, 6) for level in levels) if all_seen else None


def propose_recipe(shape: Shape, pixels: Pixels, total: int | None, fast: bool) -> Recipe:
    """Propose network, objective and length.

    Args:
        shape: Of the images.
        pixels: What training sees.
        total: Number of training examples, None if unknown.
        fast: Whether there is an accelerator.
    """
    heights, sides = [shape.shape[1]], [min(shape.shape[1:])]
    while sides[-1] >= 8 and len(sides) < 4:
        heights.append(-(-heights[-1] // 2))
        sides.append(-(-sides[-1] // 2))
    side = max(shape.shape[1:])
    wide = (128, 256, 256, 256) if side > 16 else (64, 128, 128, 128)
    channels = wide if fast else (32, 64, 64, 128)
    known = total if total is not None else 10**6
    levels = grey_levels(pixels.levels, all_seen=pixels.looked == total)
    gap = 2.0 / 255
    if levels is not None:
        gap = float(level_values(levels).diff().min())
    steps = 100_000 if fast else 2500 if side <= 8 else 10_000
    batch = 64 if fast or side <= 16 else 32 if side <= LARGEST else 16
    limit = 16 if fast else 8  # attention costs the square of the number of pixels
    attended = [height for height in heights if height <= limit] or heights[-1:]
    return Recipe(
        channels=channels[: len(sides)],
        blocks=2 if fast else 1,
        attention=tuple(attended[:2]),
        dropout=0.1 if known < 10_000 and fast else 0.0,
        levels=levels,
        logsnr_max=round(min(13.3, 2 * math.log(16 / gap)), 1),
        fourier=_fourier(gap) if levels is not None else (),
        batch_size=min(batch, max(8, 2 ** int(math.log2(known)))),
        lr=2e-4 if fast else 1e-3,
        steps=steps,
        every=steps // 20 if fast else steps // 10,
    )


def _fourier(gap: float) -> tuple[int, ...]:
    """Exponents of waves as long as one and two gaps between grey levels; none above 2."""
    finest = round(math.log2(2 / gap))
    return (finest - 1, finest) if finest >= 2 else ()


def data_arguments(
    shape: Shape, label: str | None, val: str | None, total: int | None
) -> dict[str, Any]:
    """The arguments of the data module that follow from a shape and the splits.

    Args:
        shape: Of the images.
        label: Column of the labels, None for none.
        val: Split to validate on, None if there is none.
        total: Number of training examples, None if unknown.
    """
    arguments: dict[str, Any] = {"shape": [*shape.shape]}
    if shape.mode is not None:
        arguments["mode"] = shape.mode
    if shape.fit is not None:
        arguments["transform"] = [{"class_path": "Fit", "init_args": {"mode": shape.fit}}]
    arguments["label_key"] = label
    if val is None and total is not None and total >= FEWEST:
        arguments["val_share"] = 0.1
    else:
        arguments["val_split"] = val
    if total is not None and total * math.prod(shape.shape) <= IN_MEMORY:
        arguments["streaming"] = False
    return arguments
