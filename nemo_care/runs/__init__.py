"""A run directory: its files, its lock, reading them back, what it was made with."""
