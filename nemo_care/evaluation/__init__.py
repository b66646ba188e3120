"""Evaluation: completions, verdicts on them and the forced-reasoning probe, level by level."""
