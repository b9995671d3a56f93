"""The command line program ``flashddpm``: its commands, one module each."""
