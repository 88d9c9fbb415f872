"""Networks: (z, λ, label) → an image of the shape of z. They import torch only.

To the rest of the house, any module with ``forward(z, logsnr, label=None)`` is a network; the ones
here know nothing of diffusion and are guests like yours.
"""

from lit_diffusion.nn.dit import DiT
from lit_diffusion.nn.fourier import FourierFeatures
from lit_diffusion.nn.mlp import ResidualMLP
from lit_diffusion.nn.unet import UNet

__all__ = ["DiT", "FourierFeatures", "ResidualMLP", "UNet"]
