"""`SamplingDefaults`: how a model is sampled by default, read from its scheduler config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashddpm import arguments
from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.parameterization import VARIANCE_TYPES
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.plan_options import PlanOptions
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.diffusion.timesteps import SIGMA_SPACINGS, SPACINGS, respaced

DEFAULTED = "_use_default_values"
"""The key of a live diffusers config that lists the keys which nobody has set."""

_SHARED = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLDING = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_SIGMAS = {f"use_{name}_sigmas": False for name in SIGMA_SPACINGS}
_MULTISTEP_ONLY = {
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "euler_at_final": False,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": float("-inf"),
}
_EULER_ONLY = {
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}
_LEADING, _LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}

KEYS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {
        **_SHARED,
        **_LEADING,
        **_CLIPPING,
        **_THRESHOLDING,
        "variance_type": "fixed_small",
    },
    "DDIMScheduler": {
        **_SHARED,
        **_LEADING,
        **_CLIPPING,
        **_THRESHOLDING,
        "set_alpha_to_one": True,
    },
    "DPMSolverMultistepScheduler": {
        **_SHARED,
        **_LINSPACE,
        **_THRESHOLDING,
        **_SIGMAS,
        **_MULTISTEP_ONLY,
        "algorithm_type": "dpmsolver++",
        "variance_type": None,
    },
    "EulerDiscreteScheduler": {**_SHARED, **_LINSPACE, **_SIGMAS, **_EULER_ONLY},
    "EulerAncestralDiscreteScheduler": {**_SHARED, **_LINSPACE},
}
"""The settings that each diffusers class has, with its defaults; a class ignores all other keys."""

SCHEDULERS = tuple(KEYS)
"""The diffusers classes that can be read; solvers.SOLVERS says which solver each means."""

ONLY = ("set_alpha_to_one", *(_MULTISTEP_ONLY | _EULER_ONLY))
"""The settings for which only the default has rows here; another value is refused."""


def settings_of(config: Mapping[str, Any], scheduler: str | None = None) -> dict[str, Any]:
    """Return the settings that a diffusers scheduler class reads of a config, as a dict.

    A config keeps the keys of every class that it went through, for a later one to find; and a key
    that nobody has set, in a live one, is the default of its own class only.

    Args:
        config: a mapping with diffusers' keys; without ``_class_name`` it is DDPMScheduler's.
        scheduler: the class that reads it: DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler,
            EulerAncestralDiscreteScheduler or DPMSolverMultistepScheduler (`SCHEDULERS`); None for
            the config's own.

    Returns:
        The class's keys (`KEYS`) with the config's values, unchecked, or else the class's defaults,
        and ``_class_name``, the name of the class that reads.

    Raises:
        ValueError: if the config's own class has no solver here.
        KeyError: if ``scheduler`` is not one of `SCHEDULERS`.
    """
    own = arguments.one_of("_class_name", config.get("_class_name", "DDPMScheduler"), SCHEDULERS)
    name = scheduler or own
    unset = () if name == own else config.get(DEFAULTED, ())
    settings = {
        key: default if key in unset else config.get(key, default)
        for key, default in KEYS[name].items()
    }
    return settings | {"_class_name": name}


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is sampled where ``sample`` is not told otherwise: its scheduler config.

    The values are not checked here: `from_config` checks them when they are read, and
    `make_plan` when they are used.

    Attributes:
        spacing: the spacing of timesteps: leading, linspace or trailing.
        steps_offset: an integer, at least 0, added to leading timesteps.
        clip: the bound of |x0|, 0 for none; beside a threshold, the largest threshold, at least 1.
        variance_type: the variance of ddpm: fixed_small, fixed_large, learned or learned_range.
        threshold: the quantile, in [0, 1], of each image's |x0| for dynamic thresholding (Saharia
            et al. 2022, section 2.3); 0 for none.
        solver: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, euler or euler_ancestral (solvers.SOLVERS).
        sigmas: the spacing of the noise levels: karras, exponential or beta; None for the noise
            levels of the timesteps.
    """

    spacing: str = "leading"
    steps_offset: int = 0
    clip: float = 1.0
    variance_type: str = "fixed_small"
    threshold: float = 0.0
    solver: str = "ddpm"
    sigmas: str | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], scheduler: str | None = None
    ) -> SamplingDefaults:
        """Read the defaults from a diffusers scheduler config.

        Args:
            config: a mapping with diffusers' keys; without ``_class_name`` it is DDPMScheduler's.
            scheduler: the diffusers class that reads it: DDPMScheduler, DDIMScheduler,
                EulerDiscreteScheduler, EulerAncestralDiscreteScheduler or
                DPMSolverMultistepScheduler; None for the config's own.

        Raises:
            ValueError: if the config's own class has no solver here, or a setting has a value that
                is not supported; keys that the class does not have are ignored.
            KeyError: if ``scheduler`` is not one of `SCHEDULERS`.
        """
        settings = settings_of(config, scheduler)
        name = settings["_class_name"]
        for key in ONLY:
            allowed = KEYS[name].get(key)
            if settings.get(key) != allowed:
                raise ValueError(f"{key}={settings[key]!r}: only {allowed!r} is supported")
        solver = _solver(settings)
        clip, threshold = _bounds(settings)
        return cls(
            arguments.one_of("timestep_spacing", settings["timestep_spacing"], SPACINGS),
            arguments.integer("steps_offset", settings["steps_offset"], 0),
            clip,
            _variance_type(settings.get("variance_type"), solver),
            threshold,
            solver,
            _sigmas(settings),
        )

    def plan(
        self,
        schedule: NoiseSchedule,
        prediction_type: str,
        solver: str,
        num_steps: int,
        options: PlanOptions,
    ) -> Plan:
        """Return the plan of `make_plan` by the given options, and else by these defaults.

        The sigmas of the defaults hold only for their own solver, and not beside given timesteps.

        Args:
            schedule: the forward process, T timesteps.
            prediction_type: epsilon, sample or v_prediction.
            solver: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, euler or euler_ancestral.
            num_steps: the number of steps, in 1..T; of no effect beside given timesteps.
            options: the options that are given (`PlanOptions`); None is the same as left out.

        Raises:
            ValueError: if an argument or option is not allowed, or a threshold is given without
                clip where the model's own clip is at most 1.
            TypeError: if the name of an option is none of those in `PlanOptions`.
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
        record = SOLVERS[arguments.one_of("solver", solver, SOLVERS)]
        if "variance_type" in record.options:
            own["variance_type"] = self.variance_type
        if solver == self.solver and "timesteps" not in given:
            own["sigmas"] = self.sigmas
        return make_plan(
            schedule, solver, num_steps, prediction_type=prediction_type, **own | given
        )


def _solver(settings: Mapping[str, Any]) -> str:
    """Return the name of the solver that a class of diffusers stands for with these settings."""
    found = {
        solver.algorithm_type: name
        for name, solver in SOLVERS.items()
        if solver.scheduler_class == settings["_class_name"]
    }
    algorithm = settings.get("algorithm_type")
    if "algorithm_type" in settings:
        arguments.one_of("algorithm_type", algorithm, [key for key in found if key is not None])
    return found[algorithm]


def _variance_type(value: Any, solver: str) -> str:
    """Return diffusers' variance_type under our name; None is fixed_small."""
    if value == "fixed_large_log" and "variance_type" in SOLVERS[solver].options:
        raise ValueError(
            "variance_type='fixed_large_log': has no samples, for diffusers takes the root of a "
            "logarithm that is negative and returns NaN; must be fixed_large, say"
        )
    # fixed_small_log is the same variance by way of its logarithm; other solvers draw by neither.
    value = "fixed_small" if value in (None, "fixed_small_log", "fixed_large_log") else value
    return arguments.one_of("variance_type", value, VARIANCE_TYPES)


def _sigmas(settings: Mapping[str, Any]) -> str | None:
    """Return the spacing of sigmas that diffusers' use_X_sigmas settings ask for, or None."""
    keys = {f"use_{name}_sigmas": name for name in SIGMA_SPACINGS}
    asked = [key for key in keys if arguments.boolean(key, settings.get(key) or False)]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]}=True: must be false beside {asked[1]}=True")
    return keys[asked[0]] if asked else None


def _bounds(settings: Mapping[str, Any]) -> tuple[float, float]:
    """Return clip and threshold; thresholding overrules clipping, as in diffusers."""
    if arguments.boolean("thresholding", settings.get("thresholding", False)):
        ratio = settings["dynamic_thresholding_ratio"]
        if arguments.number("dynamic_thresholding_ratio", ratio, 0, 1) == 0:
            raise ValueError("dynamic_thresholding_ratio=0: must be above 0 for thresholding")
        value = settings["sample_max_value"]
        return arguments.number("sample_max_value", value, 1), float(ratio)
    if arguments.boolean("clip_sample", settings.get("clip_sample", False)):
        bound = settings["clip_sample_range"]
        return arguments.number("clip_sample_range", bound, 0), 0.0
    return 0.0, 0.0
