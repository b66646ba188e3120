"""A group (one prompt, its G completions), its files, and its two layouts as training batches."""
