"""flashddpm: a performance engine for denoising diffusion probabilistic models.

This module holds the public names of the package:

    import flashddpm as fd

    sampler = fd.Sampler.from_pretrained(fd.bundled("fashion-mnist"))
    x = sampler.sample(seeds=range(64), labels=3)
    fd.save_grid(x, "samples.png")
"""

from importlib.metadata import version

from flashddpm import kernels
from flashddpm.checkpoints.bundled import bundled
from flashddpm.checkpoints.model_folder import load_unet
from flashddpm.diffusion.loss_tables import hybrid_rows, target_rows, vlb_rows
from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.parameterization import noising_rows
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.errors import CheckpointError, CompilationError, DataError, NonFiniteError
from flashddpm.integrations.diffusers_pipelines import DDIMPipeline, DDPMPipeline
from flashddpm.io.images import make_grid, save_grid, to_pil, to_uint8
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.unet import UNet
from flashddpm.networks.unet_config import UNetConfig
from flashddpm.sampling.sampler import Sampler
from flashddpm.serving.engine import Engine
from flashddpm.serving.request import (
    DeadlineExceeded,
    EngineClosed,
    QueueFull,
    Request,
    RequestFailed,
    Result,
    Timings,
)

__version__ = version("flashddpm")

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
    "hybrid_rows",
    "kernels",
    "load_unet",
    "make_grid",
    "make_plan",
    "noising_rows",
    "save_grid",
    "target_rows",
    "to_pil",
    "to_uint8",
    "vlb_rows",
]
