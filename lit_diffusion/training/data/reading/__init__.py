"""Find the data and read their rows: files, splits, columns, shards, and the order of training."""
