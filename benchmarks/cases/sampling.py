"""Whole sampling runs against every peer on the same weights.

Before anything is timed, both sides must draw the same images from the same noise (`agreement`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from flashddpm.benchmarks.measure import agreement
from flashddpm.benchmarks.measure.harness import Measurement, compare
from flashddpm.benchmarks.measure.runner import Case
from flashddpm.benchmarks.peers import pipelines
from flashddpm.benchmarks.peers.models import model
from flashddpm.benchmarks.peers.pipelines import Diffusers, Ours, Side

SEED = 1234  # of the noise that is given to both sides

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = {
    "graphs": "diffusers, reduce-overhead, channels_last, fused projections, cudnn.benchmark",
    "best": "diffusers, compiled, channels_last",
    "eager": "diffusers eager",
    "unet": "diffusers' U-Net in our loop",
    "reference": "our eager reference path",
    "tuned": "ours with tune=True",
}
"""The peers, and what they are called."""
DIFFUSERS_LOOP = ("graphs", "best", "eager")
BEST_ON_CUDA = "diffusers, max-autotune, channels_last, fused projections, cudnn.benchmark"


@dataclass(frozen=True)
class Setting:
    """What is drawn.

    Attributes:
        model: one of models.MODELS.
        dtype: "float32" or "bfloat16".
        solver: "ddim" or "ddpm".
        batch: images a call.
        steps: of a call: so many that a pair of calls takes some seconds on a CPU, no more.
        rounds: of the comparison.
    """

    model: str
    dtype: str
    solver: str
    batch: int
    steps: int
    rounds: int

    @property
    def name(self) -> str:
        """The case's name, without the peer."""
        return f"{self.model}-{self.dtype}-{self.solver}-batch-{self.batch}"

    @property
    def note(self) -> str:
        """What a call does."""
        return (
            f"{self.model} configuration, {self.dtype}, {self.steps} steps of {self.solver}, "
            f"{self.batch} images a call; ours compiled"
        )


def ours(setting: Setting, device: str, how: str = "best") -> Ours:
    """Return our side."""
    dtype = DTYPES[setting.dtype]
    sampler = pipelines.sampler(setting.model, dtype, device, how)
    return Ours(sampler, setting.batch, setting.solver, setting.steps, dtype)


def theirs(setting: Setting, peer: str, device: str) -> Side:
    """Return the side of a peer of PEERS."""
    if peer in ("reference", "tuned"):
        return ours(setting, device, peer)
    if peer == "unet":
        return ours(setting, device, "diffusers")
    dtype = DTYPES[setting.dtype]
    unet = pipelines.diffusers_unet(setting.model, dtype, device, peer)
    of = model(setting.model)
    return Diffusers(of, unet, setting.batch, setting.solver, setting.steps, device)


def agree(setting: Setting, peer: str, device: str) -> None:
    """Refuse to time sides that draw different images from the same noise.

    In bfloat16 over at most agreement.CHAIN steps, the length that its rule is for.

    Raises:
        AssertionError: they do.
    """
    if setting.dtype == "bfloat16":
        setting = replace(setting, steps=min(setting.steps, agreement.CHAIN))
    of = model(setting.model)
    x_T = torch.randn((setting.batch, *of.shape), generator=torch.Generator().manual_seed(SEED))
    x_T = x_T.to(DTYPES[setting.dtype]).float().to(device)

    def drawn(side: Side) -> torch.Tensor:
        return side.given(x_T, SEED)

    fast, other = drawn(ours(setting, device)), drawn(theirs(setting, peer, device))
    if setting.dtype == "float32":
        agreement.check(fast, other, setting.name, PEERS[peer])
        return
    ref32, exact32 = (drawn(side) for side in exact(setting, device, peer))
    agreement.check(ref32, exact32, f"{setting.name}, in float32", PEERS[peer])
    plain = drawn(ours(setting, device, "reference"))
    agreement.check_low(fast, plain, ref32, setting.name)
    if peer in DIFFUSERS_LOOP:  # whose x is bfloat16 between the steps
        plain = drawn(theirs(setting, "eager", device))
    agreement.check_low(other, plain, ref32, f"{setting.name}, {PEERS[peer]}")


def exact(setting: Setting, device: str, peer: str) -> tuple[Side, Side]:
    """Return plain PyTorch in float32 on the weights as the setting's dtype has them.

    In our loop, and in the peer's.
    """
    dtype, of = DTYPES[setting.dtype], model(setting.model)
    call = (setting.batch, setting.solver, setting.steps)
    unet = of.network(device, dtype).to(torch.float32)
    mine = Ours(of.around(unet, device, backend="reference"), *call, dtype)
    if peer not in DIFFUSERS_LOOP:
        return mine, mine
    return mine, Diffusers(of, of.diffusers_unet(device, dtype).float(), *call, device, dtype)


def versus(setting: Setting, peer: str) -> Case:
    """Return the case of ours against one peer."""
    name = f"{setting.name}-{peer}"

    def measure(device: str) -> Iterator[Measurement]:
        agree(setting, peer, device)
        mine, other = ours(setting, device), theirs(setting, peer, device)
        called = BEST_ON_CUDA if peer == "best" and device == "cuda" else PEERS[peer]
        comparison = compare(mine.timed, other.timed, rounds=setting.rounds)
        yield Measurement.of(name, called, setting.note, comparison)

    needs = ("diffusers",) if peer in (*DIFFUSERS_LOOP, "unet") else ()
    return Case(name, "sampling", measure, needs)


# Steps of a call and rounds. On the CPU a step of the cifar10 configuration takes about 0.1 s at
# batch 1 and 1 s at 16, one of the bundled model 5 and 50 ms. Steps divide 1000: otherwise
# diffusers' DDIM steps to other timesteps than the next of its list.
ON_CPU = {
    "cifar10": {1: (10, 3), 16: (2, 3)},
    "bundled": {1: (50, 5), 16: (20, 3)},
}
ON_CUDA = {
    "cifar10": {1: (50, 5), 16: (50, 5), 256: (10, 5)},
    "bundled": {1: (50, 5), 16: (50, 5), 256: (50, 5)},
    "pixels256": {1: (50, 3), 16: (10, 3)},
}


def settings(device: str, name: str, dtype: str, solver: str) -> list[Setting]:
    """Return the settings of a model, the smallest batch first."""
    sizes = (ON_CUDA if device == "cuda" else ON_CPU)[name]
    return [Setting(name, dtype, solver, batch, *sizes[batch]) for batch in sizes]


def best(device: str) -> tuple[str, ...]:
    """Return diffusers' best peers, on CUDA first the one that is quick to compile."""
    return ("graphs", "best") if device == "cuda" else ("best",)


def headline(device: str) -> list[Case]:
    """Return ours against diffusers' best on the cifar10 configuration, the most telling set."""
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    return [
        versus(setting, peer)
        for peer in best(device)
        for solver in ("ddim", "ddpm")
        for dtype in dtypes
        for setting in settings(device, "cifar10", dtype, solver)
    ]


def other_models(device: str) -> list[Case]:
    """Return the same on the other models."""
    names = ("bundled", "pixels256") if device == "cuda" else ("bundled",)
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32", "bfloat16")
    return [
        versus(setting, peer)
        for peer in best(device)
        for name in names
        for dtype in dtypes
        for solver in ("ddim", "ddpm")
        for setting in settings(device, name, dtype, solver)
    ]


def other_peers(device: str) -> list[Case]:
    """Return every other peer: whence the gain comes. On a CPU eager is what most people run."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    peers = ["eager", "unet", "reference", *(["tuned"] if device == "cuda" else [])]
    cases = [
        versus(setting, peer)
        for peer in peers
        for name in ("bundled", "cifar10")
        for setting in settings(device, name, dtype, "ddim")
    ]
    if device == "cpu":
        cases += [
            versus(setting, "eager")
            for dtype, solver in (("bfloat16", "ddim"), ("float32", "ddpm"), ("bfloat16", "ddpm"))
            for name in ("bundled", "cifar10")
            for setting in settings(device, name, dtype, solver)
        ]
    return cases
