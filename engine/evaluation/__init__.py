"""Evaluation of a model: a bound on its likelihood, and its samples compared with real images."""
