"""Pictures along the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.training import randomness

__all__ = ["SampleGrid", "save_grid"]


def save_grid(images: Tensor, path: Path, columns: int) -> Tensor:
    """Write images as one PNG, enlarged so that small ones can be seen, whole or not at all.

    Args:
        images: In [−1, 1].
        path: The PNG file.
        columns: Images in a row.

    Shapes:
        images (n, C, H, W), C of 1 or 3; result, the picture, (3, H', W'), uint8.
    """
    from PIL import Image
    from torchvision.utils import make_grid

    scale = max(1, 64 // images.shape[-1])
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    picture = make_grid(pixels, nrow=columns, padding=max(2, scale // 2), pad_value=255)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(unfinished, format="PNG")
    unfinished.replace(path)
    return picture


class SampleGrid(L.Callback):
    """Draws a grid of samples at each validation: samples/step-….png in the run folder.

    With classes, each column is one class. The starting noise is the same every time, so the
    pictures show how the model changes and nothing else. Drawn from the average weights if there
    is an `EMA`.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
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

    def draw(self, pl_module: Any) -> Tensor:
        """The images of the grid, row by row.

        Args:
            pl_module: The LitDiffusion to draw from.

        Shapes:
            result (rows · columns, C, H, W), in [−1, 1].
        """
        n = self.rows * self.columns
        noise = randomness.generators(pl_module.seed, "sample", list(range(n)))
        classes = pl_module.num_classes
        label = None if classes is None else torch.arange(n) % self.columns % classes
        guidance = 1.0 if classes is None else self.guidance
        return pl_module.sample(n, noise, label, guidance=guidance)

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
        picture = save_grid(self.draw(pl_module), path, self.columns)
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
