"""What can be known of the kernels without a GPU: their compiled code, and the bytes they move."""
