"""Forward noising: equal to the reference bit for bit, and near the float64 result."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm import kernels
from flashddpm.kernels import Purpose, launch, reference
from flashddpm.kernels.tables import FLOATS

module = importlib.import_module("flashddpm.kernels.add_noise")

ROWS = [[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 0.0], [-0.3, 1.7]]
SHAPES = [
    *((1, 1, 1), (1, 1, 2), (1, 1, 3), (3, 1, 1), (1, 1, 15), (1, 1, 17), (3, 17, 17)),
    *((1, 31, 33), (1, 32, 32), (1, 25, 41), (3, 8, 8), (1, 28, 28), (1, 61, 67)),
]


def arguments(shape, dtype=torch.float32, batch=2, seed=0, rows=ROWS, **change):
    draws = torch.Generator().manual_seed(seed)
    x0 = torch.randn((batch, *shape), generator=draws).to(dtype)
    return {
        "x0": x0.contiguous(memory_format=torch.channels_last),
        "t": torch.arange(1, batch + 1) % len(rows),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=draws),
        "keys": torch.randint(0, 2**40, (batch,), generator=draws),
        "rows": torch.tensor(rows),
    } | change


@pytest.fixture(scope="module")
def run(device, copy_of):
    """args -> the fast result on the device, brought to the CPU."""
    return lambda args: kernels.add_noise(**copy_of(args, device)).cpu()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(run, rules, shape, dtype):
    args = arguments(shape, dtype)
    fast, slow = run(args), reference.add_noise(**args)
    assert fast.dtype is dtype and fast.is_contiguous(memory_format=torch.channels_last)
    rules.same(fast, slow, truncates=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["fast", "reference"])
def test_near_float64(run, rules, dtype, which):
    """With float32 tables: one product and one sum on the longest path, so n = 2."""
    args = arguments((3, 17, 17), dtype, batch=3)
    got = run(args) if which == "fast" else reference.add_noise(**args)
    a, b = args["rows"][args["t"]].double().reshape(-1, 2, 1, 1, 1).unbind(1)
    eps = reference.philox(args["seeds"], args["keys"], (3, 17, 17), Purpose.TRAINING).double()
    signal, noise = a * args["x0"].double(), b * eps
    rules.close(got, signal + noise, signal.abs() + noise.abs(), n=2)


@settings(max_examples=20)
@given(
    dtype=st.sampled_from(FLOATS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    row=st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, -0.5, 0.1, 3.7])] * 2),
)
def test_equals_reference_anywhere(run, rules, dtype, shape, batch, seed, row):
    args = arguments(shape, dtype, batch, seed, rows=[list(row), [0.5, 0.5]])
    rules.same(run(args), reference.add_noise(**args), truncates=True)


def test_noise_is_that_of_philox(device, run, rules):
    args = arguments((3, 5, 7), rows=[[0.0, 1.0]], t=torch.zeros(2, dtype=torch.int64))
    for purpose in (Purpose.TRAINING, Purpose.INPAINTING):
        noise = kernels.philox(
            args["seeds"].to(device), args["keys"].to(device), (3, 5, 7), purpose
        )
        rules.same(run(args | {"purpose": purpose}), noise.cpu() + 0.0)
    rules.same(run(args | {"purpose": Purpose.TRAINING}), run(args))


def test_images_are_independent(run, rules):
    """A permuted batch gives permuted results, and an image alone gives the same."""
    args = arguments((3, 5, 7), batch=4)
    order = torch.tensor([2, 0, 3, 1])
    images = ("x0", "t", "seeds", "keys")
    together = run(args)
    permuted = run(args | {name: args[name][order] for name in images})
    rules.same(permuted, together[order])
    rules.same(run(args | {name: args[name][1:2] for name in images}), together[1:2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 17), (3, 17, 17)])
def test_nothing_is_written_around_the_result(run, guarded_outputs, shape):
    zones = guarded_outputs(module)
    run(arguments(shape, torch.bfloat16))
    assert len(zones) == 1
    zones[0].check()


def test_independent_of_block_size(run, rules, monkeypatch):
    args = arguments((1, 10, 20))
    expected = reference.add_noise(**args)
    for block in (64, 128):
        monkeypatch.setattr(launch, "block_size", lambda n, block=block: block)
        rules.same(run(args), expected)


def test_no_noise_and_no_signal_are_exact(run, rules):
    args = arguments((1, 4, 5), batch=4, t=torch.tensor([0, 0, 3, 2]))
    got = run(args)
    rules.same(got[:2], args["x0"][:2])
    assert (got[2] == 0).all() and not torch.signbit(got[2]).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_values_stay_where_they_are(run, rules, bad):
    args = arguments((3, 5, 7), batch=3, t=torch.tensor([1, 1, 1]))
    clean = run(args)
    args["x0"][1, 2, 3, 4] = bad
    got = run(args)
    assert torch.equal(got[1, 2, 3, 4].isnan(), torch.tensor(bad).isnan())
    assert not got[1, 2, 3, 4].isfinite()
    got[1, 2, 3, 4] = clean[1, 2, 3, 4]
    rules.same(got, clean)


def test_zero_coefficient_ignores_nan(run, rules):
    """With a = 0 the image is not read: NaN and Inf in it change nothing."""
    args = arguments((1, 5, 7), batch=3, t=torch.tensor([2, 3, 2]))
    clean = run(args)
    args["x0"][:] = torch.tensor([torch.nan, torch.inf, -torch.inf]).reshape(3, 1, 1, 1)
    rules.same(run(args), clean)
    rules.same(reference.add_noise(**args), clean)
    assert clean.isfinite().all()


LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "every second image": lambda x: x.repeat_interleave(2, 0)[::2],
    "a view with an offset": lambda x: torch.cat([x[:1], x])[1:],
    "rows of a wider image": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "one image for all": lambda x: x[:1].expand_as(x),
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, rules, layout):
    args = arguments((3, 5, 7))
    view = LAYOUTS[layout](args["x0"])
    args["x0"] = view.contiguous(memory_format=torch.channels_last)
    expected = reference.add_noise(**args)
    on_device = {name: value.to(device) for name, value in args.items()}
    on_device["x0"] = LAYOUTS[layout](arguments((3, 5, 7))["x0"].to(device))
    rules.same(kernels.add_noise(**on_device).cpu(), expected)


@pytest.mark.parametrize("batch", [0, 2])
def test_zero_elements(device, copy_of, batch):
    for shape in ((3, 4, 4), (3, 0, 4))[batch // 2 :]:
        args = copy_of(arguments(shape, batch=batch), device)
        for add_noise in (kernels.add_noise, reference.add_noise):
            assert add_noise(**args).shape == (batch, *shape)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_x0(device, copy_of, rules, dtype):
    """The fast path's gradient equals autograd's of the reference, where a = 0 too."""
    args = arguments((3, 5, 7), dtype, batch=4)
    weight = torch.randn((4, 3, 5, 7), generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[1] = torch.nan  # of the image whose a is 0
    weight[0, 0, 0] = torch.tensor(-0.0)  # its sign stays
    gradients = []
    for add_noise, place in ((kernels.add_noise, device), (reference.add_noise, "cpu")):
        leaves = copy_of(args, place)
        leaves["x0"].requires_grad_()
        add_noise(**leaves).backward(weight.to(place))
        gradients.append(leaves["x0"].grad.cpu())
    rules.same(*gradients, truncates=True)
    assert (gradients[0][1] == 0).all() and (gradients[0][0, 1:] != 0).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x0", {"x0": torch.zeros(2, 3, 4)}),
        ("x0", {"x0": torch.zeros(2, 1, 4, 4, dtype=torch.float64)}),
        ("x0", {"x0": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}),
        ("t", {"t": torch.zeros(2)}),
        ("t", {"t": torch.zeros(3, dtype=torch.int64)}),
        ("seeds", {"seeds": torch.zeros(2, dtype=torch.int32)}),
        ("seeds", {"seeds": torch.arange(4)[::2]}),
        ("keys", {"keys": torch.zeros((), dtype=torch.int64)}),
        ("rows", {"rows": torch.zeros(5, 3)}),
        ("rows", {"rows": torch.zeros(5, 2, dtype=torch.float64)}),
        ("rows", {"rows": torch.zeros(2, 5).T}),
        ("purpose", {"purpose": -1}),
    ],
)
def test_bad_arguments(name, change):
    with pytest.raises(ValueError, match=f"^{name}"):
        kernels.add_noise(**(arguments((1, 4, 4)) | change))


@pytest.mark.gpu
def test_bad_device():
    args = arguments((1, 4, 4))
    for name in ("t", "seeds", "keys", "rows"):
        with pytest.raises(ValueError, match=f"^{name}"):
            kernels.add_noise(**({k: v.cuda() for k, v in args.items()} | {name: args[name]}))
