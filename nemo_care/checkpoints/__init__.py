"""Checkpoints that any layout can load: write, find, verify and read them."""
