"""The paths by which a network runs: plain PyTorch, or fused kernels, compiled and captured."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import ModuleType

import torch

from flashddpm import arguments, kernels
from flashddpm.kernels import reference

log = logging.getLogger("flashddpm")

BACKENDS = ("auto", "reference", "fused")


@dataclass(frozen=True)
class Backend:
    """A path, and what of it is used.

    Attributes:
        name: "reference" or "fused".
        compile: True, False or "auto".
        capture: whether the step becomes a CUDA graph.
        ops: the module whose operations a step calls.
    """

    name: str
    compile: bool | str
    capture: bool
    ops: ModuleType


def choose_backend(
    backend: str,
    compile: bool | str,
    capture: bool | str,
    device: torch.device,
    plain: bool,
) -> Backend:
    """Return the path for these arguments of ``Sampler``.

    Args:
        backend: "auto", "reference" or "fused".
        compile: True, False or "auto".
        capture: True, False or "auto".
        device: where the network runs.
        plain: whether the network is ours, with nothing hanging on it: any other is compiled and
            captured only when asked.

    Raises:
        ValueError: a value that is not allowed, or a path that this device or machine has not.
    """
    arguments.one_of("backend", backend, BACKENDS)
    for name, flag in (("compile", compile), ("capture", capture)):
        if flag not in (True, False, "auto"):
            raise ValueError(f"{name}={flag!r}: must be True, False or 'auto'")
    fused, cuda = backend != "reference", device.type == "cuda"
    asked = True in (compile, capture)
    if not fused and asked:
        raise ValueError("backend='reference': is never compiled or captured")
    if capture is True and not cuda:
        raise ValueError(f"capture=True: needs a CUDA device, not {device}")
    if fused and cuda and not kernels.HAS_TRITON:
        if backend == "fused" or asked:
            raise ValueError(f"backend={backend!r}: on {device} it needs Triton, not installed")
        log.info("Triton is not installed: reference backend on %s", device)
        fused = False
    return Backend(
        name="fused" if fused else "reference",
        compile=compile if fused and (plain or compile is True) else False,
        capture=fused and cuda and (plain if capture == "auto" else bool(capture)),
        ops=kernels if fused and cuda else reference,
    )
