"""The settings of a training run: one frozen dataclass, stored beside the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashddpm import arguments
from flashddpm.data import ImageData
from flashddpm.kernels.contract import LOSSES
from flashddpm.parameterization import LOSS_WEIGHTINGS, PREDICTION_TYPES
from flashddpm.schedule import BETA_SCHEDULES, MAX_TIMESTEPS
from flashddpm.unet_config import UNetConfig

LR_SCHEDULES = ("constant", "cosine")
ONLY_WITH = {
    "huber_delta": ("loss", "huber"),
    "min_snr_gamma": ("loss_weighting", "min_snr"),
    "p2_gamma": ("loss_weighting", "p2"),
}
"""Settings that must stay at their defaults unless another setting has that value."""
MAY_CHANGE = ("steps", "save_every", "sample_every")
"""Settings that a resumed run may have other values of."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on besides its data."""

    steps: int
    batch_size: int = 64
    seed: int = 0
    learning_rate: float = 5e-4
    lr_schedule: str = "constant"
    warmup_steps: int = 200
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    precision: str = "float32"
    prediction_type: str = "epsilon"
    loss: str = "mse"
    huber_delta: float = 1.0
    loss_weighting: str = "constant"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    beta_schedule: str = "linear"
    num_train_timesteps: int = 1000
    block_out_channels: tuple[int, ...] = (32, 64, 96)
    layers_per_block: int = 1
    attention_head_dim: int = 32
    norm_num_groups: int = 8
    save_every: int = 500
    sample_every: int = 0

    def __post_init__(self) -> None:
        for name, low in {
            "steps": 1,
            "batch_size": 1,
            "warmup_steps": 0,
            "layers_per_block": 1,
            "attention_head_dim": 1,
            "norm_num_groups": 1,
            "save_every": 1,
            "sample_every": 0,
        }.items():
            arguments.integer(name, getattr(self, name), low)
        arguments.integer("seed", self.seed, -(2**63), 2**64 - 1)
        arguments.integer("num_train_timesteps", self.num_train_timesteps, 1, MAX_TIMESTEPS)
        arguments.number("learning_rate", self.learning_rate, 0)
        arguments.number("grad_clip", self.grad_clip, 0)
        arguments.number("ema_decay", self.ema_decay, 0, 1)
        arguments.number("label_dropout", self.label_dropout, 0, 1)
        arguments.one_of("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        arguments.one_of("precision", self.precision, ("float32", "bfloat16"))
        arguments.one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        arguments.one_of("loss", self.loss, LOSSES)
        arguments.one_of("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        self._check_loss_settings()
        arguments.one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        channels = self.block_out_channels
        if not isinstance(channels, (list, tuple)) or not channels:
            raise ValueError(f"block_out_channels={channels!r}: must be a list of integers")
        for c in channels:
            arguments.integer("block_out_channels", c, 1)
        object.__setattr__(self, "block_out_channels", tuple(channels))

    def _check_loss_settings(self) -> None:
        for name, (owner, value) in ONLY_WITH.items():
            given = arguments.number(name, getattr(self, name), 0)
            if given != getattr(type(self), name) and getattr(self, owner) != value:
                raise ValueError(f"{name}={given!r}: is of {owner}={value!r} only")
        for name in ("huber_delta", "min_snr_gamma"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0: must be above 0")

    @property
    def weighting_gamma(self) -> float | None:
        """The gamma of the weighting, if it has one."""
        return {"min_snr": self.min_snr_gamma, "p2": self.p2_gamma}.get(self.loss_weighting)

    def unet_config(self, data: ImageData) -> UNetConfig:
        """Return the network for these images: attention at the lowest resolution only."""
        levels = len(self.block_out_channels)
        _, C, H, W = data.images.shape
        plain = levels - 1
        return UNetConfig(
            sample_size=H if H == W else (H, W),
            in_channels=C,
            out_channels=C,
            down_block_types=(*["DownBlock2D"] * plain, "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * plain),
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            attention_head_dim=self.attention_head_dim,
            norm_num_groups=self.norm_num_groups,
            num_class_embeds=None if data.num_classes is None else data.num_classes + 1,
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
            "variance_type": "fixed_small",
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "timestep_spacing": "trailing",
        }
