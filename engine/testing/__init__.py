"""The tests of this project's kernels, for anybody's kernel that has a reference.

    from flashddpm.testing import check_op

    def arguments(device, dtype, shape, batch, seed):
        draws = torch.Generator().manual_seed(seed)
        x = torch.randn((batch, *shape), generator=draws)
        gain = torch.rand(batch, generator=draws)
        return {"x": x.to(device, dtype), "gain": gain.to(device)}

    def test_my_kernel():
        check_op(my_kernel, my_reference, arguments, differentiable=("x",))

runs the whole battery (``CHECKS``) over odd shapes, dtypes and seeds, and raises ``CheckFailed``
with the name of every check that fails. ``docs/examples/foreign_kernel.py`` does it for a kernel of
somebody else's, right and with three planted bugs.

- ``check_op``: the battery. On a GPU the kernels run there; without one, in Triton's interpreter,
  if TRITON_INTERPRET=1 is set before anything imports Triton.
- ``strategies``: hypothesis strategies of shapes, layouts, dtypes, seeds, rows and NaN.
- ``rules``: what "equal" means: ``same``, ``close``, ``reduced``.
- ``Guarded``, ``allocations``: red zones around arguments, and around what a function allocates.
- ``KernelCode``, ``code_faults``: the gates of compiled code, for a kernel given to ``check_op``;
  ``compile_kernel`` and ``faults`` are their parts (``flashddpm.kernels.checks``). They need Triton
  and no GPU.

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
"""Where the names come from that need hypothesis or Triton."""


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
