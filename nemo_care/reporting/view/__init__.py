"""Pages that show the completions of a run: data as .js files, drawn by plain JavaScript."""
