"""generate and stream: results, previews, cancellation and failures in an event loop."""

import asyncio
import threading

import pytest
import torch

import flashddpm as fd


class TestAsyncio:
    @pytest.fixture
    def gated(self, arithmetic, make_sampler):
        """A sampler that waits in its second step until the gate opens, and the gate."""
        gate, calls = threading.Event(), []

        def network(x_t, t, labels):
            calls.append(1)
            assert len(calls) == 1 or gate.wait(60)
            return arithmetic(x_t, t, labels)

        return make_sampler(network), gate

    def test_generate(self, sampler, draw, ask):
        async def main(engine):
            results = await asyncio.gather(*(engine.generate(ask(i)) for i in range(6)))
            with pytest.raises(ValueError, match="labels=7"):
                await engine.generate(ask(0, 7))
            return results

        with fd.Engine(sampler, 2) as engine:
            results = asyncio.run(main(engine))
        for result in results:
            assert torch.equal(result.image, draw(sampler, result.request))

    def test_cancelling_the_task_cancels_the_request(self, gated, ask, ends):
        sampler, gate = gated

        async def main(engine):
            task = asyncio.create_task(engine.generate(ask(9, num_steps=50)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()

        with fd.Engine(sampler, 2) as engine:
            asyncio.run(main(engine))
        assert ends(engine)["cancelled"] == 1 and engine.metrics()["steps"] <= 2

    def test_stream(self, sampler, ask):
        async def main(engine):
            return [item async for item in engine.stream(ask(3, num_steps=5))]

        with fd.Engine(sampler, 2) as engine:
            *previews, result = asyncio.run(main(engine))
        seen = []
        image = sampler.sample(3, 1, num_steps=5, on_step=lambda i, x: seen.append(x[0]))[0]
        assert torch.equal(result.image, image) and len(previews) == 5
        assert all(torch.equal(a, b) for a, b in zip(previews, seen, strict=True))

    def test_leaving_a_stream_cancels(self, gated, ask, ends):
        sampler, gate = gated

        async def main(engine):
            stream = engine.stream(ask(3, num_steps=50))
            async for _ in stream:
                break
            await stream.aclose()
            gate.set()

        with fd.Engine(sampler, 2) as engine:
            asyncio.run(main(engine))
        assert ends(engine)["cancelled"] == 1 and engine.metrics()["steps"] <= 2

    def test_a_loop_that_is_gone_fails_its_own_request(self, gated, ends, ask, draw):
        sampler, gate = gated
        with fd.Engine(sampler, 2) as engine:
            events = asyncio.new_event_loop()
            stream = engine.stream(ask(3))
            events.run_until_complete(anext(stream))
            other = engine.submit(ask(4))
            events.close()
            gate.set()
            assert torch.equal(other.result().image, draw(sampler, ask(4)))
        assert ends(engine) == {"completed": 1, "failed": 1, "cancelled": 0, "expired": 0}

    def test_a_failure_comes_through_a_stream(self, sampler, on_call, ask):
        on_call(sampler.executor, "take_step", range(99))

        async def main(engine):
            with pytest.raises(fd.RequestFailed):
                async for _ in engine.stream(ask(4)):
                    raise AssertionError("no step was taken")

        with fd.Engine(sampler, 2) as engine:
            asyncio.run(main(engine))
