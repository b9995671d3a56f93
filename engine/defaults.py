"""How a model is sampled unless ``sample`` is told otherwise: what its scheduler config says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashddpm import arguments


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
            "final_sigmas_type": "zero",
        }.items():
            if config.get(key, allowed) != allowed:
                raise ValueError(f"{key}={config[key]!r}: only {allowed!r} is supported")
        clip = not multistep and config.get("clip_sample", True)
        return cls(
            config.get("timestep_spacing", "linspace" if multistep else "leading"),
            config.get("steps_offset", 0),
            arguments.number("clip_sample_range", config.get("clip_sample_range", 1.0), 0)
            if clip
            else 0.0,
            arguments.one_of(
                "variance_type",
                config.get("variance_type") or "fixed_small",
                ("fixed_small", "fixed_large"),
            ),
        )
