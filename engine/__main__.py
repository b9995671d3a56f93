"""Run the command line of flashddpm: ``python -m flashddpm``."""

from flashddpm.cli.main import main

main()
