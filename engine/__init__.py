"""flashddpm: a performance engine for denoising diffusion probabilistic models.

import flashddpm as fd

sampler = fd.Sampler.from_pretrained(fd.bundled("fashion-mnist"))
x = sampler.sample(seeds=range(64), labels=3)
fd.save_grid(x, "samples.png")
"""

from flashddpm import kernels
from flashddpm.bundled import bundled
from flashddpm.checkpoint import Conditioning
from flashddpm.defaults import SamplingDefaults
from flashddpm.errors import CheckpointError, CompilationError, DataError, NonFiniteError
from flashddpm.images import make_grid, save_grid, to_pil, to_uint8
from flashddpm.pipeline import DDIMPipeline, DDPMPipeline
from flashddpm.request import (
    DeadlineExceeded,
    EngineClosed,
    QueueFull,
    Request,
    RequestFailed,
    Result,
    Timings,
)
from flashddpm.sampler import Sampler
from flashddpm.schedule import NoiseSchedule
from flashddpm.service import Engine
from flashddpm.solvers import Plan, make_plan
from flashddpm.unet import UNet
from flashddpm.unet_config import UNetConfig

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CompilationError",
    "Conditioning",
    "DDIMPipeline",
    "DDPMPipeline",
    "DataError",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "NoiseSchedule",
    "NonFiniteError",
    "Plan",
    "QueueFull",
    "Request",
    "RequestFailed",
    "Result",
    "Sampler",
    "SamplingDefaults",
    "Timings",
    "UNet",
    "UNetConfig",
    "bundled",
    "kernels",
    "make_grid",
    "make_plan",
    "save_grid",
    "to_pil",
    "to_uint8",
]
