"""The subcommands of `nemo-care`, and how a command becomes ranks."""
