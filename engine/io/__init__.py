"""Input and output: files, images and HTML pages."""
