"""Each rule accepts at its bound and refuses just past it."""

import pytest
import torch

from flashddpm.testing import rules

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def refused(rule, *arguments, **options) -> bool:
    try:
        rule(*arguments, **options)
    except AssertionError:
        return True
    return False


@pytest.fixture(params=[False, True], ids=["exact", "interpreted"], autouse=True)
def interpreted(request, monkeypatch) -> bool:
    """Whether the rules take the kernels to be interpreted."""
    monkeypatch.setattr(rules, "INTERPRETED", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int64, torch.bool])
def test_same_is_bit_for_bit(dtype):
    x = torch.tensor([0, 1, 1, 0]).to(dtype)
    rules.same(x, x.clone())
    assert refused(rules.same, x, 1 - x.long().to(dtype) if dtype is not torch.bool else ~x)
    assert refused(rules.same, x, x[:3])
    assert refused(rules.same, x, x.to(torch.float16 if dtype is torch.float32 else torch.float32))
    if dtype.is_floating_point:
        assert refused(rules.same, x, torch.tensor([-0.0, 1, 1, 0], dtype=dtype))
        nextafter = x.clone()
        nextafter.view(rules.BITS[dtype])[1] += 1
        assert refused(rules.same, x, nextafter)


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_asks_for_nan_in_the_same_places(dtype):
    x = torch.tensor([1.0, torch.nan, torch.inf], dtype=dtype)
    rules.same(x, x.clone())
    assert refused(rules.same, x, torch.tensor([torch.nan, 1.0, torch.inf], dtype=dtype))
    assert refused(rules.same, x, torch.tensor([1.0, torch.nan, -torch.inf], dtype=dtype))
    assert refused(rules.same, torch.tensor([1.0]), torch.tensor([torch.nan]))
    rules.same(-x[1:2], x[1:2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_truncation_is_one_step_towards_zero_of_bfloat16_interpreted(dtype, sign, interpreted):
    expected = torch.tensor([1.5 * sign], dtype=dtype)

    def moved(steps):
        return (expected.view(rules.BITS[dtype]) + steps).view(dtype)

    allowed = interpreted and dtype is torch.bfloat16
    assert refused(rules.same, moved(-1), expected)
    assert refused(rules.same, moved(-1), expected, truncates=True) is not allowed
    assert refused(rules.same, moved(1), expected, truncates=True)
    assert refused(rules.same, moved(-2), expected, truncates=True)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_same_says_by_how_much_at_most(dtype):
    """In units in the last place too, also across zero, whose two signs are one number."""
    smallest = torch.tensor([1], dtype=rules.BITS[dtype]).view(dtype)
    x = torch.cat([torch.tensor([1.0, 2.0, 0.0], dtype=dtype), 2 * smallest])
    y = x.clone()
    y[1] += 3 * 2 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="^1 of 4 elements differ, by at most .* \\(3 ulp\\)$"):
        rules.same(y, x)
    y[3] = -2 * smallest
    y[2] = -0.0
    with pytest.raises(AssertionError, match=r"^3 of 4 elements .* \(4 ulp\)$"):
        rules.same(y, x)
    assert refused(rules.same, torch.full((2,), torch.inf, dtype=dtype), x[:2])
    with pytest.raises(AssertionError, match="^1 of 2 elements differ, by at most 7$"):
        rules.same(torch.tensor([1, 9]), torch.tensor([1, 2]))


def test_close_in_float32_allows_n_roundings_of_the_terms():
    r64, terms = torch.tensor([1.0]).double(), torch.tensor([8.0])
    step = 2.0**-23  # of float32 from 1 to 2, so 3 u x 8 are 12 steps
    rules.close(torch.tensor([1 + 12 * step]), r64, terms, n=3)
    assert refused(rules.close, torch.tensor([1 + 13 * step]), r64, terms, n=3)
    assert refused(rules.close, torch.tensor([1 + 12 * step]), r64, terms, n=2)
    rules.close(torch.tensor([1 - 12 * step]), r64, terms, n=3)
    assert refused(rules.close, torch.tensor([1 - 13 * step]), r64, terms, n=3)
    assert refused(rules.close, torch.tensor([torch.nan]), r64, terms, n=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 2.0**-20])
def test_close_in_half_precision_allows_half_a_unit(dtype, size, interpreted):
    """Near 1, and where the numbers of float16 are subnormal: its unit no longer shrinks."""
    smallest = torch.finfo(dtype).smallest_normal
    unit = torch.finfo(dtype).eps * max(size, smallest)
    actual = torch.tensor([size], dtype=dtype)
    assert actual.item() == size
    whole = interpreted and dtype is torch.bfloat16
    share = 1.0 if whole else 0.5
    zero = torch.zeros(1)
    for sign in (1, -1):
        r64 = actual.double() + torch.tensor([sign * share * unit]).double()
        if r64 >= size:  # below, the unit at R64 is that of the smaller numbers
            rules.close(actual, r64, zero, n=0)
            assert refused(rules.close, actual, r64 * (1 + 1e-9), zero, n=0)
    assert refused(rules.close, actual, actual.double() - 0.51 * share * unit * 2, zero, n=0)


def test_reduced_allows_a_millionth_or_twice_the_error_of_plain_pytorch():
    r64 = torch.tensor([4.0]).double()
    near, off = r64.float(), torch.tensor([4.0 * (1 + 1e-4)])
    rules.reduced(torch.tensor([4.0 * (1 + 9e-7)]), r64, plain=near)
    assert refused(rules.reduced, torch.tensor([4.0 * (1 + 1.2e-6)]), r64, plain=near)
    rules.reduced(torch.tensor([4.0 * (1 - 1.99e-4)]), r64, plain=off)
    assert refused(rules.reduced, torch.tensor([4.0 * (1 - 2.01e-4)]), r64, plain=off)
    assert refused(rules.reduced, torch.tensor([torch.nan]), r64, plain=near)


def test_relative_is_reduced_where_it_can_be_and_equal_elsewhere():
    r64 = torch.tensor([4.0, 0.0, torch.nan, torch.inf]).double()
    plain = r64.float()
    rules.relative(plain, plain, r64)
    rules.relative(torch.tensor([4.0 * (1 + 9e-7), -0.0, torch.nan, torch.inf]), plain, r64)
    for i, wrong in enumerate([4.0 * (1 + 2e-6), 1e-30, 0.0, 3e38]):
        actual = plain.clone()
        actual[i] = wrong
        assert refused(rules.relative, actual, plain, r64)
    assert refused(rules.relative, plain[:3], plain, r64)
    assert refused(rules.relative, plain.half(), plain, r64)


def test_rounded_is_close_with_the_result_as_its_only_term():
    r64 = torch.tensor([2.0, torch.nan, -torch.inf]).double()
    plain = r64.float()
    rule = rules.rounded(4)
    step = 2.0**-22  # of float32 from 2 to 4, so 4 u x 2 are 2 steps
    rule(torch.tensor([2 + 2 * step, torch.nan, -torch.inf]), plain, r64)
    for i, wrong in enumerate([2 + 3 * step, 0.0, -3e38]):
        actual = plain.clone()
        actual[i] = wrong
        assert refused(rule, actual, plain, r64)
    assert refused(rule, plain[:2], plain, r64)
    assert refused(rule, plain.half(), plain, r64)


def test_bitwise_judges_by_the_reference_alone(interpreted):
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    rules.bitwise(x, x.clone(), torch.tensor([torch.nan]))
    below = (x.view(torch.int16) - 1).view(torch.bfloat16)
    assert refused(rules.bitwise, below, x, x) is not interpreted


def test_rounded_takes_the_terms_of_sums():
    def terms(x, y):
        return x.abs() + y.abs()

    arguments = {"x": torch.tensor([3.0]).double(), "y": torch.tensor([-2.0]).double()}
    rule = rules.rounded(2, terms)
    r64 = torch.tensor([1.0]).double()
    plain = r64.float()
    step = 2.0**-23  # of float32 from 1 to 2, so 2 u x 5 are 5 steps
    rule(torch.tensor([1 + 5 * step]), plain, r64, arguments)
    assert refused(rule, torch.tensor([1 + 6 * step]), plain, r64, arguments)
    assert refused(rules.rounded(2), torch.tensor([1 + 5 * step]), plain, r64)


def test_a_rule_of_two_arguments_does_without_float64():
    for rule in (rules.same, rules.bitwise, lambda actual, plain: None):
        assert not rules.needs_float64(rule)
    for rule in (rules.relative, rules.rounded(2), lambda actual, plain, r64: None):
        assert rules.needs_float64(rule)
