"""Red zones see every write outside, and allocations hold what they are told to."""

import pytest
import torch

from flashddpm.testing import Guarded, allocations
from flashddpm.testing.zones import ALLOCATORS

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)


def written(zone: Guarded) -> bool:
    try:
        zone.check()
    except AssertionError as error:
        assert "red zone" in str(error)
        return True
    return False


@pytest.mark.parametrize("dtype", DTYPES)
def test_like_keeps_values_strides_and_alignment(dtype):
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for view in (x, x.mT, x[:, 1:, ::2], x.flatten()[5:], x[:0]):
        zone = Guarded.like(view)
        assert torch.equal(zone.view, view) and zone.view.stride() == view.stride()
        assert zone.view.data_ptr() % 16 == view.data_ptr() % 16
        assert zone.view.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        last = sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
        end = zone.view.storage_offset() + (last + 1 if view.numel() else 0)
        assert len(zone.whole) - end == Guarded.ZONE  # a whole zone behind it too
        zone.view.fill_(0)
        assert not written(zone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("canary", [Guarded.CANARY, -3.0, torch.nan])
def test_every_element_outside_is_watched(dtype, canary):
    for place in (0, 7, 8, 9, 10, 11, 12, 13, 20):  # the tensor is at 8, 9, 11 and 12
        zone = Guarded((2, 2), (3, 1), dtype, "cpu", 5, zone=8, canary=canary)
        old = zone.whole[place].clone()
        zone.whole[place] = ~old if dtype is torch.bool else (old == 1).to(dtype) + 1
        assert written(zone) == (place not in (8, 9, 11, 12)), place


def test_a_write_says_where():
    zone = Guarded.like(torch.zeros(3, 5))
    zone.whole[zone.view.storage_offset() + 15 :][:2] = 0
    with pytest.raises(AssertionError, match=r"2 elements from 15 to 16, .* shape \(3, 5\)"):
        zone.check()


def test_writing_the_canary_itself_is_not_seen_but_another_canary_sees_it():
    for canary, seen in ((Guarded.CANARY, False), (1.0, True)):
        zone = Guarded.like(torch.zeros(3), canary=canary)
        zone.whole[0] = Guarded.CANARY
        assert written(zone) == seen


MAKE = {
    "empty": lambda x: torch.empty(3, 5, dtype=x.dtype),
    "empty in channels-last": lambda x: torch.empty(
        (2, 3, 4, 5), dtype=x.dtype, memory_format=torch.channels_last
    ),
    "empty_like": lambda x: torch.empty_like(x),
    "empty_strided": lambda x: torch.empty_strided((3, 5), (8, 1), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(3, 5),
    "new_empty_strided": lambda x: x.new_empty_strided((3, 5), (1, 3)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", MAKE)
def test_allocations_are_filled_and_guarded(how, dtype):
    like = torch.zeros(5, 3, dtype=dtype).mT
    expected = MAKE[how](like)
    before = [getattr(owner, name) for owner, name in ALLOCATORS]
    with allocations(3.0) as zones:
        made = MAKE[how](like)
    assert [getattr(owner, name) for owner, name in ALLOCATORS] == before
    assert (made == torch.tensor(3.0).to(dtype)).all()
    assert made.shape == expected.shape and made.stride() == expected.stride()
    assert made.dtype is dtype and not made._is_view()
    [zone] = zones
    made.zero_()
    assert not written(zone) and (zone.view == 0).all()
    memory = torch.as_strided(made, (zone.whole.numel(),), (1,), 0)
    memory[-1] = memory[-1] == 0
    assert written(zone)


def test_nan_in_integers_is_their_largest_number():
    with allocations(torch.nan):
        assert torch.empty(2).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == 2**31 - 1).all()
        assert torch.empty(2, dtype=torch.bool).all()


def test_what_is_not_new_memory_is_left_alone():
    given, place = torch.zeros(3), torch.zeros(0)
    with allocations(7.0) as zones:
        assert torch.zeros(3).eq(0).all() and torch.ones_like(given).eq(1).all()
        assert torch.empty(3, out=place) is place
        assert torch.empty(3, device="meta").is_meta
    assert zones == []


def test_gradients_flow_through_guarded_memory():
    x = torch.randn(3, requires_grad=True)
    with allocations(torch.nan):
        y = torch.empty(3)
        y[:] = 2 * x
        assert torch.empty(2, requires_grad=True).requires_grad
    y.sum().backward()
    assert (x.grad == 2).all()


def test_allocations_come_back_after_an_error():
    before = [getattr(owner, name) for owner, name in ALLOCATORS]
    with pytest.raises(RuntimeError, match="within"), allocations(0.0):
        raise RuntimeError("within")
    assert [getattr(owner, name) for owner, name in ALLOCATORS] == before


@pytest.mark.parametrize("name", MAKE)
def test_in_tests_new_memory_is_never_what_it_happened_to_be(name):
    """tests/conftest.py fills what the same functions allocate."""
    assert MAKE[name](torch.ones(3, 5)).isnan().all()
    made = MAKE[name](torch.ones(3, 5, dtype=torch.int32))
    assert (made == torch.iinfo(torch.int32).max).all()
