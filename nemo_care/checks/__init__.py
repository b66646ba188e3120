"""Checks whether a recipe can run here: inputs, node, machine, memory, data."""
