"""flashddpm."""
