"""What the fused operations replace: the same steps in eager PyTorch, and the bytes they move.

Each chain is what a user would write, after diffusers' schedulers and training scripts, with
``torch.randn`` for the noise. They take the arguments of the operation of the registry and ignore
those that they have no use for. Numbers stand for coefficients: of ``sample_stats`` those of the
registry's row that asks for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def noise(seeds: Tensor, shape: tuple[int, int, int], **_: Any) -> Tensor:
    """Draw noise."""
    return torch.randn(len(seeds), *shape)


def _column(rows: Tensor, t: Tensor, column: int, dtype: torch.dtype) -> Tensor:
    return rows[t, column].to(dtype).reshape(-1, 1, 1, 1)


def add_noise(x0: Tensor, t: Tensor, rows: Tensor, **_: Any) -> Tensor:
    """Draw noise, scale the images and the noise, add: in the images' dtype."""
    eps = torch.randn_like(x0)
    return _column(rows, t, 0, x0.dtype) * x0 + _column(rows, t, 1, x0.dtype) * eps


def epsilon_loss(out: Tensor, x0: Tensor, t: Tensor, rows: Tensor, **_: Any) -> Tensor:
    """Squared error in float32 against the noise, which add_noise had to keep (here: x0)."""
    error = F.mse_loss(out.float(), x0.float(), reduction="none")
    return rows[t, 2] * error.mean(dim=(1, 2, 3))


def velocity_loss(out: Tensor, x0: Tensor, t: Tensor, rows: Tensor, **_: Any) -> Tensor:
    """The same against v = a eps - b x0; eps, which add_noise had to keep, has x0's shape."""
    eps = x0.detach()
    target = _column(rows, t, 1, x0.dtype) * eps + _column(rows, t, 0, x0.dtype) * x0
    return epsilon_loss(out, target, t, rows)


def ancestral_step(x: Tensor, out: Tensor, **_: Any) -> Tensor:
    """DDPM's step: x0 from the output, clipped; the posterior's mean; noise; the next input."""
    x0 = ((x - 0.6 * out[: len(x)].float()) / 0.8).clamp(-1, 1)
    x_next = 0.3 * x0 + 0.68 * x + 0.2 * torch.randn_like(x)
    return x_next.to(out.dtype)


def guided_step(x: Tensor, out: Tensor, guidance: Tensor, **_: Any) -> Tensor:
    """The same of two outputs combined; both lanes get the next input."""
    cond, uncond = out.chunk(2)
    combined = uncond + guidance.to(out.dtype).reshape(-1, 1, 1, 1) * (cond - uncond)
    return torch.cat([ancestral_step(x, combined)] * 2)


def multistep(x: Tensor, hist: Tensor, out: Tensor, **_: Any) -> Tensor:
    """DPM-Solver++(2M)'s step: x0, which the next step reads; x0 extrapolated; the next input."""
    x0 = (x - 0.6 * out[: len(x)].float()) / 0.8
    x_next = 0.6 * x + 0.4 * (1.5 * x0 - 0.5 * hist)
    return x_next.to(out.dtype)


def learned_step(x: Tensor, out: Tensor, **_: Any) -> Tensor:
    """The ancestral step with a learned range: the noise's size is the exponential of a mix."""
    prediction, v = out.chunk(2, dim=1)
    fraction = (v.float() + 1) / 2
    sigma = torch.exp(0.5 * (fraction * -2.0 + (1 - fraction) * -3.0))
    x0 = ((x - 0.6 * prediction.float()) / 0.8).clamp(-1, 1)
    x_next = 0.3 * x0 + 0.68 * x + sigma * torch.randn_like(x)
    return x_next.to(out.dtype)


def hybrid_loss(out: Tensor, x0: Tensor, t: Tensor, rows: Tensor, **_: Any) -> Tensor:
    """The error's square, and the divergence of the learned from the true posterior."""
    prediction, v = out.chunk(2, dim=1)
    fraction = (v.float() + 1) / 2
    log_variance = fraction * -2.0 + (1 - fraction) * -3.0
    shift = 0.1 * (prediction.detach().float() - x0.float())  # of the means; the noise: here x0
    bound = 0.5 * (2.0 + log_variance + torch.exp(-3.0 - log_variance))
    bound = bound + 0.5 * shift**2 * torch.exp(-log_variance)
    return epsilon_loss(prediction, x0, t, rows) + bound.mean(dim=(1, 2, 3))


def _bound(prediction: Tensor, log_variance: Tensor | float, x0: Tensor) -> list[Tensor]:
    """The divergence of two normals and the errors of x0 and eps; the noise and x_t: here x0."""
    predicted = ((x0.float() - 0.6 * prediction.float()) / 0.8).clamp(-1, 1)
    variance = torch.as_tensor(log_variance)
    mean, wanted = (0.3 * x + 0.68 * x0.float() for x in (predicted, x0.float()))
    term = 0.5 * (2.0 + variance + torch.exp(-3.0 - variance))
    term = term + 0.5 * (mean - wanted) ** 2 * torch.exp(-variance)
    errors = (predicted - x0.float()) ** 2, (prediction.float() - x0.float()) ** 2
    return [value.mean(dim=(1, 2, 3)) for value in (term, *errors)]


def bound_term(out: Tensor, x0: Tensor, **_: Any) -> list[Tensor]:
    """A term of the bound: x0 from the output, clipped; the means; their divergence; errors."""
    return _bound(out, -2.0, x0)


def learned_bound_term(out: Tensor, x0: Tensor, **_: Any) -> list[Tensor]:
    """The same with a learned range."""
    prediction, v = out.chunk(2, dim=1)
    fraction = (v.float() + 1) / 2
    return _bound(prediction, fraction * -2.0 + (1 - fraction) * -3.0, x0)


def sample_stats(x: Tensor, out: Tensor, guidance: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """The bounds: a quantile of |x0|, clamped; the factors: a ratio of deviations, mixed with 1.

    The first lanes are the conditional ones, the last the others; of fewer than two an image (the
    registry's example guides every second) some are both.
    """
    cond, uncond = out[: len(x)], out[-len(x) :]
    combined = uncond + guidance.to(out.dtype).reshape(-1, 1, 1, 1) * (cond - uncond)
    ratio = cond.std(dim=(1, 2, 3)) / combined.std(dim=(1, 2, 3))
    factors = 0.7 * ratio.float() + 0.3
    x0 = (x - 0.6 * factors.reshape(-1, 1, 1, 1) * combined.float()) / 0.8
    ordered = x0.abs().flatten(1).sort(1).values  # torch.quantile is not traced by torch 2.11
    place = 0.9 * (ordered.shape[1] - 1)
    low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
    bounds = torch.lerp(low, high, place % 1)
    return bounds.clamp(1.0, 1.5), factors


FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")
OVERWRITTEN = ("copy_", "normal_", "fill_", "zero_")


def _elements(tensor: Tensor) -> int:
    """Return how many elements stand in memory: a broadcast dimension is one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or size == 0)


class _Bytes(TorchDispatchMode):
    """Adds up what each operator reads and writes; views are free."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.total = smallest, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        read = {id(x): x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        changes = name.endswith("_")
        storages = {x.untyped_storage().data_ptr() for x in read.values()}
        shares = any(x.untyped_storage().data_ptr() in storages for x in made)
        if name in FREE or (shares and not changes):
            return result
        if name in OVERWRITTEN:
            read.pop(id(args[0]))
        elif name.endswith("_like"):
            read.clear()
        for x in (*read.values(), *made):
            if _elements(x) >= self.smallest:
                self.total += _elements(x) * x.itemsize
        return result


CHAINS: dict[str, Callable[..., Any]] = {
    "philox": noise,
    "add_noise": add_noise,
    "diffusion_loss": epsilon_loss,
    "diffusion_loss v": velocity_loss,
    "denoise_step": ancestral_step,
    "denoise_step guided": guided_step,
    "denoise_step multistep": multistep,
    "denoise_step learned": learned_step,
    "hybrid_loss": hybrid_loss,
    "vlb_terms": bound_term,
    "vlb_terms learned": learned_bound_term,
    "sample_stats": sample_stats,
}
"""By case (``counting.CASES``), without " backward"."""


def bytes_moved(case: str, args: dict[str, Any], smallest: int) -> int | None:
    """Return the bytes that PyTorch's operators read and write for a case; None without a chain.

    Args:
        case: a name in ``CHAINS``; with " backward" the gradient's bytes are counted instead.
        args: of the chain.
        smallest: tensors of fewer elements are left out: numbers of each image, not images.
    """
    chain = CHAINS.get(case.removesuffix(" backward"))
    if chain is None:
        return None
    with _Bytes(smallest) as mode:
        result = chain(**args)
        if case.endswith(" backward"):
            mode.total = 0
            leaves = [x for x in args.values() if isinstance(x, Tensor) and x.requires_grad]
            torch.autograd.grad(result.sum(), leaves)
    return mode.total
