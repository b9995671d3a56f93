"""Every operation with its reference, example arguments and bytes, for tests and benchmarks.

One test and one benchmark loop over ``OPS``, so that a new operation gets both by its entry here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.add_noise import add_noise
from flashddpm.kernels.advance import advance
from flashddpm.kernels.denoise_step import denoise_step
from flashddpm.kernels.diffusion_loss import diffusion_loss
from flashddpm.kernels.hybrid_loss import hybrid_loss
from flashddpm.kernels.philox import philox
from flashddpm.kernels.sample_stats import sample_stats
from flashddpm.kernels.tables import FLOATS, Column, LossColumn, VlbColumn
from flashddpm.kernels.vlb_terms import vlb_terms

Arguments = dict[str, Any]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        name: of the operation, its file and its test.
        fast, reference: the two functions, of one signature.
        example: (device, dtype, shape (C, H, W), batch, seed) -> arguments by name; the same
            numbers on every device.
        bytes_moved: arguments -> bytes of images that one call reads and writes (for ``advance``,
            of slots); the few numbers of each image are left out.
        mutates: names of the arguments that are changed in place.
        differentiable: names of the arguments that have a gradient.
        dtypes: of the images.
    """

    name: str
    fast: Callable[..., Tensor | None]
    reference: Callable[..., Tensor | None]
    example: Callable[[str | torch.device, torch.dtype, Shape, int, int], Arguments]
    bytes_moved: Callable[[Arguments], int]
    mutates: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


class _Draws:
    """Random arguments: drawn on the CPU, so that every device gets the same."""

    def __init__(self, device: str | torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return normal numbers, images in channels-last order."""
        values = torch.randn(shape, generator=self.generator).to(self.device, dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def integers(self, size: int, low: int, high: int) -> Tensor:
        """Return int64 [size] in [low, high)."""
        return torch.randint(low, high, (size,), generator=self.generator).to(self.device)

    def table(self, rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=self.device)


def _philox_example(device, dtype: torch.dtype, shape: Shape, batch: int, seed: int) -> Arguments:
    draws = _Draws(device, seed)
    return {
        "seeds": draws.integers(batch, -(2**63), 2**63 - 1),
        "keys": draws.integers(batch, 0, 2**40),
        "shape": shape,
    }


def _philox_bytes(args: Arguments) -> int:
    C, H, W = args["shape"]
    return 4 * len(args["seeds"]) * C * H * W


NOISING = [[1.0, 0.0], [0.8, 0.6], [0.28, 0.96], [0.0, 1.0]]
TARGETS = [[0.0, 1.0, 1.0], [-0.6, 0.8, 0.5], [1.0, 0.0, 2.0]]


def _add_noise_example(
    device, dtype: torch.dtype, shape: Shape, batch: int, seed: int
) -> Arguments:
    draws = _Draws(device, seed)
    return {
        "x0": draws.normal((batch, *shape), dtype),
        "t": torch.arange(1, batch + 1, device=device) % len(NOISING),
        "seeds": draws.integers(batch, -(2**63), 2**63 - 1),
        "keys": draws.integers(batch, 0, 2**40),
        "rows": draws.table(NOISING),
    }


def _add_noise_bytes(args: Arguments) -> int:
    x0 = args["x0"]
    read = (args["rows"][args["t"], 0] != 0).sum().item()
    return (len(x0) + read) * _image_bytes(x0)


def _diffusion_loss_example(
    device, dtype: torch.dtype, shape: Shape, batch: int, seed: int
) -> Arguments:
    draws = _Draws(device, seed)
    return {
        "out": draws.normal((batch, *shape), dtype),
        "x0": draws.normal((batch, *shape), dtype),
        "t": torch.arange(batch, device=device) % len(TARGETS),
        "seeds": draws.integers(batch, -(2**63), 2**63 - 1),
        "keys": draws.integers(batch, 0, 2**40),
        "rows": draws.table(TARGETS),
    }


def _diffusion_loss_bytes(args: Arguments) -> int:
    read = (args["rows"][args["t"], 0] != 0).sum().item()
    return len(args["out"]) * _image_bytes(args["out"]) + read * _image_bytes(args["x0"])


HYBRID = [
    [0.0, 1.0, 1.0, 1.5, 0.7, 0.6, -0.4, 3.0, 0.0],
    [-0.6, 0.8, 0.5, 1.5, 0.1, 0.2, -0.3, 2.0, 0.0],
    [0.0, 1.0, 1.0, 1.5, 0.9, 0.8, -0.02, 60.0, 1 / 255],  # the decoder's
]


def _hybrid_loss_example(
    device, dtype: torch.dtype, shape: Shape, batch: int, seed: int
) -> Arguments:
    draws = _Draws(device, seed)
    C, H, W = shape
    return {
        "out": draws.normal((batch, 2 * C, H, W), dtype),
        "x0": draws.normal((batch, *shape), dtype).clamp(-1, 1),
        "t": torch.arange(batch, device=device) % len(HYBRID),
        "seeds": draws.integers(batch, -(2**63), 2**63 - 1),
        "keys": draws.integers(batch, 0, 2**40),
        "rows": draws.table(HYBRID),
    }


def _hybrid_loss_bytes(args: Arguments) -> int:
    rows = args["rows"][args["t"]]
    read = (rows[:, LossColumn.X0] != 0).sum() + (rows[:, LossColumn.HALF_BIN] != 0).sum()
    return args["out"].numel() * args["out"].itemsize + int(read) * _image_bytes(args["x0"])


VLB = [
    [-0.6, 0.8, 1.0, -0.6, 0.8, 0.0, 0.7, 0.6, 0.9, 0.0],  # v, a learned variance
    [0.0, 1.0, 1.0, -0.75, 1.0, 1.0, 0.3, 0.0, 2.0, 0.0],  # eps, clipped
    [0.0, 1.0, 1.0, -0.03, 1.0, 1.0, 0.2, 0.5, 30.0, 0.12],  # the decoder's
    [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.02, 0.0, 0.1, 0.0],  # the prior's
]


def _vlb_terms_example(
    device, dtype: torch.dtype, shape: Shape, batch: int, seed: int
) -> Arguments:
    args = _hybrid_loss_example(device, dtype, shape, batch, seed)
    args["t"] = torch.arange(batch, device=device) % len(VLB)
    return args | {"rows": _Draws(device, seed).table(VLB)}


def _vlb_terms_bytes(args: Arguments) -> int:
    out, rows = args["out"], args["rows"][args["t"]]
    used = [VlbColumn.X0, VlbColumn.CLIP, VlbColumn.HALF_BIN]
    read = (rows[:, used] != 0).any(1).sum()
    predictions = (rows[:, VlbColumn.OUT] != 0).sum()
    if out.shape[1] != args["x0"].shape[1]:
        predictions += (rows[:, VlbColumn.SLOPE] != 0).sum()
    n = args["x0"][0].numel()
    return n * (int(read) * args["x0"].itemsize + int(predictions) * out.itemsize)


def _step_row(**columns: float) -> list[float]:
    return [columns.get(column.name.lower(), 0.0) for column in Column]


STEPS = [
    _step_row(),
    _step_row(x0_xt=1.25, x0_out=-0.75, clip=1.0, c_x0=0.3, c_xt=0.68, sigma=0.2),  # ancestral
    _step_row(x0_xt=1.25, x0_out=-0.75, c_x0=0.55, c_xt=0.6, c_hist=-0.15),  # second order
    _step_row(x0_xt=0.8, x0_out=-0.6, clip=1.0, c_x0=0.9, c_out=0.4),  # DDIM, clipped
    _step_row(x0_xt=1.25, x0_out=-0.75, clip=1.5, threshold=0.9, rescale=0.7, c_x0=0.3, c_xt=0.6),
]
FOLLOW = [0, 2, 3, 0, 0]


def _denoise_step_example(
    device, dtype: torch.dtype, shape: Shape, batch: int, seed: int
) -> Arguments:
    """Slots take the rows of STEPS in turn, the rest row too; every second slot is guided."""
    draws = _Draws(device, seed)
    slot = torch.arange(batch, device=device, dtype=torch.int32)
    lanes = batch + batch // 2
    return {
        "x": draws.normal((batch, *shape)),
        "hist": draws.normal((batch, *shape)),
        "net_in": draws.normal((lanes, *shape), dtype),
        "nonfinite": torch.zeros_like(slot),
        "out": draws.normal((lanes, *shape), dtype),
        "idx": torch.arange(1, batch + 1, device=device) % len(STEPS),
        "seeds": draws.integers(batch, -(2**63), 2**63 - 1),
        "guidance": 1.5 + 0.25 * slot,
        "lane_cond": slot,
        "lane_uncond": torch.where(slot % 2 == 1, batch + slot // 2, -1).int(),
        "bounds": 1.0 + 0.125 * slot,
        "factors": 1.0 - 0.03125 * slot,
        "rows": draws.table(STEPS),
        "keys": draws.integers(len(STEPS), 0, 2**40),
        "next": torch.tensor(FOLLOW, device=device),
    }


def _denoise_step_bytes(args: Arguments) -> int:
    n = _image_bytes(args["x"]) // 4
    lane = args["out"].itemsize + args["net_in"].itemsize
    rows, follow = args["rows"].tolist(), args["next"].tolist()
    learns = args["out"].shape[1] != args["x"].shape[1]
    total = 0
    for i, uncond in zip(args["idx"].tolist(), args["lane_uncond"].tolist(), strict=True):
        if follow[i] == i:
            continue
        total += 8 * n + lane * n * (2 if uncond >= 0 else 1)
        total += 4 * n * (rows[i][Column.C_HIST] != 0)
        total += 4 * n * (rows[follow[i]][Column.C_HIST] != 0)
        draws = rows[i][Column.SIGMA] != 0
        total += 4 * n * (args.get("noise") is not None and draws)
        total += args["out"].itemsize * n * (learns and draws and rows[i][Column.LOG_SIGMA] != 0)
    return total


def _sample_stats_example(
    device, dtype: torch.dtype, shape: Shape, batch: int, seed: int
) -> Arguments:
    """The arguments of a step, every slot on the row that asks for both, or at rest."""
    args = _denoise_step_example(device, dtype, shape, batch, seed)
    args["idx"] = torch.where(args["idx"] != 0, len(STEPS) - 1, 0)
    return {name: args[name] for name in inspect.signature(sample_stats).parameters}


def _sample_stats_bytes(args: Arguments) -> int:
    """Of every pass: two over the lanes for the factor, five over lanes and x for the bound."""
    n = _image_bytes(args["x"]) // 4
    rows = args["rows"][args["idx"]].tolist()
    total = 0
    for row, i, uncond in zip(
        rows, args["idx"].tolist(), args["lane_uncond"].tolist(), strict=True
    ):
        if args["next"][i] == i:
            continue
        item = args["out"].itemsize
        guided = uncond >= 0
        # The factor's passes read the conditional lane for itself and for the combination.
        total += 2 * 3 * item * n * (row[Column.RESCALE] != 0 and guided)
        total += 5 * (4 + item * (2 if guided else 1)) * n * (row[Column.THRESHOLD] != 0)
    return total


def _advance_example(device, dtype: torch.dtype, shape: Shape, batch: int, seed: int) -> Arguments:
    draws = _Draws(device, seed)
    return {
        "idx": draws.integers(batch, 0, 50),
        "next": draws.integers(50, 0, 50),
    }


def _advance_bytes(args: Arguments) -> int:
    return 24 * len(args["idx"])


def _image_bytes(images: Tensor) -> int:
    """Return the bytes of one image."""
    return images.itemsize * (images.shape[1] * images.shape[2] * images.shape[3])


_ops = (
    Op("philox", philox, reference.philox, _philox_example, _philox_bytes),
    Op(
        "add_noise",
        add_noise,
        reference.add_noise,
        _add_noise_example,
        _add_noise_bytes,
        differentiable=("x0",),
        dtypes=FLOATS,
    ),
    Op(
        "diffusion_loss",
        diffusion_loss,
        reference.diffusion_loss,
        _diffusion_loss_example,
        _diffusion_loss_bytes,
        differentiable=("out",),
        dtypes=FLOATS,
    ),
    Op(
        "hybrid_loss",
        hybrid_loss,
        reference.hybrid_loss,
        _hybrid_loss_example,
        _hybrid_loss_bytes,
        differentiable=("out",),
        dtypes=FLOATS,
    ),
    Op(
        "sample_stats",
        sample_stats,
        reference.sample_stats,
        _sample_stats_example,
        _sample_stats_bytes,
        mutates=("bounds", "factors"),
        dtypes=FLOATS,
    ),
    Op(
        "denoise_step",
        denoise_step,
        reference.denoise_step,
        _denoise_step_example,
        _denoise_step_bytes,
        mutates=("x", "hist", "net_in", "nonfinite"),
        dtypes=FLOATS,
    ),
    Op(
        "vlb_terms",
        vlb_terms,
        reference.vlb_terms,
        _vlb_terms_example,
        _vlb_terms_bytes,
        dtypes=FLOATS,
    ),
    Op(
        "advance",
        advance,
        reference.advance,
        _advance_example,
        _advance_bytes,
        mutates=("idx",),
        dtypes=(torch.int64,),
    ),
)
OPS = {op.name: op for op in _ops}
