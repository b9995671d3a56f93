"""What a sampler gives by captured steps: on a card that only pretends to be one."""

import gc

import pytest
import torch

import flashddpm as fd

RUN = {"labels": 1, "guidance": [1.0, 2.0, 1.0], "solver": "ddpm"}


class TestSampler:
    @pytest.mark.parametrize("num_steps", [1, 4, 10, 37])
    def test_replays_give_what_the_loop_gives(self, tiny_sampler, captured, num_steps):
        want = tiny_sampler().sample(range(3), num_steps=num_steps, **RUN)
        sampler, card = captured()
        for _ in range(2):
            card.replayed.clear()
            got = sampler.sample(range(3), num_steps=num_steps, **RUN)
            assert (got - want).abs().max() <= 1e-5  # four lanes, of which none is spare
        long, short = divmod(num_steps, 4)
        assert card.replayed == [4] * long + [1] * short

    def test_one_graph_serves_every_plan_and_number_of_images(self, tiny_sampler, captured):
        sampler, card = captured()
        plain = tiny_sampler()
        for options in (
            {"solver": "ddim"},
            {"solver": "dpmpp_2m"},
            {"solver": "ddim", "threshold": 0.9, "clip": 2.0},
            {"guidance_rescale": 0.7},
            {"seeds": [5, 6]},
        ):
            ask = {"seeds": range(3), "num_steps": 9, **RUN, **options}
            ask["guidance"] = 2.0  # 6 lanes, or 4 in a bucket of 8 or 4
            got, want = sampler.sample(**ask), plain.sample(**ask)
            assert (got - want).abs().max() <= 1e-5, options
        captures = [entry[1:] for entry in card.log if entry[0] == "capture"]
        assert captures == [(n, count) for n in (8, 4) for count in (1, 4, 16)]
        assert len(sampler.executor.graphs) == 4

    def test_buckets_share_buffers_that_only_grow(self, captured):
        sampler, card = captured()
        buffers = []
        for count, batch in ((3, 4), (1, 4), (4, 4), (2, 2), (5, 8), (1, 4)):
            sampler.sample(range(count), 0, num_steps=2, batch_size=batch)
            buffers.append(sampler.executor._slots)
        assert len({id(b) for b in buffers[:4]}) == 1 and buffers[4] is buffers[5] is not buffers[0]
        assert len(buffers[0].per_slot.idx) == 4 and len(buffers[4].per_slot.idx) == 8
        keys = {key[0] for key, _ in sampler.executor.graphs._kept}
        assert keys == {buffers[4].token}  # the graphs of the old ones are gone

    def test_without_room_steps_run_one_by_one(self, tiny_sampler, captured):
        want = tiny_sampler().sample(range(3), num_steps=5, **RUN)
        sampler, card = captured(limit=1)
        assert (sampler.sample(range(3), num_steps=5, **RUN) - want).abs().max() <= 1e-5
        assert card.replayed == []

    def test_previews_of_captured_steps(self, tiny_sampler, captured):
        for options in ({}, {"threshold": 0.9, "clip": 2.0, "guidance_rescale": 0.5}):
            runs = []
            for sampler in (tiny_sampler(), captured()[0]):
                seen = []
                x = sampler.sample(
                    range(3),
                    1,
                    [1.0, 2.0, 1.0],
                    "ddim",
                    6,
                    on_step=lambda i, x0, seen=seen: seen.append(x0.clone()),
                    **options,
                )
                runs.append(torch.stack([*seen, x]))
            assert len(runs[0]) == 7 and (runs[0] - runs[1]).abs().max() <= 1e-5

    def test_a_held_result_stays_as_it_is(self, captured):
        sampler, _ = captured()
        first = sampler.sample(range(2), 0, num_steps=3)
        kept = first.clone()
        sampler.sample(range(7, 9), 1, num_steps=3)
        assert torch.equal(first, kept)

    def test_new_weights_are_not_stale(self, tiny_unet, tiny_sampler, captured):
        sampler, card = captured()
        sampler.sample(range(2), 0, num_steps=3)
        before = len(card.log)
        sampler.update_weights(tiny_unet(seed=5, num_class_embeds=4).state_dict())
        got = sampler.sample(range(2), 0, num_steps=3)
        other = tiny_sampler()
        other.update_weights(sampler.network.state_dict())
        assert (got - other.sample(range(2), 0, num_steps=3)).abs().max() <= 1e-5
        assert len(card.log) == before  # the same graphs

    def test_moved_weights_are_refused(self, captured):
        sampler, _ = captured()
        sampler.sample(range(2), 0, num_steps=3)
        for parameter in sampler.network.parameters():
            parameter.data = parameter.data.clone()
            break
        with pytest.raises(RuntimeError, match="moved or replaced under its graphs"):
            sampler.sample(range(2), 0, num_steps=3)

    def test_trajectories_take_their_graphs_with_them(self, captured):
        sampler, card = captured()
        for _ in range(3):
            trajectory = sampler.trajectory(range(3), 0, num_steps=3)
            want = trajectory.run()
            assert len(sampler.executor.graphs) == 1
            log = list(card.log)
            del trajectory
            gc.collect()
            assert card.log == log  # it only left a note
        assert want.isfinite().all()
        assert [entry for entry in card.log if entry[0] == "capture"] == [("capture", 4, 1)] * 3

    @pytest.mark.parametrize("bad", [-1, 1.5, "1", True])
    def test_bad_memory(self, tiny_unet, bad):
        with pytest.raises(ValueError, match="graph_memory="):
            fd.Sampler(tiny_unet(), fd.NoiseSchedule.create(), shape=(1, 8, 8), graph_memory=bad)
