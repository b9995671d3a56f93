"""Backends: the paths by which a network runs, plain PyTorch or fused kernels and compiled code."""

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
    """The backend (path) by which a network runs, and which of its means are used.

    Attributes:
        name: "reference" (plain PyTorch) or "fused".
        compile: whether the network is compiled: True, False, or "auto": always on CUDA, on the
            CPU where the work asked for repays it (`CompileChoice`).
        capture: whether the step is captured as a CUDA graph, a bool.
        ops: the module whose operations a step calls: `flashddpm.kernels`, which has the Triton
            kernels, for "fused" on CUDA, else `flashddpm.kernels.reference`.
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
    """Choose the backend for the arguments of a `Sampler`, its device and its network.

    Args:
        backend: "reference", "fused", or "auto", which is "fused", except that on CUDA without
            Triton it is "reference" (an error if compile or capture is True).
        compile: whether the network is to be compiled: True, False or "auto". On the fused path
            "auto" stays "auto" (decided later, by the work) if ``plain``, and is else False; on the
            reference path it is False.
        capture: whether steps are to be captured as CUDA graphs: True, False or "auto", which is
            True on the fused path on CUDA if ``plain``, and else False.
        device: the device on which the network runs, a CPU or a CUDA device; not checked.
        plain: whether the network is one of flashddpm's own, without hooks or another forward set
            on it.

    Returns:
        The backend; of its settings only compile may still be "auto".

    Raises:
        ValueError: if backend, compile or capture has a value that is not allowed, if compile or
            capture is True beside backend="reference", if capture is True and the device is no CUDA
            device, or if the fused path, compile or capture is asked for on CUDA without Triton.
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
