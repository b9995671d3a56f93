"""Plans and images of every solver and option, by all that draws: a section of work.py each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from halfway import SAMPLE, TINY, Values, command, files, normal, sampler, stored
from torch import Tensor

import flashddpm as fd

SOLVERS = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler", "euler_ancestral")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
SPACINGS = ("leading", "linspace", "trailing")
SIGMAS = (None, "karras", "exponential", "beta")
TYPES = ("epsilon", "sample", "v_prediction")
BACKENDS = ("reference", "fused")
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddpm", {"variance_type": "fixed_large", "spacing": "trailing"}),
    ("ddpm", {"threshold": 0.9, "clip": 1.5}),
    ("ddpm", {"timesteps": "ddim20"}),
    ("ddpm", {"timesteps": "10,5,5"}),
    ("ddim", {"eta": 0.5, "clip": 0.0}),
    ("ddim", {"eta": 1.0, "use_clipped_model_output": True, "steps_offset": 1}),
    ("ddim", {"threshold": 0.95, "clip": 2.0, "guidance_rescale": 0.7}),
    ("ddim", {"guidance_interval": (0.3, 5.0), "guidance_rescale": 0.5}),
    ("dpmpp_2m", {"sigmas": "karras"}),
    ("dpmpp_2m", {"timesteps": [90, 50, 20.5, 3]}),
    ("dpmpp_2m_sde", {"sigmas": "exponential", "clip": 1.0}),
    ("euler", {"sigmas": "beta", "spacing": "linspace"}),
    ("euler", {"timesteps": [90.5, 50.25, 20, 3.125]}),
    ("euler_ancestral", {"spacing": "linspace", "guidance_rescale": 0.7}),
)


def as_diffusers() -> dict[str, Any]:
    """Return the option that asks for diffusers' own pictures, which has had two names."""
    known = "match_diffusers" in inspect.signature(fd.make_plan).parameters
    return {"match_diffusers": True} if known else {"faults": "diffusers"}


def schedules() -> Values:
    """Yield every schedule, and the rows of every plan."""
    for kind, zero, tables in product(SCHEDULES, (False, True), ("float64", "diffusers")):
        made = fd.NoiseSchedule.create(kind, 100, rescale_betas_zero_snr=zero, tables=tables)
        for name in ("betas", "alphas_cumprod", "snr", "posterior_variance"):
            yield f"{kind} {zero} {tables} {name}", torch.from_numpy(getattr(made, name).copy())
    for case in product((False, True), SOLVERS, TYPES, SPACINGS, SIGMAS, ({}, as_diffusers())):
        zero, solver, kind, spacing, sigmas, match = case
        name = f"plan {zero} {solver} {kind} {spacing} {sigmas}{' as diffusers' if match else ''}"
        given = {"prediction_type": kind, "spacing": spacing, "sigmas": sigmas, **match}
        schedule = fd.NoiseSchedule.create("linear", 100, rescale_betas_zero_snr=zero)
        try:
            plan = fd.make_plan(schedule, solver, 10, **given)
        except ValueError:
            yield name, "refused"
            continue
        for part in ("rows", "noise_keys", "abar"):
            yield f"{name} {part}", torch.from_numpy(getattr(plan, part).copy())
        yield f"{name} initial", str(plan.initial)


def images() -> Values:
    """Yield images of every solver and prediction type, guided and not, on both backends."""
    for kind, backend in product(TYPES, BACKENDS):
        drawing = sampler(kind, backend=backend)
        for solver, guidance in product(SOLVERS, (1.0, 2.5)):
            x = drawing.sample(range(3), [0, 1, 2], guidance, solver, 5)
            yield f"{kind} {backend} {solver} {guidance}", x
    for dtype, solver in (("float32", "dpmpp_2m"), ("bfloat16", "ddpm")):
        bundled = stored(fd.bundled(), dtype=dtype)
        yield f"bundled {dtype}", bundled.sample(range(2), [3, 8], 2.0, solver, 5)


def options() -> Values:
    """Yield images under every option of a plan, learned variance too."""
    for backend in BACKENDS:
        drawing, learned = sampler(backend=backend), sampler(backend=backend, out_channels=2)
        for solver, given in OPTIONS:
            x = drawing.sample(range(3), [0, 1, 2], 2.0, solver, 5, **given)
            yield f"{backend} {solver} {given}", x
        for kind in ("learned", "learned_range", "fixed_small"):
            x = learned.sample(range(3), [0, 1, 2], 2.0, "ddpm", 5, variance_type=kind)
            yield f"{backend} {kind}", x


def into(kept: list[Tensor]) -> Callable[..., None]:
    """Return a function that keeps a copy of the last thing it is told."""
    return lambda *told: kept.append(told[-1].clone())


def calls() -> Values:
    """Yield what a call may be told besides: batches, images, noise; and all its previews."""
    image, z = normal("image", 1, 8, 8).clamp(-1, 1), normal("z", 5, 1, 8, 8)
    ways: dict[str, dict[str, Any]] = {
        "null class": {"solver": "ddpm"},
        "batches of 2": {"labels": 1, "guidance": 2.0, "batch_size": 2},
        "guidance of each": {"labels": [0, 1, 2, 0, 1], "guidance": [1, 2, 1, 0.5, 3]},
        "bucket": {"labels": 1, "bucket": 8, "solver": "dpmpp_2m_sde"},
        "image": {"image": image, "strength": 0.6, "solver": "ddpm"},
        "image, multistep": {"image": image, "strength": 0.5, "solver": "dpmpp_2m"},
        "noise": {"initial_noise": z, "step_noise": lambda i: z.roll(i, 3), "solver": "ddpm"},
    }
    for backend, (name, given) in product(BACKENDS, ways.items()):
        drawing, previews = sampler(backend=backend), []
        x = drawing.sample(range(-2, 3), num_steps=6, on_step=into(previews), **given)
        yield f"{backend} {name}", x
        yield f"{backend} {name}, previews", torch.cat(previews)
    t, labels = torch.tensor([0, 3, 50, 98, 99]), torch.tensor([0, 1, 2, 3, 0])
    for backend in BACKENDS:
        drawing = sampler(backend=backend)
        yield f"{backend} x_T", drawing.initial_noise([5, -(2**63)])
        yield f"{backend} step's noise", drawing.step_noise([5, 2**63 - 1], 7)
        yield f"{backend} predicted", drawing.predict(z, t, labels)


def compiled() -> Values:
    """Yield images of a compiled network, exact ones too, all of one shape: it takes a minute."""
    drawing = sampler(compile=True)
    for seeds in (range(4), range(1)):
        yield f"{seeds}", drawing.sample(seeds, 1, 2.0, "ddpm", 4, batch_size=4, exact=True)
    yield "bucket", drawing.sample(range(3), 2, 1.0, "dpmpp_2m", 4, batch_size=4, bucket=8)
    with fd.Engine(drawing, 4, exact=True, threaded=False) as engine:
        future = engine.submit(fd.Request(seed=0, label=1, guidance=2.0, num_steps=4))
        engine.drain()
        yield "engine", future.result().image


def engine() -> Values:
    """Yield the images of an engine, others being at other steps of other plans meanwhile."""
    asked = [*((solver, {}) for solver in SOLVERS), *OPTIONS]
    for backend in BACKENDS:
        futures, previews = [], []
        with fd.Engine(sampler(backend=backend), 3, threaded=False) as drawing:
            for i, (solver, given) in enumerate(asked):
                given = {"seed": i, "label": i % 3, "guidance": 1 + i % 2, **given}
                request = fd.Request(solver=solver, num_steps=3 + i % 4, **given)
                futures.append(drawing.submit(request, into(previews)))
                drawing.turn()
            drawing.drain()
        yield from ((f"{backend} {i}", future.result().image) for i, future in enumerate(futures))
        yield from ((f"{backend} preview {i}", x0) for i, x0 in enumerate(previews))


def pipelines() -> Values:
    """Yield what the pipelines draw, by our noise, by torch's, and with diffusers' objects."""
    from diffusers import DPMSolverMultistepScheduler, UNet2DModel

    drawing, noise = sampler("epsilon"), torch.Generator().manual_seed(5)
    for kind, steps in ((fd.DDPMPipeline, 20), (fd.DDIMPipeline, 6)):
        call = partial(kind(drawing), num_inference_steps=steps, output_type="pt", class_labels=1)
        yield f"{kind.__name__} seeds", call(seeds=range(3), guidance_scale=2.0).images
        yield f"{kind.__name__} generator", call(3, noise).images
        yield f"{kind.__name__} as diffusers", call(3, noise, **as_diffusers()).images
        several = [torch.Generator().manual_seed(i) for i in range(2)]
        x = call(2, several, output_type="np").images
        yield f"{kind.__name__} generators", torch.from_numpy(x)
    pipe = fd.DDPMPipeline(drawing)
    config = pipe.scheduler.config
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    yield "set scheduler", pipe(2, noise, 6, "pt", class_labels=1).images
    network = UNet2DModel(**TINY).eval()
    network.load_state_dict(drawing.network.state_dict())
    taken = fd.Sampler.from_diffusers(network, DPMSolverMultistepScheduler(), compile=False)
    yield "from diffusers", taken.sample(range(3), 1, 1.0, "dpmpp_2m", 4)


def sampling() -> Values:
    """Yield a model's files, those that ``flashddpm sample`` writes, and what ``info`` says."""
    sampler().save_pretrained("model")
    ways: dict[str, tuple[Any, ...]] = {
        "grid.png": ("model", "--guidance", 2, "--labels", "High,0,1,2"),
        "eta.png": ("model", "--solver", "ddim", "--eta", 0.5, "--trajectory", "eta.gif"),
        "folder": ("model", "--seeds", "5,9,7:9", "--labels", 1),
        "bundled.png": (
            "--respacing", "ddim10", "--threshold", 0.9, "--clip", 2, "--guidance", 2,
            "--guidance-interval", 0.2, 5, "--backend", "reference",
        ),
    }  # fmt: skip
    for out, flags in ways.items():
        command("sample", "--out", out, *SAMPLE, *flags)
    yield "info", command("info")
    yield from files(".")
