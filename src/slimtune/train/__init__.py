"""Training: the loop, the Trainer, its checkpoints and its results."""
