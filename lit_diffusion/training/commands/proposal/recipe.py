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
from lit_diffusion.training.commands.proposal.kinds import Kind
from lit_diffusion.training.data.decoding.array_survey import Arrays
from lit_diffusion.training.data.decoding.survey import Files, Pixels

__all__ = [
    "Recipe",
    "Shape",
    "grey_levels",
    "propose_classes",
    "propose_recipe",
    "propose_shape",
    "shape_of_arrays",
]

LARGEST = 64  # side of images that are proposed as they are; beyond it, latents or a cascade
SMALL = 32  # side for photographs where there is no accelerator
FEW_LEVELS = 32
MIXED = 0.95  # share of images of one size, above which it is the size of all
IN_MEMORY = 2**31  # bytes of decoded images that are kept in memory
FEWEST = 20  # examples from which a tenth is held out


class Shape(NamedTuple):
    """The shape of the images, and what leads to it.

    Attributes:
        shape: (C, H, W), or that of another kind.
        mode: What images are converted to, None if they are all alike already.
        fit: How an image of another size is brought to this one; None if there is none.
        why: The reason, in a few words.
        kind: Of the data.
        normalize: How floats are brought to the scale of the noise; None if they are not.
    """

    shape: tuple[int, ...]
    mode: str | None
    fit: str | None
    why: str
    kind: str = "image"
    normalize: str | None = None


class Recipe(NamedTuple):
    """Network, objective and length of a training.

    Attributes:
        network: The network's class.
        arguments: Its arguments.
        levels: Grey levels of the decoder; None for 256, without a decoder.
        logsnr_max: Largest λ of the bound, where neighbouring levels are 16 σ apart.
        batch_size: Examples per step.
        lr: Learning rate.
        steps: Number of steps.
        every: Steps from one validation to the next.
    """

    network: str
    arguments: dict[str, Any]
    levels: int | tuple[float, ...] | None
    logsnr_max: float
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
        >>> proposed = propose_shape(files, fast=False)
        >>> proposed.shape, proposed.why, proposed.kind
        ((1, 28, 28), 'the size of all images', 'image')
    """
    channels, mode = (1, "L") if files.grey else (3, "RGB")
    if 2 * files.transparent > files.read:  # what is transparent is part of the picture
        channels, mode = 4, "RGBA"
    same = {"L": {"L", "1"}, "RGB": {"RGB"}, "RGBA": {"RGBA"}}  # 1 bit is an encoding
    alike = set(files.modes) <= same[mode]
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


def shape_of_arrays(arrays: Arrays, kind: Kind) -> Shape:
    """Propose how arrays are read.

    Args:
        arrays: What they are.
        kind: Their kind and shape.
    """
    ready = kind.kind == "latents" and kind.shape[0] > 3 and 0.5 < arrays.std < 2
    return Shape(kind.shape, None, None, kind.why, kind.kind, None if ready else "mean_std")


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
    side = max(shape.shape[1:], default=1)
    known = total if total is not None else 10**6
    levels = grey_levels(pixels.levels, all_seen=pixels.looked == total) if pixels.levels else None
    gap = 2.0 / 255
    if levels is not None:
        gap = float(level_values(levels).diff().min())
    steps = 100_000 if fast else 2500 if side <= 8 else 10_000
    batch = 64 if fast or side <= 16 else 32 if side <= LARGEST else 16
    network, arguments = _network(shape, fast)
    if known < 10_000 and fast and network == "UNet":
        arguments["dropout"] = 0.1
    if levels is not None and (waves := _fourier(gap)) and network != "ResidualMLP":
        arguments["fourier"] = [*waves]
    return Recipe(
        network=network,
        arguments=arguments,
        levels=levels,
        logsnr_max=round(min(13.3, 2 * math.log(16 / gap)), 1),
        batch_size=min(batch, max(8, 2 ** int(math.log2(known)))),
        lr=2e-4 if fast else 1e-3,
        steps=steps,
        every=steps // 20 if fast else steps // 10,
    )


def _network(shape: Shape, fast: bool) -> tuple[str, dict[str, Any]]:
    """The network for a kind of data, and its arguments."""
    if shape.kind == "vector":
        return "ResidualMLP", {"features": 512 if fast else 256, "layers": 4}
    if shape.kind == "points":
        width = 384 if fast else 128
        return "DiT", {
            "patch": 1,
            "positions": "none",
            "depth": 8 if fast else 4,
            "width": width,
            "heads": width // 32,
        }
    axes = shape.shape[1:]
    firsts, sides = [axes[0]], [min(axes)]
    most = 6 if len(axes) == 1 else 4  # levels
    while sides[-1] >= 8 and len(sides) < most:
        firsts.append(-(-firsts[-1] // 2))
        sides.append(-(-sides[-1] // 2))
    channels: tuple[int, ...]
    wide = (128, 256, 256, 256) if max(axes) > 16 else (64, 128, 128, 128)
    if len(axes) == 3:  # of volumes, which have many more elements
        wide = (64, 128, 256, 256)
    channels = wide if fast else (16, 32, 64, 128) if len(axes) == 3 else (32, 64, 64, 128)
    channels = (*channels, *channels[-1:] * (most - 4))
    # Attention costs the square of the number of elements.
    limit = {1: 256, 2: 16, 3: 8}[len(axes)] // (1 if fast else 2)
    attended = [height for height in firsts if height <= limit] or firsts[-1:]
    return "UNet", {
        "channels": [*channels[: len(sides)]],
        "blocks": 2 if fast else 1,
        "attention": attended[:2],
    }


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
    arguments: dict[str, Any] = {} if shape.kind == "image" else {"kind": shape.kind}
    arguments["shape"] = [*shape.shape]
    if shape.normalize is not None:
        arguments["normalize"] = shape.normalize
    if shape.mode is not None:
        arguments["mode"] = shape.mode
    if shape.fit is not None:
        arguments["transform"] = [{"class_path": "Fit", "init_args": {"mode": shape.fit}}]
    arguments["label_key"] = label
    if val is None and total is not None and total >= FEWEST:
        arguments["val_share"] = 0.1
    else:
        arguments["val_split"] = val
    floats = shape.normalize is not None or shape.kind != "image"
    size = math.prod(shape.shape) * (4 if floats else 1)
    if total is not None and total * size <= IN_MEMORY:
        arguments["streaming"] = False
    return arguments
