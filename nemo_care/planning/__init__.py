"""Estimate a recipe's memory and time before it is queued, and dry-run its step."""
