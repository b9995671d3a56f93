r"""Conversion of the checkpoints of denoising-diffusion-pytorch, whose network is an RMSUNet.

They are files of Unet, of GaussianDiffusion or of Trainer.

The network keeps its names (RMSUNet). All its settings but theta follow from the names and shapes;
the schedule and the objective follow from GaussianDiffusion's tables, where the file has them:
with S = SNR, loss_weight where S is about 1/3 is 1 for pred_noise, S for pred_x0 and S / (S + 1)
for pred_v, whether or not min_snr_gamma bounds S, which it does only above.

auto_normalize only says in what range the training images came: the network's x is as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashddpm import arguments
from flashddpm.diffusion.schedule import MAX_TIMESTEPS, NoiseSchedule
from flashddpm.errors import CheckpointError
from flashddpm.networks.registry import on_meta
from flashddpm.networks.rms_unet import RMSUNetConfig
from flashddpm.networks.state_dict import mismatches

Table = NDArray[np.float64]

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
BETA_SCHEDULES = ("linear", "cosine", "sigmoid")
WEIGHTS = ("ema", "online")
FIRST = "init_conv.weight"


@dataclass(frozen=True, kw_only=True)
class LucidrainsFlags:
    """The arguments of Unet and GaussianDiffusion that a checkpoint's file may not say.

    None stands for what the file says, or else the project's default.

    Attributes:
        image_size: the side of the square images, in pixels.
        timesteps: the number of timesteps T; by default 1000.
        beta_schedule: linear, cosine or sigmoid; by default sigmoid.
        objective: what the network predicts: pred_noise, pred_x0 or pred_v; by default pred_v.
        sinusoidal_pos_emb_theta: the longest period of the timestep's sinusoids, divided by 2 pi;
            at least 1, which is checked by `convert`.
        weights: which of the two networks in a Trainer's file: ema (its average) or online; by
            default ema, where there is one.

    Raises:
        ValueError: if a flag is out of its range.
    """

    image_size: int
    timesteps: int | None = None
    beta_schedule: str | None = None
    objective: str | None = None
    sinusoidal_pos_emb_theta: float = 10000.0
    weights: str | None = None

    def __post_init__(self) -> None:
        arguments.integer("image_size", self.image_size, 1, 65536)
        if self.timesteps is not None:
            arguments.integer("timesteps", self.timesteps, 1, MAX_TIMESTEPS)
        if self.beta_schedule is not None:
            arguments.one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        if self.objective is not None:
            arguments.one_of("objective", self.objective, OBJECTIVES)
        if self.weights is not None:
            arguments.one_of("weights", self.weights, WEIGHTS)


def convert(
    state: Mapping[str, Tensor], flags: LucidrainsFlags
) -> tuple[RMSUNetConfig, dict[str, Tensor], dict[str, Any]]:
    """Return the config, state dict and scheduler config of such a checkpoint, for a model folder.

    Args:
        state: the file's tensors by name: those of a Unet, a GaussianDiffusion or a Trainer.
        flags: what the file may not say.

    Returns:
        The network's config; its state dict, tensors by name, as they are in the file; and the keys
        of a scheduler_config.json.

    Raises:
        CheckpointError: if it is no checkpoint of this project; every tensor out of place is
            listed.
        ValueError: if flags are not allowed, or the file contradicts them or needs one more.
    """
    prefix = _network_prefix(state, flags.weights)
    weights = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    diffusion = prefix.removesuffix("model.")
    tables = {
        name: state[diffusion + name].double().numpy()
        for name in ("betas", "loss_weight")
        if prefix.endswith("model.") and diffusion + name in state
    }
    config = unet_config(weights, flags)
    wrong = mismatches(on_meta(config), weights, torch.float32)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    return config, weights, _scheduler(config, tables, flags)


def _network_prefix(state: Mapping[str, Tensor], which: str | None) -> str:
    """Return the prefix of the names of the wanted network's tensors."""
    found = [key.removesuffix(FIRST) for key in state if key.endswith(FIRST)]
    averaged = [prefix for prefix in found if "ema_model." in prefix]
    online = [prefix for prefix in found if prefix not in averaged]
    # A Trainer's file has the online network twice: its own, and the one that EMA follows.
    online = [p for p in online if "online_model." not in p] or online
    if which is None:
        which = "ema" if averaged else "online"
    chosen = averaged if which == "ema" else online
    if len(chosen) != 1:
        raise CheckpointError(
            f"weights={which}: {len(chosen)} such networks (found: "
            f"{', '.join(repr(p + FIRST) for p in found) or 'no ' + FIRST}); must be one"
        )
    return chosen[0]


def unet_config(weights: Mapping[str, Tensor], flags: LucidrainsFlags) -> RMSUNetConfig:
    """Return the settings of a network, read from the names and shapes of its weights.

    Args:
        weights: the Unet's state dict, by the project's names without a prefix.
        flags: the flags, of which image_size and sinusoidal_pos_emb_theta are used.

    Raises:
        CheckpointError: if it is no such network, or one with learned sinusoids or
            self-conditioning, which no sampler here gives it.
        ValueError: if a setting that follows is not allowed.
    """
    if "time_mlp.0.weights" in weights:
        raise CheckpointError(
            "time_mlp.0.weights: learned or random sinusoids, which only continuous-time "
            "diffusions have, are not supported"
        )
    levels = 0
    while f"downs.{levels}.0.block1.proj.weight" in weights:
        levels += 1
    dims = [_shape(weights, f"downs.{i}.0.block1.proj.weight", 4)[0] for i in range(levels)]
    dims.append(_shape(weights, "mid_block1.block1.proj.weight", 4)[0])
    full, heads, head_dims = [], [], []
    for i in range(levels):
        full.append(f"downs.{i}.2.to_out.weight" in weights)
        _, h, a, b = _shape(weights, f"downs.{i}.2.mem_kv", 4)
        heads.append(h)
        head_dims.append(b if full[i] else a)
        memories = a if full[i] else b
    takes, gives = _shape(weights, FIRST, 4)[1], _shape(weights, "final_conv.weight", 4)[0]
    if takes == 2 * gives:
        raise CheckpointError(
            f"init_conv takes {takes} channels and final_conv gives {gives}: self-conditioning is "
            "not supported"
        )
    return RMSUNetConfig(
        sample_size=flags.image_size,
        in_channels=takes,
        out_channels=gives,
        dim=_shape(weights, "time_mlp.1.weight", 2)[1],
        dims=tuple(dims),
        full_attention=tuple(full),
        attention_heads=tuple(heads),
        attention_head_dim=tuple(head_dims),
        num_mem_kv=memories if levels else 4,
        theta=flags.sinusoidal_pos_emb_theta,
    )


def _shape(weights: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if key not in weights or weights[key].ndim != ndim:
        found = f"has shape {tuple(weights[key].shape)}" if key in weights else "is missing"
        raise CheckpointError(f"{key} {found}: not a Unet of denoising-diffusion-pytorch 2")
    return tuple(weights[key].shape)


def _scheduler(
    config: RMSUNetConfig, tables: Mapping[str, Table], flags: LucidrainsFlags
) -> dict[str, Any]:
    """Return the scheduler's config, from the file's tables or from the flags."""
    betas, weight = tables.get("betas"), tables.get("loss_weight")
    T = 1000 if flags.timesteps is None else flags.timesteps
    if betas is not None:
        if betas.ndim != 1 or (weight is not None and weight.shape != betas.shape):
            raise CheckpointError("betas and loss_weight: must be two rows of one length")
        if len(betas) != (flags.timesteps or len(betas)):
            raise ValueError(f"timesteps={flags.timesteps}: must be {len(betas)}, as the file says")
        T = arguments.integer("timesteps", len(betas), 1, MAX_TIMESTEPS)
    else:
        weight = None
    schedule = _schedule(betas, T, flags.beta_schedule)
    prediction = OBJECTIVES[_objective(schedule, weight, flags)]
    learns = config.out_channels == 2 * config.in_channels
    if learns and prediction != "epsilon":
        raise ValueError(
            f"objective={flags.objective!r}: must be pred_noise, as the network learns its variance"
        )
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": T,
        **schedule,
        "variance_type": "learned_range" if learns else "fixed_small",
        "prediction_type": prediction,
        "clip_sample": True,
        "timestep_spacing": "trailing",
    }


def schedule_config(name: str, T: int) -> dict[str, Any]:
    """Return the keys of a diffusers scheduler config for one of the project's noise schedules.

    Args:
        name: linear or cosine; any other is taken for sigmoid.
        T: the number of timesteps, at least 1; not checked.

    Returns:
        A dict of beta_schedule, with beta_start and beta_end if linear, or, for sigmoid, of
        trained_betas alone, a list of T numbers.
    """
    if name == "linear":
        scale = 1000 / T
        ends = {"beta_start": scale * 0.0001, "beta_end": scale * 0.02}
        return {"beta_schedule": "linear", **ends}
    if name == "cosine":
        return {"beta_schedule": "squaredcos_cap_v2"}
    return {"trained_betas": sigmoid_betas(T).tolist()}


def sigmoid_betas(T: int) -> Table:
    """Return the betas of the project's sigmoid schedule, float64 [T] (Jabri et al. 2022).

    They are at most 0.999, and otherwise those of abar(u) = (s(3) - s(6 u - 3)) / (s(3) - s(-3)),
    with u from 0 to 1 in T even steps and s the logistic function.

    Args:
        T: the number of timesteps, at least 1; not checked.
    """
    u = np.linspace(0, T, T + 1) / T
    # s(3) in float32, as there: abar ends at the difference instead of at 0.
    top = float(np.float32(1 / (1 + np.exp(-3.0))))
    abar = top - 1 / (1 + np.exp(-(u * 6 - 3)))
    return np.clip(1 - abar[1:] / abar[:-1], 0, 0.999)


def _schedule(betas: Table | None, T: int, name: str | None) -> dict[str, Any]:
    """Return the keys of the schedule that is asked for, or the file's, or the default."""
    if betas is None:
        return schedule_config(name or "sigmoid", T)
    for candidate in BETA_SCHEDULES if name is None else (name,):
        schedule = schedule_config(candidate, T)
        table = NoiseSchedule.from_config({"num_train_timesteps": T, **schedule})
        if np.allclose(table.betas, betas, rtol=1e-6, atol=0):
            return schedule
    if name is not None:
        raise ValueError(f"beta_schedule={name!r}: must be another, as the file's betas differ")
    return {"trained_betas": betas.tolist()}


def _objective(schedule: Mapping[str, Any], weight: Table | None, flags: LucidrainsFlags) -> str:
    """Return the objective that the file's loss weights show, or else that of the flags."""
    if weight is None:
        return flags.objective or "pred_v"
    snr = NoiseSchedule.from_config({"num_train_timesteps": len(weight), **schedule}).snr
    t = int(np.abs(snr - 1 / 3).argmin())
    tells = {"pred_noise": 1.0, "pred_x0": snr[t], "pred_v": snr[t] / (snr[t] + 1)}
    found = [name for name in tells if abs(tells[name] - weight[t]) < 1e-3 * weight[t]]
    if flags.objective is None and len(found) != 1:
        raise ValueError("objective=None: must be given, as the file's loss_weight fits no one")
    if found and flags.objective not in (None, *found):
        raise ValueError(f"objective={flags.objective!r}: must be {found[0]}, as the file says")
    return flags.objective or found[0]
