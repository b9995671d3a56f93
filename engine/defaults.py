"""How a model is sampled unless ``sample`` is told otherwise: what its scheduler config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashddpm import arguments
from flashddpm.options import PlanOptions
from flashddpm.schedule import NoiseSchedule
from flashddpm.solvers import SIGMA_SPACINGS, SPACINGS, VARIANCE_TYPES, Plan, make_plan
from flashddpm.timesteps import respaced

SCHEDULERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}
"""diffusers' classes, and the solver that each stands for."""

MULTISTEP = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}
"""The algorithm_type of DPMSolverMultistepScheduler."""

ONLY = {
    "set_alpha_to_one": True,
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "euler_at_final": False,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
    "lambda_min_clipped": float("-inf"),
}
"""Settings of which we have rows for one value only."""


@dataclass(frozen=True)
class SamplingDefaults:
    """What a scheduler config says of sampling; arguments of ``sample`` override it."""

    spacing: str = "leading"
    steps_offset: int = 0
    clip: float = 1.0
    variance_type: str = "fixed_small"
    threshold: float = 0.0
    solver: str = "ddpm"
    sigmas: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        """Read diffusers' keys; a config without a class is DDPMScheduler's.

        Raises:
            ValueError: a class or a setting that we have no rows for.
        """
        name = arguments.one_of(
            "_class_name", config.get("_class_name", "DDPMScheduler"), SCHEDULERS
        )
        for key, allowed in ONLY.items():
            if config.get(key, allowed) != allowed:
                raise ValueError(f"{key}={config[key]!r}: only {allowed!r} is supported")
        solver, clips = SCHEDULERS[name], name in ("DDPMScheduler", "DDIMScheduler")
        algorithm = config.get("algorithm_type", "dpmsolver++")
        algorithm = MULTISTEP[arguments.one_of("algorithm_type", algorithm, MULTISTEP)]
        clip, threshold = _bounds(config, clips)
        spacing = config.get("timestep_spacing", "leading" if clips else "linspace")
        return cls(
            arguments.one_of("timestep_spacing", spacing, SPACINGS),
            arguments.integer("steps_offset", config.get("steps_offset", 0), 0),
            clip,
            _variance_type(config.get("variance_type")),
            threshold,
            algorithm if name == "DPMSolverMultistepScheduler" else solver,
            _sigmas(config),
        )

    def plan(
        self,
        schedule: NoiseSchedule,
        prediction_type: str,
        solver: str,
        num_steps: int,
        options: PlanOptions,
    ) -> Plan:
        """Return the plan of `make_plan`, told by options and, where they are silent, by these.

        Raises:
            ValueError: an argument that is not allowed.
        """
        given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
        if isinstance(given.get("timesteps"), str):
            given["timesteps"] = respaced(given["timesteps"], len(schedule))
        if given.get("threshold"):
            arguments.number("threshold", given["threshold"], 0, 1)
            if "clip" not in given and self.clip <= 1:
                raise ValueError(
                    f"threshold={given['threshold']!r}: needs clip, the largest threshold, above "
                    f"1, such as 2; the model's own clip={self.clip:g} would be plain clipping"
                )
        own: dict[str, Any] = {
            "spacing": self.spacing,
            "steps_offset": self.steps_offset,
            "clip": self.clip,
            "threshold": self.threshold,
        }
        if solver == "ddpm":
            own["variance_type"] = self.variance_type
        if solver == self.solver and "timesteps" not in given:
            own["sigmas"] = self.sigmas
        return make_plan(
            schedule, solver, num_steps, prediction_type=prediction_type, **own | given
        )


def _variance_type(value: Any) -> str:
    """Return diffusers' variance_type under our name; None is fixed_small."""
    if value == "fixed_large_log":
        raise ValueError(
            "variance_type='fixed_large_log': has no samples, for diffusers takes the root of a "
            "logarithm that is negative and returns NaN; must be fixed_large, say"
        )
    # fixed_small_log is the same variance by way of its logarithm.
    value = "fixed_small" if value in (None, "fixed_small_log") else value
    return arguments.one_of("variance_type", value, VARIANCE_TYPES)


def _sigmas(config: Mapping[str, Any]) -> str | None:
    """Return the one spacing of sigmas that is asked for, or None."""
    keys = {f"use_{name}_sigmas": name for name in SIGMA_SPACINGS}
    asked = [key for key in keys if arguments.boolean(key, config.get(key) or False)]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]}=True: must be false beside {asked[1]}=True")
    return keys[asked[0]] if asked else None


def _bounds(config: Mapping[str, Any], clips: bool) -> tuple[float, float]:
    """Return clip and threshold; thresholding overrules clipping, as in diffusers."""
    if arguments.boolean("thresholding", config.get("thresholding", False)):
        ratio = config.get("dynamic_thresholding_ratio", 0.995)
        if arguments.number("dynamic_thresholding_ratio", ratio, 0, 1) == 0:
            raise ValueError("dynamic_thresholding_ratio=0: must be above 0 for thresholding")
        value = config.get("sample_max_value", 1.0)
        return arguments.number("sample_max_value", value, 1), float(ratio)
    if clips and arguments.boolean("clip_sample", config.get("clip_sample", True)):
        bound = config.get("clip_sample_range", 1.0)
        return arguments.number("clip_sample_range", bound, 0), 0.0
    return 0.0, 0.0
