"""Pictures of images: a grid, or of images of one or two numbers one plot of all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BAR", "MARGIN", "picture_of_images"]

MARGIN = 12  # white around a picture of points
BAR = 256  # height of the highest bar
COLOUR = torch.tensor([0.09, 0.24, 0.47])  # of bars and points


def picture_of_images(images: Tensor, columns: int) -> Tensor:
    """A grid of images; small ones are enlarged.

    Images of one or two numbers are shown together as one plot, a histogram or a scatter plot.
    Of latents, which have other numbers of channels than images, the first three (or the first)
    are shown as colours, with −3 to 3 as dark to bright.

    Args:
        images: Images in [−1, 1], or latents of standard deviation 1.
        columns: Images per row; ignored for plots.

    Shapes:
        images (n, C, H, W); result (3, H', W'), uint8.
    """
    from torchvision.utils import make_grid  # type: ignore[import-untyped]

    images, channels = images.float().cpu(), images.shape[1]
    if channels not in (1, 3) and images[0].numel() > 2:
        images = images[:, : 3 if channels > 3 else 1] / 3
    images = images.clamp(-1, 1)
    if images[0].numel() <= 2:
        return _points(images.flatten(1))
    scale = max(1, 64 // images.shape[-1])
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return make_grid(pixels, nrow=columns, padding=max(2, scale // 2), pad_value=255)


def _points(points: Tensor) -> Tensor:
    """Plot points as (3, height, 512 + 2·MARGIN), uint8: (n, 1) a histogram, (n, 2) a scatter.

    Both count the 256 byte levels of [−1, 1], two pixels each. In a scatter plot the first number
    increases to the right and the second upwards.
    """
    level = ((points.nan_to_num() + 1) * 127.5).round().long()
    if level.shape[1] == 1:
        count = torch.bincount(level[:, 0], minlength=256).float()
        height = (count / count.max() * BAR).round()
        ink = (torch.arange(BAR, 0, -1)[:, None] <= height).float()  # (BAR, 256), top row first
        ink = ink.repeat_interleave(2, 1)
    else:
        count = torch.bincount(level[:, 1] * 256 + level[:, 0], minlength=256 * 256)
        # A point is a dot, fainter at its rim; overlapping dots are darker.
        ink = torch.zeros(512, 512)
        ink[::2, ::2] = count.view(256, 256).flip(0).float()
        dot = torch.tensor([0.4, 1.0, 1.0, 0.4])
        spread = F.conv2d(F.pad(ink[None, None], (2, 1, 2, 1)), (dot[:, None] * dot)[None, None])
        ink = 1 - torch.exp(-0.8 * spread[0, 0])
    paper = torch.ones(3, ink.shape[0] + 2 * MARGIN, ink.shape[1] + 2 * MARGIN)
    for tick in (-1.0, -0.5, 0.0, 0.5, 1.0):
        place = MARGIN + round((tick + 1) * 255)
        paper[:, :, place] = 0.85
        if level.shape[1] == 2:
            paper[:, -1 - place, :] = 0.85
    if level.shape[1] == 1:
        paper[:, -MARGIN, :] = 0.5  # the axis below the bars
    inner = paper[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    inner += ink * (COLOUR[:, None, None] - inner)
    return (paper * 255).round().to(torch.uint8)
