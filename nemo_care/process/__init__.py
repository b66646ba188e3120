"""Behaviour of our processes: signals, exit statuses, screen output, quiet libraries."""
