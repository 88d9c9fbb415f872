"""The command `encode`: compute once what a frozen model makes of a data set.

A latent model is trained on the latents of images under an autoencoder, about fifty times fewer
numbers that are still arranged as an image. A model of captions looks at the tokens that a text
encoder makes of them. Both are fixed, so they are computed once:

    lit-diffusion encode --vae FOLDER --data.path NAME --data.shape [3,256,256] --out LATENTS
    lit-diffusion fit --config imagenet256-latent --data.path LATENTS
    lit-diffusion sample --ckpt_path last --num_samples 16 --out samples.npy
    lit-diffusion decode samples.npy --vae FOLDER --out samples.png

    lit-diffusion encode --text FOLDER --data.path NAME --data.text_key caption --out ENCODED
    lit-diffusion fit --config … --data.path ENCODED --data.condition_keys [text]
    lit-diffusion sample --ckpt_path last --prompt "a three"

The result are parquet files with a column `latent`, arrays of float16 in numpy's file format, or
with the images as they are; a column `text`, tokens in that format; a column `label`; and under
their own names the columns of `data.condition_keys` and `data.text_key`.
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

from lit_diffusion.models import TransformersText
from lit_diffusion.nn.text import bytes_text
from lit_diffusion.training.commands.autoencoder import Autoencoder
from lit_diffusion.training.commands.shell.choices import find_device
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.text_tokens import TextTokens
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.data.reading.columns import TEXT
from lit_diffusion.training.run.secrets import without_secrets
from lit_diffusion.training.run.whole_folder import (
    publish,
    remove_unfinished,
    unfinished_folder,
)

__all__ = ["encode"]

GROUP, FILE = 1000, 10_000  # rows per row group (a shard when streaming), and per file
CARD = """---
configs:
- config_name: default
  data_files:
{files}
---

Written by `lit-diffusion encode`. For each split: the number of examples, and of latents the mean
and standard deviation of their channels. An image is decoded from latent / scale + shift.

```yaml
{facts}```
"""


def encode(
    data: DataModule,
    *,
    out: str | Path,
    vae: str | Path | None = None,
    text: str | None = None,
    truncate: bool = False,
    mirrored: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> Path:
    """Convert a data set to one of latents, of the tokens of its captions, or of both.

    Returns its folder.

    Args:
        data: The images.
        out: Folder of the new data set; it must not exist.
        vae: An AutoencoderKL of diffusers: a folder, downloaded by `hf download NAME --local-dir`,
            or its name on the hub. By default the images stay as they are.
        text: A text encoder of transformers, likewise. Train with data.condition_keys [text] and
            the encoder as the network's argument text. By default there are no tokens.
        truncate: With text: cut off captions of more tokens than the encoder takes; by default
            they are refused.
        mirrored: With vae: also encode the mirror image of each training image, the equivalent of
            horizontal_flip for images.
        batch_size: Images per batch.
        device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        ValueError: If a model does not take these images or captions, or out exists.
    """
    out, place = Path(out), find_device(device)
    _check(data, out, vae, text, truncate, mirrored, batch_size)
    autoencoder = None if vae is None else Autoencoder(str(vae), place)
    shape = data.shape if autoencoder is None else autoencoder.latent_shape(_sides(data))
    splits = data.splits_in_use()
    tokens = None
    if text is not None:
        tokens = TextTokens(TransformersText(text, truncate=truncate).to(place), data, splits)
    remove_unfinished(out)
    with unfinished_folder(out) as partial:
        moments = {}
        for split in splits:
            batches = tqdm(data.examples(split, batch_size), desc=f"encoding {split}, batches")
            twice = mirrored and split == data.train_split
            rows = _rows(autoencoder, tokens, batches, twice, data)
            image = data.image_key if autoencoder is None else "latent"
            moments[split] = _write_split(rows, image, autoencoder is not None, partial, split)
        card: dict[str, Any] = {}
        if autoencoder is not None:
            card = {"autoencoder": str(vae), "scale": autoencoder.scale}
            card |= {"shift": autoencoder.shift, "latent_shape": [*shape], "mirrored": mirrored}
        card |= {} if tokens is None else {"text_encoder": tokens.facts}
        card |= {"images": without_secrets(data.path), "shape": [*data.shape], "splits": moments}
        files = "\n".join(f"  - split: {split}\n    path: {split}-*.parquet" for split in moments)
        (partial / "README.md").write_text(CARD.format(files=files, facts=_plain(card)))
        publish(partial, out)
    return out


def _check(
    data: DataModule,
    out: Path,
    vae: str | Path | None,
    text: str | None,
    truncate: bool,
    mirrored: bool,
    batch_size: int,
) -> None:
    """Reject arguments that do not fit each other, before a model is loaded."""
    if vae is None and text is None:
        raise UsageError("give --vae for latents, --text for the tokens of captions, or both.")
    if batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {batch_size}.")
    if mirrored and vae is None:
        raise UsageError("--mirrored is for --vae: for images set data.horizontal_flip instead.")
    if truncate and text is None:
        raise UsageError("--truncate is for --text, the encoder of captions.")
    if text is not None and data.text_key is None:
        raise UsageError("--text encodes captions: name their column as --data.text_key.")
    if out.exists():
        raise UsageError(f"--out must be a new folder, but {out} exists already.")
    own = {"latent" if vae else data.image_key, *(["label"] if data.label_key else [])}
    others = [*data.condition_keys, *([] if data.text_key is None else [_caption(data, text)])]
    own |= set() if text is None else {TEXT}
    if (taken := own & {*others}) or len({*others}) < len(others):
        named = taken.pop() if taken else _caption(data, text)
        raise UsageError(
            f"the result has a column {named!r} of its own: rename that of the conditions."
        )


def _caption(data: DataModule, text: str | None) -> str:
    """The column of captions in the result; with tokens, `text` is the column of these."""
    name = str(data.text_key)
    return "caption" if text is not None and name == TEXT else name


def _sides(data: DataModule) -> tuple[int, int, int]:
    if len(data.shape) != 3:
        raise UsageError(f"--vae encodes images (C, H, W), got data.shape {data.shape}.")
    channels, height, width = data.shape
    return channels, height, width


def _write_split(
    rows: Iterator[dict[str, Any]], image: str, latent: bool, folder: Path, split: str
) -> dict[str, Any]:
    """Write the files of a split; return the number of rows, and the mean and std of latents."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    examples, numbers, sums = 0, 0, torch.zeros(())
    for number in itertools.count():
        some = list(itertools.islice(rows, FILE))
        if not some:
            break
        images = [row.pop("image") for row in some]
        columns = {image: pa.array(map(_file, images), pa.binary())}
        columns |= {name: pa.array([row[name] for row in some]) for name in some[0]}
        path = folder / f"{split}-{number:05d}.parquet"
        parquet.write_table(  # with checksums, since a flipped bit of a latent is a latent, too
            pa.table(columns),
            path,
            row_group_size=GROUP,
            compression="none",
            write_page_checksum=True,
        )
        examples += len(some)
        if latent:
            values = torch.stack(images).double().transpose(0, 1).flatten(1)
            sums = sums + torch.stack([values.sum(1), values.square().sum(1)])
            numbers += values.shape[1]
    if not latent:
        return {"examples": examples}
    mean, square = sums / numbers
    moments = {"mean": mean, "std": (square - mean.square()).sqrt()}
    rounded = {name: [round(x, 4) for x in value.tolist()] for name, value in moments.items()}
    return {"examples": examples} | rounded


def _rows(
    autoencoder: Autoencoder | None,
    tokens: TextTokens | None,
    batches: Iterable[dict[str, Any]],
    mirrored: bool,
    data: DataModule,
) -> Iterator[dict[str, Any]]:
    """Yield the row of each image, and of its mirror image if requested: image, label, others."""
    for batch in batches:
        images = batch["image"]
        columns = {name: batch[name].numpy() for name in data.condition_keys}
        if "label" in batch:
            columns["label"] = batch["label"].numpy()
        if data.text_key is not None:
            captions = bytes_text(batch[TEXT])
            columns[_caption(data, None if tokens is None else TEXT)] = captions
            if tokens is not None:
                columns[TEXT] = [npy(one) for one in tokens(captions)]
        versions = [images, images.flip(3)] if mirrored else [images]
        if autoencoder is not None:
            versions = [autoencoder.encode(one).half().cpu() for one in versions]
        for i, made in enumerate(torch.stack(versions, dim=1)):
            row = {name: _stored(values[i]) for name, values in columns.items()}
            yield from ({"image": one, **row} for one in made)


def _stored(value: Any) -> Any:
    """A value of a column: a string, bytes, a number, or nested lists of numbers."""
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim else value


def _plain(facts: dict[str, Any]) -> str:
    return str(yaml.safe_dump(facts, sort_keys=False, default_flow_style=None))


def _file(image: Tensor) -> bytes:
    """An image as a PNG file, if it is one of bytes in one or three channels; else an array."""
    if image.dtype == torch.uint8 and image.ndim == 3 and len(image) in (1, 3):
        from PIL import Image

        file, pixels = io.BytesIO(), image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(file, "png")
        return file.getvalue()
    return npy(image)


def npy(array: Tensor) -> bytes:
    """A tensor in numpy's file format.

    Args:
        array: On the CPU.
    """
    file = io.BytesIO()
    np.save(file, array.numpy())
    return file.getvalue()
