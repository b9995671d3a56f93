"""Classes that stand in for those of other libraries: diffusers' pipelines."""
