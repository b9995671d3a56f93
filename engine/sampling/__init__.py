"""The Sampler: draws images from seeds, in one call or step by step."""
