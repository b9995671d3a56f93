"""Example arguments of operations for tests and benchmarks, the same on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashddpm.kernels.launch import channels_last
from flashddpm.kernels.operation import Arguments, Shape
from flashddpm.kernels.tables import Column


class ExampleDraws:
    """A source of random tensors, drawn on the CPU so that every device gets the same numbers.

    Args:
        device: the device on which the tensors are returned.
        seed: the seed of the random numbers.

    Attributes:
        device: the device on which the tensors are returned.
        generator: the CPU ``torch.Generator`` of all numbers, which each call of a method that
            draws advances.
    """

    def __init__(self, device: str | torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal numbers of a given shape; 4-D tensors are channels-last.

        Args:
            shape: the shape of the tensor.
            dtype: the dtype to which the numbers, drawn in float32, are rounded.
        """
        values = torch.randn(shape, generator=self.generator).to(self.device, dtype)
        return channels_last(values) if len(shape) == 4 else values

    def integers(self, size: int, low: int, high: int) -> Tensor:
        """Return uniform random integers in [low, high), int64 [size].

        Raises:
            RuntimeError: if low >= high.
        """
        return torch.randint(low, high, (size,), generator=self.generator).to(self.device)

    def seeds(self, size: int) -> Tensor:
        """Return random seeds of noise, int64 [size], in [-2^63, 2^63 - 1)."""
        return self.integers(size, -(2**63), 2**63 - 1)

    def keys(self, size: int) -> Tensor:
        """Return random keys of noise (upper 64 bits of the counter), int64 [size] in [0, 2^40)."""
        return self.integers(size, 0, 2**40)

    def table(self, rows: list[list[float]]) -> Tensor:
        """Return a table of coefficients as a tensor, float32 [R, columns].

        Args:
            rows: R lists of one number a column; ValueError if their lengths differ.
        """
        return torch.tensor(rows, dtype=torch.float32, device=self.device)


def image_bytes(images: Tensor) -> int:
    """Return the bytes of one image of a batch [B, C, H, W], of any dtype; B may be 0."""
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
    """Return example arguments of an operation on images; image i has row (first + i) mod R.

    A row is one line of the table of R rows of coefficients.

    Args:
        device: the device of the tensors.
        dtype: the dtype of the images and of the network's output.
        shape: (C, H, W) of one image.
        batch: the number of images B.
        seed: the seed of the random numbers.
        rows: the table of coefficients, a list of numbers for each row.
        outputs: how many times the channels of an image the network's output ``out`` has; 0 for an
            operation that takes no output.
        first: the index of the row of the first image.

    Returns:
        The arguments by name: "out", [B, outputs C, H, W], if outputs is not 0; "x0", [B, C, H, W];
        "t", "seeds" and "keys", int64 [B], the row, the noise seed and the noise key of each image;
        "rows", float32 [R, columns]. Images and output are standard normal numbers, channels-last.
    """
    draws = ExampleDraws(device, seed)
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
    """Return a function that gives every image the same coefficients, for ``ByteCase.change``.

    Args:
        row: the coefficients, a number for each column of the operation's table.

    Returns:
        A function of an operation's arguments, which are on the CPU; it returns the arguments that
        differ: "t", int64 zeros [B], and "rows", float32 [1, columns].
    """
    return lambda args: {"t": torch.zeros_like(args["t"]), "rows": torch.tensor([row])}


def step_row(**columns: float) -> list[float]:
    """Return the coefficients of one step, a number for each ``Column``.

    Args:
        columns: coefficients by the column's name in lower case, such as c_x0; the others are 0,
            and names of no column are ignored.
    """
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
    """Return the example tensors of a sampling step by name; every second slot is guided.

    A slot is the place of one image in a batch; slots take the five rows (a row is one step's
    coefficients) of ``STEPS`` in turn, from row 1 on. Slots 1, 3, ... are guided: they have two
    lanes (a lane is one evaluation of the network).

    Args:
        device: the device of the tensors.
        dtype: the dtype of the network's input and output; states are float32.
        shape: (C, H, W) of one image.
        batch: the number S of slots.
        seed: the seed of the random numbers.

    Returns:
        The fields of ``StepState``, ``StepSlots``, ``StepStatistics`` and ``StepTable`` by their
        names, and "out", the network's output, [L, C, H, W], for L = S + S // 2 lanes.
    """
    draws = ExampleDraws(device, seed)
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
    """Return a function that gives every slot the same step, for ``ByteCase.change``.

    A slot is the place of one image in a batch.

    Args:
        guided: whether slots have two lanes (a lane is one evaluation of the network), or one.
        following: whether the next step reads the history (c_hist = 1), so that this one writes it.
        columns: the step's coefficients by the column's name in lower case, such as c_x0; the
            others are 0, and names of no column are ignored.

    Returns:
        A function of a step's tensors by name (``of_slots``), on the CPU; it returns those that
        differ, of the names that it is given: "idx", "lane_cond" and "lane_uncond"; "rows", "keys"
        and "next", a table of three rows; and "net_in" and "out" with the first image repeated for
        every lane.
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
    """Return the prediction and log variance of an output of 2C channels, in eager PyTorch.

    The log variance is a mix of two bounds, here -2 f - 3 (1 - f) with f = (v + 1) / 2 (Nichol &
    Dhariwal 2021, eq. 15).

    Args:
        out: [B, 2C, H, W], float32, float16 or bfloat16; the second C channels are v in [-1, 1].

    Returns:
        The prediction, [B, C, H, W], a view in out's dtype; and the log variance, float32 [B, C, H,
        W].
    """
    prediction, v = out.chunk(2, dim=1)
    fraction = (v.float() + 1) / 2
    return prediction, fraction * -2.0 + (1 - fraction) * -3.0
