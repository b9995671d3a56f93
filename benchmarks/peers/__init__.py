"""The peers (implementations that flashddpm is compared with), set up on the same weights."""
