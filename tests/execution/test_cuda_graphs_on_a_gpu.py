"""What a replay gives, and what a graph leaves to others: on a real card."""

import pytest
import torch

import flashddpm as fd

RUN = {"labels": 1, "guidance": [1.0, 2.0, 1.0], "solver": "ddpm"}


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.fixture
    def make(self, tiny_unet):
        def build(**options):
            return fd.Sampler(
                tiny_unet(num_class_embeds=4).cuda(),
                fd.NoiseSchedule.create("squaredcos_cap_v2", 100),
                shape=(1, 8, 8),
                prediction_type="v_prediction",
                conditioning=fd.Conditioning(3, 3),
                device="cuda",
                **{"compile": False, **options},
            )

        return build

    @pytest.mark.parametrize("count", [1, 4, 16])
    def test_graphs_of_many_steps(self, make, monkeypatch, count):
        """Whichever pays: 37 steps are some replays of it and some of one step."""
        monkeypatch.setattr(
            "flashddpm.execution.cuda_graphs.UNROLLED", (1, count) if count > 1 else (1,)
        )
        monkeypatch.setattr(
            "flashddpm.execution.cuda_graphs.WORTH", -1.0
        )  # the last one is always kept
        monkeypatch.setattr("flashddpm.execution.cuda_graphs.GAP_SECONDS", 1.0)
        sampler, plain = make(), make(backend="reference")
        ask = {"num_steps": 37, **RUN}
        for seeds in (range(3), range(3, 6)):
            got, want = sampler.sample(seeds, **ask), plain.sample(seeds, **ask)
            assert (got - want).abs().max() <= 1e-3
        counts = {graph.count for graph in sampler.executor.graphs._kept.values()}
        assert counts == {1, count}
        assert sampler.executor.graphs.bytes > 0

    def test_ten_buckets_are_compiled_and_captured_once_each(self, make):
        sampler, plain = make(compile=True), make(backend="reference")
        for _ in range(2):
            for lanes in range(1, 11):
                got = sampler.sample(range(lanes), 1, num_steps=3, bucket=lanes)
                want = plain.sample(range(lanes), 1, num_steps=3)
                assert (got - want).abs().max() <= 1e-3
        assert sampler.executor.choice.compiled.shapes == {(n, False) for n in range(1, 11)}
        assert {key[2] for key, _ in sampler.executor.graphs._kept} == set(range(1, 11))

    def test_without_memory_for_graphs(self, make):
        sampler, plain = make(graph_memory=0), make(backend="reference")
        got, want = (s.sample(range(3), num_steps=5, **RUN) for s in (sampler, plain))
        assert (got - want).abs().max() <= 1e-3 and sampler.executor.graphs.bytes == 0

    def test_a_step_that_may_not_be_captured_runs_as_it_is(self, make):
        """And leaves the card, and the sampler itself, able to capture others."""
        reads = [True]

        def network(x_t, t, labels):
            return x_t * float(x_t.sum().isfinite()) if reads[0] else x_t * 1.0

        sampler = fd.Sampler(
            network,
            fd.NoiseSchedule.create(),
            shape=(1, 8, 8),
            conditioning=fd.Conditioning(3, 3),
            device="cuda",
            capture=True,
        )
        stream = torch.cuda.current_stream()
        want = sampler.sample(0, 0, num_steps=2)
        assert len(sampler.executor.graphs) == 0
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
        reads[0] = False
        got = sampler.sample(0, 0, num_steps=2, bucket=3)  # another key, the same pools
        assert len(sampler.executor.graphs) >= 1
        assert (got - want).abs().max() <= 1e-5
        assert make().sample(range(2), 0, num_steps=3).isfinite().all()

    def test_dropping_one_graph_leaves_the_scratch_memory_of_others(self):
        """cuBLAS works in memory that torch frees when a graph of the same stream is destroyed."""
        torch.manual_seed(0)
        wide = torch.nn.Linear(4096, 64, dtype=torch.bfloat16).cuda()
        back = torch.nn.Linear(64, 64, dtype=torch.bfloat16).cuda()

        def network(x_t, t):  # few rows and a long inner size: split over the card
            h = wide(x_t.flatten(1).repeat(1, 64))
            return back(h).reshape(x_t.shape)

        sampler = fd.Sampler(
            network,
            fd.NoiseSchedule.create(),
            shape=(1, 8, 8),
            device="cuda",
            dtype="bfloat16",
            capture=True,
        )
        want = [sampler.sample(range(n), num_steps=33) for n in (2, 8)]
        graphs = sampler.executor.graphs
        for key in [key for key, _ in graphs._kept if key[2] == 8]:
            graphs._drop(lambda other, count, key=key: other == key)
        torch.cuda.empty_cache()
        filler = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(64)]
        assert torch.equal(sampler.sample(range(2), num_steps=33), want[0])
        del filler
        assert torch.equal(sampler.sample(range(8), num_steps=33), want[1])

    def test_requests_in_flight(self, make):
        sampler, plain = make(compile=True), make(backend="reference")
        requests = [
            fd.Request(
                seed=i,
                label=i % 3,
                guidance=1.0 + i % 2,
                solver=("ddpm", "ddim", "dpmpp_2m")[i % 3],
                num_steps=3 + i,
            )
            for i in range(12)
        ]
        with fd.Engine(sampler, 4) as engine:
            engine.warm()
            held = len(sampler.executor.graphs)
            results = [future.result() for future in map(engine.submit, requests)]
            assert len(sampler.executor.graphs) == held == 4
            assert engine.metrics()["graph_bytes"] > 0
        for r, result in zip(requests, results, strict=True):
            want = plain.sample(r.seed, r.label, r.guidance, r.solver, r.num_steps)
            assert (result.image - want[0]).abs().max() <= 1e-3

    def test_calls_on_streams_of_their_own_do_not_overlap(self, make):
        sampler = make()
        want = [sampler.sample(range(2), 1, num_steps=20) for _ in range(2)]
        got = []
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream()):
                got.append(sampler.trajectory(range(2), 1, num_steps=20))
        for trajectory in got:
            with torch.cuda.stream(torch.cuda.Stream()):
                x = trajectory.run()
            assert (x - want[0]).abs().max() <= 1e-5
