"""Files, images and HTML pages."""
