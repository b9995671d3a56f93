"""Every operation in plain PyTorch, with the same name and signature: what kernels must equal."""

from flashddpm.kernels.reference import exact
from flashddpm.kernels.reference.evaluation import vlb_terms
from flashddpm.kernels.reference.noise import PIECES, philox, philox_in_pieces, philox_words
from flashddpm.kernels.reference.sampling import (
    advance,
    combine,
    denoise_step,
    predict_x0,
    sample_stats,
)
from flashddpm.kernels.reference.training import (
    add_noise,
    diffusion_loss,
    diffusion_loss_backward,
    hybrid_loss,
    hybrid_loss_backward,
)

__all__ = [
    "PIECES",
    "add_noise",
    "advance",
    "combine",
    "denoise_step",
    "diffusion_loss",
    "diffusion_loss_backward",
    "exact",
    "hybrid_loss",
    "hybrid_loss_backward",
    "philox",
    "philox_in_pieces",
    "philox_words",
    "predict_x0",
    "sample_stats",
    "vlb_terms",
]
