"""Count of the bytes that eager PyTorch moves for the work of an operation, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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


def bytes_moved(
    chain: Callable[..., Any], args: dict[str, Any], smallest: int, backward: bool = False
) -> int:
    """Return the bytes that the operators of a piece of eager PyTorch code read and write.

    Each operator counts its tensors that are inputs and outputs; views and uninitialised tensors
    are free.

    Args:
        chain: the code, the same work as an operation (``ByteCase.plain``), called with ``args`` by
            name; for ``backward`` it must return one tensor that depends on an argument with
            requires_grad.
        args: the arguments of the code by name, tensors or other values.
        smallest: tensors of fewer elements are left out: they hold numbers of each image, not
            images.
        backward: whether to count, instead of the bytes of the code, those of the gradient of its
            result's sum with respect to the arguments that have requires_grad.
    """
    with _Bytes(smallest) as mode:
        result = chain(**args)
        if backward:
            mode.total = 0
            leaves = [x for x in args.values() if isinstance(x, Tensor) and x.requires_grad]
            torch.autograd.grad(result.sum(), leaves)
    return mode.total
