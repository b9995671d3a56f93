"""The command line, ``flashddpm``."""
