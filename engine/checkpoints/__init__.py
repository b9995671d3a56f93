"""Model folders: their configs and weights, read as untrusted files and written atomically."""
