"""The benchmark cases, and the suites that list them."""
