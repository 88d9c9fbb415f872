"""The commands `lit-diffusion encode` and `decode`: images as latents, and back.

A latent model does not see images but what an autoencoder makes of them, some fifty times fewer
numbers that are still arranged as an image. They never change, so they are made once:

    lit-diffusion encode --vae FOLDER --data.path NAME --data.image_shape [3,256,256] --out LATENTS
    lit-diffusion fit --config configs/imagenet256-latent.yaml --data.path LATENTS
    lit-diffusion sample --ckpt_path last --num_samples 16 --out samples.npy
    lit-diffusion decode samples.npy --vae FOLDER --out samples.png

What is stored is (mean − shift) · scale: the mean of what the encoder answers, whose standard
deviation is small beside that of the means, brought to a size of 1 by the two numbers that each
autoencoder of diffusers is published with. Shards are parquet files with a column `latent`, each
an array of float16 in numpy's file format, and a column `label`.
"""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.models import import_diffusers
from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.commands.parsing import DiffusionParser, fail, find_device
from lit_diffusion.training.commands.sample import write_images
from lit_diffusion.training.data.module import ImageDataModule

__all__ = ["decode", "encode"]

GROUP, FILE = 1000, 10_000  # latents in a row group, which a stream calls a shard; in a file
CARD = """---
configs:
- config_name: default
  data_files:
{files}
---

Latents, written by `lit-diffusion encode`. Of each split: how many there are, and the mean and
standard deviation of their channels. An image is decoded from latent / scale + shift.

```yaml
{facts}```
"""


class Autoencoder:
    """An autoencoder of diffusers, between bytes of images and latents of size 1.

    Args:
        path: Its folder, or its name on the hub.
        device: Where it computes.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self.path = path
        self.device = device
        self.vae = import_diffusers().AutoencoderKL.from_pretrained(path).to(device).eval()
        self.scale = float(self.vae.config.scaling_factor)
        self.shift = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the latents of such images.

        Args:
            image_shape: (C, H, W) of the images.

        Raises:
            ValueError: If it does not take them.
        """
        channels, height, width = image_shape
        if channels != self.vae.config.in_channels or height % self.factor or width % self.factor:
            raise ValueError(
                f"{self.path} encodes images of {self.vae.config.in_channels} channels whose "
                f"sides are multiples of {self.factor}, got {image_shape}; set data.image_shape "
                "to that of the images, and convert those that do not fit."
            )
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images, float32.

        Args:
            images: (B, C, H, W), uint8.
        """
        x = images.to(self.device).float().div(127.5).sub(1)
        return (self.vae.encode(x).latent_dist.mode() - self.shift) * self.scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, in [−1, 1] and a little beyond.

        Args:
            latents: (B, C, H, W).
        """
        z = latents.to(self.device).float() / self.scale + self.shift
        images: Tensor = self.vae.decode(z).sample
        return images


def encode(argv: list[str]) -> Path:
    """Make a data set of latents; return its folder.

    Args:
        argv: The command line after `encode`.
    """
    parser = DiffusionParser(
        prog="lit-diffusion encode", description="Make a data set of the latents of another."
    )
    parser.add_class_arguments(ImageDataModule, "data")
    _add_autoencoder(parser)
    parser.add_argument("--out", type=str, required=True, help="The data set: a new folder.")
    parser.add_argument(
        "--mirrored",
        type=bool,
        default=False,
        help="Encode each training image mirrored, too: what horizontal_flip is for images.",
    )
    config = parser.parse_args(argv)
    out, data = Path(config.out), ImageDataModule(**vars(config.data))
    _check(config, out)
    autoencoder = Autoencoder(config.vae, find_device(config.device))
    shape = autoencoder.latent_shape(data.image_shape)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        said = {}
        for split in dict.fromkeys(filter(None, (data.train_split, data.val_split))):
            batches = data.examples(split, config.batch_size)
            mirrored = config.mirrored and split == data.train_split
            said[split] = _write_split(autoencoder, batches, partial, split, mirrored)
        card = {"autoencoder": config.vae, "scale": autoencoder.scale, "shift": autoencoder.shift}
        card |= {"images": data.path, "image_shape": [*data.image_shape], "latent_shape": [*shape]}
        card |= {"mirrored": config.mirrored, "splits": said}
        files = "\n".join(f"  - split: {split}\n    path: {split}-*.parquet" for split in said)
        text = CARD.format(files=files, facts=_plain(card))
        (partial / "README.md").write_text(text)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there if all went well
    return out


def decode(argv: list[str]) -> Path:
    """Make images of latents; return where they are.

    Args:
        argv: The command line after `decode`.
    """
    parser = DiffusionParser(
        prog="lit-diffusion decode", description="Make images of sampled latents."
    )
    parser.add_argument("latents", type=str, help="What `sample --out latents.npy` wrote.")
    _add_autoencoder(parser)
    parser.add_argument(
        "--out", type=str, default="samples.png", help="A .png for one grid, or a folder."
    )
    config = parser.parse_args(argv)
    out = Path(config.out)
    if out.suffix not in ("", ".png"):
        fail(f"--out must be a .png file or a folder, got {out}.")
    _check(config)
    if not Path(config.latents).is_file():
        fail(f"there is no file {config.latents}: give what `sample --out latents.npy` wrote.")
    autoencoder = Autoencoder(config.vae, find_device(config.device))
    latents = torch.from_numpy(np.load(config.latents, allow_pickle=False))
    channels = autoencoder.vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        fail(
            f"{config.latents} must hold latents of shape (n, {channels}, height, width), got "
            f"{tuple(latents.shape)}."
        )
    images = []
    for first in tqdm(range(0, len(latents), config.batch_size), desc="decoding"):
        batch = autoencoder.decode(latents[first : first + config.batch_size]).cpu()
        if out.suffix:
            images.append(batch)
        else:
            write_images(batch, out, [""], first)
    if out.suffix:
        save_grid(torch.cat(images), out, max(1, round(len(latents) ** 0.5)))
    return out


def _add_autoencoder(parser: DiffusionParser) -> None:
    parser.add_argument(
        "--vae",
        type=str,
        required=True,
        help="An AutoencoderKL of diffusers: a folder, fetched by `hf download NAME --local-dir`, "
        "or its name on the hub.",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")


def _check(config: Any, out: Path | None = None) -> None:
    if config.batch_size < 1:
        fail(f"--batch_size must be at least 1, got {config.batch_size}.")
    if out is not None and out.exists():
        fail(f"--out must be a new folder, and {out} is there already.")


def _write_split(
    autoencoder: Autoencoder,
    batches: Iterator[dict[str, Any]],
    folder: Path,
    split: str,
    mirrored: bool,
) -> dict[str, Any]:
    """Write the files of a split; return how many latents there are, and their mean and std."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = _rows(autoencoder, tqdm(batches, desc=f"encoding {split}, batches"), mirrored)
    examples, numbers = 0, 0
    sums = torch.zeros(2, autoencoder.vae.config.latent_channels, dtype=torch.float64)
    for number in itertools.count():
        some = list(itertools.islice(rows, FILE))
        if not some:
            break
        latents, labels = zip(*some, strict=True)
        columns = {"latent": pa.array(map(_npy, latents), pa.binary())}
        if labels[0] is not None:
            columns["label"] = pa.array(labels, pa.int64())
        path = folder / f"{split}-{number:05d}.parquet"
        parquet.write_table(pa.table(columns), path, row_group_size=GROUP, compression="none")
        values = torch.stack(latents).double().transpose(0, 1).flatten(1)
        sums += torch.stack([values.sum(1), values.square().sum(1)])
        examples, numbers = examples + len(some), numbers + values.shape[1]
    mean, square = sums / numbers
    moments = {"mean": mean, "std": (square - mean.square()).sqrt()}
    rounded = {name: [round(x, 4) for x in value.tolist()] for name, value in moments.items()}
    return {"examples": examples} | rounded


def _rows(
    autoencoder: Autoencoder, batches: Iterable[dict[str, Any]], mirrored: bool
) -> Iterator[tuple[Tensor, int | None]]:
    """Yield (latent, label) of each image, and behind it of its mirror image."""
    for batch in batches:
        images = batch["image"]
        labels = batch["label"].tolist() if "label" in batch else [None] * len(images)
        versions = [images, images.flip(3)] if mirrored else [images]
        encoded = torch.stack([autoencoder.encode(one).half().cpu() for one in versions], dim=1)
        for latents, label in zip(encoded, labels, strict=True):
            yield from ((latent, label) for latent in latents)


def _plain(facts: dict[str, Any]) -> str:
    return str(yaml.safe_dump(facts, sort_keys=False, default_flow_style=None))


def _npy(latent: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, latent.numpy())
    return file.getvalue()
