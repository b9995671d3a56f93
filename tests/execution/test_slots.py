"""The step that a graph captures: no host read, no allocation, no other address, any plan."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashddpm as fd
from flashddpm import kernels
from flashddpm.execution.plan_table import PlanTable
from flashddpm.execution.slot_table import Occupant, SlotTable
from flashddpm.execution.slots import Slots
from flashddpm.execution.step import step
from flashddpm.kernels import reference
from flashddpm.kernels.launch import INTERPRETED

SHAPE = (1, 8, 8)
SCHEDULE = fd.NoiseSchedule.create("squaredcos_cap_v2", 100)


def plan(solver, num_steps, **options):
    return fd.make_plan(SCHEDULE, solver, num_steps, prediction_type="v_prediction", **options)


PLANS = [
    plan("ddpm", 5),
    plan("dpmpp_2m", 4),
    plan("ddim", 6, threshold=0.9, clip=2.0, guidance_rescale=0.5),
]


def batch_of_three(device="cpu"):
    """Slots 0, 1 and 2 of four, each on a plan of its own, the third guided."""
    slots = Slots(4, 6, SHAPE, 64, torch.float32, torch.device(device), labelled=True)
    table, batch = PlanTable(slots), SlotTable(slots)
    draws = torch.Generator().manual_seed(0)
    for i, (one, w) in enumerate(zip(PLANS, (1.0, 1.0, 3.0), strict=True)):
        row = table.acquire(one)
        x = torch.randn(SHAPE, generator=draws).to(device)
        slots.state.x[batch.admit(Occupant(i, i, 3, w, row, row + len(one) - 1))] = x
    batch.upload()
    batch.fill_lanes()
    return slots, batch


class Network:
    """Elementwise, of image, timestep and label; writes into memory of its own."""

    def __init__(self, lanes, device="cpu"):
        self.out = torch.empty(lanes, *SHAPE, device=device, memory_format=torch.channels_last)
        self.scale = torch.empty(lanes, 1, 1, 1, device=device)

    def __call__(self, x_t, t, labels, index):
        out, scale = self.out[: len(x_t)], self.scale[: len(x_t)]
        torch.add(t.reshape(-1, 1, 1, 1), labels.reshape(-1, 1, 1, 1), out=scale)
        return torch.mul(x_t, scale.mul_(0.001).add_(0.5), out=out)


def storages(*owners):
    found = set()
    for owner in owners:
        for value in vars(owner).values():
            for tensor in value if isinstance(value, tuple) else [value]:
                if isinstance(tensor, torch.Tensor):
                    found.add(tensor.untyped_storage().data_ptr())
    return found


class Watch(TorchDispatchMode):
    """Fails on a read by the host, a copy between devices, or a result in memory not known."""

    def __init__(self, known):
        super().__init__()
        self.known, self.seen = known, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"), name
        tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
        assert len({tensor.device for tensor in tensors}) <= 1, f"{name} between devices"
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                assert tensor.untyped_storage().data_ptr() in self.known, f"{name} allocates"
        self.seen.append(name)
        return result


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernels' own launch is not watched")
def test_a_step_reads_nothing_and_allocates_nothing():
    """The kernels allocate nothing either: every one of the step writes in place."""
    slots, _ = batch_of_three()
    network = Network(6)
    known = storages(slots, network)
    for L in (4, 6):
        with Watch(known) as watch:
            for _ in range(3):
                step(slots.prefix(4, L), network, kernels)
        assert watch.seen.count("flashddpm::denoise_step") == 3
        assert watch.seen.count("flashddpm::sample_stats") == 3
    assert storages(slots, network) == known


def test_the_watch_sees_what_it_should():
    x = torch.ones(2)
    known = {x.untyped_storage().data_ptr()}
    for wrong in (lambda: x.sum().item(), lambda: x + 1, lambda: x[x > 0], lambda: bool(x[0])):
        with pytest.raises(AssertionError), Watch(known):
            wrong()


@pytest.mark.parametrize("ops", [reference, kernels], ids=["reference", "kernels"])
def test_every_slot_ends_as_if_it_were_alone(ops):
    """Three plans in one batch; whoever is finished is idle while the others go on."""
    slots, batch = batch_of_three()
    network, finished = Network(6), {}
    for n in range(6):
        step(slots.prefix(4, 4), network, ops)
        for s in batch.advance():
            finished[s] = n + 1
            result = slots.state.x[s].clone()
            lone = Slots(1, 2, SHAPE, 64, torch.float32, torch.device("cpu"), labelled=True)
            alone = SlotTable(lone)
            lone.load_plan(PLANS[s])
            start = batch_of_three()[0].state.x[s]
            w = (1.0, 1.0, 3.0)[s]
            lone.state.x[alone.admit(Occupant(s, s, 3, w, 1, len(PLANS[s])))] = start
            alone.upload()
            alone.fill_lanes()
            for _ in range(len(PLANS[s])):
                step(lone.prefix(1, 2 if w != 1 else 1), Network(2), ops)
            assert torch.equal(lone.state.x[0], result)
    assert finished == {0: 5, 1: 4, 2: 6}
    assert slots.per_slot.idx.tolist() == [0] * 4


def test_host_and_device_agree_on_every_row():
    slots, batch = batch_of_three()
    network = Network(6)
    for _ in range(7):
        rows = [0 if o is None else o.row for o in batch.occupants]
        assert slots.per_slot.idx.tolist() == rows
        step(slots.prefix(4, 4), network, reference)
        batch.advance()
