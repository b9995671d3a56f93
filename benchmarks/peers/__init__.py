"""What we are compared with, and how both sides are set up alike."""
