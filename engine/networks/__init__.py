"""The U-Nets, their settings, and the conditioning that they take."""
