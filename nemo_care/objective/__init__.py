"""Every formula of the paper as a pure function."""
