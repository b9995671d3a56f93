"""Whole sampling runs, and the loop alone, against diffusers on the same weights.

Before anything is timed, both sides must give the same pictures with ddim, which after x_T draws
no noise. (ddpm differs in its noise only; tests compare it on equal noise.)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flashddpm as fd
from flashddpm.benchmarks.harness import Result, compare

STEPS = 50
LOOP_STEPS = 1000  # so many that starting a run does not count
EXACT_STEPS, EXACT_BATCH = 10, 16
TOLERANCE = 1e-3  # of the final x of a trajectory, float32


class Diffusers:
    """diffusers' U-Net and scheduler on the bundled weights, in the loop of its pipelines."""

    def __init__(self, sampler: fd.Sampler, solver: str, compiled: bool = False) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

        kind: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[solver]
        self.scheduler = kind.from_pretrained(fd.bundled(), subfolder="scheduler")
        self.scheduler.set_timesteps(STEPS)
        unet = UNet2DModel.from_pretrained(
            fd.bundled(), subfolder="unet", torch_dtype=torch.float32
        )
        self.unet = unet.to(sampler.device).eval()
        if compiled:
            self.unet.to(memory_format=torch.channels_last)
            self.unet = torch.compile(self.unet, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """Run the trajectory from x_T."""
        for t in self.scheduler.timesteps:
            out = self.unet(x, t, labels, return_dict=False)[0]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


def check(ours: Tensor, theirs: Tensor, what: str, peer: str = "diffusers") -> None:
    """Refuse to time two sides whose pictures differ."""
    error = (ours - theirs).abs().max().item()
    if not error <= TOLERANCE:
        raise AssertionError(f"{what}: differs from {peer} by {error}, not timed")


def whole_runs(device: str, compiled_peer: bool) -> Iterator[Result]:
    """Ddpm and ddim over 50 steps of the bundled model, float32, both warm."""
    sampler = fd.Sampler.from_pretrained(fd.bundled(), device, "float32", compile=True)
    for batch in (1, 16):
        seeds, labels = range(batch), [i % 10 for i in range(batch)]
        wanted = torch.tensor(labels, device=sampler.device)
        x_T = sampler.initial_noise(seeds).contiguous()
        for compiled in (False, True) if compiled_peer else (False,):
            ddim = Diffusers(sampler, "ddim", compiled)
            run = partial(sampler.sample, seeds, labels, num_steps=STEPS)
            check(run(solver="ddim"), ddim(x_T, wanted), f"ddim at batch {batch}")
            for solver in ("ddpm", "ddim"):
                peer = ddim if solver == "ddim" else Diffusers(sampler, solver, compiled)
                if solver == "ddpm" and compiled:
                    peer.unet = ddim.unet
                comparison = compare(
                    partial(run, solver=solver),
                    partial(peer, x_T, wanted),
                    rounds=5 if batch == 1 else 3,
                )
                yield Result.of(
                    f"{solver}-{STEPS}-batch-{batch}",
                    f"diffusers {'compiled, channels_last' if compiled else 'eager'}",
                    f"bundled model, float32, {STEPS} steps, {batch} images a call; ours compiled",
                    comparison,
                )


def price_of_exact(device: str) -> Iterator[Result]:
    """What exact=True costs: a full batch for every step, however few images are asked for."""
    sampler = fd.Sampler.from_pretrained(fd.bundled(), device, "float32", compile=True)
    run = partial(sampler.sample, solver="ddim", num_steps=EXACT_STEPS, batch_size=EXACT_BATCH)
    note = f"bundled model, float32, ddim, {EXACT_STEPS} steps; exact pads to {EXACT_BATCH} images"
    counts = (1, EXACT_BATCH)
    try:
        alone, crowd = (run(range(n), [i % 10 for i in range(n)], exact=True) for n in counts)
    except ValueError as error:  # this machine's compiled code has other bits in other lanes
        yield Result("exact", str(error), note, {})
        return
    if not torch.equal(alone, crowd[:1]):
        raise AssertionError("exact=True: one image has other bits than among others, not timed")
    for count in counts:
        few = partial(run, range(count), [i % 10 for i in range(count)])
        check(few(), crowd[:count], f"exact at {count}", "exact=True")
        yield Result.of(
            f"exact-{count}-of-{EXACT_BATCH}",
            "the same with exact=True",
            f"{note}; the ratio is its price",
            compare(few, partial(few, exact=True), rounds=5 if count == 1 else 3),
        )


def loops_without_network(device: str) -> Iterator[Result]:
    """A whole run whose network returns its input, against the scheduler's steps alone."""
    from diffusers import DDIMScheduler, DDPMScheduler

    sampler = fd.Sampler(
        lambda x, t: x,
        fd.NoiseSchedule.create(),
        shape=(1, 28, 28),
        device=device,
        compile=False,
    )
    model = fd.Sampler.from_pretrained(fd.bundled(), device, "float32", compile=True)
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
        yield Result.of(
            f"loop-{solver}",
            f"diffusers {kind.__name__}.step",
            f"{LOOP_STEPS} steps of one 28x28 image, the network returning its input; ours "
            "includes the plan, x_T, the noise and the check for non-finite values",
            compare(ours, peer, rounds=10),
        )
        short = partial(sampler.sample, [0], solver=solver, num_steps=STEPS)
        network = partial(model.sample, [0], 0, solver=solver, num_steps=STEPS)
        yield Result(
            f"loop-{solver}-share",
            "the bundled model's run",
            f"the loop's share of {STEPS} steps of the bundled model, batch 1, compiled",
            {"share_of_run": 1 / compare(short, network, rounds=10).ratio},
        )
