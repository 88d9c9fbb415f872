"""Save a grid of samples at each validation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.models.base import SamplingModel
from lit_diffusion.nn.text import bytes_text
from lit_diffusion.training.callbacks.periodic import Periodic
from lit_diffusion.training.data.reading.columns import TEXT
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.reporting.parts import COLUMNS
from lit_diffusion.training.run.dashboard import show
from lit_diffusion.training.run.grid_texts import add_texts
from lit_diffusion.training.run.pictures import picture_of
from lit_diffusion.training.run.tolerance import may_fail
from lit_diffusion.training.run.trainer import output_folder
from lit_diffusion.training.run.whole_file import replacing
from lit_diffusion.training.step import randomness
from lit_diffusion.training.step.conditions import prompt_bytes

__all__ = ["SampleGrid", "save_grid", "save_samples"]


def save_grid(
    samples: Tensor,
    path: Path,
    columns: int,
    names: Sequence[str] = (),
    texts: Sequence[str] | None = None,
    kind: str | None = None,
) -> Tensor:
    """Write the picture of samples as one PNG, whole or not at all.

    Args:
        samples: Samples of any kind; images in [−1, 1], or latents of standard deviation 1.
        path: The PNG file.
        columns: Samples per row; ignored where all are in one plot.
        names: What each column shows; the report reads them from the file.
        texts: The text of each sample; the report reads them from the file, too.
        kind: The kind of data, which decides how they are shown, such as signal; None for what
            the shape suggests.

    Shapes:
        samples (n, C, *); result, the picture, (3, H', W'), uint8.
    """
    from PIL import Image, PngImagePlugin

    picture = picture_of(samples, columns, kind)
    note = PngImagePlugin.PngInfo()
    if names and kind != "vector" and samples[0].numel() > 2:
        note.add_itxt(COLUMNS, json.dumps(list(names), ensure_ascii=False))
    if texts:
        add_texts(note, texts, columns)
    with replacing(path) as unfinished:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(
            unfinished, format="PNG", pnginfo=note
        )
    return picture


def save_samples(
    model: SamplingModel,
    samples: Tensor,
    path: Path,
    columns: int,
    names: Sequence[str] = (),
    texts: Sequence[str] | None = None,
) -> Tensor:
    """Write the picture of a model's samples; what is plotted is in the unit of the data.

    Args:
        model: What they are samples of.
        samples: As the model returns them.
        path: As in `save_grid`.
        columns: As in `save_grid`.
        names: As in `save_grid`.
        texts: As in `save_grid`.

    Shapes:
        samples (n, C, *); result, the picture, (3, H', W'), uint8.
    """
    # An image that nobody has called so may be anything of its shape, such as a toy's point.
    kind = None if model.kind == "image" and len(model.shape) != 3 else model.kind
    as_pixels = kind in ("image", "latents")  # whose range is that of the model
    shown = samples if as_pixels else model.restored(samples)
    return save_grid(shown, path, columns, names, texts, kind)


class SampleGrid(Periodic):
    """Saves a grid of samples at each validation: samples/step-….png in the run folder.

    With classes, each column is one class; the file has their names, if the data name them, and
    the report shows them. With prompts, each column is one of these. With further conditions, the
    images have the conditions of the first validation examples, or training examples if there is
    no validation; if rank 0 has fewer than rows · columns of them, there are fewer images. The
    starting noise is
    always the same, so that the grids differ only by the model. With an `EMA` the samples are
    those of the average. The last weights of a fit always have a grid; without validation data,
    epochs of training count as validations. Sampling with more than 100 noise levels shows a
    progress bar, if the trainer has one.

    Other kinds of data are shown as suits them: signals as line plots, volumes as their middle
    slices, sets of points as scatter plots, all in the unit of the data. Vectors, and images of
    one or two numbers, are together in one histogram or scatter plot, which needs some thousand
    samples, such as 40 rows and 50 columns.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid; rows · columns is the number of samples.
        guidance: Scale of classifier-free guidance, 1 for none.
        guidance_interval: Guide only where low ≤ λ ≤ high; None for everywhere.
        prompts: Texts for a model that reads texts, one for each column, in turn; by default the
            captions of the first validation examples.
        every_n_validations: Sample at the first of every n validations, and at the end of the fit.

    Raises:
        ValueError: If a number is below 1, low is not below high, or the model cannot be guided.
    """

    def __init__(
        self,
        rows: int = 10,
        columns: int = 10,
        guidance: float = 1.0,
        every_n_validations: int = 1,
        guidance_interval: tuple[float, float] | None = None,
        prompts: tuple[str, ...] = (),
    ) -> None:
        super().__init__(every_n_validations, first=True)
        if min(rows, columns, every_n_validations) < 1:
            raise ValueError(
                "SampleGrid: rows, columns and every_n_validations must be at least 1, "
                f"got {rows}, {columns} and {every_n_validations}."
            )
        if guidance_interval is not None and not guidance_interval[0] < guidance_interval[1]:
            raise ValueError(
                "SampleGrid: guidance_interval must be (low, high) in λ with low < high, got "
                f"{guidance_interval}."
            )
        self.rows = rows
        self.columns = columns
        self.guidance = guidance
        self.guidance_interval = guidance_interval
        self.prompts = tuple(prompts)
        self.last_path: Path | None = None
        self._seen: list[dict[str, Tensor]] = []

    def sample(
        self,
        model: LitDiffusion,
        progress: Callable[[Any], Iterable[Any]] = iter,
        cond: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Sample the images of the grid, row by row.

        Args:
            model: The model.
            progress: Wraps the list of steps, such as tqdm.
            cond: The conditions of each image, with its label; None means a class per column. The
                prompts replace a text.

        Shapes:
            each condition (n, *) with n ≤ rows · columns; result (n, C, H, W), in [−1, 1].
        """
        cond, n, classes = dict(cond or {}), self._most, model.num_classes
        if cond:
            n, label = len(next(iter(cond.values()))), cond.pop("label", None)
        else:
            label = None if classes is None else torch.arange(n) % self.columns % classes
        if self.prompts:
            cond[TEXT] = prompt_bytes(model, self._texts(n))
        return model.sample(
            n,
            randomness.generators(model.seed, "sample", list(range(n))),
            label,
            guidance=self.guidance,
            guidance_interval=self.guidance_interval,
            progress=progress,
            cond=cond,
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse now what the model cannot do, not at the first validation."""
        pl_module.check_guidance(self.guidance)
        if self.prompts:
            prompt_bytes(pl_module, self.prompts)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Discard the conditions of the previous validation."""
        self._seen = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the conditions of the first examples, if the model has more than classes."""
        if not self._wanted(pl_module):
            return
        room = self._most - sum(len(c[pl_module.conditions[0]]) for c in self._seen)
        if room > 0:
            cond = pl_module.condition(pl_module.standard(batch))
            self._seen.append({name: value[:room] for name, value in cond.items()})

    def measure(self, trainer: L.Trainer, pl_module: Any, stage: str) -> dict[str, float]:
        """Sample the grid on rank 0, if the validation is part of a fit; there is no number.

        Args:
            trainer: The trainer.
            pl_module: The model.
            stage: Of no importance.
        """
        folder = output_folder(trainer)
        in_fit = trainer.state.fn == "fit" or pl_module.finishing
        if not in_fit or not trainer.is_global_zero or folder is None:
            return {}
        path = folder / "samples" / f"step-{trainer.global_step:07d}.png"
        if self._wanted(pl_module) and not self._seen:
            self._see_training_data(trainer, pl_module)
        seen = {
            name: torch.cat([cond[name] for cond in self._seen])
            for name in (self._seen[0] if self._seen else ())
        }
        images = self.sample(pl_module, pl_module.watch(), seen)
        names = self._names(pl_module) if self.prompts or not seen else []
        captions = _captions(trainer, seen)
        with may_fail(path):
            shown = None if self.prompts else captions
            save_samples(pl_module, images, path, self.columns, names, shown)
            self.last_path = path
            show(trainer, "samples", path, f"columns: {', '.join(names)}" if names else "")
        return {}

    def _names(self, model: LitDiffusion) -> list[str]:
        """The prompt or the class of each column; empty if the data name no classes."""
        if self.prompts:
            return self._texts(self.columns)
        classes, names = model.num_classes, model.class_names or []
        if classes is None or len(names) < min(classes, self.columns):
            return []
        return [names[column % classes] for column in range(self.columns)]

    def _see_training_data(self, trainer: L.Trainer, model: LitDiffusion) -> None:
        """Take the conditions of the first training examples, where there is no validation."""
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "examples"):
            # One at a time, since their images may have several sizes.
            for batch in islice(data.examples(data.train_split, 1), self._most):
                cond = model.condition({k: v for k, v in batch.items() if k != "image"})
                self._seen.append({name: value.to(model.device) for name, value in cond.items()})

    @property
    def _most(self) -> int:
        return self.rows * self.columns

    def _wanted(self, model: LitDiffusion) -> bool:
        """Whether images have conditions of examples: all but the text, if there are prompts."""
        return bool(set(model.conditions) - ({TEXT} if self.prompts else set()))

    def _texts(self, n: int) -> list[str]:
        """The prompts of n images; empty if there are none."""
        columns = [i % self.columns for i in range(n)]
        return [self.prompts[k % len(self.prompts)] for k in columns] if self.prompts else []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Tensor,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the samples of `predict`, a grid for each batch and rank."""
        folder = output_folder(trainer)
        if folder is not None:
            name = f"predict-{batch_idx:05d}-rank{trainer.global_rank}.png"
            self.last_path = folder / "samples" / name
            texts = _captions(trainer, batch if isinstance(batch, dict) else {})
            save_samples(pl_module, outputs, self.last_path, self.columns, texts=texts)


def _captions(trainer: L.Trainer, seen: dict[str, Tensor]) -> list[str] | None:
    """The captions among some conditions; None if the data have none."""
    has_text = getattr(getattr(trainer, "datamodule", None), "text_key", None) is not None
    return bytes_text(seen[TEXT]) if has_text and TEXT in seen else None
