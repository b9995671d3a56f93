"""`Engine`: images for many requests at once, batched in flight: a batch never waits to fill."""
