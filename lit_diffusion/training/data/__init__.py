"""Data: any Hugging Face data set of images, as batches in a reproducible order."""

from lit_diffusion.training.data.module import DataModule

__all__ = ["DataModule"]
