"""Many callers at once, weights that change meanwhile, and ten thousand requests."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import flashddpm as fd
from flashddpm.serving import metrics


def test_callbacks_may_call_the_engine(sampler, ask):
    more, ready, returned = [], threading.Event(), threading.Event()
    with fd.Engine(sampler, 2) as engine:

        def again(_):
            more.append(engine.submit(ask(2)))
            more[0].add_done_callback(lambda _: (engine.shutdown(), returned.set()))
            ready.set()

        engine.submit(ask(1)).add_done_callback(again)
        assert ready.wait(30) and returned.wait(30)
    assert more[0].result()


def resident_bytes():
    statm = Path("/proc/self/statm")  # Linux; elsewhere objects alone are counted
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


class TestThreads:
    def test_many_callers_and_the_samplers_own(self, sampler, ask, make_sampler):
        def ask_for(i):
            if i % 4 == 0:
                return i, sampler.sample(i, 1, num_steps=3)[0]
            return i, engine.submit(ask(i)).result(60).image

        with fd.Engine(sampler, 3) as engine, ThreadPoolExecutor(8) as pool:
            for i, image in pool.map(ask_for, range(60)):
                assert torch.equal(image, make_sampler().sample(i, 1, num_steps=3)[0])

    def test_weights_change_between_steps(self, tiny_sampler, tiny_unet, monkeypatch, ask):
        sampler, inside, seen = tiny_sampler(), threading.Lock(), []
        step, load = sampler.executor.take_step, sampler.executor.update_weights
        stepping = threading.Event()

        def take_step(*args):
            assert inside.acquire(blocking=False)
            stepping.set()
            try:
                return step(*args)
            finally:
                inside.release()

        def update(state):
            assert inside.acquire(blocking=False)
            load(state)
            seen.append(engine.metrics()["completed"])
            inside.release()

        monkeypatch.setattr(sampler.executor, "take_step", take_step)
        monkeypatch.setattr(sampler.executor, "update_weights", update)
        new = tiny_unet(1, num_class_embeds=4).state_dict()
        with fd.Engine(sampler, 1) as engine:
            futures = [engine.submit(ask(i, num_steps=20)) for i in range(20)]
            assert stepping.wait(60)
            sampler.update_weights(new)
            last = engine.submit(ask(50))
        assert seen[0] < 20 and all(future.exception() is None for future in futures)
        monkeypatch.undo()
        assert (last.result().image - sampler.sample(50, 1, num_steps=3)[0]).abs().max() < 1e-5

    def test_soak(self, sampler, monkeypatch, ask):
        """Ten thousand requests: each resolved once, memory flat."""
        monkeypatch.setattr(metrics, "WINDOW", 64)  # full before the count begins
        resolved = [0]

        def count(future):
            resolved[0] += 1

        def burst(engine):
            for i in range(2000):
                if engine.metrics()["queue_depth"] == 512:
                    engine.drain()
                future = engine.submit(ask(i, num_steps=1 + i % 3, eta=(i % 300) / 300))
                future.add_done_callback(count)
                if i % 50 == 0:
                    future.cancel()
            engine.drain()
            gc.collect()
            return len(gc.get_objects()), resident_bytes()

        with fd.Engine(sampler, 64, queue_size=512) as engine:
            sizes = [burst(engine) for _ in range(5)]
        counts = engine.metrics()
        assert counts["completed"] + counts["cancelled"] == counts["submitted"] == 10_000
        assert counts["completed"] >= 9_800 and resolved[0] == 10_000
        (objects, memory), (objects_after, memory_after) = sizes[1], sizes[-1]
        assert objects_after - objects < 600  # 6,000 requests: a tenth of an object each
        assert memory_after - memory < 8 << 20
