"""Studies and comparisons: many runs, started, collected and summarised."""
