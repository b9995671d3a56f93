"""Model folders: their configs and weights, read with distrust and written whole."""
