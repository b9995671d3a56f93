"""Run the benchmarks: ``python -m flashddpm.benchmarks`` does the same as ``flashddpm bench``."""

import sys

import typer

from flashddpm.benchmarks.command import bench

if __name__ == "__main__":
    try:
        typer.run(bench)
    except ValueError as error:
        sys.exit(f"flashddpm: error: {error}")
