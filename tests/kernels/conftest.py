"""Devices, copies, and the rules by which results of kernels are judged."""

import pytest
import torch

from flashddpm import kernels
from flashddpm.kernels import Column, reference
from flashddpm.kernels.launch import INTERPRETED

U = 2.0**-24  # unit roundoff of float32
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
DIGITS = {torch.float16: 11, torch.bfloat16: 8}
LOWEST = {torch.float16: -14, torch.bfloat16: -126}  # exponent of the smallest normal number


class Rules:
    """What "equal" means. No rule is loosened to pass.

    The interpreter truncates float32 to bfloat16 where GPUs round, hence its one exception.
    """

    @staticmethod
    def same(actual: torch.Tensor, expected: torch.Tensor, truncates: bool = False) -> None:
        """Equal bit for bit, signs of zeros too; NaN equals NaN.

        With ``truncates``, bfloat16 under the interpreter may be one step nearer to zero.
        """
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        actual, expected = actual.detach().cpu(), expected.detach().cpu()
        nan = expected.isnan() if expected.is_floating_point() else torch.zeros_like(expected) > 0
        assert torch.equal(actual.isnan() if actual.is_floating_point() else nan, nan)
        if expected.dtype in BITS:
            actual = actual.contiguous().view(BITS[actual.dtype])
            expected = expected.contiguous().view(BITS[expected.dtype])
        off = expected.long() - actual.long()
        off = off.where(~nan, 0)
        if truncates and INTERPRETED and expected.dtype is torch.int16:
            off = off.where(off != 1, 0)
        assert not off.count_nonzero(), f"{off.count_nonzero()} of {off.numel()} elements differ"

    @staticmethod
    def close(actual: torch.Tensor, r64: torch.Tensor, terms: torch.Tensor, n: int) -> None:
        """Within n u times the terms' sum of the float64 result, and half a unit of the dtype."""
        bound = n * U * terms.double()
        if actual.dtype is not torch.float32:
            exponent = r64.abs().log2().floor().clamp(min=LOWEST[actual.dtype])
            unit = 2.0 ** (exponent - DIGITS[actual.dtype] + 1)
            truncated = INTERPRETED and actual.dtype is torch.bfloat16
            bound = bound + unit * (1.0 if truncated else 0.5)
        excess = (actual.detach().cpu().double() - r64).abs() - bound
        assert not excess.isnan().any() and (excess <= 0).all(), f"over by {excess.max():.3g}"

    @staticmethod
    def reduced(actual: torch.Tensor, r64: torch.Tensor, plain: torch.Tensor) -> None:
        """Relative error at most twice that of plain PyTorch in float32, or 1e-6."""
        error = ((actual.detach().cpu().double() - r64) / r64).abs()
        allowed = (2 * ((plain.double() - r64) / r64).abs()).clamp(min=1e-6)
        assert (error <= allowed).all(), f"relative errors {error} over {allowed}"


@pytest.fixture(scope="session")
def rules() -> Rules:
    return Rules()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def copy_of():
    """(arguments, device) -> a copy of them there, tensors with the same strides."""

    def copied(args: dict, device: str = "cpu") -> dict:
        result = {}
        for name, value in args.items():
            if isinstance(value, torch.Tensor):
                place = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=device
                )
                value = place.copy_(value.detach()).requires_grad_(value.requires_grad)
            result[name] = value
        return result

    return copied


class Guarded:
    """Memory with red zones: canaries around what may be written."""

    CANARY, ZONE = 12345.678, 64

    def __init__(self, size, stride, dtype, device, elements):
        self.whole = torch.full((elements + 2 * self.ZONE,), self.CANARY, dtype=dtype)
        self.whole = self.whole.to(device)
        self.view = self.whole.as_strided(size, stride, self.ZONE)

    @classmethod
    def around(cls, values: torch.Tensor, stride: int, device: str) -> "Guarded":
        """Return images, channels-last, with this stride from one to the next."""
        count, C, H, W = values.shape
        strides = (stride, 1, W * C, C)
        result = cls(values.shape, strides, values.dtype, device, count * stride)
        result.view.copy_(values)
        return result

    def check(self):
        """Nothing outside the view was written, between its rows neither."""
        outside = torch.ones(self.whole.shape, dtype=torch.bool)
        outside.as_strided(self.view.shape, self.view.stride(), self.ZONE).fill_(False)
        canary = torch.tensor(self.CANARY).to(self.whole.dtype)
        assert (self.whole.cpu()[outside] == canary).all(), "a red zone was written"


@pytest.fixture(scope="session", name="Guarded")
def _guarded():
    return Guarded


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Module of an operation -> list that collects red zones around each output it allocates."""

    def guard(module) -> list[Guarded]:
        made = []

        def empty_channels_last(like: torch.Tensor) -> torch.Tensor:
            B, C, H, W = like.shape
            n = C * H * W
            stride = (n, 1, W * C, C)
            made.append(Guarded(like.shape, stride, like.dtype, like.device, B * n))
            return made[-1].view

        monkeypatch.setattr(module, "empty_channels_last", empty_channels_last)
        return made

    return guard


IN_PLACE = ("x", "hist", "net_in", "nonfinite")


# name: (columns of the row, 0 where nothing is said; the row that follows)
STEPS = {
    "rest": ({}, 0),
    "ancestral": (dict(x0_xt=1.3, x0_out=-0.8, clip=1.0, c_x0=0.3, c_xt=0.68, sigma=0.2), 2),
    "second order": (dict(x0_xt=1.3, x0_out=-0.8, c_x0=0.55, c_xt=0.6, c_hist=-0.15), 3),
    "stochastic": (dict(x0_out=1.0, c_x0=0.5, c_xt=0.4, c_hist=-0.1, sigma=0.3), 4),
    "clipped": (dict(x0_xt=0.8, x0_out=-0.6, clip=0.7, c_x0=0.9, c_out=0.4), 5),
    "last": (dict(x0_xt=1.1, x0_out=-0.5, c_x0=1.0), 6),
    "finished": (dict(x0_xt=1.0, x0_out=1.0, c_x0=1.0, c_xt=1.0, sigma=1.0), 6),
    "all": (
        dict(x0_xt=1.2, x0_out=-0.9, c_x0=0.4, c_xt=0.5, c_out=0.1, c_hist=-0.2, sigma=0.3),
        3,
    ),
}


class State:
    """Arguments of a step on a device, with red zones around what is changed in place.

    A table begins with the row of rest; its other rows are given by name, each with the columns
    that are not 0 and the number of the row that follows. Lanes are given by slot.
    """

    STEPS = STEPS

    def __init__(
        self,
        device,
        shape=(3, 5, 7),
        names=("ancestral", "second order", "clipped", "all"),
        uncond=(-1, 5, -1, 4),
        cond=(2, 0, 3, 1),
        dtypes=(torch.float32, torch.float32),
        table=STEPS,
        noise=False,
        seed=0,
        change=None,
    ):
        draws = torch.Generator().manual_seed(seed)
        slots, lanes = len(names), max(*cond, *uncond) + 2  # the last lane is nobody's
        table = {"rest": ({}, 0)} | table
        self.names = list(table)
        columns = [column.name.lower() for column in Column]
        rows = [[row.get(name, 0.0) for name in columns] for row, _ in table.values()]

        def images(count, dtype=torch.float32):
            return torch.randn((count, *shape), generator=draws).to(dtype)

        n = images(1).numel()
        self.zones = {
            "x": Guarded.around(images(slots), -(-n // 16) * 16 + 16, device),
            "hist": Guarded.around(images(slots), -(-n // 16) * 16 + 32, device),
            "net_in": Guarded.around(images(lanes, dtypes[1]), n, device),
        }
        self.args = {name: zone.view for name, zone in self.zones.items()} | {
            "nonfinite": torch.zeros(slots, dtype=torch.int32),
            "out": images(lanes, dtypes[0]).contiguous(memory_format=torch.channels_last),
            "idx": torch.tensor([self.names.index(name) for name in names]),
            "seeds": torch.randint(-(2**63), 2**63 - 1, (slots,), generator=draws),
            "guidance": torch.rand(slots, generator=draws) * 4,
            "lane_cond": torch.tensor(cond[:slots], dtype=torch.int32),
            "lane_uncond": torch.tensor(uncond[:slots], dtype=torch.int32),
            "rows": torch.tensor(rows),
            "keys": torch.randint(0, 2**40, (len(rows),), generator=draws),
            "next": torch.tensor([follow for _, follow in table.values()]),
        }
        if noise:
            self.args["noise"] = images(slots).contiguous(memory_format=torch.channels_last)
        if change:
            change(self.args)
        for name, value in self.args.items():
            if name not in self.zones:
                self.args[name] = value.to(device)
        self.before = {name: self.args[name].clone() for name in IN_PLACE}

    def step(self, step=kernels.denoise_step):
        """Apply the step; return its results on the CPU."""
        assert step(**self.args) is None
        for zone in self.zones.values():
            zone.check()
        return {name: self.args[name].cpu() for name in IN_PLACE}


@pytest.fixture(scope="session", name="State")
def _state():
    return State


@pytest.fixture(scope="session")
def fast_step(device):
    """What State takes -> the results of the kernel."""
    return lambda **spec: State(device, **spec).step()


@pytest.fixture(scope="session")
def compared_step(device):
    """What State takes -> the results of the kernel, once they equal the reference's."""

    def compare(**spec):
        results = State(device, **spec).step()
        expected = State("cpu", **spec).step(reference.denoise_step)
        for name in IN_PLACE:
            Rules.same(results[name], expected[name], truncates=True)
        return results

    return compare


@pytest.fixture
def counted(monkeypatch):
    """Bytes of images that the interpreter loads and stores: every block, no single numbers."""
    import numpy as np
    from triton.runtime import interpreter

    counts = {"loaded": 0, "stored": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting(kind, pointers, mask):
        if pointers.data.size > 1:
            item = pointers.get_element_ty().primitive_bitwidth // 8
            counts[kind] += int(np.sum(mask.data)) * item

    def masked_load(self, ptrs, mask, *rest):
        counting("loaded", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        counting("stored", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    return counts
