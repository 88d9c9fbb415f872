"""What is made from a checkpoint: a model, a resumed run, or the first weights of another run."""
