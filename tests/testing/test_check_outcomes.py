"""check_op: what it says of itself: what ran, on which cases, and what it refuses.

The functions are plain PyTorch: y_b = gain_b x_b, in float32 (float64 of float64).
"""

import sys
import types

import pytest
import torch

from flashddpm import testing
from flashddpm.testing import CHECKS, Case, CheckFailed, check_op, rules

F32, BF16 = torch.float32, torch.bfloat16


def arguments(device, dtype, shape, batch, seed):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, *shape), generator=draws).to(device, dtype)
    return {"x": x, "gain": (torch.rand(batch, generator=draws) + 0.5).to(device)}


def wide(x):
    return x.double() if x.dtype is torch.float64 else x.float()


def scale(x, gain):
    return (wide(x) * gain.reshape(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def check(fast=scale, reference=scale, **options):
    options = {"dtypes": [F32, BF16], "examples": 3, "device": "cpu"} | options
    return check_op(fast, reference, arguments, **options)


def test_it_returns_what_ran_and_why_the_rest_did_not():
    expected = dict.fromkeys(CHECKS, "ran") | {
        "gradients": "not run: differentiable names no argument",
        "opcheck": "not run: the call uses no custom operator",
        "compiled_code": "not run: no kernels are given",
        "layouts": "not run: left out",
    }
    assert check(skip=("layouts",)) == expected
    with_gradients = check(differentiable=("x",), checks=("gradients",))
    assert with_gradients == dict.fromkeys(CHECKS, "not run: left out") | {"gradients": "ran"}


def test_what_no_case_asks_for_is_not_said_to_have_run():
    found = check(cases=[Case(F32, (1, 0, 4), batch=1)], examples=0, skip=("compiled",))
    assert found["batch_order"] == "not run: no case has two samples"
    found = check(batched=("x",), cases=[Case(F32, (1, 0, 4))], examples=0, skip=("compiled",))
    assert found["nonfinite"].startswith("not run: no argument of floating point")
    assert found["batch_order"] == found["layouts"] == "ran"
    in_place = [lambda x, gain: (x.copy_(scale(x, gain)), gain.add_(1))[:0] or None] * 2
    found = check(*in_place, mutates=("x", "gain"), skip=("compiled",))
    assert found["arguments_unchanged"] == "not run: mutates names every tensor"


@pytest.mark.parametrize(
    ("name", "what", "options"),
    [
        ("compiled_code", "must come with kernels", {}),
        ("gradients", "must come with differentiable", {}),
        ("opcheck", "must have something to check, but the call uses no custom operator", {}),
        ("batch_order", "but no argument has one entry a sample", {"batched": ()}),
    ],
)
def test_a_check_asked_for_by_name_that_cannot_be_is_refused(name, what, options):
    with pytest.raises(ValueError, match=f"^checks='{name}': .*{what}"):
        check(checks=("equals_reference", name), **options)
    check(checks=("equals_reference", name), skip=(name,), **options)


def recorded(**options):
    """Return the cases that fast was called with, in order."""
    cases = []

    def noted(device, *case):
        cases.append(Case(*case))
        return arguments(device, *case)

    options = {"device": "cpu", "examples": 3, "checks": ("random_state",)} | options
    check_op(scale, scale, noted, **options)
    return list(dict.fromkeys(cases))


GIVEN = [Case(BF16, (1, 1, 17), 3, seed=5), Case(F32, (0,)), Case(BF16, (1, 1, 1), 1, -1)]


def test_given_cases_are_run_before_those_drawn():
    assert recorded(cases=GIVEN, examples=0) == GIVEN
    both = recorded(cases=iter(GIVEN), examples=3)
    assert both[:3] == GIVEN and len(both) > 3


def test_a_given_case_finds_what_three_draws_do_not():
    def fails_on_one_channel_of_bfloat16(x, gain):
        return scale(x, gain) + (x.dtype is BF16 and x[:1].shape == (1, 1, 1, 17))

    options = {"checks": ("equals_reference",)}
    check(fails_on_one_channel_of_bfloat16, **options)
    with pytest.raises(CheckFailed):
        check(fails_on_one_channel_of_bfloat16, cases=GIVEN, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": [Case(torch.float16, (3,))]}, "cases: Case.* must have .*a dtype among"),
        ({"cases": [Case(F32, (3,), batch=0)]}, "cases: Case.* must have a sample"),
        ({"examples": 0}, "examples=0: must be at least 1"),
        ({"cases": GIVEN, "examples": -1}, "examples=-1: must be at least 0"),
    ],
)
def test_cases_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check(**options)


def test_draws_are_the_same_in_every_run():
    first = recorded(examples=12)
    assert recorded(examples=12) == first
    anew = [recorded(examples=12, derandomize=False) for _ in range(3)]
    assert any(cases != first for cases in anew)


def narrow(x, gain):
    return (x.float() * gain.float().reshape(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def narrow_too(x, gain):
    return narrow(x, gain).float()


@pytest.mark.parametrize(
    ("reference", "why"),
    [(narrow, "rounded to float32"), (narrow_too, "returned in torch.float32")],
)
def test_a_reference_that_is_no_float64_is_refused_where_a_rule_needs_it(reference, why):
    options = {"checks": ("equals_reference",), "dtypes": [F32]}
    with pytest.raises(ValueError, match=f"^reference: result of float64 .* {why}.*x.double"):
        check(reference, reference, rule=rules.rounded(2), **options)
    with pytest.raises(ValueError, match="^reference: result "):
        check(reference, reference, rule={"result": rules.relative}, **options)
    check(reference, reference, **options)
    check(reference, reference, rule=rules.same, **options)
    check(scale, scale, rule=rules.rounded(2), **options)


def test_a_gradient_in_float32_is_refused_where_a_rule_needs_float64():
    options = {"differentiable": ("x",), "checks": ("gradients",), "dtypes": [F32]}
    with pytest.raises(ValueError, match="^reference: gradient of x of float64 arguments"):
        check(narrow, narrow, rule={"gradient of x": rules.rounded(2)}, **options)
    check(scale, scale, rule={"gradient of x": rules.rounded(2)}, **options)


class NoGradient:
    """scale, without a graph; of other results than the reference's by nothing."""

    def __call__(self, x, gain):
        return scale(x.detach(), gain)


def test_a_result_without_a_graph_has_no_gradient():
    with pytest.raises(CheckFailed, match="gradient of x: the result has no gradient"):
        check(NoGradient(), differentiable=("x",), checks=("gradients",))
    for fast in (scale, NoGradient()):
        with pytest.raises(ValueError, match="^differentiable='x': .*no gradient for it"):
            check(fast, NoGradient(), differentiable=("x",), checks=("gradients",))


def test_a_failure_says_how_far_and_which_rules_there_are():
    def off(x, gain):
        return scale(x, gain) * (1 + 2.0**-20)

    with pytest.raises(CheckFailed) as caught:
        check(off, dtypes=[F32], checks=("equals_reference",))
    message = str(caught.value)
    assert "elements differ, by at most" in message and "ulp)" in message
    assert "give rule=rules.rounded(n) or rules.relative" in message
    with pytest.raises(CheckFailed) as caught:
        check(off, dtypes=[F32], checks=("equals_reference",), rule=rules.rounded(1))
    assert "give rule=" not in str(caught.value)


def test_long_errors_are_cut_in_the_message_alone():
    def wordy(actual, plain):
        raise AssertionError("\n".join(f"line {i} " + "x" * 1000 for i in range(100)))

    with pytest.raises(CheckFailed) as caught:
        check(rule=wordy, checks=("equals_reference",))
    message = str(caught.value)
    assert len(message) < 1500 and len(str(caught.value.failures["equals_reference"][1])) > 10**5
    assert all(part in message for part in ("line 0 ", "line 1 ", "line 99 ", "with Case("))
    assert "line 2 " not in message


def test_roundings_of_the_terms_of_a_sum():
    """Sums of numbers of both signs: relative to the sum itself no few roundings are enough."""

    def total(x, gain):
        return gain * wide(x).flatten(1).sum(1).to(gain.dtype)

    def reversed_total(x, gain):
        return gain * sum(wide(x).flatten(1).flip(1).unbind(1)).to(gain.dtype)

    def wrong(x, gain):
        return reversed_total(x, gain) * (1 + 2.0**-10)

    def sizes(x, gain):
        assert x.dtype is gain.dtype is torch.float64
        return gain * x.abs().flatten(1).sum(1)

    cases = [Case(F32, (3, 31, 7), 4, seed) for seed in range(4)]
    options = {"dtypes": [F32], "cases": cases, "examples": 0, "checks": ["equals_reference"]}
    with pytest.raises(CheckFailed):
        check(reversed_total, total, rule=rules.rounded(2), **options)
    rule = rules.rounded(2, terms=sizes)
    check(reversed_total, total, rule=rule, **options)
    check(reversed_total, total, rule={"result": rule}, **(options | {"checks": ["nonfinite"]}))
    with pytest.raises(CheckFailed):
        check(wrong, total, rule=rule, **options)


def test_the_example_of_the_module_runs(monkeypatch):
    """Its text, with an operator of plain PyTorch for the kernel that it imports."""

    @torch.library.custom_op("check_op_test::silu", mutates_args=())
    def silu(x: torch.Tensor) -> torch.Tensor:
        return (x.double() / (1 + torch.exp(-x.double()))).to(x.dtype)

    silu.register_fake(lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device))

    def backward(ctx, grad):
        x = ctx.saved_tensors[0].double()
        share = torch.sigmoid(x)
        return (grad * (share * (1 + x * (1 - share)))).to(grad.dtype)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    silu.register_autograd(backward, setup_context=save)
    package = types.ModuleType("my_package")
    package.silu = silu
    monkeypatch.setitem(sys.modules, "my_package", package)
    lines = (testing.__doc__ or "").splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)
    namespace: dict = {}
    exec(code, namespace)
    namespace["test_silu"]()
