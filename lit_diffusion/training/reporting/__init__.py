"""A run read back: the page that reports it, and the model card."""
