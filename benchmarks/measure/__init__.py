"""Timing: interleaved measurements, the comparison of results, and runs as files."""
