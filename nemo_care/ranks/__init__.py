"""Ranks of a run: process groups, starting them, signals, memory."""
