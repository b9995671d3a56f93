"""How a model is sampled unless ``sample`` is told otherwise: what its scheduler config says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashddpm import arguments
from flashddpm.solvers import SPACINGS, VARIANCE_TYPES


@dataclass(frozen=True)
class SamplingDefaults:
    """What a scheduler config says of sampling; arguments of ``sample`` override it."""

    spacing: str = "leading"
    steps_offset: int = 0
    clip: float = 1.0
    variance_type: str = "fixed_small"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SamplingDefaults:
        """Read diffusers' keys.

        Raises:
            ValueError: a setting that we have no rows for.
        """
        multistep = config.get("_class_name") == "DPMSolverMultistepScheduler"
        for key, allowed in {
            "thresholding": False,
            "set_alpha_to_one": True,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "use_lu_lambdas": False,
            "use_flow_sigmas": False,
            "euler_at_final": False,
            "lower_order_final": True,
            "final_sigmas_type": "zero",
        }.items():
            if config.get(key, allowed) != allowed:
                raise ValueError(f"{key}={config[key]!r}: only {allowed!r} is supported")
        clip = not multistep and arguments.boolean("clip_sample", config.get("clip_sample", True))
        spacing = config.get("timestep_spacing", "linspace" if multistep else "leading")
        return cls(
            arguments.one_of("timestep_spacing", spacing, SPACINGS),
            arguments.integer("steps_offset", config.get("steps_offset", 0), 0),
            arguments.number("clip_sample_range", config.get("clip_sample_range", 1.0), 0)
            if clip
            else 0.0,
            arguments.one_of(
                "variance_type",
                config.get("variance_type") or "fixed_small",
                VARIANCE_TYPES,
            ),
        )
