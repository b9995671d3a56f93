"""The command ``flashddpm info``: it prints versions, devices, and what ``auto`` chooses."""

from __future__ import annotations

import platform
from importlib.metadata import version

import numpy
import torch

from flashddpm.checkpoints.bundled import bundled
from flashddpm.diffusion.plan_options import with_defaults
from flashddpm.sampling.sampler import Sampler


def info() -> None:
    """Show versions, devices and what ``auto`` would choose, and why."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    print(
        f"flashddpm {version('flashddpm')}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, triton {triton_version}, numpy {numpy.__version__}"
    )
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    cuda = torch.cuda.is_available()
    for i in range(torch.cuda.device_count() if cuda else 0):
        card = torch.cuda.get_device_properties(i)
        print(
            f"cuda:{i}: {card.name}, sm_{card.major}{card.minor}, "
            f"{card.total_memory / 2**30:.0f} GiB"
        )
    if not cuda:
        print("cuda: no device is available")
    sampler = Sampler.from_pretrained(bundled())
    why = "a CUDA device is available" if cuda else "no CUDA device is available"
    print(f"device auto: {sampler.device} ({why})")
    print(f"dtype auto: {str(sampler.dtype).removeprefix('torch.')}")
    kind = "Triton kernels, captured step" if cuda else "PyTorch operations, noise drawn ahead"
    print(f"backend auto: {sampler.backend} ({kind})")
    asked = with_defaults({}, sampler.defaults.solver, len(sampler.schedule))
    chosen, reason = sampler.executor.choice.auto(64 * asked["num_steps"])
    print(f"compile auto: {'yes' if chosen else 'no'} for a sheet of 64 ({reason})")
