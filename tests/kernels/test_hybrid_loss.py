"""The hybrid loss and its gradient, against distributions of torch in float64 and each other.

What the columns of a row must be for a schedule: tests/diffusion/test_parameterization.py.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from flashddpm import kernels
from flashddpm.kernels import LOSSES, LossColumn, Purpose, launch, losses, reference
from flashddpm.kernels.launch import channels_last
from flashddpm.kernels.tables import FLOATS

# The interpreter computes with NumPy, which warns where 0 / 0 is tried.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

# Columns: x0, eps, weight, bound_weight, offset, slope, gain, precision, half_bin.
KL = [
    [0.0, 1.0, 1.0, 1.5, 0.7, 0.6, -0.4, 3.0, 0.0],
    [-0.6, 0.8, 0.5, 0.3, 0.1, 0.2, -0.3, 2.0, 0.0],
    [1.0, 0.0, 2.0, 1.0, -0.5, 1.0, 0.2, 1.5, 0.0],
]
DECODER = [
    [0.0, 1.0, 1.0, 1.5, 0.9, 0.8, -0.02, 60.0, 1 / 255],
    [1.0, 0.0, 0.7, 1.5, 0.2, 0.3, 1.0, 4.0, 1 / 255],
]
ROWS = KL + DECODER
SHAPES = [(1, 1, 1), (1, 1, 2), (3, 1, 1), (1, 1, 17), (3, 17, 17), (1, 31, 33), (4, 8, 8)]


def arguments(shape, dtype=torch.float32, t=(1, 0), seed=0, rows=ROWS, **change):
    draws = torch.Generator().manual_seed(seed)
    B, (C, H, W) = len(t), shape
    x0 = torch.rand((B, *shape), generator=draws) * 2.2 - 1.1
    return {
        "out": channels_last(torch.randn((B, 2 * C, H, W), generator=draws).to(dtype)),
        "x0": channels_last(x0.clamp(-1, 1).to(dtype)),
        "t": torch.tensor(t),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (B,), generator=draws),
        "keys": torch.randint(0, 2**40, (B,), generator=draws),
        "rows": torch.tensor(rows),
    } | change


def exact(args):
    """Return the loss in float64, its gradient as autograd has it, and terms to judge that by."""
    out = args["out"].detach().double().requires_grad_()
    B, C, H, W = args["x0"].shape
    c = {
        column: args["rows"][args["t"], column].double().reshape(B, 1, 1, 1)
        for column in LossColumn
    }
    eps = reference.philox(args["seeds"], args["keys"], (C, H, W), Purpose.TRAINING).double()
    x0 = args["x0"].double()
    parts = [out[:, :C], -c[LossColumn.X0] * x0, -c[LossColumn.EPS] * eps]
    error, v = sum(parts), out[:, C:]
    name, delta = args.get("loss", "mse"), args.get("delta", 1.0)
    simple = {
        "mse": error.square(),
        "l1": error.abs(),
        "huber": torch.nn.functional.huber_loss(
            error, torch.zeros_like(error), reduction="none", delta=delta
        ),
    }[name]
    half, e = c[LossColumn.HALF_BIN], error.detach()
    posterior = 1 / c[LossColumn.PRECISION]
    d = c[LossColumn.OFFSET] + c[LossColumn.SLOPE] * v
    model = Normal(x0 + c[LossColumn.GAIN] * e, posterior * (d / 2).exp())
    kl = kl_divergence(Normal(x0, posterior.expand_as(x0)), model)
    cdf = reference.training._cdf
    upper = cdf((x0 + half - model.loc) / model.scale)
    lower = cdf((x0 - half - model.loc) / model.scale)
    above = cdf(-(x0 - half - model.loc) / model.scale)
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, above, upper - lower))
    bound = torch.where(half == 0, kl, -mass.clamp(min=1e-12).log())
    weight, bound_weight = c[LossColumn.WEIGHT], c[LossColumn.BOUND_WEIGHT]
    loss = (weight * simple + bound_weight * bound).flatten(1).mean(1)
    size = sum(part.detach().abs() for part in parts)
    gp = (c[LossColumn.GAIN] * c[LossColumn.PRECISION]).abs()
    ratio = (-d.detach()).exp() * (1 + (gp * e) ** 2 + 2 * gp**2 * e.abs() * size)
    argument = c[LossColumn.OFFSET].abs() + (c[LossColumn.SLOPE] * v.detach()).abs()
    scale = 1 / e[0].numel()
    terms_v = scale * bound_weight * c[LossColumn.SLOPE].abs() * (1 + ratio * (1 + argument)) / 2
    return loss, out, torch.cat([2 * scale * weight * size, terms_v], 1)


@pytest.fixture(scope="module")
def run(device, copy_of):
    """args -> the fast losses on the device, brought to the CPU."""
    return lambda args: kernels.hybrid_loss(**copy_of(args, device)).cpu()


@pytest.fixture(scope="module")
def gradient(device, copy_of):
    """(args, d_loss, reference or not) -> gradient of out."""

    def gradient(args, d_loss, slow=False):
        args = copy_of(args, "cpu" if slow else device)
        args["out"].requires_grad_()
        loss = (reference if slow else kernels).hybrid_loss(**args)
        loss.backward(d_loss.to(loss.device))
        return args["out"].grad.cpu()

    return gradient


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [(1, 0, 2), (3, 4)], ids=["divergence", "decoder"])
def test_near_float64(run, rules, shape, dtype, t):
    args = arguments(shape, dtype, t)
    got = run(args)
    assert got.dtype is torch.float32 and got.shape == (len(t),)
    rules.reduced(got, exact(args)[0].detach(), plain=reference.hybrid_loss(**args))


@settings(max_examples=15)
@given(
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    t=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=2),
    seed=st.integers(0, 10**6),
    loss=st.sampled_from(LOSSES),
)
def test_near_float64_anywhere(run, rules, dtypes, shape, t, seed, loss):
    """Output and images may differ in dtype; any loss on the prediction."""
    args = arguments(shape, torch.float32, t, seed, loss=loss, delta=0.8)
    args["out"], args["x0"] = args["out"].to(dtypes[0]), args["x0"].to(dtypes[1])
    rules.reduced(run(args), exact(args)[0].detach(), plain=reference.hybrid_loss(**args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 17), (3, 17, 17), (1, 32, 32)])
def test_gradient(gradient, rules, shape, dtype):
    """Of the divergence, against autograd in float64.

    The longest path rounds the error (3), shift (2), its square, 1 + that, exp (3) and its product,
    1 - that, three factors and their product: n = 16.
    """
    args = arguments(shape, dtype, (1, 0, 2))
    d_loss = torch.tensor([1.0, -0.25, 3.0])
    loss, out, terms = exact(args)
    loss.backward(d_loss.double())
    for slow in (False, True):
        got = gradient(args, d_loss, slow)
        assert got.dtype is dtype
        rules.close(got, out.grad, terms * d_loss.abs().reshape(-1, 1, 1, 1), n=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 17), (3, 17, 17), (1, 32, 32)])
def test_gradient_of_the_decoder(gradient, shape, dtype):
    """No further from float64's autograd than plain PyTorch's autograd in the same dtype, twice."""
    args = arguments(shape, dtype, (3, 4))
    d_loss = torch.tensor([1.0, -0.25])
    loss, out, _ = exact(args)
    loss.backward(d_loss.double())
    plain = gradient(args, d_loss, slow=True).double()
    allowed = max(2 * (plain - out.grad).norm(), 1e-6 * out.grad.norm())
    assert (gradient(args, d_loss).double() - out.grad).norm() <= allowed
    assert out.grad[:, shape[0] :].norm() > 0


def test_backward_of_the_reference_is_its_autograd(rules):
    """Written out by hand, as operators need it: in float64 the two agree to its rounding."""
    args = arguments((2, 3, 5), t=(0, 1, 2, 3, 4))
    args["out"] = args["out"].double().requires_grad_()
    d_loss = torch.tensor([1.0, -0.25, 3.0, 0.7, 2.0], dtype=torch.float64)
    for loss in LOSSES:
        (wanted,) = torch.autograd.grad(
            reference.hybrid_loss(**args, loss=loss, delta=0.7), args["out"], d_loss
        )
        got = reference.hybrid_loss_backward(d_loss, **args, loss=loss, delta=0.7)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_gradcheck_of_the_reference():
    args = arguments((2, 2, 3), t=(0, 1, 3))
    out = args.pop("out").double().requires_grad_()
    args["rows"] = args["rows"].clone()
    args["rows"][:, LossColumn.GAIN] = 0  # else the detached mean is a difference to it
    args["x0"] = args["x0"].double()
    assert torch.autograd.gradcheck(
        lambda out: reference.hybrid_loss(out, **args), out, fast_mode=False
    )


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_the_bound_does_not_move_the_prediction(gradient, which, rules):
    args = arguments((3, 5, 7), t=(0, 3))
    args["rows"][:, LossColumn.WEIGHT] = 0
    grad = gradient(args, torch.ones(2), slow=which == "reference")
    rules.same(grad[:, :3].abs(), torch.zeros(2, 3, 5, 7))
    assert (grad[:, 3:] != 0).float().mean() > 0.9


def test_without_the_bound_it_is_diffusion_loss(run, gradient, device, rules):
    args = arguments((3, 5, 7), t=(0, 3, 1))
    args["rows"][:, LossColumn.BOUND_WEIGHT] = 0
    simple = args | {
        "out": channels_last(args["out"][:, :3]),
        "rows": args["rows"][:, :3].contiguous(),
    }
    simple = {name: value.to(device) for name, value in simple.items()}
    simple["out"].requires_grad_()
    loss = kernels.diffusion_loss(**simple)
    loss.sum().backward()
    torch.testing.assert_close(run(args), loss.detach().cpu(), rtol=3e-7, atol=0)
    grad = gradient(args, torch.ones(3))
    torch.testing.assert_close(grad[:, :3], simple["out"].grad.cpu(), rtol=3e-7, atol=0)


def test_pixels_far_from_the_mean_have_no_gradient(run, gradient):
    """The mass of a bin is held at 1e-12: finite, and flat."""
    args = arguments((1, 4, 4), t=(4,))
    args["out"][:, :1] = 500.0
    loss, grad = run(args), gradient(args, torch.ones(1))
    assert loss.isfinite().all() and (grad[:, 1:] == 0).all()


@pytest.fixture(scope="module")
def finite(run, gradient):
    """t -> losses of three images that are finite, and the gradient of their sum."""

    @functools.cache
    def results(t):
        args = arguments((3, 5, 7), t=(t,) * 3)
        return run(args), gradient(args, torch.ones(3))

    return results


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [1, 4])
@pytest.mark.parametrize("t", [0, 3])
def test_nonfinite_values_stay_in_their_image(run, gradient, finite, rules, bad, channel, t):
    args = arguments((3, 5, 7), t=(t,) * 3)
    d_loss = torch.ones(3)
    loss, grad = finite(t)
    args["out"][1, channel, 3, 4] = bad
    bad_loss, bad_grad = run(args), gradient(args, d_loss)
    if bad != bad:
        assert bad_loss[1].isnan() and bad_grad[1, 4, 3, 4].isnan()
    bad_loss[1], bad_grad[1, [1, 4], 3, 4] = loss[1], grad[1, [1, 4], 3, 4]
    rules.same(bad_loss, loss)
    rules.same(bad_grad, grad)


def test_images_are_independent(run, gradient, rules):
    args = arguments((3, 5, 7), t=(0, 3, 1, 4))
    order = torch.tensor([2, 0, 3, 1])
    permuted = args | {name: args[name][order] for name in ("out", "x0", "t", "seeds", "keys")}
    d_loss = torch.tensor([1.0, 2.0, -1.0, 0.5])
    rules.same(run(permuted), run(args)[order])
    rules.same(gradient(permuted, d_loss[order]), gradient(args, d_loss)[order])


@pytest.mark.parametrize("block", [64, 128])
def test_several_blocks(run, gradient, rules, monkeypatch, block):
    args = arguments((1, 10, 20), t=(0, 3))
    plain = run(args)
    grad = gradient(args, torch.ones(2))
    monkeypatch.setattr(launch, "block_size", lambda n: block)
    torch.testing.assert_close(run(args), plain, rtol=1e-6, atol=0)
    rules.same(gradient(args, torch.ones(2)), grad)


def test_nothing_is_written_around_the_gradient(gradient, guarded_outputs):
    zones = guarded_outputs(losses)
    gradient(arguments((3, 17, 17), torch.bfloat16, (0, 3)), torch.ones(2))
    assert len(zones) == 1
    zones[0].check()


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 0, 4)])
def test_zero_elements(device, copy_of, rules, shape):
    batch = 0 if 0 not in shape else 2
    args = copy_of(arguments(shape, t=(0,) * batch), device)
    args["t"] = args["t"].long()
    args["out"].requires_grad_()
    loss = kernels.hybrid_loss(**args)
    rules.same(loss, torch.full((batch,), torch.nan))
    rules.same(reference.hybrid_loss(**args), loss)
    loss.sum().backward()
    assert args["out"].grad.shape == (batch, 6, *shape[1:])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out", {"out": torch.zeros(2, 1, 4, 4)}),
        ("out", {"out": torch.zeros(2, 3, 4, 4)}),
        ("out", {"out": torch.zeros(1, 2, 4, 4)}),
        ("out", {"out": torch.zeros(2, 2, 4, 4, dtype=torch.float64)}),
        ("x0", {"x0": torch.zeros(2, 4, 4)}),
        ("x0", {"x0": torch.zeros(2, 1, 4, 4, dtype=torch.int64)}),
        ("t", {"t": torch.zeros(2)}),
        ("seeds", {"seeds": torch.zeros(3, dtype=torch.int64)}),
        ("keys", {"keys": torch.arange(4)[::2]}),
        ("rows", {"rows": torch.zeros(5, 3)}),
        ("loss", {"loss": "kl"}),
        ("delta", {"loss": "huber", "delta": 0.0}),
    ],
)
def test_bad_arguments(name, change):
    with pytest.raises(ValueError, match=f"^{name}"):
        kernels.hybrid_loss(**(arguments((1, 4, 4)) | change))
