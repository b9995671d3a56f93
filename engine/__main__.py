"""``python -m flashddpm``."""

from flashddpm.cli import main

main()
