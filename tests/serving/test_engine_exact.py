"""exact=True: an image's bits depend on no load, slot or neighbour, or the request fails."""

import pytest
import torch

import flashddpm as fd


@pytest.fixture(scope="module")
def compiled():
    """A network whose images fill whole vectors: only then are compiled bits free of the lane."""
    config = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "num_class_embeds": 4,
    }
    unet = fd.UNet(fd.UNetConfig(**config)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return fd.Sampler(
        unet,
        fd.NoiseSchedule.create("squaredcos_cap_v2", 50),
        shape=(1, 4, 4),
        prediction_type="v_prediction",
        conditioning=fd.Conditioning(3, 3),
        device="cpu",
    )


class TestExact:
    @pytest.mark.parametrize(
        "threads", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 5))]
    )
    def test_bits_do_not_depend_on_load_slot_or_neighbours(
        self, compiled, threads, many, ask, draw
    ):
        """Dynamo compiles again for another number of threads, hence the marks."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            engine = fd.Engine(compiled, 7, exact=True, threaded=False)
            for options in many[:2]:
                request = ask(7, 2, **options)
                alone = engine.submit(request)
                engine.drain()
                image = alone.result().image
                assert image.std() > 0.1
                assert torch.equal(image, draw(compiled, request, exact=True, batch_size=7))
                for crowd in (1, 2, 6, 11):
                    for i in range(crowd):
                        engine.submit(ask(20 + i, i % 3, guidance=3.0, num_steps=6 + i))
                    engine.turn()
                    again = engine.submit(request)
                    engine.drain()
                    assert torch.equal(again.result().image, image)
        finally:
            torch.set_num_threads(before)

    def test_one_bucket_and_the_compiled_network(self, compiled, monkeypatch, ask):
        taken = []

        def take_step(slots, compiled, stats, fractional):
            taken.append((len(slots.lane_slot), compiled))
            return slots.state.net_in

        engine = fd.Engine(compiled, 3, exact=True, threaded=False)
        monkeypatch.setattr(compiled.executor, "prove_exact", lambda lanes: None)
        monkeypatch.setattr(compiled.executor, "take_step", take_step)
        engine.submit(ask(0))
        engine.submit(ask(1, guidance=2.0))
        engine.drain()
        assert taken == [(6, True)] * 3
        engine.submit(ask(solver="euler", timesteps=[20.5, 3.25]))  # of embeddings by row
        engine.drain()
        assert taken == [(6, True)] * 5

    def test_a_request_fails_where_bits_depend_on_the_lane(self, compiled, monkeypatch, ask):
        """Tried before the first step; no image is handed out as exact that is not."""

        def refuse(lanes):
            raise ValueError(f"exact=True: other bits in other lanes of {lanes}")

        monkeypatch.setattr(compiled.executor, "prove_exact", refuse)
        engine = fd.Engine(compiled, 3, exact=True, threaded=False)
        future = engine.submit(ask(0))
        engine.drain()
        with pytest.raises(fd.RequestFailed, match="other bits in other lanes of 6"):
            future.result(0)

    def test_lanes_are_tried_once(self, compiled, monkeypatch, ask):
        network, tried = compiled.executor.choice.compiled, []

        def prove(image, told, L, labelled):
            tried.append(L)
            network.exact.add(L)

        monkeypatch.setattr(network, "network", lambda x, told, labels, index: x * 0.5)
        monkeypatch.setattr(network, "exact", set())
        monkeypatch.setattr(network, "prove_exact", prove)
        drawn, real = [], compiled.executor.draw
        monkeypatch.setattr(compiled.executor, "draw", lambda *a: (drawn.append(a), real(*a))[1])
        engine = fd.Engine(compiled, 3, exact=True, threaded=False)
        for seed in range(2):
            future = engine.submit(ask(seed, num_steps=3))
            engine.drain()
            assert future.result().image.isfinite().all()
        assert tried == [6] and len(drawn) == 1  # what is tried with

    def test_refused_where_nothing_is_compiled(self, tiny_sampler, make_sampler):
        for of in (make_sampler(), tiny_sampler(backend="reference"), tiny_sampler()):
            with pytest.raises(ValueError, match=r"exact=True.*compile=False"):
                fd.Engine(of, exact=True, threaded=False)
