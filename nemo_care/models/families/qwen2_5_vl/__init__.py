"""Qwen2.5-VL: what no other part of the package knows about it."""
