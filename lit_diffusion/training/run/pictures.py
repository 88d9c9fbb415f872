"""Pictures of samples, as suits the kind of data.

    image   a grid of them; of one or two numbers, one histogram or scatter plot
    signal  a grid of line plots, a colour for each channel
    volume  a grid of their three middle slices, side by side
    points  a grid of scatter plots
    vector  one histogram, scatter plot or matrix of scatter plots of all samples

All panels of a picture have the same axes, whose range is written below plots, and all slices the
same range from black to white: samples that differ look different.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_diffusion.training.run.figures import LINE, PALETTE, SOFT, figure_style, new_figure
from lit_diffusion.training.run.image_pictures import picture_of_images

__all__ = ["picture_of"]

GAP, FOOT = 6, 22  # pixels between panels, and below them for the text
DPI = 100
WIDE, HIGH = 112, 64  # of the panel of a signal
SQUARE = 96  # of the panel of a set of points
MATRIX = 5  # numbers of a vector that are shown at most
RANK_KINDS = {1: "vector", 2: "signal", 3: "image", 4: "volume"}


def picture_of(samples: Tensor, columns: int, kind: str | None = None) -> Tensor:
    """The picture of samples, whose values outside all numbers (NaN, ∞) are left blank.

    Args:
        samples: Samples; images in [−1, 1], others in any unit.
        columns: Samples per row; ignored where all are in one plot.
        kind: image, signal, volume, points or vector; None, or latents, for that of the shape.

    Shapes:
        samples (n, C, *); result (3, H, W), uint8.

    Example:
        >>> picture_of(torch.randn(6, 2, 50), columns=3, kind="signal").shape
        torch.Size([3, 168, 360])
    """
    samples = samples.detach().float().cpu()
    if kind in (None, "latents"):
        kind = RANK_KINDS.get(samples.dim() - 1)
    painters = {
        "image": picture_of_images,
        "signal": _signals,
        "volume": _volumes,
        "points": _point_sets,
        "vector": _vectors,
    }
    if kind not in painters:
        raise ValueError(
            f"expected samples of one of the kinds {', '.join(painters)}, got {kind!r} and the "
            f"shape {tuple(samples.shape)}"
        )
    if kind != "image":
        samples = samples.masked_fill(~samples.isfinite(), torch.nan)
    return painters[kind](samples, columns)


# Panels ---------------------------------------------------------------------------------------


class _Panels:
    """A canvas with a grid of empty panels, in pixels from the upper left corner.

    Args:
        n: Number of panels.
        columns: Panels per row.
        width: Width of a panel.
        height: Height of a panel.
    """

    def __init__(self, n: int, columns: int, width: int, height: int) -> None:
        columns = max(1, min(n, columns))
        rows = -(-n // columns)
        across = columns * (width + GAP) + GAP
        down = rows * (height + GAP) + FOOT + GAP
        i = torch.arange(n)
        self.width, self.height = width, height
        self.left = GAP + i % columns * (width + GAP)
        self.top = GAP + i // columns * (height + GAP)
        self.figure = new_figure(across / DPI, down / DPI, DPI)
        self.figure.set_layout_engine("none")  # the axes fill the figure
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(down, 0))
        self.axes.axis("off")
        x, y = self.left + 0.5, self.top + 0.5
        frame = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        corners = torch.stack([torch.stack(corner, -1) for corner in frame], 1)  # (n, 5, 2)
        self.plot(corners, LINE)

    def plot(self, lines: Tensor, colour: str) -> None:
        """Plot lines, (n, points, 2); none where a number is NaN."""
        from matplotlib.collections import LineCollection

        collection = LineCollection(list(lines.numpy()), colors=colour, linewidths=0.9)
        self.axes.add_collection(collection)

    def finish(self, text: str) -> Tensor:
        """Write the text below the panels; return the picture."""
        bottom = self.axes.get_ylim()[0] - GAP
        self.axes.text(GAP, bottom, text, color=SOFT, fontsize=8, va="bottom")
        return _pixels(self.figure)


def _pixels(figure: Any) -> Tensor:
    """A figure as (3, H, W), uint8."""
    figure.canvas.draw()
    rgba = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = figure.canvas.get_width_height()
    return rgba.view(height, width, 4)[..., :3].permute(2, 0, 1).contiguous()


def _range(values: Tensor) -> tuple[float, float]:
    """Smallest and largest value, of finite numbers, apart by more than nothing."""
    values = values[~values.isnan()]
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    least = 1e-6 * max(1.0, abs(low), abs(high))
    return (low, high) if high - low > least else (low - 0.5, high + 0.5)


def _text(number: float) -> str:
    return f"{number:.3g}".replace("-", "−")


# Kinds ----------------------------------------------------------------------------------------


def _signals(samples: Tensor, columns: int) -> Tensor:
    """A grid of line plots of (n, C, L)."""
    n, channels, _ = samples.shape
    samples = _envelope(samples, 2 * WIDE)
    low, high = _range(samples)
    with figure_style():
        panels = _Panels(n, columns, WIDE, HIGH)
        inner = HIGH - 8  # so that a line at the limit is not on the frame
        y = panels.top[:, None, None] + 4 + inner * (high - samples) / (high - low)
        x = panels.left[:, None, None] + torch.linspace(0, WIDE, samples.shape[-1])
        if low < 0 < high:
            level = panels.top + 4 + inner * high / (high - low)
            ends = [torch.stack([panels.left + dx, level], -1) for dx in (0, WIDE)]
            panels.plot(torch.stack(ends, 1), LINE)
        for c in range(channels):
            lines = torch.stack([x[:, 0], y[:, c]], -1)
            panels.plot(lines, PALETTE[c % len(PALETTE)])
        return panels.finish(f"each from {_text(low)} to {_text(high)}")


def _envelope(samples: Tensor, most: int) -> Tensor:
    """Long signals as the smallest and largest value of each piece, which a plot shows alike."""
    n, channels, length = samples.shape
    each = length // most
    if each < 4:
        return samples
    whole = samples[..., : length // each * each].view(n, channels, -1, each)
    return torch.stack([whole.amin(-1), whole.amax(-1)], -1).flatten(2)


def _volumes(samples: Tensor, columns: int) -> Tensor:
    """A grid of the three middle slices of (n, C, D, H, W): across D, H and W."""
    from torchvision.utils import make_grid  # type: ignore[import-untyped]

    samples = samples[:, : 3 if samples.shape[1] == 3 else 1]
    low, high = _range(samples)
    grey = ((samples - low) / (high - low)).nan_to_num(1.0)
    depth, height, width = samples.shape[2:]
    slices = [grey[:, :, depth // 2], grey[:, :, :, height // 2], grey[..., width // 2]]
    gap, tallest = 1, max(depth, height)
    tiles = [
        torch.nn.functional.pad(one, (0, gap, 0, tallest - one.shape[-2]), value=1.0)
        for one in slices
    ]
    tile = torch.cat(tiles, -1)[..., :-gap]
    scale = max(1, 64 // tallest)
    pixels = (tile * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return make_grid(pixels, nrow=columns, padding=GAP, pad_value=255)


def _point_sets(samples: Tensor, columns: int) -> Tensor:
    """A grid of scatter plots of (n, C, N), both axes of one scale; C of 3 are seen from above."""
    n, size, _ = samples.shape
    shade = samples[:, 2] if size == 3 else torch.zeros_like(samples[:, 0])
    if size == 1:
        flat = torch.cat([samples, torch.zeros_like(samples)], 1)
    elif size == 3:
        # Turned by 30° about the vertical axis and tilted by 30°; the colour is the height.
        turn = torch.tensor([[0.866, -0.5, 0.0], [0.25, 0.433, 0.866]])
        flat = turn @ samples
    else:
        flat = samples[:, :2]
    ranges = [_range(flat[:, i]) for i in (0, 1)]
    widest = max(high - low for low, high in ranges)
    centre = torch.tensor([(low + high) / 2 for low, high in ranges])
    place = 0.5 + 0.9 * (flat - centre[:, None]) / widest  # in [0.05, 0.95]
    with figure_style():
        panels = _Panels(n, columns, SQUARE, SQUARE)
        panels.axes.scatter(
            (panels.left[:, None] + SQUARE * place[:, 0]).flatten(),
            (panels.top[:, None] + SQUARE * (1 - place[:, 1])).flatten(),
            s=5,
            linewidths=0,
            **({"c": shade.flatten(), "cmap": "viridis"} if size == 3 else {"c": PALETTE[0]}),
        )
        x, y = (f"{_text(low)} to {_text(high)}" for low, high in ranges)
        texts = {1: x, 2: f"{x}; up: {y}", 3: "obliquely from above; the colour is the height"}
        text = texts.get(size, f"the first two of {size} numbers: {x}; up: {y}")
        return panels.finish(text)


def _vectors(samples: Tensor, columns: int) -> Tensor:
    """One plot of (n, C): a histogram, a scatter plot, or a matrix of both for C above 2."""
    n, size = samples.shape
    shown = min(size, MATRIX)
    dot = max(2.0, min(12.0, 8000 / n)) / (1 if size == 2 else 3)
    with figure_style():
        figure = new_figure(5.4, 5.4 if size > 1 else 3.2, DPI)
        if size == 1:
            axes = figure.add_subplot(ylabel="samples")
            _histogram(axes, samples[:, 0])
        elif size == 2:
            axes = figure.add_subplot(xlabel="number 1", ylabel="number 2")
            axes.scatter(*samples.T, s=dot, linewidths=0, alpha=0.7)
        else:
            grid = figure.subplots(shown, shown, sharex="col", squeeze=False)
            for i in range(shown):
                for j in range(shown):
                    axes = grid[i, j]
                    axes.tick_params(labelsize=7, labelleft=j == 0 and i > 0)
                    if i == j:
                        _histogram(axes, samples[:, i])
                        axes.set_yticks([])
                    else:
                        axes.scatter(samples[:, j], samples[:, i], s=dot, linewidths=0, alpha=0.7)
                        axes.set_ylim(*_wider(samples[:, i]))
                grid[i, 0].set_ylabel(f"number {i + 1}", fontsize=8)
                grid[-1, i].set_xlabel(f"number {i + 1}", fontsize=8)
                grid[-1, i].set_xlim(*_wider(samples[:, i]))
            if size > shown:
                figure.suptitle(f"the first {shown} of {size} numbers", fontsize=8, color=SOFT)
        return _pixels(figure)


def _wider(values: Tensor) -> tuple[float, float]:
    low, high = _range(values)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _histogram(axes: Any, values: Tensor) -> None:
    """Bars of counts, as many as the square root of the number of values, within 10 and 100."""
    values = values[~values.isnan()]
    bars = int(min(100, max(10, len(values) ** 0.5)))
    axes.hist(values, bins=bars, range=_range(values), color=PALETTE[0])
