"""Curves, figures, pages and tables of runs."""
