"""Evaluation by level: completions, verdicts on them, and the forced-reasoning probe."""
