"""Reports of benchmark runs: tables, plots, HTML pages, and comparisons of two runs."""
