"""Checks of a GPU kernel against a reference in PyTorch: this project's tests, for any kernel.

    import os

    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU; before anything imports Triton

    import torch
    from flashddpm.testing import check_op, rules
    from my_package import silu  # a torch.library.custom_op around a Triton kernel

    def reference(x):
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return (wide * torch.sigmoid(wide)).to(x.dtype)

    def arguments(device, dtype, shape, batch, seed):
        draws = torch.Generator().manual_seed(seed)
        return {"x": torch.randn((batch, *shape), generator=draws).to(device, dtype)}

    def terms(x):  # of the gradient, g s (1 + x (1 - s)) with s in [0, 1]; check_op's g is within 2
        return 2 + x.abs()

    def test_silu():
        rule = {"result": rules.rounded(8), "gradient of x": rules.rounded(8, terms)}
        check_op(silu, reference, arguments, differentiable=("x",), rule=rule)

runs all checks (``CHECKS``) over odd shapes, dtypes and seeds, and raises ``CheckFailed`` with the
name of every check that fails. It returns which checks ran, and why the others did not: compiled
code is checked with ``kernels=[KernelCode(...)]``, gradients with ``differentiable``. ``fast``, the
function under test, should be a custom operator (``torch.library.custom_op``, with a fake and
autograd): the check ``opcheck`` tests its registration, and the check ``compiled`` needs one, since
``torch.compile`` cannot trace Triton's interpreter.

Without ``rule``, results must equal the reference's bit for bit; ``rules.rounded(n)`` allows n
roundings (with ``terms`` for sums whose terms may cancel), and ``rules.relative`` allows sums in
another order. ``docs/examples/foreign_kernel.py`` checks a kernel of another project, as it is and
with three planted bugs.

- ``check_op``: runs all checks. Kernels run on a GPU or, without one, in Triton's interpreter, if
  TRITON_INTERPRET=1 is set before anything imports Triton.
- ``strategies``: hypothesis strategies of shapes, layouts, dtypes, seeds, rows and NaN.
- ``rules``: rules of what "equal" means: ``bitwise``, ``rounded``, ``relative`` and others.
- ``Guarded``, ``allocations``: red zones (memory that shows whether it was written) around
  arguments, and around what a function allocates.
- ``KernelCode``, ``code_faults``: the gates (checks) of compiled code, for a kernel given to
  ``check_op``; ``compile_kernel`` and ``faults`` are their parts (``flashddpm.kernels.checks``).
  They need Triton and no GPU.

Importing this needs neither a GPU, nor Triton, nor hypothesis; ``check_op`` and ``strategies`` need
hypothesis, which ``pip install flashddpm[test]`` brings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flashddpm.testing import rules
from flashddpm.testing.gates import KernelCode, code_faults
from flashddpm.testing.zones import Guarded, allocations

if TYPE_CHECKING:
    from flashddpm.kernels.checks.compiled import compile_kernel, faults
    from flashddpm.testing import strategies
    from flashddpm.testing.check import CHECKS, CheckFailed, check_op
    from flashddpm.testing.strategies import Case

__all__ = [
    "CHECKS",
    "Case",
    "CheckFailed",
    "Guarded",
    "KernelCode",
    "allocations",
    "check_op",
    "code_faults",
    "compile_kernel",
    "faults",
    "rules",
    "strategies",
]

_LAZY = {
    **dict.fromkeys(("CHECKS", "CheckFailed", "check_op"), "flashddpm.testing.check"),
    **dict.fromkeys(("Case", "strategies"), "flashddpm.testing.strategies"),
    **dict.fromkeys(("compile_kernel", "faults"), "flashddpm.kernels.checks.compiled"),
}
"""The modules of the names that need hypothesis or Triton, which are imported when first used."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(
            f"{__name__}.{name} needs hypothesis: pip install flashddpm[test]"
        ) from error
    return module if name == "strategies" else getattr(module, name)
