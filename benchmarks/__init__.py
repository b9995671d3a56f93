"""Benchmarks of flashddpm against other implementations, and the command that runs them."""
