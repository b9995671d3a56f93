"""How a model is sampled unless ``sample`` is told otherwise: what its scheduler config says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashddpm import arguments
from flashddpm.solvers import FIXED_VARIANCES, SPACINGS


@dataclass(frozen=True)
class SamplingDefaults:
    """What a scheduler config says of sampling; arguments of ``sample`` override it."""

    spacing: str = "leading"
    steps_offset: int = 0
    clip: float = 1.0
    variance_type: str = "fixed_small"
    threshold: float = 0.0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SamplingDefaults:
        """Read diffusers' keys.

        Raises:
            ValueError: a setting that we have no rows for.
        """
        multistep = config.get("_class_name") == "DPMSolverMultistepScheduler"
        for key, allowed in {
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
        clip, threshold = _bounds(config, clips=not multistep)
        spacing = config.get("timestep_spacing", "linspace" if multistep else "leading")
        return cls(
            arguments.one_of("timestep_spacing", spacing, SPACINGS),
            arguments.integer("steps_offset", config.get("steps_offset", 0), 0),
            clip,
            arguments.one_of(
                "variance_type",
                config.get("variance_type") or "fixed_small",
                FIXED_VARIANCES,
            ),
            threshold,
        )


def _bounds(config: dict[str, Any], clips: bool) -> tuple[float, float]:
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
