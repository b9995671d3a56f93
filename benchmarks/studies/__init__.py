"""Studies whose results stand in the documentation."""
