"""The benchmark cases by subject (sampling, training, serving, ...) and the list of all of them."""
