"""What a step draws: a pure function of seed and step, and distributed as it should be."""

import dataclasses
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats

from flashddpm.training.config import TIMESTEP_SAMPLINGS, TrainConfig
from flashddpm.training.draws import Draws

CONFIG = TrainConfig(steps=6, batch_size=4, seed=3)


def draws(count: int = 10, rank: int = 0, size: int = 1, **changes) -> Draws:
    return Draws(dataclasses.replace(CONFIG, **changes), count, rank, size)


def drawn(draw: Draws, step: int) -> dict[str, torch.Tensor]:
    """Everything that is drawn for a step."""
    keys = draw.keys(step)
    return {
        "index": draw.index(keys),
        "flip": draw.flips(keys),
        "t": draw.timesteps(keys),
        "seeds": draw.seeds(keys),
        "keys": keys,
        "drop": draw.label_drops(keys),
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def images(draw: Draws, steps: int) -> list[int]:
    return torch.cat([draw.index(draw.keys(step)) for step in range(steps)]).tolist()


def test_draws_are_those_of_the_runs_that_are_stored():
    """A run that was started with an older version goes on with the same data."""
    draw = drawn(draws(label_dropout=0.5), 7)
    assert draw["index"].tolist() == [8, 6, 9, 6]
    assert draw["drop"].tolist() == [False, False, True, False]
    assert draw["t"].tolist() == [622, 354, 343, 949]
    assert draw["seeds"].tolist() == [3, 3, 3, 3]
    assert draw["keys"].tolist() == [28, 29, 30, 31]


def test_uniform_draws_do_not_depend_on_the_batch_size():
    small, large = (draws(batch_size=n, horizontal_flip=True) for n in (8, 16))
    for step in (0, 3, 1):
        halves = [drawn(small, 2 * step + i) for i in range(2)]
        for name, expected in drawn(large, step).items():
            assert torch.equal(torch.cat([half[name] for half in halves]), expected), name


@pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
def test_draws_are_a_function_of_seed_and_step(sampling):
    options = {"timestep_sampling": sampling, "horizontal_flip": True}
    one, other = draws(**options), draws(seed=4, **options)
    first = drawn(one, 5)
    for step in (0, 99, 5):
        again = drawn(one, step)
    assert same(first, again) and same(first, drawn(draws(**options), 5))
    for different in (drawn(one, 6), drawn(other, 5)):
        assert not torch.equal(first["t"], different["t"])
    assert images(one, 5) != images(other, 5)


def test_the_seed_reaches_over_64_bits():
    for seed in (2**64 - 1, -1):
        assert drawn(draws(seed=seed), 0)["seeds"].tolist() == [-1] * 4
    assert not torch.equal(drawn(draws(seed=2**63), 0)["t"], drawn(draws(seed=0), 0)["t"])


@hypothesis.given(
    size=st.sampled_from([1, 2, 3, 6]), step=st.integers(0, 10**6), flip=st.booleans(),
    sampling=st.sampled_from(TIMESTEP_SAMPLINGS), count=st.integers(1, 50),
)  # fmt: skip
@hypothesis.settings(max_examples=25)
def test_the_parts_of_all_processes_are_the_whole(size, step, flip, sampling, count):
    options = {"batch_size": 12, "timestep_sampling": sampling, "horizontal_flip": flip}
    parts = [drawn(draws(count, rank, size, **options), step) for rank in range(size)]
    for name, expected in drawn(draws(count, **options), step).items():
        assert all(len(part[name]) == 12 // size for part in parts)
        assert torch.equal(torch.cat([part[name] for part in parts]), expected), name


def test_accumulation_changes_no_draw():
    for sampling in TIMESTEP_SAMPLINGS:
        pair = (draws(accumulate=k, timestep_sampling=sampling) for k in (1, 4))
        assert same(*(drawn(draw, 9) for draw in pair))


@pytest.mark.parametrize("timesteps", [1, 7, 1000])
def test_timesteps_are_uniform(timesteps):
    draw = draws(num_train_timesteps=timesteps, batch_size=4000)
    t = torch.cat([drawn(draw, step)["t"] for step in range(2)])
    assert t.dtype is torch.int64 and 0 <= int(t.min()) and int(t.max()) < timesteps
    cells = min(timesteps, 50)
    counts = torch.bincount(t * cells // timesteps, minlength=cells)
    # One seed, so one outcome: a uniform draw fails here with probability 0.001.
    assert cells == 1 or stats.chisquare(counts.numpy()).pvalue > 0.001
    if timesteps == 7:
        pairs = torch.bincount(t[::2] * 7 + t[1::2], minlength=49)
        assert stats.chisquare(pairs.numpy()).pvalue > 0.001


@pytest.mark.parametrize("batch", [1, 3, 8, 64, 100])
def test_low_discrepancy_hits_every_stratum_of_a_batch_once(batch):
    """T = 100 B, so that t // 100 is the number of the stratum of width 1/B."""
    T = 100 * batch
    draw = draws(batch_size=batch, num_train_timesteps=T, timestep_sampling="low_discrepancy")
    for step in range(40):
        t = drawn(draw, step)["t"]
        assert sorted((t // 100).tolist()) == list(range(batch))
        steps = (t.roll(-1) - t) % T  # evenly spread: 100 apart, but for rounding down
        assert batch == 1 or set(steps.tolist()) <= {99, 100, 101}


def test_low_discrepancy_is_uniform_over_the_steps():
    draw = draws(batch_size=4, timestep_sampling="low_discrepancy")
    t = torch.stack([draw.timesteps(draw.keys(step)) for step in range(4000)])
    for place in range(4):  # of one place in the batch, the steps are independent draws
        counts = torch.bincount(t[:, place] * 50 // 1000, minlength=50)
        assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_labels_are_dropped_at_the_rate_asked_for():
    for rate in (0.0, 0.1, 1.0):
        draw = drawn(draws(5, label_dropout=rate, batch_size=4000), 0)
        dropped, t = draw["drop"], draw["t"]
        spread = 4 * math.sqrt(rate * (1 - rate) / 4000)
        assert abs(float(dropped.float().mean()) - rate) <= spread
        if rate == 0.1:
            # Neither the image nor the timestep has a say in it.
            table = torch.stack(
                [torch.bincount(draw["index"][dropped == d]) for d in (False, True)]
            )
            assert stats.chi2_contingency(table.numpy()).pvalue > 0.001
            kept, lost = (t[dropped == d].float().numpy() for d in (False, True))
            assert stats.ks_2samp(kept, lost).pvalue > 0.001


def test_half_of_the_images_are_mirrored_and_others_each_epoch():
    assert not drawn(draws(batch_size=4000), 0)["flip"].any()
    draw = draws(4000, batch_size=4000, horizontal_flip=True, label_dropout=0.5)
    mirrored = []
    for epoch in range(3):
        found = drawn(draw, epoch)
        index, flip = found["index"], found["flip"]
        assert abs(float(flip.float().mean()) - 0.5) <= 4 * 0.5 / math.sqrt(4000)
        mirrored.append(torch.empty(4000, dtype=torch.bool).index_put((index,), flip))
        agree = float((flip == found["drop"]).float().mean())
        assert abs(agree - 0.5) <= 4 * 0.5 / math.sqrt(4000)  # not the same words
    for a, b in ((0, 1), (0, 2), (1, 2)):
        agree = float((mirrored[a] == mirrored[b]).float().mean())
        assert abs(agree - 0.5) <= 4 * 0.5 / math.sqrt(4000)


def test_every_epoch_is_a_permutation_of_its_own():
    found = images(draws(10, batch_size=3), 10)
    epochs = [found[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(10)) not in epochs


def test_a_batch_may_be_larger_than_the_data():
    found = images(draws(3, batch_size=7), 3)
    assert all(sorted(found[i : i + 3]) == [0, 1, 2] for i in range(0, 21, 3))


def test_drawing_leaves_global_generators_alone():
    before = torch.get_rng_state()
    drawn(draws(horizontal_flip=True), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_must_have_equal_parts():
    with pytest.raises(ValueError, match="^batch_size=4: must be a multiple of 3 processes"):
        draws(rank=1, size=3).keys(0)
