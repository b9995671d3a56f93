"""Measurement: timing in turn, kernel times, checks that results agree, and files of results."""
