"""Pictures along the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_diffusion.training import randomness

__all__ = ["SampleGrid", "save_grid"]

MARGIN = 12  # white around a picture of points
BAR = 256  # height of the highest bar
COLOUR = torch.tensor([0.09, 0.24, 0.47])  # what full ink looks like


def save_grid(images: Tensor, path: Path, columns: int) -> Tensor:
    """Write images as one PNG, enlarged so that small ones can be seen, whole or not at all.

    Examples of one or two numbers are no images to look at: all of them together make one
    picture, a histogram or a scatter of points.

    Args:
        images: In [−1, 1].
        path: The PNG file.
        columns: Images in a row; without meaning for points.

    Shapes:
        images (n, C, H, W), C of 1 or 3, or C·H·W of at most 2; result, the picture,
        (3, H', W'), uint8.
    """
    from PIL import Image
    from torchvision.utils import make_grid

    images = images.float().cpu().clamp(-1, 1)
    if images[0].numel() <= 2:
        picture = _points(images.flatten(1))
    else:
        scale = max(1, 64 // images.shape[-1])
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        picture = make_grid(pixels, nrow=columns, padding=max(2, scale // 2), pad_value=255)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(unfinished, format="PNG")
    unfinished.replace(path)
    return picture


def _points(points: Tensor) -> Tensor:
    """Draw points (n, 1) as a histogram, (n, 2) as a scatter: (3, height, 512 + 2·MARGIN), uint8.

    Both count the 256 byte levels of [−1, 1], two pixels each. In a scatter the first number
    runs to the right and the second up, as on paper.
    """
    level = ((points.nan_to_num() + 1) * 127.5).round().long()
    if level.shape[1] == 1:
        count = torch.bincount(level[:, 0], minlength=256).float()
        height = (count / count.max() * BAR).round()
        ink = (torch.arange(BAR, 0, -1)[:, None] <= height).float()  # (BAR, 256), top row first
        ink = ink.repeat_interleave(2, 1)
    else:
        count = torch.bincount(level[:, 1] * 256 + level[:, 0], minlength=256 * 256)
        # A point is a dot, fainter at its rim; dots that meet darken each other.
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
        paper[:, -MARGIN, :] = 0.5  # the bars' ground
    inner = paper[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    inner += ink * (COLOUR[:, None, None] - inner)
    return (paper * 255).round().to(torch.uint8)


class SampleGrid(L.Callback):
    """Draws a grid of samples at each validation: samples/step-….png in the run folder.

    With classes, each column is one class. The starting noise is the same every time, so the
    pictures show how the model changes and nothing else. Drawn from the average weights if there
    is an `EMA`. A walk of more than 100 levels shows a progress bar, if the trainer has one.

    Data of one or two numbers make one picture instead: a histogram, or a scatter of points.
    These want some thousand samples, such as 40 rows and 50 columns.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid; rows · columns is the number of samples.
        guidance: Strength of classifier-free guidance, 1 for none.
        every_n_validations: Draw at every n-th validation only.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(
        self,
        rows: int = 10,
        columns: int = 10,
        guidance: float = 1.0,
        every_n_validations: int = 1,
    ) -> None:
        if min(rows, columns, every_n_validations) < 1:
            raise ValueError(
                "SampleGrid: rows, columns and every_n_validations must be at least 1, "
                f"got {rows}, {columns} and {every_n_validations}."
            )
        self.rows = rows
        self.columns = columns
        self.guidance = guidance
        self.every_n_validations = every_n_validations
        self.last_path: Path | None = None
        self._validations = 0

    def draw(self, pl_module: Any, progress: Callable[[Any], Iterable[Any]] = iter) -> Tensor:
        """The images of the grid, row by row.

        Args:
            pl_module: The LitDiffusion to draw from.
            progress: Wraps the list of steps, such as tqdm.

        Shapes:
            result (rows · columns, C, H, W), in [−1, 1].
        """
        n = self.rows * self.columns
        noise = randomness.generators(pl_module.seed, "sample", list(range(n)))
        classes = pl_module.num_classes
        label = None if classes is None else torch.arange(n) % self.columns % classes
        guidance = 1.0 if classes is None else self.guidance
        return pl_module.sample(n, noise, label, guidance=guidance, progress=progress)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, in a hook where the average weights are in place."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations and not trainer.should_stop:
            return
        folder = trainer.log_dir  # a collective: every rank asks
        if not trainer.is_global_zero or folder is None:
            return
        path = Path(folder) / "samples" / f"step-{trainer.global_step:07d}.png"
        picture = save_grid(self.draw(pl_module, pl_module.watch()), path, self.columns)
        self.last_path = path
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [picture.permute(1, 2, 0).numpy()])

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write what `predict` drew, a grid for each batch and rank."""
        folder = trainer.log_dir
        if folder is not None:
            name = f"predict-{batch_idx:05d}-rank{trainer.global_rank}.png"
            self.last_path = Path(folder) / "samples" / name
            save_grid(outputs, self.last_path, self.columns)

    def state_dict(self) -> dict[str, Any]:
        """How often it was asked."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]
