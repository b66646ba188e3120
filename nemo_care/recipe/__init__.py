"""The recipe: its schema with ranges, composition from files and overrides, the page of keys."""
