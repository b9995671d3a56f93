"""What only a GPU shows: repeats, sizes, streams, graphs, and the sanitizer's checks.

As a script, one short run of every operation, for compute-sanitizer.
"""

import importlib
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm import kernels
from flashddpm.kernels import OPS, Column, launch, reference
from flashddpm.kernels.step_arguments import by_tensor
from flashddpm.kernels.tables import FLOATS, Purpose
from flashddpm.testing import rules, strategies

pytestmark = pytest.mark.gpu

CASES = [
    pytest.param(op, dtype, id=f"{op.name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS.values()
    for dtype in op.dtypes
]
each_case = pytest.mark.parametrize(("op", "dtype"), CASES)
SHAPE, BATCH, REPEATS = (3, 45, 51), 40, 250
STEP = importlib.import_module("flashddpm.kernels.denoise_step")  # not the function of this name
HUGE = 2**31 + 2**20


def call(op, args):
    """Return every tensor that the operation makes or changes, gradients included, by name."""
    leaves = [args[name].requires_grad_() for name in op.differentiable]
    result = op.fast(**args)
    results = {name: args[name] for name in op.mutates}
    if result is not None:
        results["result"] = result.detach()
    if leaves:
        gradients = torch.autograd.grad(result, leaves, torch.ones_like(result))
        results |= dict(zip(op.differentiable, gradients, strict=True))
    return results


def fill(args, values):
    """Copy values into the tensors of the arguments, where they stand."""
    with torch.no_grad():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                args[name].copy_(value)


def assert_same(results, expected):
    """Equal bits; compared where the tensors are, for copies to the CPU would take long."""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        bits = rules.BITS.get(value.dtype, value.dtype)
        assert torch.equal(results[name].view(bits), value.view(bits)), f"{name} differs"


@each_case
def test_repeats_are_equal_bit_for_bit(op, dtype, device):
    args = op.example(device, dtype, SHAPE, BATCH, 0)
    fresh = {k: v.clone() for k, v in args.items() if isinstance(v, torch.Tensor)}
    expected = {name: value.clone() for name, value in call(op, args).items()}
    for _ in range(REPEATS):
        fill(args, fresh)
        assert_same(call(op, args), expected)


SHAPES = [(3, 64, 64), (4, 37, 41), (1, 1, 66_001), (3, 256, 256)]


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_equals_that_of_the_cpu(device, shape):
    draws = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (5,), generator=draws)
    keys = torch.randint(0, 2**63 - 1, (5,), generator=draws)
    for purpose in Purpose:
        noise = kernels.philox(seeds.to(device), keys.to(device), shape, purpose)
        rules.same(noise, reference.philox(seeds, keys, shape, purpose))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_noising_equals_that_of_the_cpu(device, copy_of, shape, dtype):
    args = OPS["add_noise"].example("cpu", dtype, shape, 5, 1)
    args["rows"] = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 0.0], [-0.3, 1.7]])
    args["t"] = torch.arange(5)
    noised = kernels.add_noise(**copy_of(args, device))
    rules.same(noised, reference.add_noise(**args), truncates=True)


DTYPES = [*((dtype, dtype) for dtype in FLOATS), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_update_equals_that_of_the_cpu(State, compared_step, shape, dtypes):
    """Every row of the table, so every column; guided and not; both kinds of output and of noise.

    (``learned`` reads its column where the network has 2C channels.)
    """
    names = tuple(State.STEPS)
    count = len(names)
    cond = tuple(reversed(range(count)))
    uncond = tuple(count + i if i % 2 else -1 for i in range(count))
    assert names.index("rescaled") % 2, "the rescaled slot must be guided"
    for variance, noise in product((False, True), repeat=2):
        compared_step(
            shape=shape, names=names, cond=cond, uncond=uncond, dtypes=dtypes,
            variance=variance, noise=noise,
        )  # fmt: skip


@settings(max_examples=50)
@given(
    count=st.sampled_from([1, 2, 4, 8]),
    name=st.sampled_from(["philox", "add_noise", "denoise_step", "denoise_step learned"]),
    dtype=st.sampled_from(FLOATS),
    shape=strategies.shapes(),
    seed=st.integers(0, 2**31),
)
def test_bits_do_not_depend_on_the_number_of_warps(device, count, name, dtype, shape, seed):
    """Of a block, a thread has 4 to 32 elements; 2C channels have warps of their own."""
    name, _, learned = name.partition(" ")

    def results():
        args = OPS[name].example(device, dtype, shape, BATCH // 10, seed)
        if learned:
            args["out"] = torch.cat([args["out"], args["out"].flip(-1)], 1)
            args["rows"][:, Column.LOG_SIGMA] = 0.5
        return call(OPS[name], args)

    expected = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(launch.OPTIONS, "num_warps", count)
        patch.setattr(STEP, "WARPS_2C", count)
        assert_same(results(), expected)


def need(count):
    """Skip where fewer bytes are free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < count:
        pytest.skip(f"{free / 2**30:.1f} GiB of GPU memory are free; {count / 2**30:.1f} needed")


def noise_of(seed, key, first, count):
    """Return the training noise of ``count`` elements from ``first`` on, both multiples of 4."""

    def uniform(seeds, keys, purpose, groups):
        w = reference.philox_words(seeds, keys, purpose, groups, first=first // 4)
        u = torch.stack([w[0], w[2]], -1).float() * 2.0**-32 + 2.0**-33
        return u, torch.stack([w[1], w[3]], -1)

    pieces = (uniform, *reference.PIECES[1:])
    shape = (1, 1, count)
    noise = reference.philox_in_pieces(pieces, seed, key, shape, int(Purpose.TRAINING))
    return noise.flatten()


def places(n):
    """Return slices of 64 elements: the first, around 2^31 (or the middle), and the last."""
    middle = min(2**31, n // 2 // 64 * 64)
    return [slice(first, first + 64) for first in (0, middle - 64, middle, n - 64)]


def huge_image(n, device, seed):
    """Return float16 [1, 1, 1, n]: 0.5, and random numbers in ``places``."""
    image = torch.full((1, 1, 1, n), 0.5, dtype=torch.float16, device=device)
    draws = torch.Generator().manual_seed(seed)
    for place in places(n):
        image[..., place] = torch.randn(64, generator=draws).to(image)
    return image


def vectors(device, *row):
    """Return t, seeds, keys and a table of one row, for one image."""
    values = {"t": [0], "seeds": [-(2**62) - 7], "keys": [2**40 + 3]}
    tensors = {name: torch.tensor(value, device=device) for name, value in values.items()}
    return tensors | {"rows": torch.tensor([row], device=device)}


def expected_noise(args, place):
    return noise_of(args["seeds"].cpu(), args["keys"].cpu(), place.start, 64)


def test_noising_past_2_to_the_31_elements(device, n=HUGE):
    if device == "cuda":
        need(5 * n)
    args = vectors(device, 0.8, 0.6)
    x0 = huge_image(n, device, 0)
    noised = kernels.add_noise(x0, **args).flatten()
    for place in places(n):
        a, b = args["rows"].cpu()[0]
        expected = a * x0.flatten()[place].cpu().float() + b * expected_noise(args, place)
        rules.same(noised[place], expected.half())


def test_loss_past_2_to_the_31_elements(device, n=HUGE):
    """The sum sees errors wherever they are, and the gradient is in its place."""
    if device == "cuda":
        need(7 * n)
    x0 = huge_image(n, device, 0)
    out, args = x0.clone(), vectors(device, 1.0, 0.0, 1.0)
    squares = 0.0
    for i, place in enumerate(places(n)):
        out[..., place] += i + 1
        squares += (out[..., place].double() - x0[..., place].double()).square().sum().item()
    found = kernels.diffusion_loss(out, x0, **args).item() * n
    assert found == pytest.approx(squares, rel=1e-6)

    args = vectors(device, -0.6, 0.8, 0.5)
    out.requires_grad_()
    loss = kernels.diffusion_loss(out, x0, **args)
    upstream = torch.full_like(loss, n)  # exact in float32: of the mean's 1 / n it leaves 1
    gradient = torch.autograd.grad(loss, out, upstream)[0].flatten()
    k0, k1, weight = args["rows"].cpu()[0]
    for place in places(n):
        o, x = (images.detach().flatten()[place].cpu().float() for images in (out, x0))
        error = o - (k0 * x + k1 * expected_noise(args, place))
        rules.same(gradient[place], (weight * (2 * error)).half())


def test_gradient_of_a_variance_past_2_to_the_31_elements(device, n=HUGE):
    """Of n numbers in 2 channels; the row has no noise, so that a part is as good as the whole."""
    if device == "cuda":
        need(6 * n)
    layout = {"memory_format": torch.channels_last}
    out = huge_image(n, device, 1).reshape(1, 1, n // 2, 2).permute(0, 3, 1, 2)
    x0 = huge_image(n // 2, device, 2).clamp_(-1, 1)
    assert out.is_contiguous(**layout) and x0.is_contiguous(**layout)
    args = vectors(device, 1.0, 0.0, 1.0, 1.5, 0.7, 0.6, -0.4, 3.0, 0.0)
    out.requires_grad_()
    loss = kernels.hybrid_loss(out, x0, **args)
    gradient = torch.autograd.grad(loss, out, torch.full_like(loss, n // 2))[0]
    for place in places(n):
        pixels = slice(place.start // 2, place.stop // 2)
        part, images = (x.detach()[..., pixels].cpu() for x in (out, x0))
        on_cpu = {name: value.cpu() for name, value in args.items()}
        upstream = torch.full((1,), float(pixels.stop - pixels.start))
        expected = reference.hybrid_loss_backward(upstream, part, images, **on_cpu)
        torch.testing.assert_close(gradient[..., pixels].cpu(), expected)


def test_update_of_slots_2_to_the_31_elements_apart(device, State, stride=2**31 + 64):
    """x and hist of two slots, whose second is past what 32 bits can say."""
    if device == "cuda":
        need(8 * stride + 2**20)
    spec = {"names": ("second order", "all"), "cond": (1, 0), "uncond": (-1, 2)}
    expected = State("cpu", **spec).step(reference.denoise_step)
    args = State(device, **spec).args
    _, C, H, W = args["x"].shape
    for name in ("x", "hist"):
        wide = torch.empty(stride + C * H * W, device=device)
        wide = wide.as_strided(args[name].shape, (stride, 1, W * C, C))
        args[name] = wide.copy_(args[name])
    by_tensor(kernels.denoise_step)(**args)
    for name, value in expected.items():
        rules.same(args[name], value)


@each_case
def test_two_streams_at_once(op, dtype, device):
    pair = [op.example(device, dtype, SHAPE, BATCH, seed) for seed in (1, 2)]
    fresh = [{k: v.clone() for k, v in args.items() if torch.is_tensor(v)} for args in pair]
    expected = [{k: v.clone() for k, v in call(op, args).items()} for args in pair]
    streams = [torch.cuda.Stream() for _ in pair]
    for args, values in zip(pair, fresh, strict=True):
        fill(args, values)
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, args, values in zip(streams, pair, fresh, strict=True):
            with torch.cuda.stream(stream):
                fill(args, values)
                results.append(call(op, args))
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        assert_same(found, wanted)


def captured(function):
    """Return a graph of the function's work, and its results, which a replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = function()
    return graph.replay, results


@each_case
def test_a_graph_is_replayed_with_other_numbers(op, dtype, device):
    """Other images, seeds, keys and coefficients, put where the captured ones stood."""
    args = op.example(device, dtype, SHAPE, BATCH, 1)
    replay, results = captured(lambda: call(op, args))
    for seed in (2, 3):
        others = op.example(device, dtype, SHAPE, BATCH, seed)
        if "rows" in others:
            others["rows"] *= 1 - seed / 16
        fill(args, others)
        replay()
        assert_same(results, call(op, others))


def short_run():
    """Run every operation in every dtype, gradients too, on images of odd sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in OPS.values():
        for dtype in op.dtypes:
            call(op, op.example(device, dtype, (3, 9, 11), 3, 0))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran {len(OPS)} operations")


@triton.jit
def _outside_kernel(
    x,  # float32 [n], written one element past its end
    n,
):
    tl.store(x + n, 1.0)


def planted_fault():
    """Write past the end of an allocation."""
    x = torch.zeros(512, device="cuda")
    _outside_kernel[(1,)](x, len(x))
    torch.cuda.synchronize()


def sanitized(tool, what):
    if shutil.which("compute-sanitizer") is None:
        missing = "compute-sanitizer, of the CUDA toolkit, is not on PATH"
        if os.environ.get("FLASHDDPM_REQUIRE_SANITIZER") == "1":
            pytest.fail(f"{missing}, and FLASHDDPM_REQUIRE_SANITIZER=1 wants it")
        pytest.skip(missing)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-P"]
    # Each allocation is CUDA's own: within PyTorch's pool, the next tensor hides what goes too far.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        [*command, str(Path(__file__)), what], env=environment, capture_output=True, text=True
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool):
    child = sanitized(tool, "short_run")
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
    assert f"ran {len(OPS)} operations" in child.stdout


@pytest.mark.timeout(1200)
def test_sanitizer_finds_a_planted_fault():
    child = sanitized("memcheck", "planted_fault")
    assert child.returncode != 0 and "Invalid __global__ write" in child.stdout + child.stderr


if __name__ == "__main__":
    {"short_run": short_run, "planted_fault": planted_fault}[sys.argv[1]]()
