"""Our file formats: a kill never leaves half a file, and content is checked when read."""
