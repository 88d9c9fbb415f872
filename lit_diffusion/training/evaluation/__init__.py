"""Evaluation: features, reference statistics, generated samples, scores and their tables."""
