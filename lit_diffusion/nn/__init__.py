"""Networks: (z, λ, label) → a tensor of the shape of z. They import torch only.

Any module with ``forward(z, logsnr, label=None)`` is a network to the rest of the library. Those
here depend on no other part of it.
"""

from lit_diffusion.nn.dit import DiT
from lit_diffusion.nn.fourier import FourierFeatures
from lit_diffusion.nn.mlp import ResidualMLP
from lit_diffusion.nn.sizes import check_shape, takes_shape
from lit_diffusion.nn.text import ByteTransformer, TextEncoder, bytes_text, text_bytes
from lit_diffusion.nn.unet import UNet

__all__ = [
    "ByteTransformer",
    "DiT",
    "FourierFeatures",
    "ResidualMLP",
    "TextEncoder",
    "UNet",
    "bytes_text",
    "check_shape",
    "takes_shape",
    "text_bytes",
]
