"""Where images begin: x_T of any slots, by the seeds that the device was told."""

import pytest
import torch

from flashddpm.execution.slot_table import Occupant, SlotTable

SEEDS = [7, -3, 2**62, 7]


@pytest.fixture(params=["reference", "fused"])
def sampler(request, tiny_sampler):
    return tiny_sampler(backend=request.param)


@pytest.fixture
def slots(sampler):
    """Five slots, four of them in use, with other images in them and flags set."""
    slots = sampler.executor.service_slots(5, 8, 4)
    table = SlotTable(slots)
    for i, seed in enumerate(SEEDS):
        table.admit(Occupant(seed, 0, 3, 1.0, 1, 3, i))
    table.upload()
    slots.state.x.fill_(5.0)
    slots.state.nonfinite.fill_(2)
    return slots


@pytest.mark.parametrize("which", [slice(1, 3), torch.tensor([3, 0])])
def test_each_slot_begins_at_the_noise_of_its_seed(sampler, slots, which):
    sampler.executor.start(slots, which, sampler.plan("ddim", 5))
    started = torch.zeros(5, dtype=torch.bool)
    started[which] = True
    assert torch.equal(slots.state.x[:4][started[:4]], sampler.initial_noise(SEEDS)[started[:4]])
    assert (slots.state.x[~started] == 5).all()
    assert torch.equal(slots.state.nonfinite == 0, started)


def test_an_image_is_noised_by_the_seeds(sampler, slots):
    plan = sampler.plan("ddim", 50).from_image(0.3)
    a, b = plan.initial
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand(2, -1, -1, -1)
    sampler.executor.start(slots, torch.tensor([2, 1]), plan, image)
    expected = a * image + b * sampler.initial_noise([SEEDS[2], SEEDS[1]])
    torch.testing.assert_close(slots.state.x[[2, 1]], expected, rtol=1e-6, atol=1e-6)


def test_noise_of_the_callers_own_is_taken_instead(sampler, slots):
    plan = sampler.plan("ddim", 50).from_image(0.3)
    a, b = plan.initial
    z, image = torch.full((2, 1, 8, 8), 3.0), torch.full((2, 1, 8, 8), 0.5)
    sampler.executor.start(slots, slice(2), plan, image, z)
    assert torch.equal(slots.state.x[:2], a * image + b * z)
