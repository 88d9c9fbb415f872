"""The autoencoder of a latent model: images to latents and back.

A latent is (mean − shift) · scale: the mean of the encoder's distribution, whose standard
deviation is much smaller than that of the means, normalised to a standard deviation of 1 by the
two numbers published with each autoencoder of diffusers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.models import import_diffusers

__all__ = ["Autoencoder"]


class Autoencoder:
    """An autoencoder of diffusers, between uint8 images and latents of unit variance.

    Args:
        path: Its folder, or its name on the hub.
        device: The device to run on.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self.path = path
        self.device = device
        self.vae = import_diffusers().AutoencoderKL.from_pretrained(path).to(device).eval()
        self.scale = float(self.vae.config.scaling_factor)
        self.shift = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images of a shape.

        Args:
            shape: (C, H, W) of the images.

        Raises:
            ValueError: If the autoencoder does not take images of this shape.
        """
        channels, height, width = shape
        if channels != self.vae.config.in_channels or height % self.factor or width % self.factor:
            raise ValueError(
                f"{self.path} encodes images of {self.vae.config.in_channels} channels whose "
                f"sides are multiples of {self.factor}, got {shape}: set data.shape "
                "to that of the images, and resize images that do not fit."
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
        """Images of latents, in [−1, 1] or slightly outside.

        Args:
            latents: (B, C, H, W).
        """
        z = latents.to(self.device).float() / self.scale + self.shift
        images: Tensor = self.vae.decode(z).sample
        return images
