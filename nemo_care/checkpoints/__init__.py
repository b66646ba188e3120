"""Checkpoints that any layout can load: writing, finding, verifying and reading them."""
