"""The running batch: the lanes, the dtype of timesteps and the rows that their steps take."""

import torch

from flashddpm.serving import running_batch


def test_timesteps_are_whole_again_when_a_fractional_plan_has_left(
    start, arithmetic, make_sampler, ask
):
    kinds = []

    def network(x_t, t, labels):
        kinds.append(t.dtype)
        return arithmetic(x_t, t, labels)

    engine = start(2, make_sampler(network))
    engine.submit(ask(1, num_steps=4))
    engine.submit(ask(2, solver="euler", timesteps=[30.5, 3.25]))
    engine.drain()
    assert kinds == [torch.float32] * 2 + [torch.int64] * 2


def test_more_plans_than_rows(sampler, start, monkeypatch, ask, draw):
    monkeypatch.setattr(running_batch, "PLAN_ROWS", 60)
    engine = start(4)
    requests = [ask(i, solver="ddpm", num_steps=20 + i) for i in range(12)]
    futures = [engine.submit(request) for request in requests]
    engine.turn()
    assert engine.metrics()["active"] == 2  # 20 + 21 rows of 60; a third has no room
    engine.drain()
    for request, future in zip(requests, futures, strict=True):
        assert torch.equal(future.result().image, draw(sampler, request))


def test_the_network_runs_on_the_lanes_in_use(start, arithmetic, make_sampler, ask):
    sizes = []

    def network(x_t, t, labels):
        sizes.append((len(x_t), labels.tolist()))
        return arithmetic(x_t, t, labels)

    engine = start(4, make_sampler(network))
    engine.submit(ask(1, 0, num_steps=3))
    engine.turn()
    engine.submit(ask(2, 2, num_steps=2, guidance=3.0))
    engine.drain()
    assert sizes == [(1, [0]), (3, [0, 2, 3]), (3, [0, 2, 3])]


def test_the_device_is_told_who_is_where_only_when_that_changes(start, monkeypatch, ask):
    engine = start(2)
    table, told = engine._loop.batch.slot_table, []
    upload = table.upload
    monkeypatch.setattr(
        table, "upload", lambda: (told.append(engine.metrics()["steps"]), upload())[1]
    )
    engine.submit(ask(1, num_steps=6))
    engine.turn()
    engine.turn()
    engine.submit(ask(2, num_steps=2))
    engine.drain()
    assert told == [0, 2, 4]  # one enters, another enters, that one has left
