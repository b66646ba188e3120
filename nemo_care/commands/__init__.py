"""The subcommands of `nemo-care`, and how a command starts its ranks."""
