"""The fused kernels of denoising diffusion models, usable without the engine.

On CUDA tensors they are Triton kernels; on CPU tensors, and where Triton is not installed, the
same functions run in plain PyTorch (``flashddpm.kernels.reference``), with the same noise.
"""

from flashddpm.kernels import reference
from flashddpm.kernels.step_arguments import StepSlots, StepState, StepStatistics, StepTable
from flashddpm.kernels.tables import LOSSES, Column, LossColumn, Purpose, VlbColumn

try:
    import triton  # noqa: F401  (only to learn whether it is there)
except ImportError:
    HAS_TRITON = False
    from flashddpm.kernels.reference import (
        add_noise,
        advance,
        denoise_step,
        diffusion_loss,
        hybrid_loss,
        philox,
        sample_stats,
        vlb_terms,
    )
else:
    HAS_TRITON = True
    from flashddpm.kernels.add_noise import add_noise
    from flashddpm.kernels.advance import advance
    from flashddpm.kernels.denoise_step import denoise_step
    from flashddpm.kernels.diffusion_loss import diffusion_loss
    from flashddpm.kernels.hybrid_loss import hybrid_loss
    from flashddpm.kernels.operation import collected
    from flashddpm.kernels.philox import philox
    from flashddpm.kernels.sample_stats import sample_stats
    from flashddpm.kernels.vlb_terms import vlb_terms

    OPS = collected(
        philox,
        add_noise,
        diffusion_loss,
        hybrid_loss,
        vlb_terms,
        sample_stats,
        denoise_step,
        advance,
    )
    """The record of each operation by its name; without Triton there is none."""

__all__ = [
    "HAS_TRITON",
    "LOSSES",
    "Column",
    "LossColumn",
    "Purpose",
    "StepSlots",
    "StepState",
    "StepStatistics",
    "StepTable",
    "VlbColumn",
    "add_noise",
    "advance",
    "denoise_step",
    "diffusion_loss",
    "hybrid_loss",
    "philox",
    "reference",
    "sample_stats",
    "vlb_terms",
]
