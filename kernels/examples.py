"""Arguments of operations, for tests, counts of bytes and benchmarks: the same on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashddpm.kernels.launch import channels_last
from flashddpm.kernels.operation import Arguments, Shape
from flashddpm.kernels.tables import Column


class Draws:
    """Random arguments: drawn on the CPU, so that every device gets the same."""

    def __init__(self, device: str | torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return normal numbers, images in channels-last order."""
        values = torch.randn(shape, generator=self.generator).to(self.device, dtype)
        return channels_last(values) if len(shape) == 4 else values

    def integers(self, size: int, low: int, high: int) -> Tensor:
        """Return int64 [size] in [low, high)."""
        return torch.randint(low, high, (size,), generator=self.generator).to(self.device)

    def seeds(self, size: int) -> Tensor:
        """Return seeds of noise, int64 [size]."""
        return self.integers(size, -(2**63), 2**63 - 1)

    def keys(self, size: int) -> Tensor:
        """Return keys of noise, int64 [size]."""
        return self.integers(size, 0, 2**40)

    def table(self, rows: list[list[float]]) -> Tensor:
        """Return a table, float32 [R, columns]."""
        return torch.tensor(rows, dtype=torch.float32, device=self.device)


def image_bytes(images: Tensor) -> int:
    """Return the bytes of one image."""
    return images.itemsize * (images.shape[1] * images.shape[2] * images.shape[3])


def of_images(
    device: str | torch.device,
    dtype: torch.dtype,
    shape: Shape,
    batch: int,
    seed: int,
    *,
    rows: list[list[float]],
    outputs: int = 0,
    first: int = 0,
) -> Arguments:
    """Return x0, t, seeds, keys and rows of a batch of images that take the rows in turn.

    Args:
        device, dtype, shape, batch, seed: as in ``Op.example``.
        rows: of the table.
        outputs: how many times the channels of an image a network's output, ``out``, has; 0 for
            none, which stands before x0.
        first: row of the first image.
    """
    draws = Draws(device, seed)
    C, H, W = shape
    out = {"out": draws.normal((batch, outputs * C, H, W), dtype)} if outputs else {}
    return out | {
        "x0": draws.normal((batch, *shape), dtype),
        "t": torch.arange(first, first + batch, device=device) % len(rows),
        "seeds": draws.seeds(batch),
        "keys": draws.keys(batch),
        "rows": draws.table(rows),
    }


def on_row(row: list[float]) -> Callable[[Arguments], Arguments]:
    """Return what gives every image this one row (``ByteCase.change``)."""
    return lambda args: {"t": torch.zeros_like(args["t"]), "rows": torch.tensor([row])}


def step_row(**columns: float) -> list[float]:
    """Return a row of a step, 0 in the columns that are not given."""
    return [columns.get(column.name.lower(), 0.0) for column in Column]


STEPS = [
    step_row(),
    step_row(x0_xt=1.25, x0_out=-0.75, clip=1.0, c_x0=0.3, c_xt=0.68, sigma=0.2),  # ancestral
    step_row(x0_xt=1.25, x0_out=-0.75, c_x0=0.55, c_xt=0.6, c_hist=-0.15),  # second order
    step_row(x0_xt=0.8, x0_out=-0.6, clip=1.0, c_x0=0.9, c_out=0.4),  # DDIM, clipped
    step_row(x0_xt=1.25, x0_out=-0.75, clip=1.5, threshold=0.9, rescale=0.7, c_x0=0.3, c_xt=0.6),
]
FOLLOW = [0, 2, 3, 0, 0]


def of_slots(
    device: str | torch.device, dtype: torch.dtype, shape: Shape, batch: int, seed: int
) -> Arguments:
    """Return the tensors of a step, by name: slots take ``STEPS`` in turn, every second is guided.

    Arguments are those of ``Op.example``.
    """
    draws = Draws(device, seed)
    slot = torch.arange(batch, device=device, dtype=torch.int32)
    lanes = batch + batch // 2
    return {
        "x": draws.normal((batch, *shape)),
        "hist": draws.normal((batch, *shape)),
        "net_in": draws.normal((lanes, *shape), dtype),
        "nonfinite": torch.zeros_like(slot),
        "out": draws.normal((lanes, *shape), dtype),
        "idx": torch.arange(1, batch + 1, device=device) % len(STEPS),
        "seeds": draws.seeds(batch),
        "guidance": 1.5 + 0.25 * slot,
        "lane_cond": slot,
        "lane_uncond": torch.where(slot % 2 == 1, batch + slot // 2, -1).int(),
        "dynamic_threshold": 1.0 + 0.125 * slot,
        "rescale_factor": 1.0 - 0.03125 * slot,
        "rows": draws.table(STEPS),
        "keys": draws.keys(len(STEPS)),
        "next": torch.tensor(FOLLOW, device=device),
    }


def on_step(
    *, guided: bool = False, following: bool = False, **columns: float
) -> Callable[[Arguments], Arguments]:
    """Return what gives every slot one row of these columns (``ByteCase.change``).

    Args:
        guided: whether slots have two lanes.
        following: whether the next row reads the history.
        columns: that are not 0.
    """

    def change(args: Arguments) -> Arguments:
        S = len(args["idx"])
        lanes = torch.arange(2 * S, dtype=torch.int32)
        first = torch.zeros(2 * S if guided else S, dtype=torch.int64)
        rows = [step_row(), step_row(**columns), step_row(c_hist=float(following))]
        images = {name: args[name][first] for name in ("net_in", "out") if name in args}
        changed: Arguments = {name: channels_last(x) for name, x in images.items()} | {
            "idx": torch.ones(S, dtype=torch.int64),
            "lane_cond": lanes[:S],
            "lane_uncond": lanes[S:] if guided else torch.full((S,), -1, dtype=torch.int32),
            "rows": torch.tensor(rows),
            "keys": torch.arange(3),
            "next": torch.tensor([0, 2, 0]),
        }
        return {name: value for name, value in changed.items() if name in args}

    return change


def learned_range(out: Tensor) -> tuple[Tensor, Tensor]:
    """Return prediction and log variance of an output of 2C channels, as eager PyTorch does it.

    The logarithm is a mix of two, here of -2 and -3 (Nichol & Dhariwal 2021, eq. 15).
    """
    prediction, v = out.chunk(2, dim=1)
    fraction = (v.float() + 1) / 2
    return prediction, fraction * -2.0 + (1 - fraction) * -3.0
