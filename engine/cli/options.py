"""Options that several commands share, and how a model is sampled where they say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

if TYPE_CHECKING:
    from flashddpm.sampling.sampler import Sampler

AllowPickle = Annotated[
    bool, Option("--allow-pickle", help="Read .bin weights where there are no safetensors.")
]
BatchSize = Annotated[int, Option(help="Images at a time.")]
Clip = Annotated[float | None, Option(help="Bound of x0, 0 for none.  [default: the model's]")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, Option(help="float32, bfloat16 or float16.  [default: by device]")]
Guidance = Annotated[float, Option(help="Guidance weight w; 1 is off.")]
NumSteps = Annotated[
    int | None,
    Option(help="Network evaluations an image.  [default: 20 of dpmpp_*, 50 of others]"),
]
Seeds = Annotated[str | None, Option(help="7 (the first seed), 1,2,5 or 0:64.  [default: from 0]")]
Sigmas = Annotated[
    str | None, Option(help="karras, exponential or beta noise levels.  [default: spacing's]")
]
Solver = Annotated[
    str | None,
    Option(
        help="ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, euler or euler_ancestral.  "
        "[default: the model's, but dpmpp_2m_sde with linspace spacing for ddpm]"
    ),
]
Spacing = Annotated[
    str | None, Option(help="leading, linspace or trailing.  [default: the model's]")
]
VarianceType = Annotated[
    str | None,
    Option(
        help="Of ddpm: fixed_small, fixed_large, learned or learned_range.  [default: the model's]"
    ),
]

MULTISTEP_STEPS, STEPS = 20, 50
OF_DDPM = ("variance_type", "timesteps")
"""Options that ask for ddpm: OpenAI's scripts, whose respacings these are, draw by it."""


def with_defaults(options: Mapping[str, Any], sampler: Sampler) -> dict[str, Any]:
    """Return options of `Sampler.plan` with a solver and a number of steps.

    A model that names ancestral sampling, as all do that were saved with the scheduler they were
    trained with, is sampled by dpmpp_2m_sde: the solver study of docs/evaluation.md finds its 20
    steps nearer to the real images than 100 of ddpm.

    Args:
        options: by name; None is "not given".
        sampler: of the model.
    """
    options, T = dict(options), len(sampler.schedule)
    if options.get("solver") is None:
        options["solver"] = sampler.defaults.solver
        free = all(options.get(name) is None for name in OF_DDPM)
        if options["solver"] == "ddpm" and free and T > MULTISTEP_STEPS:
            options["solver"] = "dpmpp_2m_sde"
            options["spacing"] = options.get("spacing") or "linspace"
    if options.get("num_steps") is None:
        multistep = str(options["solver"]).startswith("dpmpp_")
        options["num_steps"] = min(MULTISTEP_STEPS if multistep else STEPS, T)
    return options
