"""The training algorithm: policy update, trainer, what a run records."""
