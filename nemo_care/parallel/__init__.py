"""Process groups, CPU compatibility, starting ranks, checkpoints."""
