"""Slots move to their next rows, all at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm import kernels
from flashddpm.kernels import reference
from flashddpm.kernels.step_arguments import by_tensor


@pytest.mark.parametrize("slots", [1, 2, 3, 127, 128, 129, 257])
@pytest.mark.parametrize("which", ["fast", "reference"])
def test_moves_every_slot(device, slots, which):
    draws = torch.Generator().manual_seed(slots)
    follow = torch.randint(50, (50,), generator=draws)
    start = torch.randint(50, (slots,), generator=draws)
    # A red zone on both sides: the last program's lanes beyond the slots write nothing.
    whole = torch.full((slots + 256,), 7, device=device)
    idx = whole[128 : 128 + slots].copy_(start)
    ops = kernels if which == "fast" else reference
    assert by_tensor(ops.advance)(idx=idx, next=follow.to(device)) is None
    assert idx.tolist() == [follow[i].item() for i in start]
    assert (whole[:128] == 7).all() and (whole[128 + slots :] == 7).all()


@settings(max_examples=15)
@given(data=st.data())
def test_a_row_that_points_at_itself_is_the_end(device, data):
    count = data.draw(st.integers(1, 9))
    follow = torch.tensor([0, *(max(0, i - 1) for i in range(1, count))], device=device)
    start = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
    idx = torch.tensor(start, device=device)
    for step in range(1, 4):
        by_tensor(kernels.advance)(idx=idx, next=follow)
        assert idx.tolist() == [max(0, i - step) for i in start]


def test_zero_slots(device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    for advance in (kernels.advance, reference.advance):
        by_tensor(advance)(idx=none, next=torch.zeros(3, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("idx", {"idx": torch.zeros(2)}),
        ("idx", {"idx": torch.zeros(2, 2, dtype=torch.int64)}),
        ("idx", {"idx": torch.zeros(4, dtype=torch.int64)[::2]}),
        ("next", {"next": torch.zeros(3, dtype=torch.int32)}),
        ("next", {"next": torch.zeros((), dtype=torch.int64)}),
    ],
)
def test_bad_arguments(name, change):
    good = {"idx": torch.zeros(2, dtype=torch.int64), "next": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^{name}"):
        by_tensor(kernels.advance)(**(good | change))
