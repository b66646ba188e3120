"""The trainer, and what it needs around the algorithm: state, records, saving, watching."""
