"""The settings of a training run: one frozen dataclass, stored beside the run.

The command line is made of it: a field's name is its flag, its ``help`` the flag's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flashddpm import arguments
from flashddpm.diffusion.parameterization import (
    LEARNED_VARIANCES,
    LOSS_WEIGHTINGS,
    PREDICTION_TYPES,
)
from flashddpm.diffusion.schedule import BETA_SCHEDULES, MAX_TIMESTEPS
from flashddpm.kernels.tables import LOSSES
from flashddpm.networks.unet_config import UNetConfig

LR_SCHEDULES = ("constant", "cosine")
TIMESTEP_SAMPLINGS = ("uniform", "low_discrepancy")
VARIANCE_TYPES = ("fixed_small", "fixed_large", *LEARNED_VARIANCES)
PRECISIONS = ("float32", "bfloat16")
ONLY_WITH = {
    "huber_delta": ("loss", "huber"),
    "min_snr_gamma": ("loss_weighting", "min_snr"),
    "p2_gamma": ("loss_weighting", "p2"),
}
"""Settings that must stay at their defaults unless another setting has that value."""
NETWORK = ("block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups")
"""Settings of a new network: at their defaults where ``init`` names one to start from."""
MAY_CHANGE = ("steps", "data", "save_every", "keep", "sample_every", "checkpoint_activations")
"""Settings that a resumed run may have other values of. Other data are known by their content; the
steps of a cosine decide its learning rates, and so may not change."""

INTEGERS: dict[str, tuple[int, ...]] = {
    "steps": (1,),
    "batch_size": (1,),
    "accumulate": (1,),
    "seed": (-(2**63), 2**64 - 1),
    "warmup_steps": (0,),
    "num_train_timesteps": (1, MAX_TIMESTEPS),
    "layers_per_block": (1,),
    "attention_head_dim": (1,),
    "norm_num_groups": (1,),
    "save_every": (1,),
    "keep": (1,),
    "sample_every": (0,),
}
NUMBERS: dict[str, tuple[float, ...]] = {
    "learning_rate": (0,),
    "grad_clip": (0,),
    "label_dropout": (0, 1),
    "huber_delta": (0,),
    "min_snr_gamma": (0,),
    "p2_gamma": (0,),
}
CHOICES = {
    "lr_schedule": LR_SCHEDULES,
    "precision": PRECISIONS,
    "prediction_type": PREDICTION_TYPES,
    "variance_type": VARIANCE_TYPES,
    "loss": LOSSES,
    "loss_weighting": LOSS_WEIGHTINGS,
    "timestep_sampling": TIMESTEP_SAMPLINGS,
    "beta_schedule": BETA_SCHEDULES,
}
"""What settings are checked against: the lowest and the highest, or all that are allowed."""


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; of its data, where they are."""

    FILE: ClassVar[str] = "train_config.json"

    steps: int = dataclasses.field(
        metadata={"help": "Steps in all, those of a resumed run included."}
    )
    data: str = _field("", "Where the images are.")
    init: str = _field("", "A model folder whose network and weights to start from.")
    batch_size: int = _field(64, "Images a step, of all processes together.")
    accumulate: int = _field(1, "Parts of a step's batch, one after the other, to save memory.")
    seed: int = _field(0, "Seed of weights, order, timesteps and noise.")
    learning_rate: float = _field(5e-4, "After the warm-up.")
    lr_schedule: str = _field("constant", "constant or cosine.")
    warmup_steps: int = _field(200, "Steps of linear warm-up.")
    grad_clip: float = _field(1.0, "Bound of the gradient's norm; 0 for none.")
    ema_half_lives: tuple[int, ...] = _field(
        (700, 2800),
        "Half-lives, in steps, of the averaged weights: the first are the run's model, "
        "the others' are in OUT/ema-HALFLIFE.",
    )
    label_dropout: float = _field(0.1, "Share of labels dropped, for guidance.")
    horizontal_flip: bool = _field(False, "Mirror half of the images, drawn anew each epoch.")
    precision: str = _field("float32", "float32 or bfloat16 (autocast).")
    prediction_type: str = _field("epsilon", "epsilon, sample or v_prediction.")
    variance_type: str = _field(
        "fixed_small",
        "fixed_small, fixed_large, or with the hybrid loss learned or learned_range.",
    )
    loss: str = _field("mse", "mse, l1 or huber.")
    huber_delta: float = _field(1.0, "Where huber turns to a line.")
    loss_weighting: str = _field("constant", "constant, min_snr, truncated_snr or p2.")
    min_snr_gamma: float = _field(5.0, "Of min_snr: the largest SNR that counts.")
    p2_gamma: float = _field(1.0, "Of p2: how steeply weights fall with SNR.")
    timestep_sampling: str = _field(
        "uniform", "uniform, or low_discrepancy: spread evenly over each batch."
    )
    beta_schedule: str = _field("linear", "linear, scaled_linear, squaredcos_cap_v2 or sigmoid.")
    num_train_timesteps: int = _field(1000, "Timesteps T of the process.")
    block_out_channels: tuple[int, ...] = _field((32, 64, 96), "Channels at each resolution.")
    layers_per_block: int = _field(1, "Residual blocks at each resolution.")
    attention_head_dim: int = _field(32, "Channels of an attention head.")
    norm_num_groups: int = _field(8, "Groups of the norms.")
    checkpoint_activations: bool = _field(
        False, "Compute activations again in the backward pass, to save memory."
    )
    save_every: int = _field(500, "Steps between saves.")
    keep: int = _field(2, "States to go on from that are kept, the newest.")
    sample_every: int = _field(0, "Steps between sample grids; 0 for none.")

    def __post_init__(self) -> None:
        for name, limits in INTEGERS.items():
            self._set(name, arguments.integer(name, getattr(self, name), *limits))
        for name, bounds in NUMBERS.items():
            self._set(name, arguments.number(name, getattr(self, name), *bounds))
        for name, choices in CHOICES.items():
            arguments.one_of(name, getattr(self, name), choices)
        for name in ("horizontal_flip", "checkpoint_activations"):
            arguments.boolean(name, getattr(self, name))
        for name in ("data", "init"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a path, as a string")
        for name in ("block_out_channels", "ema_half_lives"):
            self._check_integers(name)
        self._check_loss_settings()
        if len(set(self.ema_half_lives)) < len(self.ema_half_lives):
            raise ValueError(f"ema_half_lives={self.ema_half_lives!r}: must differ")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: must divide batch_size={self.batch_size}"
            )
        for name in NETWORK if self.init else ():
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must not be given beside init, whose "
                    "network is taken"
                )

    def _set(self, name: str, value: Any) -> None:
        """Store a value as Python's own number or tuple, which JSON knows."""
        object.__setattr__(self, name, value)

    def _check_integers(self, name: str) -> None:
        values = getattr(self, name)
        if not isinstance(values, (list, tuple)) or not values:
            raise ValueError(f"{name}={values!r}: must be a list of integers")
        self._set(name, tuple(arguments.integer(name, value, 1) for value in values))

    def _check_loss_settings(self) -> None:
        for name, (owner, value) in ONLY_WITH.items():
            given = getattr(self, name)
            if given != getattr(type(self), name) and getattr(self, owner) != value:
                raise ValueError(f"{name}={given!r}: is of {owner}={value!r} only")
        for name in ("huber_delta", "min_snr_gamma"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0: must be above 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the settings that a run stored; what they do not name is at its default.

        Raises:
            ValueError: a setting that there is none of, or one out of its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name}={values[name]!r}: is no setting of a run")
        if "steps" not in values:
            raise ValueError("steps: is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def learns_variance(self) -> bool:
        """Whether the network has 2C output channels."""
        return self.variance_type in LEARNED_VARIANCES

    @property
    def weighting_gamma(self) -> float | None:
        """The gamma of the weighting, if it has one."""
        return {"min_snr": self.min_snr_gamma, "p2": self.p2_gamma}.get(self.loss_weighting)

    def part_of(self, processes: int) -> int:
        """Return how many images of a batch each of so many processes takes.

        Raises:
            ValueError: not all take equally many.
        """
        if self.batch_size % (processes * self.accumulate):
            raise ValueError(
                f"batch_size={self.batch_size}: must be a multiple of {processes} processes times "
                f"accumulate={self.accumulate}"
            )
        return self.batch_size // processes

    @property
    def may_change(self) -> tuple[str, ...]:
        """The settings that a resumed run may have other values of."""
        fixed = "steps" if self.lr_schedule == "cosine" else ""
        return tuple(name for name in MAY_CHANGE if name != fixed)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))
        if self.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return rate

    def unet_config(self, shape: tuple[int, int, int], num_classes: int | None) -> UNetConfig:
        """Return a new network for such images: attention at the lowest resolution only.

        Args:
            shape: (C, H, W) of an image.
            num_classes: of the labels; the network has one more, the null class.
        """
        C, H, W = shape
        plain = len(self.block_out_channels) - 1
        return UNetConfig(
            sample_size=H if H == W else (H, W),
            in_channels=C,
            out_channels=2 * C if self.learns_variance else C,
            down_block_types=(*["DownBlock2D"] * plain, "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * plain),
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            attention_head_dim=self.attention_head_dim,
            norm_num_groups=self.norm_num_groups,
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )

    def scheduler_config(self) -> dict[str, Any]:
        """Return the keys of scheduler_config.json."""
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.num_train_timesteps,
            "beta_schedule": self.beta_schedule,
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "prediction_type": self.prediction_type,
            "variance_type": self.variance_type,
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "timestep_spacing": "trailing",
        }
