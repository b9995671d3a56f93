"""What the figures of a step are computed from, with times made up."""

import sys
import types

import pytest
import torch

import flashddpm as fd
from flashddpm.benchmarks.cases import energy, first_call, roofline, steps
from flashddpm.benchmarks.cases.roofline import Speed, StepWork
from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.peers import models


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    for module in (harness, energy, first_call):
        monkeypatch.setattr(module, "time", fake)
    return now


def test_a_step_is_the_difference_of_two_runs(clock):
    def draw(num_steps):
        clock[0] += 10 + 0.5 * num_steps

    assert steps.seconds_a_step(draw, 2, 12) == pytest.approx(0.5)


def test_the_warm_up_does_not_count(clock):
    calls = []

    def draw(num_steps):
        calls.append(num_steps)
        clock[0] += num_steps * (100 if len(calls) <= 2 else 1)

    assert steps.seconds_a_step(draw, 1, 3, rounds=1) == pytest.approx(1)
    assert calls == [1, 3, 1, 3]


def test_the_counted_work_of_a_known_network():
    """One 1x1 convolution's worth of a U-Net is counted by hand."""
    with roofline.Traffic() as traffic:
        x = torch.zeros(2, 3, 4, 4)
        torch.nn.Conv2d(3, 5, 3, padding=1)(x)
        torch.nn.Linear(4, 7)(x)
        q = torch.zeros(1, 2, 9, 4)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    conv, linear, attention = 96 + 160, 96 + 168, 4 * 72
    assert traffic.elements == conv + linear + attention


def test_work_grows_with_the_batch_and_weights_are_read_once():
    of, kind = models.model("bundled"), torch.bfloat16
    one, two, four = (roofline.work_of(of, kind, batch) for batch in (1, 2, 4))
    assert two.flops == 2 * one.flops and four.flops == 4 * one.flops
    image = two.bytes - one.bytes
    assert four.bytes - two.bytes == 2 * image > 0
    assert one.bytes - image == 2 * sum(p.numel() for p in of.unet.parameters())
    wide = roofline.work_of(of, torch.float32, 1)
    C, H, W = of.shape
    assert wide.bytes - 8 * C * H * W == 2 * (one.bytes - 8 * C * H * W)


def test_the_floor_is_the_longer_of_two_times():
    speed = Speed(flops=100.0, bytes=10.0)
    assert speed.floor(StepWork(200, 10)) == 2 and speed.floor(StepWork(200, 40)) == 4


def test_shares_of_the_floors(monkeypatch):
    monkeypatch.setattr(roofline, "work_of", lambda *a: StepWork(200, 10))
    values = steps.shares(None, torch.float32, 1, 4.0, Speed(100.0, 10.0))
    assert values["of_flop_floor"] == 0.5 and values["of_byte_floor"] == 0.25


def test_speeds_are_measured(monkeypatch):
    monkeypatch.setattr(roofline, "MATMUL", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 2**12})
    roofline.speed.cache_clear()
    found = roofline.speed("cpu", torch.float32)
    roofline.speed.cache_clear()
    assert found.flops > 0 and found.bytes > 0


def event(name, cuda):
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return types.SimpleNamespace(name=name, device_type=kind)


def test_kernels_and_launches_are_counted():
    events = [event("a_kernel", True)] * 3 + [event("Memcpy HtoD", True), event("Memset", True)]
    events += [event("cudaLaunchKernel", False), event("cuLaunchKernelEx", False)]
    events += [event("cudaGraphLaunch", False), event("aten::add", False)]
    assert steps.count(events) == {"kernels": 3, "launches": 3}


def test_counts_are_of_the_steps_alone(monkeypatch):
    """A run of n steps has 7 kernels once and 5 a step; a launch once and 1 a step."""
    drawn = []

    class Profile:
        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def events(self):
            n = drawn[-1]
            return [event("k", True)] * (7 + 5 * n) + [event("cudaGraphLaunch", False)] * (1 + n)

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    assert steps.launches(drawn.append, 2, 10) == {"kernels": 5.0, "launches": 1.0}


def test_the_host_launches_steps_of_a_trajectory():
    of = models.model("bundled")
    sampler = of.sampler("cpu", torch.float32, compile=False)
    assert steps.host_seconds(sampler, 1) > 0


def test_a_latency_case_on_the_cpu(monkeypatch):
    of = models.model("bundled")
    sampler = of.sampler("cpu", torch.float32, compile=False)
    monkeypatch.setattr(steps.pipelines, "sampler", lambda *a: sampler)
    monkeypatch.setattr(steps.roofline, "speed", lambda *a: Speed(1e12, 1e12))
    monkeypatch.setattr(steps, "ROUNDS", 1)
    monkeypatch.setitem(steps.SPAN, "cpu", {"bundled": (1, 2)})
    (result,) = steps.latency("bundled", "float32", 2).measure("cpu")
    v = result.values
    assert result.case == "step-bundled-float32-batch-2" and 0 < v["loop_ms"]
    assert v["image_steps_a_second"] == pytest.approx(2e3 / v["ms_a_step"])
    assert v["of_flop_floor"] == pytest.approx(v["gflop"] / 1e3 / (v["ms_a_step"] / 1e3))


def test_graphs_that_draw_other_images_are_not_timed(monkeypatch):
    drawn = iter([torch.zeros(1), torch.ones(1)])
    monkeypatch.setattr(steps.pipelines, "sampler", lambda *a: None)
    monkeypatch.setattr(steps, "drawing", lambda *a: lambda n: next(drawn))
    monkeypatch.setitem(steps.SPAN, "cpu", {"cifar10": (1, 2)})
    with pytest.raises(AssertionError, match="not timed"):
        list(steps.graph("cifar10", "float32", 1).measure("cpu"))


# The first call


def test_a_call_within_another_counts_once(clock):
    class Thing:
        def outer(self):
            clock[0] += 2
            self.inner()

        def inner(self):
            clock[0] += 3

    watch = first_call.Watch()
    watch.over(Thing, "outer", "compile")
    watch.over(Thing, "inner", "capture")
    Thing().outer()
    assert dict(watch.seconds) == {"compile": 5}
    Thing().inner()
    assert dict(watch.seconds) == {"compile": 5, "capture": 3}


def test_the_parts_of_a_first_call_add_up():
    parts = first_call.split(1.0, 2.0, {"compile": 10.0, "capture": 3.0}, 4.0, 20.0)
    assert parts == {
        "import_seconds": 1.0, "build_seconds": 2.0, "compile_seconds": 6.0, "tune_seconds": 4.0,
        "capture_seconds": 3.0, "rest_seconds": 4.0, "seconds": 20.0,
    }  # fmt: skip


def test_tuning_is_found_among_the_compile_times():
    times = {"mm_template_autotuning": [1.0, 2.0], "conv_template_precompiling": [4.0], "x": [9.0]}
    assert first_call.tuning(times) == 7.0


def test_the_methods_that_are_timed_are_there():
    from flashddpm.execution.compiled_network import CompiledNetwork
    from flashddpm.execution.cuda_graphs import Graphs

    assert callable(CompiledNetwork.prepare) and callable(Graphs.get) and callable(Graphs.best)


def test_the_first_call_of_a_process(forked, monkeypatch):
    """The process itself, with nothing compiled; of two, the second begins in a fork."""
    script = first_call.SCRIPT.replace(
        "first_call.main(",
        "import torch\n"
        "from flashddpm.benchmarks.peers import models as m, pipelines as p\n"
        "p.sampler = lambda *a: m.model('bundled').sampler('cpu', torch.float32, compile=False)\n"
        "first_call.main(",
    )
    monkeypatch.setattr(first_call, "SCRIPT", script)
    beginnings, run_child = iter([[sys.executable], forked]), first_call.run_child

    def run(line, cache):
        return run_child([*next(beginnings), *line[1:]], cache)

    monkeypatch.setattr(first_call, "run_child", run)
    cold, warm = first_call.first_call("bundled", "float32", 1).measure("cpu")
    assert cold.case == "first-call-bundled-float32-batch-1-cold"
    parts = [cold.values[f"{part}_seconds"] for part in first_call.PARTS]
    assert sum(parts) == pytest.approx(cold.values["seconds"])
    assert cold.values["import_seconds"] > 0.2 and cold.values["peak_host_memory_mib"] > 100


# Energy


def test_energy_of_an_image_is_beyond_idle(clock, monkeypatch):
    """Idle at 50 W; a call of 4 images takes 2 s at 150 W: 50 J an image."""
    monkeypatch.setattr(harness, "synchronize", lambda: None)
    read = [0.0]

    def spend(seconds, watts):
        clock[0] += seconds
        read[0] += seconds * watts

    idle = energy.window(lambda: spend(0.1, 50), lambda: read[0], 10)
    busy = energy.window(lambda: spend(2, 150), lambda: read[0], 10)
    assert idle.seconds == pytest.approx(10, abs=0.11) and (busy.seconds, busy.calls) == (10, 5)
    assert energy.joules_an_image(idle, busy, 4) == pytest.approx(50)


def test_two_cases_of_energy_on_a_gpu_only():
    assert [case.name for case in energy.energies("cuda")] == [
        "energy-cifar10-bfloat16-ddim-batch-256",
        "energy-bundled-bfloat16-ddim-batch-256",
    ]
    assert energy.energies("cpu") == [] == steps.graphs("cpu")


def test_a_sampler_without_a_network_draws():
    sampler = steps.without_network(models.model("bundled"), "cpu")
    assert steps.drawing(sampler, 2)(3).shape == (2, 1, 28, 28)
    assert isinstance(sampler, fd.Sampler)
