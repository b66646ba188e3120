"""Qwen3-VL without experts: what no other part of the package knows about it.

It cuts frames, numbers vision tokens and attends within a frame as Qwen2.5-VL does, by its code.
"""
