"""check_op: a right function passes, and each check finds a planted bug of its own.

The functions are plain PyTorch: y_b = gain_b x_b, in float32, in the dtype of x.
"""

import random

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from flashddpm.testing import CHECKS, Case, CheckFailed, check_op, rules


@pytest.fixture(autouse=True)
def same_draws():
    """Draw the same in every run: what is asserted of a bug does not depend on luck."""
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.register_profile("same draws", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("same draws")
    yield
    hypothesis.settings.load_profile(before)


def arguments(device, dtype, shape, batch, seed):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, *shape), generator=draws).to(device, dtype)
    return {"x": x, "gain": (torch.rand(batch, generator=draws) + 0.5).to(device)}


def column(gain, x):
    return gain.reshape(-1, *[1] * (x.ndim - 1))


def scale(x, gain):
    return (x.float() * column(gain, x)).to(x.dtype)


def scale_in_place(x, gain):
    x.copy_(scale(x, gain))


def failures(fast, reference=scale, args=arguments, examples=8, **options) -> dict[str, str]:
    """Return what check_op says, by check."""
    options.setdefault("dtypes", [torch.float32, torch.bfloat16])
    try:
        check_op(fast, reference, args, examples=examples, device="cpu", **options)
    except CheckFailed as failed:
        assert all(isinstance(case, Case | None) for case, _ in failed.failures.values())
        assert all(name in str(failed) for name in (*failed.failures, *failed.not_run))
        return {name: str(why) for name, (_, why) in failed.failures.items()}
    return {}


def test_a_right_function_passes():
    assert failures(scale, differentiable=("x",)) == {}
    assert failures(scale_in_place, scale_in_place, mutates=("x",)) == {}
    for shapes in (st.just((5,)), st.just(()), st.just((2, 3)), st.just((1, 2, 3, 4))):
        assert failures(scale, shapes=shapes, differentiable=("x",), skip=("compiled",)) == {}


def test_several_results_and_both_gradients():
    """The gradient of gain is a sum, so it takes a rule of its own."""

    def both(x, gain):
        return scale(x, gain), x.flatten(1).sum(1)

    def reordered(x, gain):
        y, _ = both(x, gain)
        return y, x.flip(-1).flatten(1).sum(1)

    options = dict(
        dtypes=[torch.float32], shapes=st.just((3, 17, 17)), checks=("equals_reference",)
    )
    assert failures(both, both, **options) == {}
    assert "result 1" in failures(reordered, both, **options)["equals_reference"]
    assert failures(reordered, both, rule={"result 1": within(64)}, **options) == {}
    options["checks"] = ("equals_reference", "gradients")
    assert failures(both, both, differentiable=("x", "gain"), **options) == {}


def within(steps):
    def rule(actual, plain, r64):
        assert r64.dtype is torch.float64 and plain.dtype is actual.dtype
        assert ((actual.double() - r64).abs() <= steps * 2.0**-22).all()

    return rule


def test_rules_of_sums_in_another_order():
    def mean_square(x, gain):
        return gain * (x.to(gain.dtype) ** 2).flatten(1).mean(1)

    def flipped(x, gain):
        return gain * (x.to(gain.dtype) ** 2).flip(-1, -2).flatten(1).mean(1)

    def off(x, gain):
        return flipped(x, gain) * (1 + 3e-4)

    shapes = st.sampled_from([(3, 17, 17), (1, 0, 4), (1, 8, 8)])
    options = dict(shapes=shapes, checks=("equals_reference", "nonfinite"), dtypes=[torch.float32])
    assert "equals_reference" in failures(flipped, mean_square, **options)
    assert failures(flipped, mean_square, rule=rules.relative, **options) == {}
    found = failures(off, mean_square, rule=rules.relative, **options)
    assert found.keys() == {"equals_reference", "nonfinite"}
    assert found["equals_reference"].startswith("result: relative errors")


# The bugs: each function is right but for one thing.


def beside(tensor, place):
    """One element of the memory around a tensor."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + place)


def writes_behind_its_output(x, gain):
    y = torch.empty_like(x).copy_(scale(x, gain))
    beside(y, y.numel()).fill_(7)
    return y


def writes_before_an_argument(x, gain):
    if x.numel():
        beside(gain, -3).fill_(7)
    return scale(x, gain)


def inexact(x, gain):
    return scale(x, gain) * 1.01


class _WrongSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain):
        ctx.save_for_backward(gain)
        return scale(x, gain).clone()  # torch 2.11 compiles no gradient where `to` is the last

    @staticmethod
    def backward(ctx, grad):
        (gain,) = ctx.saved_tensors
        return -scale(grad, gain), None


def wrong_gradient(x, gain):
    return _WrongSign.apply(x, gain)


def no_gradient(x, gain):
    return scale(x.detach(), gain)


CALLS = [0]


def differs_from_call_to_call(x, gain):
    CALLS[0] += 1
    return scale(x, gain) + CALLS[0]


def changes_an_argument(x, gain):
    y = scale(x, gain)
    gain.mul_(2)
    return y


def adds_to_new_memory(x, gain):
    return torch.empty_like(x).add_(scale(x, gain))


def supposes_a_layout(x, gain):
    """Takes the elements from memory in the order of their addresses, if all are there."""
    if x.stride()[-1:] == (2,):
        return scale(x.as_strided(x.shape, torch.ones(x.shape).stride()), gain)
    return scale(x, gain)


def fails_on_a_layout(x, gain):
    return scale(x.view(-1).view(x.shape), gain)


def refuses_without_a_name(x, gain):
    if not x.is_contiguous():
        raise ValueError("must be contiguous")
    return scale(x, gain)


def refuses_by_name(x, gain):
    for name, tensor in (("x", x), ("gain", gain)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} of strides {tensor.stride()}: must be contiguous")
    return scale(x, gain)


def fails_on_no_samples(x, gain):
    assert len(gain)
    return scale(x, gain)


def returns_one_for_none(x, gain):
    return scale(x, gain) if len(x) else x.new_zeros(1, *x.shape[1:])


def knows_its_place(x, gain):
    return scale(x, gain + torch.arange(len(x), device=x.device))


def mixes_samples(x, gain):
    return scale(x, gain) + (0 * x.roll(1, 0) if len(x) > 1 else 0)


def hides_nan(x, gain):
    return scale(x, gain).nan_to_num(0.0, torch.inf, -torch.inf)


def draws_from_torch(x, gain):
    torch.rand(1)
    return scale(x, gain)


def draws_from_numpy(x, gain):
    np.random.random()
    return scale(x, gain)


def draws_from_random(x, gain):
    random.random()
    return scale(x, gain)


@torch.library.custom_op("check_op_test::wrong_fake", mutates_args=())
def _wrong_fake(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return scale(x, gain)


@_wrong_fake.register_fake
def _(x, gain):
    return torch.empty(x.shape, dtype=torch.float64)


def wrong_fake(x, gain):
    return _wrong_fake(x, gain)


def waits_for_a_number(x, gain):
    return x if gain.sum().item() == 0.125 else scale(x, gain)


def differs_when_compiled(x, gain):
    return scale(x, gain) + torch.compiler.is_compiling()


BUGS = [  # the check that it is for, others that must see it too, the function
    ("red_zones", set(), writes_behind_its_output, "allocation 0: a red zone was written"),
    ("red_zones", set(), writes_before_an_argument, "gain: a red zone was written: 1 "),
    ("equals_reference", {"nonfinite"}, inexact, "result: "),
    ("gradients", set(), wrong_gradient, "gradient of x: "),
    ("gradients", set(), no_gradient, "gradient of x: "),
    ("arguments_unchanged", set(), changes_an_argument, "gain: "),
    ("former_content", {"compiled"}, adds_to_new_memory, "result: "),
    ("layouts", set(), supposes_a_layout, "x strided, gain "),
    ("layouts", set(), fails_on_a_layout, "RuntimeError: view size"),
    ("layouts", set(), refuses_without_a_name, "refused without"),
    ("zero_batch", set(), fails_on_no_samples, "assert 0"),
    ("zero_batch", set(), returns_one_for_none, "result: shape"),
    ("nonfinite", set(), mixes_samples, "result of other samples: "),
    ("nonfinite", set(), hides_nan, "result: NaN in"),
    ("random_state", {"compiled"}, draws_from_torch, "moved: torch"),
    ("random_state", {"compiled"}, draws_from_numpy, "moved: numpy"),
    ("random_state", {"compiled"}, draws_from_random, "moved: random"),
    ("opcheck", {"compiled"}, wrong_fake, "check_op_test::wrong_fake"),
    ("compiled", set(), waits_for_a_number, "item"),
    ("compiled", set(), differs_when_compiled, "result: "),
]


@pytest.mark.parametrize(
    ("check", "others", "fast", "why"), [pytest.param(*bug, id=bug[2].__name__) for bug in BUGS]
)
def test_each_check_finds_its_bug_and_only_those_that_see_it_fail(check, others, fast, why):
    gradients = ("x",) if "gradients" in (check, *others) else ()
    found = failures(fast, differentiable=gradients)
    assert check in found and found.keys() <= {check, *others}
    assert why in found[check]


def test_what_differs_from_call_to_call_is_not_repeatable():
    found = failures(differs_from_call_to_call, checks=("repeatable",))
    assert found["repeatable"].startswith("result: ")


def test_what_depends_on_its_place_equals_its_reference_and_fails_by_order():
    found = failures(knows_its_place, knows_its_place)
    assert found.keys() == {"batch_order"}
    in_place = failures(*[lambda x, gain: x.copy_(knows_its_place(x, gain))] * 2, mutates=("x",))
    assert in_place.keys() == {"batch_order"}


def test_reading_around_an_argument_is_seen():
    """What lies there differs between two calls, like what new memory holds."""

    def reads(x, gain):
        behind = gain.as_strided((1,), (1,), gain.storage_offset() + len(gain))
        return scale(x, gain) + (behind < 0).to(x.dtype)

    found = failures(reads, checks=("equals_reference", "former_content"))
    assert found.keys() == {"former_content"}


def test_a_layout_may_be_refused_by_name():
    assert failures(refuses_by_name) == {}


def test_writing_between_the_rows_of_an_argument():
    def padded(device, dtype, shape, batch, seed):
        args = arguments(device, dtype, shape, batch, seed)
        n = max(args["x"][:1].numel(), 1)
        rows = torch.zeros(batch, n + 16, dtype=dtype, device=device)
        x = rows.as_strided(args["x"].shape, (n + 16, *args["x"].stride()[1:]))
        return args | {"x": x.copy_(args["x"])}

    def overruns(x, gain):
        scale_in_place(x, gain)
        if len(x) > 1 and x.numel():
            beside(x, x[0].numel() + 1).fill_(0)

    options = dict(mutates=("x",), checks=("red_zones",), args=padded)
    assert failures(scale_in_place, scale_in_place, **options) == {}
    assert failures(overruns, scale_in_place, **options)["red_zones"].startswith("x: ")


def test_after_a_written_red_zone_nothing_runs_outside_of_zones():
    with pytest.raises(CheckFailed) as caught:
        check_op(writes_behind_its_output, scale, arguments, examples=4, device="cpu")
    assert caught.value.not_run == ("zero_batch", "opcheck", "compiled")


def test_samples_that_depend_on_each_other():
    """Of a sum over the batch nothing is asked by sample, if it is said that none is."""

    def centred(x, gain):
        return scale(x - x.mean(0, keepdim=True), gain)

    options = dict(dtypes=[torch.float32], shapes=st.just((1, 4, 4)))
    found = failures(centred, centred, **options)
    assert {"nonfinite"} <= found.keys() <= {"nonfinite", "batch_order"}
    assert failures(centred, centred, batched=(), **options) == {}


def test_the_smallest_arguments_that_fail_are_named():
    def wrong_past_16(x, gain):
        return scale(x, gain) + (x[:1].numel() >= 16)

    with pytest.raises(CheckFailed, match="with Case\\(dtype=") as caught:
        check_op(wrong_past_16, scale, arguments, device="cpu", checks=("equals_reference",))
    case, error = caught.value.failures["equals_reference"]
    assert isinstance(error, AssertionError)
    elements = torch.Size(case.shape).numel()
    assert 16 <= elements < 200


def test_checks_can_be_chosen():
    found = failures(inexact, skip=("nonfinite",))
    assert found.keys() == {"equals_reference"}
    assert failures(inexact, checks=("repeatable", "layouts")) == {}
    assert failures(inexact, checks=("equals_reference",), skip=("equals_reference",)) == {}
    assert failures(inexact, checks=()) == {}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("checks='speed'", {"checks": ("speed",)}),
        ("skip='red_zone'", {"skip": ["red_zone"]}),
        ("checks='layouts'", {"checks": "layouts"}),
        ("mutates='y'", {"mutates": ("y",)}),
        ("differentiable='y'", {"differentiable": ("y",)}),
        ("batched='y'", {"batched": ("y",)}),
        ("rule='gradient of x'", {"rule": {"gradient of x": rules.bitwise}}),
    ],
)
def test_unknown_names_are_refused(name, options):
    with pytest.raises(ValueError, match=f"^{name}: must be"):
        check_op(scale, scale, arguments, device="cpu", **options)


def test_arguments_must_be_reproducible():
    def drawn_anew(device, dtype, shape, batch, seed):
        return {"x": torch.randn(batch, *shape), "gain": torch.ones(batch)}

    with pytest.raises(ValueError, match="^arguments: x must be the same"):
        check_op(scale, scale, drawn_anew, shapes=st.just((1, 2, 2)), device="cpu")


def test_a_function_that_returns_nothing_must_change_something():
    with pytest.raises(ValueError, match="^mutates="):
        check_op(scale_in_place, scale_in_place, arguments, device="cpu")
    with pytest.raises(ValueError, match="^fast returned dict"):
        check_op(lambda x, gain: {"y": x}, scale, arguments, device="cpu")


def test_an_error_of_the_function_comes_as_it_is_with_the_case():
    def broken(x, gain):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken") as caught:
        check_op(broken, scale, arguments, device="cpu")
    assert any("Case(dtype=" in note for note in caught.value.__notes__)


def test_every_check_has_a_bug_here_or_in_the_example():
    tested = {check for check, *_ in BUGS} | {"repeatable", "batch_order"}
    assert tested | {"compiled_code"} == set(CHECKS)  # that one: test_foreign_kernel.py
    assert all(CHECKS.values())
