"""The recipe: its schema with ranges, composing one from files and overrides, its page of keys."""
