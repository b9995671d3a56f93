"""`TrainConfig`: the settings of a training run, one frozen dataclass, stored beside the run.

Each field is a flag of ``flashddpm train``; the field's ``help`` is the flag's help text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flashddpm import arguments
from flashddpm.diffusion.loss_tables import LOSS_WEIGHTINGS
from flashddpm.diffusion.parameterization import (
    LEARNED_VARIANCES,
    PREDICTION_TYPES,
    VARIANCE_TYPES,
)
from flashddpm.diffusion.schedule import BETA_SCHEDULES, MAX_TIMESTEPS
from flashddpm.kernels.tables import LOSSES
from flashddpm.networks.unet_config import UNetConfig

LR_SCHEDULES = ("constant", "cosine")
TIMESTEP_SAMPLINGS = ("uniform", "low_discrepancy")
PRECISIONS = ("float32", "bfloat16")
ONLY_WITH = {
    "huber_delta": ("loss", "huber"),
    "min_snr_gamma": ("loss_weighting", "min_snr"),
    "p2_gamma": ("loss_weighting", "p2"),
}
"""For each of these settings (the key), the other setting and the value of it beside which alone
the first may differ from its default."""
NETWORK = ("block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups")
"""Settings of a new network; they must have their defaults where ``init`` names a model folder."""
MAY_CHANGE = ("steps", "data", "save_every", "keep", "sample_every", "checkpoint_activations")
"""Settings that may change when a run is resumed. Of the data, the content is compared and not the
path; ``steps`` may not change under a cosine schedule, whose learning rates depend on it."""

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
"""The allowed values of settings, by name: INTEGERS and NUMBERS hold the lowest value and, where
there is one, the highest; CHOICES holds all the strings that are allowed."""


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run and the path of its data; ``steps`` alone has no default.

    Attributes:
        FILE: the name of the file in the run's folder that holds the settings as JSON.
        steps: the number of steps of the whole run, those before a resume included; at least 1.
        data: the path of the images, a str; kept as a note, not opened here.
        init: the path of the model folder whose network and weights the run starts from, a str; ""
            for a new network. It is not opened here.
        batch_size: the number of images in a step, over all processes; at least 1, a multiple of
            accumulate.
        accumulate: the number of equal parts, at least 1, of a batch that are computed in turn to
            save memory.
        seed: the seed of weights, image order, timesteps and noise, in [-2^63, 2^64).
        learning_rate: AdamW's learning rate after the warm-up, at least 0.
        lr_schedule: constant or cosine (half a cosine, which would be 0 at step number steps).
        warmup_steps: the number of steps, at least 0, in which the learning rate grows linearly.
        grad_clip: the norm of all gradients together that they are clipped to; 0 for no clipping.
        ema_half_lives: half-lives of the moving averages of the weights, in steps: integers of at
            least 1, one or more, all different; the first average is the run's model.
        label_dropout: the probability, in [0, 1], that a label is replaced by the null class.
        horizontal_flip: whether each image is mirrored left to right with probability 1/2.
        precision: float32 or bfloat16 (autocast of the network).
        prediction_type: what the network predicts: epsilon, sample or v_prediction.
        variance_type: fixed_small, fixed_large, or (trained with the hybrid loss) learned or
            learned_range.
        loss: the penalty of the error: mse, l1 or huber.
        huber_delta: the error at which huber turns from quadratic to linear; above 0.
        loss_weighting: constant, min_snr, truncated_snr or p2.
        min_snr_gamma: the gamma of min_snr, the largest SNR that counts; above 0.
        p2_gamma: the gamma of p2, at least 0: how steeply weights fall with the SNR.
        timestep_sampling: uniform, or low_discrepancy for timesteps evenly spread over a batch.
        beta_schedule: linear, scaled_linear, squaredcos_cap_v2 or sigmoid.
        num_train_timesteps: the number of timesteps T of the forward process, 1..100000.
        block_out_channels: the number of channels at each resolution, finest first.
        layers_per_block: the number of residual blocks at each resolution on the way down; on the
            way up there is one more.
        attention_head_dim: the number of channels of an attention head.
        norm_num_groups: the number of groups of the group norms.
        checkpoint_activations: whether activations are computed again in the backward pass, to save
            memory.
        save_every: the number of steps between two saves, at least 1.
        keep: the number of newest states (files to resume from) that are kept, at least 1.
        sample_every: the number of steps between two grids of samples; 0 for none.

    Raises:
        ValueError: if a setting is of a wrong type or out of its range, if accumulate does not
            divide batch_size, if a half-life occurs twice, if huber_delta, min_snr_gamma or
            p2_gamma is not its default without the loss or weighting that it belongs to, or if a
            setting of a new network (`NETWORK`) is not its default beside init.
    """

    FILE: ClassVar[str] = "train_config.json"

    steps: int = dataclasses.field(
        metadata={"help": "Steps of the run in all, those before a resume included."}
    )
    data: str = _field("", "Path of the images.")
    init: str = _field("", "A model folder whose network and weights the run starts from.")
    batch_size: int = _field(64, "Images of a step, of all processes together.")
    accumulate: int = _field(1, "Parts of a batch that are computed in turn, to save memory.")
    seed: int = _field(0, "Seed of the weights, the order of images, the timesteps and the noise.")
    learning_rate: float = _field(5e-4, "Learning rate after the warm-up.")
    lr_schedule: str = _field("constant", "Schedule of the learning rate: constant or cosine.")
    warmup_steps: int = _field(200, "Steps of the linear warm-up.")
    grad_clip: float = _field(1.0, "Norm that gradients are clipped to; 0 for no clipping.")
    ema_half_lives: tuple[int, ...] = _field(
        (700, 2800),
        "Half-lives, in steps, of the averages of the weights: the first average is the run's "
        "model, the others are in OUT/ema-HALFLIFE.",
    )
    label_dropout: float = _field(0.1, "Share of labels dropped, for classifier-free guidance.")
    horizontal_flip: bool = _field(False, "Mirror each image left to right with probability 1/2.")
    precision: str = _field("float32", "Precision of the network: float32 or bfloat16 (autocast).")
    prediction_type: str = _field(
        "epsilon", "What the network predicts: epsilon, sample or v_prediction."
    )
    variance_type: str = _field(
        "fixed_small",
        "Variance of the model: fixed_small, fixed_large, or with the hybrid loss learned or "
        "learned_range.",
    )
    loss: str = _field("mse", "Penalty of the error: mse, l1 or huber.")
    huber_delta: float = _field(1.0, "Error at which huber goes from quadratic to linear.")
    loss_weighting: str = _field("constant", "Weighting: constant, min_snr, truncated_snr or p2.")
    min_snr_gamma: float = _field(5.0, "gamma of min_snr: the largest SNR that counts.")
    p2_gamma: float = _field(1.0, "gamma of p2: how steeply weights fall with SNR.")
    timestep_sampling: str = _field(
        "uniform", "Timesteps of a batch: uniform, or low_discrepancy, which are evenly spread."
    )
    beta_schedule: str = _field(
        "linear", "Noise schedule: linear, scaled_linear, squaredcos_cap_v2 or sigmoid."
    )
    num_train_timesteps: int = _field(1000, "Number T of timesteps of the forward process.")
    block_out_channels: tuple[int, ...] = _field((32, 64, 96), "Channels at each resolution.")
    layers_per_block: int = _field(1, "Residual blocks at each resolution.")
    attention_head_dim: int = _field(32, "Channels of each attention head.")
    norm_num_groups: int = _field(8, "Groups of the group norms.")
    checkpoint_activations: bool = _field(
        False, "Compute activations again in the backward pass, to save memory."
    )
    save_every: int = _field(500, "Steps between two saves.")
    keep: int = _field(2, "Number of newest states, to resume from, that are kept.")
    sample_every: int = _field(0, "Steps between two grids of samples; 0 for none.")

    def __post_init__(self) -> None:
        self._check_each()
        self._check_together()

    def _check_each(self) -> None:
        """Check every setting by itself; store numbers and tuples as Python's own."""
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

    def _check_together(self) -> None:
        """Check the settings that restrict one another."""
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
        """Build the settings of a run from the dictionary that `to_dict` returned for it.

        Args:
            values: settings by field name, with lists or tuples; all but "steps" may be missing,
                and then have their defaults.

        Raises:
            ValueError: if ``steps`` is missing, a name is not a setting, or a value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name}={values[name]!r}: is no setting of a run")
        if "steps" not in values:
            raise ValueError("steps: is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by field name as JSON can store them: tuples become lists."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def learns_variance(self) -> bool:
        """Whether the network also predicts the variance, in C more output channels."""
        return self.variance_type in LEARNED_VARIANCES

    @property
    def weighting_gamma(self) -> float | None:
        """min_snr_gamma or p2_gamma, a float, if loss_weighting is min_snr or p2, else None."""
        return {"min_snr": self.min_snr_gamma, "p2": self.p2_gamma}.get(self.loss_weighting)

    def part_of(self, processes: int) -> int:
        """Return the number of images of a batch that each process takes: batch_size / processes.

        Args:
            processes: the number of processes that train, at least 1 (not checked).

        Raises:
            ValueError: if batch_size is not a multiple of processes times accumulate.
        """
        if self.batch_size % (processes * self.accumulate):
            raise ValueError(
                f"batch_size={self.batch_size}: must be a multiple of {processes} processes times "
                f"accumulate={self.accumulate}"
            )
        return self.batch_size // processes

    @property
    def may_change(self) -> tuple[str, ...]:
        """The names, a tuple of strings, of the settings that may change when the run is resumed.

        They are those of `MAY_CHANGE`, without "steps" under a cosine schedule, whose learning
        rates depend on it.
        """
        fixed = "steps" if self.lr_schedule == "cosine" else ""
        return tuple(name for name in MAY_CHANGE if name != fixed)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, times half a cosine if so scheduled.

        Args:
            step: the number of the step, from 0 (not checked); step 0 already has
                learning_rate / warmup_steps, or learning_rate without a warm-up.
        """
        rate = self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))
        if self.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return rate

    def unet_config(self, shape: tuple[int, int, int], num_classes: int | None) -> UNetConfig:
        """Return the config of a new network, with attention at the lowest resolution only.

        Args:
            shape: (C, H, W) of an image, in pixels; the network returns C channels, or 2C if it
                learns the variance.
            num_classes: the number of classes; the network has one more embedding, for the null
                class. None for an unconditional network.

        Raises:
            ValueError: if the settings make no network (`UNetConfig`), such as channels that are
                not multiples of norm_num_groups.
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
        """Return the content of scheduler_config.json as a dict with the keys of diffusers.

        Its class is DDPMScheduler, with samples clipped to [-1, 1] and trailing timesteps.
        """
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
