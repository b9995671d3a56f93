"""``python -m flashddpm``."""

from flashddpm.cli.main import main

main()
