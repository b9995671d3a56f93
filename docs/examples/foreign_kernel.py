"""The battery on somebody else's kernel: right, and with three planted bugs.

The kernel is the preconditioning of Karras et al. 2022, eq. 7: D_b = c_skip_b x_b + c_out_b F_b for
each sample b. Its reference is one line of PyTorch, ``arguments`` says what it is called with, and
``check_op`` does the rest. Run this file to see which check finds which bug.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: run on the CPU

import triton
import triton.language as tl

from flashddpm.testing import CheckFailed, KernelCode, check_op

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # each product and sum rounded, as in PyTorch


@triton.jit
def _precondition_kernel(
    denoised,  # [B, n], written
    x,  # [B, n]
    out,  # [B, n]
    c_skip,  # float32 [B]
    c_out,  # float32 [B]
    n,  # elements of a sample
    MASKED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < n - block
    start = sample * n + block
    skip = tl.load(c_skip + sample)
    scale = tl.load(c_out + sample)
    a = tl.load(x + start + offsets, mask=inside, other=0).to(tl.float32)
    b = tl.load(out + start + offsets, mask=inside, other=0).to(tl.float32)
    value = skip * a + scale * b
    if ADDS:  # bug: new memory need not hold 0
        value += tl.load(denoised + start + offsets, mask=inside, other=0).to(tl.float32)
    value = value.to(denoised.dtype.element_ty)
    if MASKED:
        tl.store(denoised + start + offsets, value, mask=inside)
    else:  # bug: the last block writes behind the sample
        tl.store(denoised + start + offsets, value)


def make(name: str, masked: bool = True, adds: bool = False, skips: bool = True):
    """Return the operation under this name: right, or with one of the bugs."""

    @torch.library.custom_op(f"foreign::{name}", mutates_args=())
    def operator(
        x: torch.Tensor, out: torch.Tensor, c_skip: torch.Tensor, c_out: torch.Tensor
    ) -> torch.Tensor:
        x, out = x.contiguous(), out.contiguous()
        denoised = torch.empty_like(x)
        if x.numel():
            n = x[0].numel()
            grid = (len(x), triton.cdiv(n, BLOCK))
            _precondition_kernel[grid](
                denoised, x, out, c_skip, c_out, n, masked, adds, BLOCK, **OPTIONS
            )
        return denoised

    @operator.register_fake
    def _(x, out, c_skip, c_out):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    def backward(ctx, grad):
        """Each gradient is the coefficient times that of the result."""
        skip, scale = (c.reshape(-1, *[1] * (grad.ndim - 1)) for c in ctx.saved_tensors)
        d_x = skip * grad if skips else torch.zeros_like(grad)  # bug: D depends on x too
        return d_x.to(grad.dtype), (scale * grad).to(grad.dtype), None, None

    operator.register_autograd(backward, setup_context=setup_context)

    def precondition(x, out, c_skip, c_out):
        for name, tensor in (("c_skip", c_skip), ("c_out", c_out)):
            if not tensor.is_contiguous():
                raise ValueError(f"{name} of strides {tensor.stride()}: must be contiguous")
        return operator(x, out, c_skip, c_out)

    return precondition


def reference(x, out, c_skip, c_out):
    """Return c_skip x + c_out out, in float32 (float64 of float64), in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    skip, scale = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in (c_skip, c_out))
    return (skip * x.to(wide) + scale * out.to(wide)).to(x.dtype)


def arguments(device, dtype, shape, batch, seed):
    """Return random samples and coefficients."""
    draws = torch.Generator().manual_seed(seed)
    x, out = (torch.randn((batch, *shape), generator=draws).to(device, dtype) for _ in "xo")
    c_skip, c_out = (torch.rand(batch, generator=draws) for _ in "so")
    return {"x": x, "out": out, "c_skip": c_skip.to(device), "c_out": c_out.to(device)}


CODE = KernelCode(
    _precondition_kernel,
    signature=dict.fromkeys(("denoised", "x", "out", "c_skip", "c_out"), "*fp32:16")
    | {"n": "i32:16"},
    constants={"MASKED": 1, "ADDS": 0, "BLOCK": BLOCK},
    images=("denoised", "x", "out"),
    options=OPTIONS,
)
OPERATIONS = {
    "right": make("right"),
    "no mask": make("no_mask", masked=False),
    "adds to its output": make("adds", adds=True),
    "forgets the skip": make("forgets_the_skip", skips=False),
}


def failures(operation, **options) -> dict[str, str]:
    """Return which checks the operation fails, and why."""
    try:
        check_op(operation, reference, arguments, differentiable=("x", "out"), **options)
    except CheckFailed as failed:
        return {name: str(why) for name, (_, why) in failed.failures.items()}
    return {}


if __name__ == "__main__":
    for name, operation in OPERATIONS.items():
        options = {"kernels": [CODE]} if name == "right" else {}
        found = failures(operation, examples=10, **options)
        print(f"{name}: fails {', '.join(found) or 'no check'}")
        for check, why in found.items():
            print(f"    {check}: {why.splitlines()[0][:150]}")
