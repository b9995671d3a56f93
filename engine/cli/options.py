"""The options that several commands share, as annotations for typer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from typer import Option

from flashddpm.diffusion.parameterization import VARIANCE_TYPES
from flashddpm.diffusion.plan_options import ANCESTRAL, IN_ITS_PLACE
from flashddpm.diffusion.solvers import SOLVERS


def _joined(names: Iterable[str], last: str = "and") -> str:
    """Return names in a row, as in "a, b and c"."""
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end


def _takers(option: str) -> str:
    """Return the names of the solvers that take an option, as text."""
    return _joined(name for name, solver in SOLVERS.items() if option in solver.options)


def _default_steps() -> str:
    """Return the default number of steps of each solver, as text, most solvers last."""
    solvers: dict[int, list[str]] = {}
    for name, solver in SOLVERS.items():
        solvers.setdefault(solver.default_steps, []).append(name)
    *some, (steps, _) = sorted(solvers.items(), key=lambda item: len(item[1]))
    return ", ".join([*(f"{n} of {_joined(names)}" for n, names in some), f"{steps} of others"])


AllowPickle = Annotated[
    bool, Option("--allow-pickle", help="Read .bin weights where there are no safetensors.")
]
BatchSize = Annotated[int, Option(help="Images at a time.")]
Clip = Annotated[float | None, Option(help="Bound of x0, 0 for none.  [default: the model's]")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, Option(help="float32, bfloat16 or float16.  [default: by device]")]
Eta = Annotated[
    float | None, Option(help=f"Of {_takers('eta')}: 0 deterministic, 1 as noisy as ddpm.")
]
Guidance = Annotated[float, Option(help="Guidance weight w; 1 is off.")]
NumSteps = Annotated[
    int | None,
    Option(help=f"Network evaluations an image.  [default: {_default_steps()}]"),
]
Seeds = Annotated[str | None, Option(help="7 (the first seed), 1,2,5 or 0:64.  [default: from 0]")]
Sigmas = Annotated[
    str | None, Option(help="karras, exponential or beta noise levels.  [default: spacing's]")
]
Solver = Annotated[
    str | None,
    Option(
        help=f"{_joined(SOLVERS, 'or')}.  "
        f"[default: the model's, but {IN_ITS_PLACE} with linspace spacing for {ANCESTRAL}]"
    ),
]
Spacing = Annotated[
    str | None, Option(help="leading, linspace or trailing.  [default: the model's]")
]
VarianceType = Annotated[
    str | None,
    Option(
        help=f"Of {_takers('variance_type')}: {_joined(VARIANCE_TYPES, 'or')}.  "
        "[default: the model's]"
    ),
]
