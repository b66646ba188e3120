"""Validation: accuracy, consistency and the forced-reasoning probe, level by level."""
