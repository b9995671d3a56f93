"""The fused loss and its gradient, against float64, autograd and each other."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm import kernels
from flashddpm.kernels import LOSSES, Purpose, image_means, launch, losses, reference
from flashddpm.kernels.launch import OPTIONS
from flashddpm.kernels.tables import FLOATS

ROWS = [[0.0, 1.0, 1.0], [-0.6, 0.8, 0.5], [1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]
SHAPES = [
    *((1, 1, 1), (1, 1, 2), (1, 1, 3), (3, 1, 1), (1, 1, 15), (1, 1, 17), (3, 17, 17)),
    *((1, 31, 33), (1, 32, 32), (1, 25, 41), (3, 8, 8), (1, 28, 28), (1, 127, 131)),
]


def arguments(shape, dtype=torch.float32, batch=2, seed=0, rows=ROWS, **change):
    draws = torch.Generator().manual_seed(seed)
    out, x0 = torch.randn((2, batch, *shape), generator=draws).to(dtype)
    return {
        "out": out.contiguous(memory_format=torch.channels_last),
        "x0": x0.contiguous(memory_format=torch.channels_last),
        "t": torch.arange(1, batch + 1) % len(rows),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=draws),
        "keys": torch.randint(0, 2**40, (batch,), generator=draws),
        "rows": torch.tensor(rows),
    } | change


def penalty(error, loss, delta):
    """PyTorch's own losses, in float64, one number an element."""
    target = torch.zeros_like(error)
    if loss == "huber":
        return torch.nn.functional.huber_loss(error, target, reduction="none", delta=delta)
    function = {"mse": torch.nn.functional.mse_loss, "l1": torch.nn.functional.l1_loss}[loss]
    return function(error, target, reduction="none")


def exact(args):
    """Return (error, sum of the absolute terms of it, weight) in float64; eps is an input."""
    k0, k1, weight = args["rows"][args["t"]].double().reshape(-1, 3, 1, 1, 1).unbind(1)
    shape = tuple(args["x0"].shape[1:])
    eps = reference.philox(args["seeds"], args["keys"], shape, Purpose.TRAINING).double()
    terms = [args["out"].double(), -k0 * args["x0"].double(), -k1 * eps]
    return sum(terms), sum(term.abs() for term in terms), weight


@pytest.fixture(scope="module")
def run(device, copy_of):
    """args -> the fast losses on the device, brought to the CPU."""
    return lambda args: kernels.diffusion_loss(**copy_of(args, device)).cpu()


@pytest.fixture(scope="module")
def gradient(device, copy_of):
    """(args, d_loss, reference or not) -> gradient of out."""

    def gradient(args, d_loss, slow=False):
        args = copy_of(args, "cpu" if slow else device)
        args["out"].requires_grad_()
        loss = (reference if slow else kernels).diffusion_loss(**args)
        loss.backward(d_loss.to(loss.device))
        return args["out"].grad.cpu()

    return gradient


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_near_float64(run, rules, shape, dtype):
    args = arguments(shape, dtype)
    error, _, weight = exact(args)
    r64 = weight.flatten() * error.square().flatten(1).mean(1)
    got = run(args)
    assert got.dtype is torch.float32 and got.shape == (2,)
    rules.reduced(got, r64, plain=reference.diffusion_loss(**args))


@settings(max_examples=15)
@given(
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 2),
    seed=st.integers(0, 10**6),
    row=st.tuples(
        st.sampled_from([0.0, -0.0, 1.0, -0.5]),
        st.sampled_from([0.0, 1.0, -0.7]),
        st.sampled_from([1.0, 0.3, 12.0]),
    ),
    loss=st.sampled_from(LOSSES),
    delta=st.sampled_from([1.0, 0.1, 2.5]),
)
def test_near_float64_anywhere(run, rules, dtypes, shape, batch, seed, row, loss, delta):
    """Output and images may differ in dtype."""
    args = arguments(shape, torch.float32, batch, seed, rows=[list(row), [0.5, 0.5, 1.0]])
    args |= {"loss": loss, "delta": delta}
    args["out"], args["x0"] = args["out"].to(dtypes[0]), args["x0"].to(dtypes[1])
    error, _, weight = exact(args)
    r64 = weight.flatten() * penalty(error, loss, delta).flatten(1).mean(1)
    rules.reduced(run(args), r64, plain=reference.diffusion_loss(**args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("delta", [0.4, 3.0])
@pytest.mark.parametrize("loss", ["l1", "huber"])
def test_gradient_of_other_losses(gradient, rules, loss, delta, dtype):
    """PyTorch's gradient of its own losses, in float64 (roundings as in test_gradient_of_out).

    l1 turns at 0 and huber at delta: errors nearer to a turn than they are exact are left out.
    """
    args = arguments((3, 17, 17), dtype, batch=4, loss=loss, delta=delta)
    d_loss = torch.tensor([1.0, -0.25, 3.0, 0.7])
    error, terms, weight = exact(args)
    error.requires_grad_()
    penalty(error, loss, delta).sum().backward()
    scale = weight * d_loss.double().reshape(-1, 1, 1, 1) / error[0].numel()
    size = error.detach().abs()
    clear = (size if loss == "l1" else (size - delta).abs()) > 1e-5
    assert clear.float().mean() > 0.99
    for slow in (False, True):
        got = gradient(args, d_loss, slow)
        wanted, size = scale * error.grad, scale.abs() * (1 if loss == "l1" else terms)
        rules.close(got.where(clear, 0), wanted.where(clear, 0), size, n=6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 17), (3, 17, 17), (1, 32, 32)])
def test_gradient_of_out(gradient, rules, shape, dtype):
    """Both gradients against 2 w d_loss error / n in float64.

    The longest path rounds k1 eps, the target, out - target, w d_loss, its quotient by n and the
    last product: n = 6.
    """
    args = arguments(shape, dtype, batch=4)
    d_loss = torch.tensor([1.0, -0.25, 3.0, 0.7])
    error, terms, weight = exact(args)
    scale = 2 * weight * d_loss.double().reshape(-1, 1, 1, 1) / error[0].numel()
    for slow in (False, True):
        got = gradient(args, d_loss, slow)
        assert got.dtype is dtype
        rules.close(got, scale * error, scale.abs() * terms, n=6)


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_only_out_has_a_gradient(device, copy_of, which):
    args = copy_of(arguments((1, 4, 4)), device if which == "fast" else "cpu")
    args["out"].requires_grad_()
    args["x0"].requires_grad_()
    (kernels if which == "fast" else reference).diffusion_loss(**args).sum().backward()
    assert args["out"].grad is not None and args["x0"].grad is None


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 17), (3, 17, 17)])
def test_nothing_is_written_around_the_gradient(gradient, guarded_outputs, shape):
    zones = guarded_outputs(losses)
    gradient(arguments(shape, torch.bfloat16), torch.ones(2))
    assert len(zones) == 1
    zones[0].check()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_of_the_reference(loss):
    args = arguments((2, 3, 3), batch=4, loss=loss, delta=0.7)
    args["out"], args["x0"] = args["out"].double().requires_grad_(), args["x0"].double()
    out = args.pop("out")
    assert torch.autograd.gradcheck(
        lambda out: reference.diffusion_loss(out, **args), out, fast_mode=False
    )


def test_weights_apply(run, gradient, rules):
    args = arguments((1, 5, 7))
    ones = torch.ones(2)
    args["t"] = torch.zeros(2, dtype=torch.int64)
    loss, grad = run(args), gradient(args, ones)
    for weight in (0.5, 4.0, 0.0):
        weighted = args | {"rows": torch.tensor([[0.0, 1.0, weight]])}
        rules.same(run(weighted), weight * loss)
        rules.same(gradient(weighted, ones).abs(), (weight * grad).abs())


def test_noise_is_that_of_add_noise(run, gradient, device):
    """The network that answers the very noise has no loss and no gradient."""
    args = arguments((3, 5, 7))
    names = ("x0", "seeds", "keys", "t")
    noising = {name: args[name].to(device) for name in names}
    noising |= {"t": noising["t"] * 0, "rows": torch.tensor([[0.0, 1.0]], device=device)}
    args |= {"out": kernels.add_noise(**noising).cpu(), "t": args["t"] * 0}
    assert (run(args) == 0).all()
    assert (gradient(args, torch.ones(2)) == 0).all()


def test_images_are_independent(run, gradient, rules):
    args = arguments((3, 5, 7), batch=4)
    order = torch.tensor([2, 0, 3, 1])
    images = ("out", "x0", "t", "seeds", "keys")
    d_loss = torch.tensor([1.0, 2.0, -1.0, 0.5])
    permuted = args | {name: args[name][order] for name in images}
    alone = args | {name: args[name][1:2] for name in images}
    loss, grad = run(args), gradient(args, d_loss)
    rules.same(run(permuted), loss[order])
    rules.same(run(alone), loss[1:2])
    rules.same(gradient(permuted, d_loss[order]), grad[order])
    rules.same(gradient(alone, d_loss[1:2]), grad[1:2])


@pytest.fixture(scope="module")
def finite(run, gradient):
    """Kind of loss -> losses of three images that are finite, and the gradient of their sum."""

    @functools.cache
    def results(kind):
        args = arguments((3, 5, 7), batch=3, loss=kind)
        return run(args), gradient(args, torch.ones(3))

    return results


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_values_stay_where_they_are(run, gradient, finite, rules, bad, kind):
    args = arguments((3, 5, 7), batch=3, loss=kind)
    d_loss = torch.ones(3)
    loss, grad = finite(kind)
    args["out"][1, 2, 3, 4] = bad
    bad_loss, bad_grad = run(args), gradient(args, d_loss)
    assert not bad_loss[1].isfinite() and bad_loss[1].isnan() == (bad != bad)
    assert bad_grad[1, 2, 3, 4].isfinite() == (kind != "mse" and bad == bad)
    if kind != "mse" and bad == bad:  # the slope is at its bound
        assert bad_grad[1, 2, 3, 4].sign() == (1 if bad > 0 else -1)
    bad_loss[1], bad_grad[1, 2, 3, 4] = loss[1], grad[1, 2, 3, 4]
    rules.same(bad_loss, loss)
    rules.same(bad_grad, grad)


def test_zero_coefficient_ignores_nan(run, gradient, rules):
    """With k0 = 0 the image is not read: NaN and Inf in it change nothing."""
    args = arguments((1, 5, 7), t=torch.tensor([0, 3]))
    d_loss = torch.ones(2)
    loss, grad = run(args), gradient(args, d_loss)
    args["x0"][:] = torch.tensor([torch.nan, torch.inf]).reshape(2, 1, 1, 1)
    rules.same(run(args), loss)
    rules.same(gradient(args, d_loss), grad)
    rules.same(gradient(args, d_loss, slow=True), grad)
    assert loss.isfinite().all()


@pytest.mark.parametrize("block", [64, 128])
def test_several_blocks(run, gradient, rules, monkeypatch, block):
    """Two stages: the blocks' sums, then theirs; the last block is not full."""
    args = arguments((1, 10, 20))
    error, _, weight = exact(args)
    r64 = weight.flatten() * error.square().flatten(1).mean(1)
    grad = gradient(args, torch.ones(2))
    monkeypatch.setattr(launch, "block_size", lambda n: block)
    rules.reduced(run(args), r64, plain=reference.diffusion_loss(**args))
    rules.same(gradient(args, torch.ones(2)), grad)


@pytest.mark.parametrize(("blocks", "width"), [(1, 1), (37, 16), (32, 16), (5, 8)])
def test_sum_of_blocks(device, rules, blocks, width):
    draws = torch.Generator().manual_seed(0)
    partial = torch.rand((2, blocks), generator=draws)
    loss = torch.full((2,), torch.nan, device=device)
    image_means._mean_kernel[(2,)](loss, partial.to(device), 77, blocks, width, **OPTIONS)
    rules.reduced(loss, partial.double().sum(1) / 77, plain=partial.sum(1) / 77)


def test_any_layout(device, run, rules):
    args = arguments((3, 5, 7))
    expected = run(args)
    on_device = {name: value.to(device) for name, value in args.items()}
    on_device["out"] = on_device["out"].contiguous().requires_grad_()
    on_device["x0"] = on_device["x0"].repeat_interleave(2, 0)[::2]
    loss = kernels.diffusion_loss(**on_device)
    rules.same(loss, expected)
    loss.sum().backward()
    assert on_device["out"].grad.isfinite().all()


def test_gradient_of_an_expanded_sum(device, copy_of, gradient, rules):
    """``loss.sum()`` hands back one number for all images, of stride 0."""
    args = arguments((1, 4, 5))
    leaves = copy_of(args, device)
    leaves["out"].requires_grad_()
    kernels.diffusion_loss(**leaves).sum().backward()
    rules.same(leaves["out"].grad, gradient(args, torch.ones(2)))


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 0, 4)])
def test_zero_elements(device, copy_of, rules, shape):
    """No image, no loss; an image of no elements has the mean of nothing, NaN."""
    batch = 0 if 0 not in shape else 2
    args = copy_of(arguments(shape, batch=batch), device)
    args["out"].requires_grad_()
    loss = kernels.diffusion_loss(**args)
    rules.same(loss, torch.full((batch,), torch.nan))
    rules.same(reference.diffusion_loss(**args), loss)
    loss.sum().backward()
    assert args["out"].grad.shape == (batch, *shape)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out", {"out": torch.zeros(2, 3, 4)}),
        ("out", {"out": torch.zeros(2, 1, 4, 4, dtype=torch.float64)}),
        ("x0", {"x0": torch.zeros(2, 1, 4, 5)}),
        ("x0", {"x0": torch.zeros(2, 1, 4, 4, dtype=torch.int64)}),
        ("t", {"t": torch.zeros(2)}),
        ("seeds", {"seeds": torch.zeros(3, dtype=torch.int64)}),
        ("keys", {"keys": torch.arange(4)[::2]}),
        ("rows", {"rows": torch.zeros(5, 2)}),
        ("rows", {"rows": torch.zeros(5, 3, dtype=torch.float64)}),
        ("rows", {"rows": torch.zeros(3, 5).T}),
        ("loss", {"loss": "l2"}),
        ("loss", {"loss": ""}),
        ("delta", {"loss": "huber", "delta": 0.0}),
        ("delta", {"loss": "huber", "delta": -1.0}),
        ("delta", {"loss": "huber", "delta": float("nan")}),
        ("delta", {"loss": "huber", "delta": float("inf")}),
        ("delta", {"loss": "huber", "delta": 1e300}),
        ("delta", {"loss": "huber", "delta": 1e-50}),
    ],
)
def test_bad_arguments(name, change):
    with pytest.raises(ValueError, match=f"^{name}"):
        kernels.diffusion_loss(**(arguments((1, 4, 4)) | change))
