"""The ranks of a run: process groups, starting, signals, memory."""
