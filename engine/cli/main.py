"""The command line ``flashddpm``: its commands, and what becomes of their errors."""

from __future__ import annotations

import logging

import typer

from flashddpm.benchmarks.command import bench
from flashddpm.cli import exits
from flashddpm.cli.convert import convert
from flashddpm.cli.evaluate import evaluate
from flashddpm.cli.info import info
from flashddpm.cli.kernels import kernels
from flashddpm.cli.sample import sample
from flashddpm.cli.train import train
from flashddpm.cli.warm import warm
from flashddpm.errors import CompilationError

app = typer.Typer(
    help="Sample and train denoising diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (sample, train, convert, bench, evaluate, kernels, warm, info):
    app.command()(command)


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2, Ctrl-C is 130."""
    logging.basicConfig(format="flashddpm: %(message)s")
    logging.getLogger("flashddpm").setLevel(logging.INFO)
    try:
        app()
    except SystemExit as end:
        exits.leave_torchrun(end.code if isinstance(end.code, int) else 0)
        raise
    except (ValueError, FloatingPointError, OSError, MemoryError, CompilationError) as error:
        exits.fail(" ".join(str(error).split()), exits.USAGE)
