"""The command `encode`: convert a data set of images to a data set of latents.

A latent model is trained on the latents of images under an autoencoder, about fifty times fewer
numbers that are still arranged as an image. They are fixed, so they are computed once:

    lit-diffusion encode --vae FOLDER --data.path NAME --data.shape [3,256,256] --out LATENTS
    lit-diffusion fit --config imagenet256-latent --data.path LATENTS
    lit-diffusion sample --ckpt_path last --num_samples 16 --out samples.npy
    lit-diffusion decode samples.npy --vae FOLDER --out samples.png

The result are parquet files with a column `latent`, arrays of float16 in numpy's file format, a
column `label`, and under their own names the columns of `data.condition_keys` and `data.text_key`.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.nn.text import bytes_text
from lit_diffusion.training.commands.autoencoder import Autoencoder
from lit_diffusion.training.commands.shell.choices import find_device
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.data.reading.columns import TEXT
from lit_diffusion.training.run.secrets import without_secrets
from lit_diffusion.training.run.whole_folder import (
    publish,
    remove_unfinished,
    unfinished_folder,
)

__all__ = ["encode"]

GROUP, FILE = 1000, 10_000  # latents per row group (a shard when streaming), and per file
CARD = """---
configs:
- config_name: default
  data_files:
{files}
---

Latents, written by `lit-diffusion encode`. For each split: the number of latents, and the mean and
standard deviation of their channels. An image is decoded from latent / scale + shift.

```yaml
{facts}```
"""


def encode(
    vae: str | Path,
    data: DataModule,
    *,
    out: str | Path,
    mirrored: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> Path:
    """Convert a data set of images to a data set of latents; return its folder.

    Args:
        vae: An AutoencoderKL of diffusers: a folder, downloaded by `hf download NAME --local-dir`,
            or its name on the hub.
        data: The images.
        out: Folder of the new data set; it must not exist.
        mirrored: Also encode the mirror image of each training image, the equivalent of
            horizontal_flip for images.
        batch_size: Images per batch.
        device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        ValueError: If the autoencoder does not take images of this shape, or out exists.
    """
    out = Path(out)
    if batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {batch_size}.")
    if out.exists():
        raise UsageError(f"--out must be a new folder, but {out} exists already.")
    own = {"latent", "label"} if data.label_key else {"latent"}
    if taken := own & {*data.condition_keys, data.text_key}:
        raise UsageError(
            f"the result has a column {taken.pop()!r} of its own: rename that of the conditions."
        )
    autoencoder = Autoencoder(str(vae), find_device(device))
    channels, height, width = data.shape
    shape = autoencoder.latent_shape((channels, height, width))
    remove_unfinished(out)
    with unfinished_folder(out) as partial:
        moments, channels_of_latent = {}, shape[0]
        for split in data.splits_in_use():
            batches = data.examples(split, batch_size)
            twice = mirrored and split == data.train_split
            rows = _rows(
                autoencoder, tqdm(batches, desc=f"encoding {split}, batches"), twice, data
            )
            moments[split] = _write_split(rows, channels_of_latent, partial, split)
        card = {"autoencoder": str(vae), "scale": autoencoder.scale, "shift": autoencoder.shift}
        card |= {
            "images": without_secrets(data.path),
            "shape": [*data.shape],
            "latent_shape": [*shape],
        }
        card |= {"mirrored": mirrored, "splits": moments}
        files = "\n".join(f"  - split: {split}\n    path: {split}-*.parquet" for split in moments)
        text = CARD.format(files=files, facts=_plain(card))
        (partial / "README.md").write_text(text)
        publish(partial, out)
    return out


def _write_split(
    rows: Iterator[dict[str, Any]], channels: int, folder: Path, split: str
) -> dict[str, Any]:
    """Write the files of a split; return the number of latents, and their mean and std."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    examples, numbers = 0, 0
    sums = torch.zeros(2, channels, dtype=torch.float64)
    for number in itertools.count():
        some = list(itertools.islice(rows, FILE))
        if not some:
            break
        latents = [row.pop("latent") for row in some]
        columns = {"latent": pa.array(map(_npy, latents), pa.binary())}
        columns |= {name: pa.array([row[name] for row in some]) for name in some[0]}
        path = folder / f"{split}-{number:05d}.parquet"
        parquet.write_table(  # with checksums, since a flipped bit of a latent is a latent, too
            pa.table(columns),
            path,
            row_group_size=GROUP,
            compression="none",
            write_page_checksum=True,
        )
        values = torch.stack(latents).double().transpose(0, 1).flatten(1)
        sums += torch.stack([values.sum(1), values.square().sum(1)])
        examples, numbers = examples + len(some), numbers + values.shape[1]
    mean, square = sums / numbers
    moments = {"mean": mean, "std": (square - mean.square()).sqrt()}
    rounded = {name: [round(x, 4) for x in value.tolist()] for name, value in moments.items()}
    return {"examples": examples} | rounded


def _rows(
    autoencoder: Autoencoder,
    batches: Iterable[dict[str, Any]],
    mirrored: bool,
    data: DataModule,
) -> Iterator[dict[str, Any]]:
    """Yield the row of each image, and of its mirror image if requested: latent, label, others."""
    for batch in batches:
        images = batch["image"]
        columns = {name: batch[name].numpy() for name in data.condition_keys}
        if "label" in batch:
            columns["label"] = batch["label"].numpy()
        if data.text_key is not None:
            columns[data.text_key] = bytes_text(batch[TEXT])
        versions = [images, images.flip(3)] if mirrored else [images]
        encoded = torch.stack([autoencoder.encode(one).half().cpu() for one in versions], dim=1)
        for i, latents in enumerate(encoded):
            row = {name: _stored(values[i]) for name, values in columns.items()}
            yield from ({"latent": latent, **row} for latent in latents)


def _stored(value: Any) -> Any:
    """A value of a column: a string, a number, or nested lists of numbers."""
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim else value


def _plain(facts: dict[str, Any]) -> str:
    return str(yaml.safe_dump(facts, sort_keys=False, default_flow_style=None))


def _npy(latent: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, latent.numpy())
    return file.getvalue()
