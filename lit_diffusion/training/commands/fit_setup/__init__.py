"""What `fit` sets up around Lightning: loggers, trainer, seeds, the network's shape."""
