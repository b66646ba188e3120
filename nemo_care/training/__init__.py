"""The trainer and what it needs besides the algorithm: state, records, checkpoints, checks."""
