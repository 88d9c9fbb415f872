"""Write the samples of `predict` as they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from lit_diffusion.training.evaluation.sample_files import write_image
from lit_diffusion.training.run.trainer import output_folder
from lit_diffusion.training.run.whole_file import replacing

__all__ = ["Predictions"]


class Predictions(L.Callback):
    """Writes each sample of `predict` to a file, named by the number of its example.

    Images of one or three channels are PNG files, and all others, such as latents and signals,
    .npy files, in the unit of the data. Each rank writes its own, and a run that is killed keeps
    what it has written.

    Args:
        folder: The folder; None means predicted/ in the run folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._out: Path | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder, which all ranks ask for together."""
        run = output_folder(trainer)
        given = None if self.folder is None else Path(self.folder)
        self._out = None if run is None else given or run / "predicted"

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the samples of a batch."""
        if self._out is None or not isinstance(outputs, Tensor):
            return
        samples = pl_module.restored(outputs.cpu())
        pictures = pl_module.kind == "image" and pl_module.normalization is None
        for i, x in zip(pl_module.numbered(batch)["index"].tolist(), samples, strict=True):
            path = self._out / f"{i:06d}.png"
            if pictures and x.ndim == 3 and len(x) in (1, 3):
                write_image(x, path)
            else:
                with replacing(path.with_suffix(".npy")) as unfinished, unfinished.open("wb") as f:
                    np.save(f, x.float().numpy())
