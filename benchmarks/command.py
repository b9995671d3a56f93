"""The command ``flashddpm bench``, which runs benchmarks, or compares, merges or reports runs."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from flashddpm import arguments

Option = typer.Option


def bench(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of results, for --compare, --merge or --report."),
    ] = None,
    suite: Annotated[
        str, Option(help="all, sampling, step, kernels, training, startup or serving.")
    ] = "all",
    cases: Annotated[str, Option(help="Patterns of their names, such as 'card,kernel-*'.")] = "*",
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto",
    budget: Annotated[
        float | None, Option(help="Seconds after which nothing more is begun.", min=0)
    ] = None,
    out: Annotated[
        Path | None, Option(help="The JSON file to write.  [default: benchmark.json]")
    ] = None,
    eager: Annotated[
        bool, Option("--eager", help="Serve with the network as it is, not compiled.")
    ] = False,
    compare: Annotated[
        bool, Option("--compare", help="OLD.json NEW.json: tell a regression from noise.")
    ] = False,
    merge: Annotated[
        bool, Option("--merge", help="FILES of one machine as one, which --out names.")
    ] = False,
    report: Annotated[
        bool, Option("--report", help="FILES as a Markdown table, and as --html if given.")
    ] = False,
    html: Annotated[Path | None, Option(help="The page to write, for --report.")] = None,
) -> None:
    """Time flashddpm against its peers (other implementations), the most telling cases first.

    Let nothing else run on the machine meanwhile. Both sides must give the same result before
    either is timed; each measurement is written to the file as soon as it is done. The exit code is
    1 if a case failed, or, with --compare, if a case failed or is slower beyond the noise.
    """
    paths = files or []
    if compare + merge + report > 1:
        raise ValueError("compare, merge, report: must be given one at a time")
    if html is not None and not report:
        raise ValueError(f"html={str(html)!r}: must be given with --report only")
    if compare:
        _compare(paths)
    elif merge:
        _merge(paths, out)
    elif report:
        _report(paths, html)
    elif paths:
        raise ValueError(
            f"files={[*map(str, paths)]}: must be given with --compare, --merge or --report"
        )
    else:
        _measure(suite, cases, device, budget, out or Path("benchmark.json"), eager)


def _compare(paths: list[Path]) -> None:
    from flashddpm.benchmarks.measure.runs import BenchmarkRun
    from flashddpm.benchmarks.reports import regression

    if len(paths) != 2:
        raise ValueError(f"compare: {len(paths)} files; must be two, OLD.json and NEW.json")
    text, lost = regression.report(*map(BenchmarkRun.read, paths))
    print(text)
    if lost:
        sys.exit(1)


def _merge(paths: list[Path], out: Path | None) -> None:
    from flashddpm.benchmarks.measure.runs import BenchmarkRun, merged

    if len(paths) < 2 or out is None:
        raise ValueError("merge: must have two files or more, and --out for the result")
    whole = merged([BenchmarkRun.read(path) for path in paths])
    whole.write(out)
    print(f"{len(whole.results)} results of {len(paths)} files -> {out}")


def _report(paths: list[Path], html: Path | None) -> None:
    from flashddpm.benchmarks.measure.runs import BenchmarkRun
    from flashddpm.benchmarks.reports.table import table

    if not paths:
        raise ValueError("report: must have one file of results or more")
    runs = [BenchmarkRun.read(path) for path in paths]
    print("\n\n".join(map(table, runs)))
    if html is not None:
        from flashddpm.benchmarks.reports.html_page import page

        html.write_text(page(runs), encoding="utf-8")
        print(f"\n-> {html}")


def _measure(
    suite: str, pattern: str, device: str, budget: float | None, out: Path, eager: bool
) -> None:
    import torch

    from flashddpm.benchmarks.cases import suites
    from flashddpm.benchmarks.measure import harness, runner
    from flashddpm.benchmarks.measure.runs import BenchmarkRun

    arguments.one_of("suite", suite, ("all", *suites.SUITES))
    kind = arguments.resolve_device(device).type
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, for both sides
    torch.backends.cudnn.benchmark = kind == "cuda"
    cases = [
        case
        for case in suites.chosen(kind, suite, eager)
        if any(fnmatch(case.name, part.strip()) for part in pattern.split(","))
    ]
    if not cases:
        raise ValueError(f"cases={pattern!r}: no name of a case in suite {suite!r} fits")
    run = BenchmarkRun(harness.environment(kind))  # now: files may change while it runs
    runner.run_cases(cases, kind, run, out, budget)
    print(f"{len(run.results)} results, {len(run.failures)} cases failed -> {out}")
    if run.failures:
        sys.exit(1)
