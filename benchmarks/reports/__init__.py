"""Runs as tables, plots, pages and comparisons."""
