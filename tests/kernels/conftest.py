"""Devices, copies, and the rules by which results of kernels are judged."""

import importlib

import pytest
import torch

INTERPRETED = importlib.import_module("flashddpm.kernels.launch").INTERPRETED
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

    def check(self):
        """Nothing outside the view was written, between its rows neither."""
        outside = torch.ones(self.whole.shape, dtype=torch.bool)
        outside.as_strided(self.view.shape, self.view.stride(), self.ZONE).fill_(False)
        canary = torch.tensor(self.CANARY).to(self.whole.dtype)
        assert (self.whole.cpu()[outside] == canary).all(), "a red zone was written"


@pytest.fixture(scope="session")
def guarded():
    """(values, row stride, device) -> Guarded, holding the values channels-last."""

    def guard(values: torch.Tensor, stride: int, device: str) -> Guarded:
        count, C, H, W = values.shape
        result = Guarded(values.shape, (stride, 1, W * C, C), values.dtype, device, count * stride)
        result.view.copy_(values)
        return result

    return guard


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
