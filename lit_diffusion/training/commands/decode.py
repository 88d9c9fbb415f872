"""The command `decode`: decode sampled latents to images."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.commands.autoencoder import Autoencoder
from lit_diffusion.training.commands.shell.choices import find_device
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.evaluation.sample_files import ImageFolder

__all__ = ["decode"]


def decode(
    latents: str | Path,
    *,
    vae: str | Path,
    batch_size: int = 64,
    device: str = "auto",
    out: str | Path = "samples.png",
) -> Path:
    """Decode sampled latents to images; return their path.

    Args:
        latents: The file written by `sample --out latents.npy`.
        vae: An AutoencoderKL of diffusers: a folder, downloaded by `hf download NAME --local-dir`,
            or its name on the hub.
        batch_size: Images per batch.
        device: auto, cpu, cuda, cuda:1, mps.
        out: A .png file for one grid, or a folder for one file per image.

    Raises:
        ValueError: If the file does not contain latents of this autoencoder, or out has images of
            other latents.
    """
    out = Path(out)
    if out.suffix not in ("", ".png"):
        raise UsageError(f"--out must be a .png file or a folder, got {out}.")
    if batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {batch_size}.")
    if not Path(latents).is_file():
        raise UsageError(
            f"there is no file {latents}: give the one written by `sample --out latents.npy`."
        )
    autoencoder = Autoencoder(str(vae), find_device(device))
    z = np.load(latents, mmap_mode="r", allow_pickle=False)
    channels = autoencoder.vae.config.latent_channels
    if z.ndim != 4 or z.shape[1] != channels:
        raise UsageError(
            f"{latents} must contain latents of shape (n, {channels}, height, width), got "
            f"{tuple(z.shape)}."
        )
    about = {
        "latents": Path(latents).name,
        "checksum": zlib.crc32(z[0].tobytes()),
        "vae": str(vae),
    }
    files = None if out.suffix else ImageFolder(out, about)
    images = []
    for first in tqdm(range(0, len(z), batch_size), desc="decoding"):
        index = range(first, min(first + batch_size, len(z)))
        if files is not None and files.has(index):
            continue
        batch = autoencoder.decode(torch.from_numpy(np.array(z[index.start : index.stop]))).cpu()
        if files is None:
            images.append(batch)
        else:
            files.write(index, batch)
    if out.suffix:
        save_grid(torch.cat(images), out, max(1, round(len(z) ** 0.5)))
    return out
