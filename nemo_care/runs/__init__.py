"""The run directory: its files, lock, reader, origin, and the metrics of a run."""
