"""Combine examples to batches: streamed, from memory, in order; workers; resumption."""
