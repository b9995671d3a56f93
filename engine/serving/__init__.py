"""The Engine: images for many requests at once, in one batch that never waits."""
