"""Studies: variants of a recipe, trained with several seeds and set side by side."""
