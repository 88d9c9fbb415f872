"""Data: any Hugging Face data set of images, as batches in a reproducible order."""
