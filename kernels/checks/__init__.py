"""Checks of the kernels that need no GPU: their compiled code, and the bytes that they move."""
