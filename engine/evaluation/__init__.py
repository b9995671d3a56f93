"""How good a model is: a bound on its likelihood, and its samples beside real images."""
