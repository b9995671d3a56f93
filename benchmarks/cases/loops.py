"""Benchmarks of the sampling loop alone: ours against diffusers' schedulers and lucidrains' loop.

lucidrains' loop is that of the package denoising-diffusion-pytorch. A third benchmark measures the
price of ``exact=True`` (bits of an image that do not depend on the others of its batch), which is a
matter of how the loop chooses the batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from flashddpm.benchmarks.measure.agreement import check
from flashddpm.benchmarks.measure.harness import Measurement, compare
from flashddpm.checkpoints.bundled import bundled
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.sampling.sampler import Sampler

STEPS = 50
LOOP_STEPS = 1000  # so many that the time of starting a run is negligible
EXACT_STEPS, EXACT_BATCH = 10, 16
DDPT_STEPS, BATCHES = 50, (1, 16)


def price_of_exact(device: str) -> Iterator[Measurement]:
    """Measure what exact=True costs: a full batch in every step, however few images are asked for.

    The bundled model draws 1 image and 16 images by 10 steps of DDIM in float32, with and without
    exact=True, which always runs the network on 16 images here.

    Args:
        device: "cpu" or "cuda".

    Yields:
        For 1 and for 16 images, the comparison of the seconds of a call of ``Sampler.sample``
        without exact=True ("ours_seconds") and with it ("peer_seconds"): the "ratio", the latter
        over the former, is the price, 1 for none. A single measurement without figures, which says
        why, if exact=True is refused on this machine.

    Raises:
        AssertionError: if one image drawn with exact=True has other bits than among 16, or if
            images drawn with and without it differ by more than 1e-3; nothing more is timed then.
    """
    sampler = Sampler.from_pretrained(bundled(), device, "float32", compile=True)
    run = partial(sampler.sample, solver="ddim", num_steps=EXACT_STEPS, batch_size=EXACT_BATCH)
    note = f"bundled model, float32, ddim, {EXACT_STEPS} steps; exact pads to {EXACT_BATCH} images"
    counts = (1, EXACT_BATCH)
    try:
        alone, crowd = (run(range(n), [i % 10 for i in range(n)], exact=True) for n in counts)
    except ValueError as error:  # this machine's compiled code has other bits in other lanes
        yield Measurement("exact", str(error), note, {})
        return
    if not torch.equal(alone, crowd[:1]):
        raise AssertionError("exact=True: one image has other bits than among others, not timed")
    for count in counts:
        few = partial(run, range(count), [i % 10 for i in range(count)])
        check(few(), crowd[:count], f"exact at {count}", "exact=True")
        yield Measurement.of(
            f"exact-{count}-of-{EXACT_BATCH}",
            "the same with exact=True",
            f"{note}; the ratio is its price",
            compare(few, partial(few, exact=True), rounds=5 if count == 1 else 3),
        )


def against_schedulers(device: str) -> Iterator[Measurement]:
    """Measure our loop around a network that returns its input, against diffusers' scheduler steps.

    One call of our side is a whole run of 1000 steps of one 1x28x28 image; one call of the peer's
    side (diffusers') is 1000 calls of ``scheduler.step``, one for each timestep, and nothing else.

    Args:
        device: "cpu" or "cuda".

    Yields:
        Two measurements for DDIM, then two for DDPM. The first has the fields of `Comparison` as
        values: "ours_seconds" and "peer_seconds", the median seconds of 1000 steps, "ratio" (the
        peer's time over ours), its quartiles, "spread" and "pairs". The second has "share_of_run":
        the time of 50 steps of our loop as a fraction (0..1) of the time in which our sampler draws
        one image by 50 steps of the bundled model, compiled.

    Raises:
        ImportError: if diffusers is not installed.
        AssertionError: if the images of DDIM differ by more than 1e-3; DDPM draws noise of its own
            and is not checked.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    sampler = Sampler(
        lambda x, t: x,
        NoiseSchedule.create(),
        shape=(1, 28, 28),
        device=device,
        compile=False,
    )
    model = Sampler.from_pretrained(bundled(), device, "float32", compile=True)
    x_T = sampler.initial_noise([0]).contiguous()
    kinds: tuple[tuple[str, Any], ...] = (("ddim", DDIMScheduler), ("ddpm", DDPMScheduler))
    for solver, kind in kinds:
        theirs = kind()
        theirs.set_timesteps(LOOP_STEPS)

        def peer(theirs: Any = theirs) -> Tensor:
            x = x_T
            for t in theirs.timesteps:
                x = theirs.step(x, t, x, return_dict=False)[0]
            return x

        ours = partial(sampler.sample, [0], solver=solver, num_steps=LOOP_STEPS)
        if solver == "ddim":
            check(ours(), peer(), "loop")
        yield Measurement.of(
            f"loop-{solver}",
            f"diffusers {kind.__name__}.step",
            f"{LOOP_STEPS} steps of one 28x28 image, the network returning its input; ours "
            "includes the plan, x_T, the noise and the check for non-finite values",
            compare(ours, peer, rounds=10),
        )
        short = partial(sampler.sample, [0], solver=solver, num_steps=STEPS)
        network = partial(model.sample, [0], 0, solver=solver, num_steps=STEPS)
        yield Measurement(
            f"loop-{solver}-share",
            "the bundled model's run",
            f"the loop's share of {STEPS} steps of the bundled model, batch 1, compiled",
            {"share_of_run": 1 / compare(short, network, rounds=10).ratio},
        )


def against_ddpt(device: str) -> Iterator[Measurement]:
    """Measure our loop against that of denoising-diffusion-pytorch, both around its own U-Net.

    Both sides call the same eager module, since its U-Net cannot hold our weights, nor ours its:
    this compares the loops alone, over 50 steps of DDPM of 3x32x32 images in float32.

    Args:
        device: "cpu" or "cuda".

    Yields:
        For a batch of 1 and for one of 16 images, the comparison of the seconds that a run of 50
        steps takes by our loop ("ours_seconds") and by theirs ("peer_seconds"); its values are the
        fields of `Comparison`.

    Raises:
        ImportError: if denoising-diffusion-pytorch is not installed.
        AssertionError: if the images of both sides, from the same noise, differ by more than 1e-3.
    """
    ddpt: Any = importlib.import_module("denoising_diffusion_pytorch")
    steps, side = DDPT_STEPS, 32
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet: nn.Module = ddpt.Unet(dim=32, dim_mults=(1, 2, 4), flash_attn=False).to(device).eval()
    peer = ddpt.GaussianDiffusion(
        unet,
        image_size=side,
        timesteps=steps,
        objective="pred_noise",
        beta_schedule="linear",
        auto_normalize=False,
    ).to(device)
    schedule = NoiseSchedule.from_config({"trained_betas": peer.betas.tolist()})
    sampler = Sampler(unet, schedule, shape=(3, side, side), device=device)
    for batch in BATCHES:
        shape = (batch, 3, side, side)
        ours = partial(sampler.sample, range(batch), solver="ddpm", num_steps=steps)
        noise = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        drawn = mock.Mock(side_effect=list(noise))
        with mock.patch.multiple(torch, randn=drawn, randn_like=drawn):
            theirs = peer.p_sample_loop(shape)
        # Its first draw is x_T; its last step draws none.
        mine = ours(initial_noise=noise[0], step_noise=[*noise[1:], None].__getitem__)
        check(mine, theirs, f"loop at batch {batch}", "denoising-diffusion-pytorch")
        yield Measurement.of(
            f"loop-ddpt-batch-{batch}",
            "denoising-diffusion-pytorch GaussianDiffusion",
            f"{steps} steps of ddpm, {batch} {side}x{side} images, around the same eager module, "
            "its Unet(dim=32, dim_mults=(1, 2, 4)), float32",
            compare(ours, partial(peer.p_sample_loop, shape), rounds=3),
        )
