"""Models: trained or trainable networks that sample images, independent of training."""

from lit_diffusion.models.base import SamplingModel
from lit_diffusion.models.diffusers_network import DiffusersNetwork
from lit_diffusion.models.diffusers_pipeline import from_diffusers
from lit_diffusion.models.extras import import_diffusers, import_transformers
from lit_diffusion.models.pretrained import Pretrained, load_pretrained
from lit_diffusion.models.transformers_text import TransformersText

__all__ = [
    "DiffusersNetwork",
    "Pretrained",
    "SamplingModel",
    "TransformersText",
    "from_diffusers",
    "import_diffusers",
    "import_transformers",
    "load_pretrained",
]
