"""The Sampler: images from seeds in one call, or step by step."""
