"""What a training step needs: batches, conditions, randomness, precision, the optimizer."""
