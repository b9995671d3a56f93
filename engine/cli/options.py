"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

from typer import Option

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
