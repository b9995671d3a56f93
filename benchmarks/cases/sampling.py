"""Benchmarks of whole sampling runs: our sampler against every peer, on the same weights.

A peer is another implementation that draws the same images: diffusers, or our own loop with another
network or without compiling. Before anything is timed, both sides must draw the same images from
the same noise (module `agreement`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from flashddpm.benchmarks.measure import agreement
from flashddpm.benchmarks.measure.harness import Measurement, compare
from flashddpm.benchmarks.measure.runner import BenchmarkCase
from flashddpm.benchmarks.peers import pipelines
from flashddpm.benchmarks.peers.models import model
from flashddpm.benchmarks.peers.pipelines import Diffusers, Ours, Side

SEED = 1234  # the seed of the noise that both sides are given

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = {
    "graphs": "diffusers, reduce-overhead, channels_last, fused projections, cudnn.benchmark",
    "best": "diffusers, compiled, channels_last",
    "eager": "diffusers eager",
    "unet": "diffusers' U-Net in our loop",
    "reference": "our eager reference path",
    "tuned": "ours with tune=True",
}
"""The name of a peer, as functions take it -> its description in reports."""
DIFFUSERS_LOOP = ("graphs", "best", "eager")
BEST_ON_CUDA = "diffusers, max-autotune, channels_last, fused projections, cudnn.benchmark"


@dataclass(frozen=True)
class SamplingSetting:
    """The settings of one sampling benchmark: what is drawn in one call, and how often.

    Attributes:
        model: the model's name: "bundled", "cifar10" or "pixels256".
        dtype: the network's dtype: "float32" or "bfloat16".
        solver: "ddim" or "ddpm".
        batch: the number of images of one call.
        steps: the number of solver steps of one call, chosen so that a call of each side together
            takes no more than some seconds on a CPU.
        rounds: the number of rounds of the comparison, at least 1; in each round our side is timed
            once, the peer's twice and ours again.
    """

    model: str
    dtype: str
    solver: str
    batch: int
    steps: int
    rounds: int

    @property
    def name(self) -> str:
        """The case's name without the peer, a string such as "cifar10-float32-ddim-batch-16"."""
        return f"{self.model}-{self.dtype}-{self.solver}-batch-{self.batch}"

    @property
    def note(self) -> str:
        """The description for reports of what one call draws, a string."""
        return (
            f"{self.model} configuration, {self.dtype}, {self.steps} steps of {self.solver}, "
            f"{self.batch} images a call; ours compiled"
        )


def ours(setting: SamplingSetting, device: str, how: str = "best") -> Ours:
    """Return our side of the comparison: our sampler and the batch that it draws.

    Args:
        setting: what is drawn.
        device: "cpu" or "cuda".
        how: how the sampler runs the network: "best" (compiled), "tuned" (compiled by
            max-autotune), "uncaptured" (compiled, without CUDA graphs), "reference" (plain PyTorch)
            or "diffusers" (diffusers' U-Net in our loop).

    Raises:
        KeyError: if the setting's model or dtype or ``how`` is none of those named.
    """
    dtype = DTYPES[setting.dtype]
    sampler = pipelines.sampler(setting.model, dtype, device, how)
    return Ours(sampler, setting.batch, setting.solver, setting.steps, dtype)


def theirs(setting: SamplingSetting, peer: str, device: str) -> Side:
    """Return the peer's side of the comparison: an implementation and the batch that it draws.

    Args:
        setting: what is drawn.
        peer: a key of PEERS: "reference" (plain PyTorch) and "tuned" (max-autotune) are samplers of
            ours, "unet" is diffusers' U-Net in our loop; "graphs" (reduce-overhead), "best"
            (max-autotune) and "eager" are diffusers' U-Net in its own loop. On the CPU "graphs" is
            "best", compiled by the default mode.
        device: "cpu" or "cuda".

    Raises:
        KeyError: if the setting's model or dtype, or for diffusers as a whole its solver, is none
            of those that `SamplingSetting` names; or, on CUDA, if there is no such peer.
        ImportError: if the peer needs diffusers and it is not installed.
    """
    if peer in ("reference", "tuned"):
        return ours(setting, device, peer)
    if peer == "unet":
        return ours(setting, device, "diffusers")
    dtype = DTYPES[setting.dtype]
    unet = pipelines.diffusers_unet(setting.model, dtype, device, peer)
    of = model(setting.model)
    return Diffusers(of, unet, setting.batch, setting.solver, setting.steps, device)


def agree(setting: SamplingSetting, peer: str, device: str) -> None:
    """Check that our sampler and a peer draw the same images from the same noise.

    In float32 no element may differ by more than 1e-3. In bfloat16 each side, drawing at most 10
    steps, must be about as near to the images drawn in float32 as plain PyTorch in bfloat16 is
    (``agreement.check_low``: within 2 times its largest and 3 times its rms error).

    Args:
        setting: what is drawn.
        peer: a key of PEERS, such as "graphs", "best" or "eager".
        device: "cpu" or "cuda".

    Raises:
        AssertionError: if the images differ by more than is allowed.
        KeyError: if there is no such model, dtype, solver or peer.
        ImportError: if the peer needs diffusers and it is not installed.
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
    if peer in DIFFUSERS_LOOP:  # diffusers keeps x in bfloat16 between the steps
        plain = drawn(theirs(setting, "eager", device))
    agreement.check_low(other, plain, ref32, f"{setting.name}, {PEERS[peer]}")


def exact(setting: SamplingSetting, device: str, peer: str) -> tuple[Side, Side]:
    """Return float32 references: plain PyTorch on the weights rounded to the setting's dtype.

    The references are what the sides of a comparison in bfloat16 are judged against.

    Args:
        setting: what is drawn.
        device: "cpu" or "cuda".
        peer: a key of PEERS; any other name is taken for a peer in our loop.

    Returns:
        The reference in our loop, and the one in the loop of diffusers; the former twice if the
        peer does not use the loop of diffusers ("unet", "reference" and "tuned" do not).
    """
    dtype, of = DTYPES[setting.dtype], model(setting.model)
    call = (setting.batch, setting.solver, setting.steps)
    unet = of.network(device, dtype).to(torch.float32)
    mine = Ours(of.around(unet, device, backend="reference"), *call, dtype)
    if peer not in DIFFUSERS_LOOP:
        return mine, mine
    return mine, Diffusers(of, of.diffusers_unet(device, dtype).float(), *call, device, dtype)


def versus(setting: SamplingSetting, peer: str) -> BenchmarkCase:
    """Return the benchmark case that times our compiled sampler against one peer.

    Its ``measure`` yields one comparison, of the seconds in which each side draws one batch
    ("ours_seconds", "peer_seconds" and their "ratio", the peer's over ours). It raises
    AssertionError if the two draw different images, and KeyError if there is no such peer.

    Args:
        setting: what is drawn: model, dtype, solver, batch size and number of steps.
        peer: a key of PEERS: "graphs", "best" or "eager" (diffusers), "unet" (its U-Net in our
            loop), "reference" or "tuned" (ours); not checked here.
    """
    name = f"{setting.name}-{peer}"

    def measure(device: str) -> Iterator[Measurement]:
        agree(setting, peer, device)
        mine, other = ours(setting, device), theirs(setting, peer, device)
        called = BEST_ON_CUDA if peer == "best" and device == "cuda" else PEERS[peer]
        comparison = compare(mine.timed, other.timed, rounds=setting.rounds)
        yield Measurement.of(name, called, setting.note, comparison)

    needs = ("diffusers",) if peer in (*DIFFUSERS_LOOP, "unet") else ()
    return BenchmarkCase(name, "sampling", measure, needs)


# Each model's batch size -> (steps of a call, rounds). On the CPU a step of the cifar10 model takes
# about 0.1 s at batch 1 and 1 s at 16, one of the bundled model 5 and 50 ms. The numbers of steps
# divide 1000: otherwise diffusers' DDIM steps to other timesteps than the next of its list.
ON_CPU = {
    "cifar10": {1: (10, 3), 16: (2, 3)},
    "bundled": {1: (50, 5), 16: (20, 3)},
}
ON_CUDA = {
    "cifar10": {1: (50, 5), 16: (50, 5), 256: (10, 5)},
    "bundled": {1: (50, 5), 16: (50, 5), 256: (50, 5)},
    "pixels256": {1: (50, 3), 16: (10, 3)},
}


def settings(device: str, name: str, dtype: str, solver: str) -> list[SamplingSetting]:
    """Return the settings of a model, the smallest batch first.

    Args:
        device: "cpu" or "cuda", which decides the batch sizes, steps and rounds.
        name: the model: "bundled", "cifar10" or, on CUDA only, "pixels256".
        dtype: the network's dtype: "float32" or "bfloat16".
        solver: "ddim" or "ddpm".

    Raises:
        KeyError: if the device has no settings for this model.
    """
    sizes = (ON_CUDA if device == "cuda" else ON_CPU)[name]
    return [SamplingSetting(name, dtype, solver, batch, *sizes[batch]) for batch in sizes]


def best(device: str) -> tuple[str, ...]:
    """Return the names of diffusers' fastest configurations on a device, keys of PEERS.

    On "cuda" these are "graphs" and "best", the former first, for it compiles quickly; on "cpu"
    "best" alone.
    """
    return ("graphs", "best") if device == "cuda" else ("best",)


def headline(device: str) -> list[BenchmarkCase]:
    """Return the most telling cases: the cifar10 model against diffusers' fastest configurations.

    They are of DDIM and DDPM at each batch size, on "cuda" in bfloat16, on "cpu" in float32 and
    bfloat16.
    """
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    return [
        versus(setting, peer)
        for peer in best(device)
        for solver in ("ddim", "ddpm")
        for dtype in dtypes
        for setting in settings(device, "cifar10", dtype, solver)
    ]


def other_models(device: str) -> list[BenchmarkCase]:
    """Return the cases of the models that are not the headline's, against diffusers at its fastest.

    The models are the bundled one and, on CUDA ("cuda"), the 256x256 one, each with DDIM and DDPM,
    in float32 and bfloat16, and at each of its batch sizes.
    """
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


def other_peers(device: str) -> list[BenchmarkCase]:
    """Return the cases against the peers that are not diffusers at its fastest.

    They show where our gain comes from: diffusers' eager pipeline, its U-Net in our loop, our
    reference path and, on CUDA ("cuda"), our sampler with tuning, on the bundled and the cifar10
    model. On the CPU ("cpu") the eager pipeline, which most people run there, is also compared in
    bfloat16 and by DDPM.
    """
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
