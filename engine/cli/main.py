"""The command line program ``flashddpm``: it runs commands and turns errors into exit codes."""

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
    """Run the command line program with the arguments of the process.

    After bad input, or an error of files, memory, sampling or compilation, it prints one line on
    stderr and the exit code is 2; after Ctrl-C it is 130.

    Raises:
        SystemExit: at the end, with the exit code (not in one of several processes of torchrun,
            which ends at once).
    """
    logging.basicConfig(format="flashddpm: %(message)s")
    logging.getLogger("flashddpm").setLevel(logging.INFO)
    try:
        app()
    except SystemExit as end:
        exits.leave_torchrun(end.code if isinstance(end.code, int) else 0)
        raise
    except (ValueError, FloatingPointError, OSError, MemoryError, CompilationError) as error:
        exits.fail(" ".join(str(error).split()), exits.USAGE)
