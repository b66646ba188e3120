"""How a process of ours behaves: signals and exit statuses, what it prints, what it keeps quiet."""
