"""What is done on CUDA only, with stand-ins for the card: options, figures, the counter."""

import types

import pytest
import torch
from torch import nn

import flashddpm as fd
from flashddpm.benchmarks.cases import energy, sampling, steps
from flashddpm.benchmarks.cases.roofline import Speed
from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.peers import models, pipelines


class Network(nn.Module):
    """Notes what is done to it."""

    def __init__(self):
        super().__init__()
        self.did = []

    def to(self, *args, **options):
        self.did.append(options)
        return self

    def compile(self, **options):
        self.did.append(options)


@pytest.fixture
def made(monkeypatch):
    """Models whose networks note what is done, in place of all; caches are cleared."""
    networks, samplers = [], []

    def diffusers_unet(device, dtype):
        networks.append(Network())
        return networks[-1]

    def note(kind):
        return lambda *arguments, **options: samplers.append((kind, options))

    fake = types.SimpleNamespace(
        diffusers_unet=diffusers_unet, sampler=note("own"), around=note("around")
    )
    monkeypatch.setattr(pipelines, "model", lambda name: fake)
    monkeypatch.setattr(pipelines, "fuse_projections", lambda unet: unet.did.append("fused"))
    caches = (pipelines.sampler, pipelines.diffusers_unet)
    for cached in caches:
        cached.cache_clear()
    yield types.SimpleNamespace(networks=networks, samplers=samplers)
    for cached in caches:
        cached.cache_clear()


CHANNELS_LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize(
    ("device", "how", "did"),
    [
        ("cuda", "eager", []),
        ("cuda", "graphs", [CHANNELS_LAST, "fused", "reduce-overhead"]),
        ("cuda", "best", [CHANNELS_LAST, "fused", "max-autotune"]),
        ("cuda", "graphless", [CHANNELS_LAST, "fused", "max-autotune-no-cudagraphs"]),
        ("cpu", "best", [CHANNELS_LAST, None]),
        ("cpu", "graphless", [CHANNELS_LAST, None]),
    ],
)
def test_the_peer_is_at_its_best(made, device, how, did):
    pipelines.diffusers_unet("m", torch.bfloat16, device, how)
    if did:
        did = [*did[:-1], {"fullgraph": True, "dynamic": False, "mode": did[-1]}]
    assert made.networks[-1].did == did


def test_on_the_cpu_the_best_is_compiled_once(made):
    best, other = (pipelines.diffusers_unet("m", torch.float32, "cpu", how)
                   for how in ("best", "graphless"))  # fmt: skip
    assert best is other


@pytest.mark.parametrize(
    ("how", "kind", "options"),
    [
        ("best", "own", {"compile": True}),
        ("tuned", "own", {"compile": True, "tune": True}),
        ("uncaptured", "own", {"compile": True, "capture": False}),
        ("reference", "own", {"backend": "reference"}),
        ("diffusers", "around", {"compile": False, "capture": True, "dtype": torch.bfloat16}),
    ],
)
def test_our_sides(made, how, kind, options):
    pipelines.sampler("m", torch.bfloat16, "cuda", how)
    ((found, given),) = made.samplers
    given.pop("call", None)
    assert (found, given) == (kind, options)


def test_figures_of_a_step_on_a_card(monkeypatch):
    did = []
    monkeypatch.setattr(steps.pipelines, "sampler", lambda *a: "sampler")
    monkeypatch.setattr(steps, "drawing", lambda sampler, batch: lambda n: did.append((sampler, n)))
    monkeypatch.setattr(steps, "without_network", lambda of, device: "loop")
    monkeypatch.setattr(steps, "host_seconds", lambda sampler, batch: 2e-3)
    monkeypatch.setattr(steps, "launches", lambda draw, few, many: {"kernels": many - few})
    monkeypatch.setattr(
        steps,
        "seconds_a_step",
        lambda draw, few, many: draw(0) or {"loop": 1e-3}.get(did[-1][0], 4e-3),
    )
    monkeypatch.setattr(steps.roofline, "speed", lambda *a: Speed(1e15, 1e12))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: did.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    (result,) = steps.latency("bundled", "bfloat16", 8).measure("cuda")
    v = result.values
    assert did[0] == ("sampler", 4) and did[1] == "reset", "compiling is not part of the peak"
    assert v["ms_a_step"] == 4 and v["image_steps_a_second"] == 2000 and v["loop_ms"] == 1
    assert v["host_ms_a_step"] == 2 and v["kernels"] == 64 and v["peak_memory_mib"] == 1024


def test_energy_is_measured_after_the_check_and_beyond_idle(monkeypatch):
    did, watts = [], {"ours": 150.0, "theirs": 250.0}

    class Side:
        def __init__(self, name):
            self.name = name

        def timed(self):
            did.append(self.name)

    def window(work, joules, least):
        assert (joules, least) == (harness.joules, energy.WINDOW)
        power = watts.get(getattr(getattr(work, "__self__", None), "name", ""), 50.0)
        return energy.Window(10 * power, 10.0, 5)

    monkeypatch.setattr(sampling, "agree", lambda *a: did.append("checked"))
    monkeypatch.setattr(sampling, "ours", lambda *a: Side("ours"))
    monkeypatch.setattr(sampling, "theirs", lambda *a: Side("theirs"))
    monkeypatch.setattr(energy, "window", window)
    setting = sampling.SamplingSetting("cifar10", "bfloat16", "ddim", 4, 10, 1)
    (result,) = energy.energy(setting).measure("cuda")
    assert did == ["checked", "ours", "theirs"], "each is warm before its window"
    assert result.values == {
        "ours_joules_an_image": 50.0, "peer_joules_an_image": 100.0, "ours_of_peer": 0.5
    }  # fmt: skip


def test_the_counter_is_read_in_joules(monkeypatch):
    from contextlib import contextmanager

    nvml = types.SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda card: 1500)

    @contextmanager
    def opened():
        yield nvml, "card"

    monkeypatch.setattr(harness, "_nvml", opened)
    assert harness.joules() == 1.5


@pytest.mark.gpu
@pytest.mark.parametrize("peer", ["reference", "graphs", "unet", "best"])  # the quick first
def test_ours_and_a_peer_agree_on_a_card(peer):
    for solver in ("ddim", "ddpm"):
        setting = sampling.SamplingSetting("bundled", "bfloat16", solver, 2, 10, 1)
        sampling.agree(setting, peer, "cuda")


@pytest.mark.gpu
def test_steps_are_counted_on_a_card():
    sampler = models.model("bundled").sampler("cuda", torch.float32, compile=False)
    assert isinstance(sampler, fd.Sampler)
    draw = steps.drawing(sampler, 2)
    draw(4)
    assert steps.launches(draw, 4, 20)["kernels"] > 1
    assert 0 < steps.host_seconds(sampler, 2) < 1
    assert harness.joules() > 0
