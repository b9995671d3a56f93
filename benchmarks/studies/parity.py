"""The study of parity with diffusers: how much our images differ from those of its schedulers.

    python -m flashddpm.benchmarks.studies.parity --out FILE.md

writes the table. Both sides begin at the same x_T, get the same noise at every step and call the
same small random network; the final images are compared, in float32 on the CPU. Nothing is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor

from flashddpm.diffusion import diffusers_quirks
from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.diffusion.timesteps import SPACINGS
from flashddpm.sampling.sampler import Sampler

SHAPE = (2, 3, 8, 8)
STEPS = 50
SEED = 2

SCHEDULERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "DDPM": ("DDPMScheduler", {}, 0.0),
    "DDIM, eta 0": ("DDIMScheduler", {}, 0.0),
    "DDIM, eta 1": ("DDIMScheduler", {}, 1.0),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}, 0.0),
    "SDE-DPM-Solver++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        0.0,
    ),
    "Euler": ("EulerDiscreteScheduler", {}, 0.0),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 0.0),
}
"""The scheduler's name in the table; its class in diffusers, extra keys of its config, and eta."""

QUIRKS = {
    "DDPM": "noise in the last step",
    "DDIM, eta 0": "next timestep by arithmetic",
    "DDIM, eta 1": "next timestep by arithmetic",
}
"""The quirk (deviation of diffusers) that explains a difference on purpose, by scheduler."""

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
BOUNDS: dict[str, dict[str, Any]] = {
    "none": {"clip_sample": False},
    "clip": {"clip_sample": True},
    "threshold": {"thresholding": True, "sample_max_value": 1.5},
}


@dataclass(frozen=True)
class ParityCase:
    """One configuration of a diffusers scheduler, whose images are compared with ours.

    Attributes:
        scheduler: the scheduler's name, a key of SCHEDULERS.
        prediction_type: "epsilon", "sample" or "v_prediction".
        spacing: the spacing of timesteps: "leading", "linspace" or "trailing".
        variance_type: for DDPM "fixed_small", "fixed_small_log", "fixed_large" or "learned_range";
            "-" for schedulers without this setting.
        bound: how the predicted x0 is bounded, "none", "clip" or "threshold"; "-" for schedulers
            without this setting.
        beta_schedule: the name of the schedule of betas, such as "linear".
        num_steps: the number of steps.
    """

    scheduler: str
    prediction_type: str
    spacing: str
    variance_type: str
    bound: str
    beta_schedule: str = "linear"
    num_steps: int = STEPS

    @property
    def config(self) -> dict[str, Any]:
        """The scheduler's config, a dictionary with the keys of a scheduler_config.json."""
        name, own, _ = SCHEDULERS[self.scheduler]
        config = {
            "_class_name": name,
            "beta_schedule": self.beta_schedule,
            "prediction_type": self.prediction_type,
            "timestep_spacing": self.spacing,
        }
        if self.variance_type != "-":
            config["variance_type"] = self.variance_type
        clips = self.scheduler.startswith("DD")  # the others know no clip_sample
        bound = BOUNDS[self.bound] if clips or self.bound == "threshold" else {}
        return config | own | bound

    def cells(self) -> tuple[str, ...]:
        """Return the case's seven settings as the text of the first cells of its table row."""
        names = (self.scheduler, self.prediction_type, self.spacing, self.variance_type, self.bound)
        return (*names, self.beta_schedule, str(self.num_steps))

    @property
    def eta(self) -> float:
        """The eta of DDIM, a float: the noise of a step, 0 for none; 0 for other schedulers."""
        return SCHEDULERS[self.scheduler][2]


LONG = (
    ParityCase("DDPM", "epsilon", "leading", "fixed_small", "clip", num_steps=1000),
    ParityCase("DDPM", "v_prediction", "leading", "fixed_large", "none", "squaredcos_cap_v2", 1000),
    ParityCase("DDPM", "epsilon", "linspace", "learned_range", "threshold", "scaled_linear", 1000),
    ParityCase("DDIM, eta 0", "epsilon", "leading", "-", "clip", num_steps=1000),
    ParityCase("SDE-DPM-Solver++", "v_prediction", "trailing", "-", "none", num_steps=1000),
    ParityCase("Euler ancestral", "epsilon", "linspace", "-", "-", num_steps=1000),
)


def possible() -> Iterator[ParityCase]:
    """Yield every combination of settings that diffusers can run; flashddpm can run them all.

    Betas are linear, and 50 steps (STEPS) are taken in each.
    """
    for scheduler, kind, spacing in itertools.product(SCHEDULERS, PREDICTION_TYPES, SPACINGS):
        if scheduler == "Euler ancestral" and kind == "sample":
            continue  # not implemented there
        variances = VARIANCES if scheduler == "DDPM" else ("-",)
        bounds: Sequence[str] = ("-",)
        if scheduler.startswith("DD"):
            bounds = tuple(BOUNDS)
        elif "DPM" in scheduler:
            bounds = ("none", "threshold")
        for variance, bound in itertools.product(variances, bounds):
            yield ParityCase(scheduler, kind, spacing, variance, bound)


def pairwise(cases: Sequence[ParityCase]) -> list[ParityCase]:
    """Choose few of the cases so that every pair of settings that some case has is covered.

    The choice is greedy: the case that covers most pairs comes next. The cases chosen are returned
    in the order given.
    """

    def pairs(case: ParityCase) -> set[tuple[tuple[int, str], ...]]:
        return set(itertools.combinations(enumerate(case.cells()), 2))

    left = set().union(*map(pairs, cases))
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(pairs(case) & left))  # the first of the best
        chosen.append(best)
        left -= pairs(best)
    return sorted(chosen, key=cases.index)


def noise(step: int) -> Tensor:
    """Return the fixed noise that both sides are given at a step.

    Args:
        step: the number of the step, from 0; -1 for the initial noise x_T.

    Returns:
        Standard normal values, float32 of the shape SHAPE, [2, 3, 8, 8], on the CPU.

    Raises:
        ValueError: if the step is below -1.
    """
    values = np.random.default_rng(1 + step).standard_normal(SHAPE)
    return torch.from_numpy(values).float()


def network(case: ParityCase) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a small random network that predicts what a case's scheduler expects.

    It is a smooth function with a bounded x0 and a random bias for each element, made of sums,
    products, quotients and roots only, which round alike on every machine.

    Args:
        case: gives the prediction type, the schedule of betas, and whether the variance is learned.

    Returns:
        A function of x_t, float32 [B, 3, 8, 8], and t, timesteps [B] or a scalar, integers or
        floats in 0..999. It returns float32 [B, 3, 8, 8], or [B, 6, 8, 8] for the variance type
        "learned_range".
    """
    random = np.random.default_rng(SEED)
    w, slope, share, extra = random.standard_normal((4, 4)).tolist()
    bias = torch.from_numpy(random.standard_normal((4, *SHAPE[1:]))).float()
    abar = NoiseSchedule.create(case.beta_schedule).alphas_cumprod

    def bounded(u: Tensor) -> Tensor:
        return u / (1 + u * u).sqrt()

    def out(x: Tensor, t: Tensor) -> Tensor:
        at = t.expand(len(x)).double()
        level = np.interp(at.numpy(), np.arange(len(abar)), abar)
        a, b = (
            torch.from_numpy(root).float()[:, None, None, None]
            for root in (np.sqrt(level), np.sqrt(1 - level))
        )
        time = (at / 1000).float()[:, None, None, None]
        x0 = sum(
            share[k] * bounded(2 * w[k] * x + bias[k] + slope[k] * time) for k in range(len(w))
        )
        eps = (x - a * x0) / b
        value = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}
        result = value[case.prediction_type]
        if case.variance_type != "learned_range":
            return result
        return torch.cat([result, bounded(extra[0] * x + time)], 1)

    return out


def theirs(case: ParityCase) -> Tensor:
    """Draw the images of a case by diffusers' scheduler, in the loop of its pipelines.

    Returns:
        The images, float32 [2, 3, 8, 8] in about [-1, 1], on the CPU.

    Raises:
        ImportError: if diffusers is not installed.
    """
    import diffusers

    config = {key: value for key, value in case.config.items() if key != "_class_name"}
    scheduler = getattr(diffusers, case.config["_class_name"])(**config)
    scheduler.set_timesteps(case.num_steps)
    out = network(case)
    x = noise(-1) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        z = noise(i)
        options: dict[str, Any] = {"eta": case.eta} if "DDIM" in case.scheduler else {}
        if case.scheduler.startswith("DDIM") or "DPM-Solver" in case.scheduler:
            options["variance_noise"] = z
        module = type(scheduler).__module__
        # Two of the schedulers take no noise; they draw it by this name, which not all have.
        with mock.patch(f"{module}.randn_tensor", lambda *_, z=z, **__: z, create=True):
            result = out(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(result, t, x, **options).prev_sample
    return x


def ours(case: ParityCase, tables: str, match_diffusers: bool = False) -> Tensor:
    """Draw the images of a case by flashddpm's `Sampler`, on the noise that diffusers is given.

    Args:
        case: the scheduler and its settings.
        tables: "float64", or "diffusers" for the values of abar (the cumulative product of alphas)
            that diffusers computes in float32.
        match_diffusers: whether diffusers' quirks (its deviations from the method) are reproduced.

    Returns:
        The images, float32 [2, 3, 8, 8] in about [-1, 1], on the CPU.

    Raises:
        ValueError: if ``tables`` is another name, or diffusers' quirks cannot be matched.
    """
    sampler = Sampler(
        network(case),
        NoiseSchedule.from_config(case.config, tables),
        shape=SHAPE[1:],
        prediction_type=case.prediction_type,
        defaults=SamplingDefaults.from_config(case.config),
        device="cpu",
        dtype="float32",
    )
    options: dict[str, Any] = {"eta": case.eta} if "DDIM" in case.scheduler else {}
    options["match_diffusers"] = match_diffusers
    plan = sampler.plan(sampler.defaults.solver, case.num_steps, **options)
    return sampler.sample(range(SHAPE[0]), solver=plan, initial_noise=noise(-1), step_noise=noise)


@dataclass(frozen=True)
class Row:
    """The largest differences between our images and diffusers' in one case: a row of the table.

    All are absolute differences of elements of images in about [-1, 1].

    Attributes:
        case: the scheduler and its settings.
        float64: the difference with our own tables, computed in float64.
        tables: the difference with tables="diffusers".
        matched: the difference with tables="diffusers" and match_diffusers=True; None if
            match_diffusers changes the images by no more than 1e-6.
    """

    case: ParityCase
    float64: float
    tables: float
    matched: float | None

    def line(self) -> str:
        """Return the row as a line of the Markdown table.

        Raises:
            KeyError: if ``matched`` is known and QUIRKS has no quirk of the scheduler.
        """
        numbers = [f"{self.float64:.0e}", f"{self.tables:.0e}", "", ""]
        if self.matched is not None:
            numbers[2:] = f"{self.matched:.0e}", QUIRKS[self.case.scheduler]
        return "| " + " | ".join([*self.case.cells(), *numbers]) + " |"


def measure(case: ParityCase) -> Row:
    """Draw the images of a case by both sides, and return their largest differences.

    Raises:
        ImportError: if diffusers is not installed.
    """
    want = theirs(case)
    rounded, matched = ours(case, "diffusers"), ours(case, "diffusers", match_diffusers=True)
    # fixed_small's quirk, of 1e-10, is below float32's last digit: no row shows it.
    changed = (matched - rounded).abs().max() > 1e-6

    def off(images: Tensor) -> float:
        return (images - want).abs().max().item()

    return Row(case, off(ours(case, "float64")), off(rounded), off(matched) if changed else None)


HEAD = """| scheduler | prediction | spacing | variance | x0 | betas | steps | float64 tables \
| diffusers' tables | and quirks | quirk |
|---|---|---|---|---|---|---|---|---|---|---|
"""

PAGE = """# Parity with diffusers

What `{command}` wrote, with diffusers {diffusers},
torch {torch} and numpy {numpy}, on the CPU in float32. Both sides begin at the same x_T, get the
same noise at every step and ask the same small random network. A row gives the largest difference
between their images, which have about unit size: pixels are in [-1, 1], 8-bit ones 8e-03 apart.

- **float64 tables**: as `Sampler` is by default. diffusers computes betas and abar in float32, which
  makes most of this difference.
- **diffusers' tables**: with `tables="diffusers"` abar is diffusers' own, bit for bit. What is left is
  the rounding of coefficients: ours are float64, rounded once; `DDPMScheduler` takes
  1 - abar_t / abar_s in float32, of which a thousand short steps leave few digits.
- **and quirks**: where diffusers does what we hold for wrong (last column), images differ on purpose.
  With `match_diffusers=True` besides they are diffusers' again.

The {few} rows of {steps} steps are picked of the {all} that diffusers can run, so that any two
settings that can meet do meet. Learned variance is missing: diffusers takes the network's v for the
variance, we for its logarithm, as Nichol & Dhariwal do.

{rows}
Six long ones:

{long}
## Quirks of diffusers

{quirks}"""  # noqa: E501


def page(command: str) -> str:
    """Measure all rows of the study, which takes about a minute, and return the Markdown page.

    Args:
        command: the command line that the page says it was written by.

    Raises:
        ImportError: if diffusers is not installed.
    """
    import diffusers

    cases = list(possible())
    few = pairwise(cases)
    table = [HEAD + "".join(measure(case).line() + "\n" for case in some) for some in (few, LONG)]
    quirks = diffusers_quirks.__doc__ or ""
    return PAGE.format(
        command=command,
        diffusers=diffusers.__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        few=len(few),
        all=len(cases),
        steps=STEPS,
        rows=table[0],
        long=table[1],
        quirks=quirks.partition("\n\n")[2],
    )


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write.")] = Path("parity.md"),
) -> None:
    """Compare our images with those of diffusers' schedulers and write the table of differences."""
    text = page(f"python -m flashddpm.benchmarks.studies.parity --out {out}")
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
