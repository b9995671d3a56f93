"""The host's account of a batch: lanes, uploads, rows, and where plans stand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashddpm as fd
from flashddpm.diffusion.plan import Plan
from flashddpm.execution.plan_table import PlanTable
from flashddpm.execution.slot_table import Occupant, SlotTable
from flashddpm.execution.slots import Slots
from flashddpm.execution.step import evaluate
from flashddpm.kernels import reference
from flashddpm.kernels.tables import IDLE, Column

SHAPE = (2, 1, 3)
CPU = torch.device("cpu")


def make_slots(S=4, L=8, R=20, dtype=torch.float32, labelled=True):
    return Slots(S, L, SHAPE, R, dtype, CPU, labelled)


def make_plan(length, number=0.0):
    rows = np.zeros((length, len(Column)))
    rows[:, Column.C_XT] = 1
    rows[:, Column.TIMESTEP] = number
    return Plan(rows, np.arange(length))


def occupant(seed=0, guidance=1.0, label=1, row=1, last=3):
    return Occupant(seed, label, 9, guidance, row, last)


def image(value):
    return torch.full(SHAPE, float(value))


def put(batch, occupant, x):
    """Admit an image at x_t, as the device has it once lanes are filled."""
    slot = batch.admit(occupant)
    batch.slots.state.x[slot] = x
    return slot


def told(batch):
    batch.upload()
    batch.fill_lanes()


class TestBatch:
    @settings(max_examples=200)
    @given(st.data())
    def test_upload_tells_the_device_what_the_host_knows(self, data):
        slots = make_slots(dtype=torch.bfloat16)
        batch, held = SlotTable(slots), {}
        seeds = iter(range(100, 200))
        for _ in range(data.draw(st.integers(1, 6))):
            free = [s for s in range(4) if s not in held]
            if free and (not held or data.draw(st.booleans())):
                o = occupant(next(seeds), data.draw(st.sampled_from([1.0, 2.5])), row=2)
                assert put(batch, o, image(o.seed / 256)) == free[0]
                held[free[0]] = o
            else:
                gone = data.draw(st.sampled_from(sorted(held)))
                batch.retire(gone)
                del held[gone]
        told(batch)
        assert len(batch) == len(held)
        L = batch.lanes
        assert L == sum(2 if o.guidance != 1 else 1 for o in held.values())
        owners = {}
        for s in range(4):
            cond, uncond = int(slots.per_slot.lane_cond[s]), int(slots.per_slot.lane_uncond[s])
            if s not in held:
                assert slots.per_slot.idx[s] == IDLE and uncond == -1
                continue
            o = held[s]
            assert slots.per_slot.idx[s] == 2 and slots.per_slot.seeds[s] == o.seed
            assert (uncond >= 0) == (o.guidance != 1) and slots.per_slot.guidance[s] == o.guidance
            owners[cond] = (s, 1)
            if uncond >= 0:
                owners[uncond] = (s, 9)
        assert sorted(owners) == list(range(L))  # every lane one owner, and no gaps
        for lane, (s, label) in owners.items():
            assert slots.lane_slot[lane] == s and slots.lane_label[lane] == label
            assert torch.equal(slots.state.net_in[lane], slots.state.x[s].bfloat16())
            assert torch.equal(slots.state.x[s], image(held[s].seed / 256))

    def test_the_host_is_where_the_device_is(self):
        slots = make_slots()
        batch, table = SlotTable(slots), PlanTable(slots)
        lengths = [1, 4, 2]
        for length in lengths:
            start = table.acquire(make_plan(length))
            put(batch, occupant(row=start, last=start + length - 1), image(0))
        told(batch)
        finished = []
        for turn in range(1, 5):
            finished += [(turn, s) for s in batch.advance()]
            reference.advance(slots.per_slot, slots.table)
            rows = [o.row if o else IDLE for o in batch.occupants]
            assert rows == slots.per_slot.idx.tolist()
        assert finished == [(1, 0), (2, 2), (4, 1)]

    def test_admit_takes_the_first_idle_slot_or_nothing(self):
        batch = SlotTable(make_slots())
        assert [batch.admit(occupant(seed)) for seed in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ValueError):
            batch.admit(occupant(4))
        batch.retire(2)
        assert len(batch) == 3 and batch.admit(occupant(5)) == 2

    def test_without_labels(self):
        slots = make_slots(labelled=False)
        batch = SlotTable(slots)
        put(batch, Occupant(1, None, None, 1.0, 1, 1), image(1))
        told(batch)
        assert slots.lane_label is None and slots.per_slot.idx.tolist() == [1, 0, 0, 0]


def longest_gap(users, plans):
    """The most rows in a row, of 12, that no plan in use has."""
    ends = [1] + [starts[0] + len(plans[j]) for j, starts in users.items()]
    starts = sorted([starts[0] for starts in users.values()] + [13])
    return max(start - end for start, end in zip(starts, sorted(ends), strict=True))


class TestPlanTable:
    @settings(max_examples=300)
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40))
    def test_plans_never_overlap_and_are_whole_while_followed(self, moves):
        slots = make_slots(R=13)
        table = PlanTable(slots)
        plans = [make_plan(2 + i, number=i) for i in range(6)]
        users: dict[int, list[int]] = {}
        for enter, i in moves:
            if enter:
                start = table.acquire(plans[i])
                if start is None:
                    assert i not in users and longest_gap(users, plans) < len(plans[i])
                    continue
                users.setdefault(i, []).append(start)
                assert len(set(users[i])) == 1
            elif i in users:
                table.release(plans[i])
                users[i].pop()
                users = {k: v for k, v in users.items() if v}
            taken = set()
            for j, (start, *_) in users.items():
                n = len(plans[j])
                rows = range(start, start + n)
                assert start >= 1 and not taken & set(rows) and rows[-1] < 13
                taken |= set(rows)
                assert slots.timesteps[start : start + n].tolist() == [j] * n
                assert slots.table.keys[start : start + n].tolist() == list(range(n))
                assert slots.table.next[start : start + n].tolist() == [*rows[1:], IDLE]
        assert slots.table.next[IDLE] == IDLE and not slots.table.rows[IDLE].any()

    def test_an_equal_plan_is_the_same_rows(self):
        table = PlanTable(make_slots())
        assert table.acquire(make_plan(3)) == table.acquire(make_plan(3)) == 1
        assert table.acquire(make_plan(3, 1.0)) == 4

    def test_the_oldest_unused_makes_room_first(self):
        slots = make_slots(R=7)
        table = PlanTable(slots)
        a, b, c = (make_plan(3, i) for i in range(3))
        for plan in (a, b, a):
            table.acquire(plan)
            table.release(plan)
        assert table.acquire(c) == 4  # b's rows, for a was asked for since
        assert table.acquire(a) == 1
        assert table.acquire(b) is None
        table.release(a)
        assert table.acquire(b) == 1

    def test_too_long_for_the_table(self):
        table = PlanTable(make_slots(R=7))
        assert table.acquire(make_plan(6)) == 1
        with pytest.raises(ValueError, match="plan of 7 rows: must be at most 6"):
            table.acquire(make_plan(7))


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_a_bucket_runs_on_the_first_lanes_only(lanes):
    slots = make_slots()
    slots.load_plan(make_plan(2, 6.0))
    batch = SlotTable(slots)
    for seed in range(3):
        put(batch, occupant(seed), image(seed))
    told(batch)
    seen = []

    def network(x_t, t, labels, index):
        seen.append((len(x_t), t.tolist(), labels.tolist()))
        return x_t

    evaluate(slots.prefix(4, lanes), network)
    spare = lanes - min(lanes, 3)  # of slot 0, label 0
    assert seen == [(lanes, [6] * lanes, [1] * (lanes - spare) + [0] * spare)]


def test_bucket_is_a_power_of_two_only_where_shapes_are_fixed():
    network = torch.nn.Conv2d(2, 2, 1)
    options = {"shape": SHAPE, "device": "cpu", "call": lambda x, t, labels: network(x)}
    executor = fd.Sampler(network, fd.NoiseSchedule.create(), **options).executor
    assert [executor.bucket(n, 12, False) for n in (1, 3, 12)] == [1, 3, 12]
    assert [executor.bucket(n, 12, True) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 12]
