"""What the bound is asked for: timesteps, seeds, labels and settings; and what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashddpm as fd
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.evaluation.bound import Bound, chosen_timesteps, variational_bound

SHORT = NoiseSchedule.create("linear", 20, 1e-3, 0.5)
COSINE = NoiseSchedule.create("squaredcos_cap_v2", 50)


def levels(N, shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (N, *shape), generator=draws).to(torch.uint8)


@settings(max_examples=60)
@given(data=st.data(), T=st.integers(2, 2000))
def test_chosen_timesteps(data, T):
    count = data.draw(st.integers(2, T))
    steps = chosen_timesteps(T, count)
    assert len(steps) == count and steps[0] == 0 and 1 <= steps[1] and steps[-1] <= T - 1
    gaps = np.diff(steps[1:])
    assert (gaps >= 1).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= 1)
    middle = np.mean(steps[1:])
    assert abs(middle - T / 2) <= 1
    assert chosen_timesteps(T, None) == chosen_timesteps(T, T) == list(range(T))


def test_strided_terms_are_those_of_all(tiny_sampler):
    """Noise is of the pair of image and timestep, whichever others are evaluated, in any batch."""
    sampler, images = tiny_sampler(), levels(3, (1, 8, 8))
    whole = variational_bound(sampler, images, 1, batch_size=64)
    few = variational_bound(sampler, images, 1, timesteps=12, batch_size=7)
    assert whole.timesteps == tuple(range(100)) and len(few.timesteps) == 12
    picked = [whole.terms[t] for t in few.timesteps]
    np.testing.assert_allclose(few.terms, picked, rtol=1e-4)
    assert few.prior == whole.prior
    middle = few.total - few.prior - few.decoder
    np.testing.assert_allclose(middle, 99 * np.mean(few.terms[1:]), rtol=1e-12)
    np.testing.assert_allclose(
        whole.total, whole.prior + whole.decoder + sum(whole.terms[1:]), rtol=1e-12
    )


def test_seeds_differ_and_repeat(tiny_sampler):
    sampler, images = tiny_sampler(), levels(3, (1, 8, 8))
    first, again, other = (
        variational_bound(sampler, images, 1, timesteps=3, seed=seed) for seed in (0, 0, 2**64 - 1)
    )
    assert first == again and first.prior == other.prior
    assert all(a != b for a, b in zip(first.terms, other.terms, strict=True))


def test_a_compiled_network_gives_the_same(tiny_sampler):
    images = levels(3, (1, 8, 8))
    plain = variational_bound(tiny_sampler(), images, 1, timesteps=3, batch_size=4)
    sampler = tiny_sampler(compile=True)
    found = variational_bound(sampler, images, 1, timesteps=3, batch_size=4)
    np.testing.assert_allclose(found.terms, plain.terms, rtol=1e-4)
    assert sampler.executor.choice.compiled.shapes == {(4, False)}


def test_defaults_are_the_samplers(tiny_sampler):
    images = levels(2, (1, 8, 8))
    for defaults, clip in (
        (fd.SamplingDefaults(clip=0.0, variance_type="fixed_large"), 0.0),
        (fd.SamplingDefaults(clip=2.0, threshold=0.99), 1.0),
    ):
        found = variational_bound(tiny_sampler(defaults=defaults), images, 1, timesteps=2)
        assert (found.variance_type, found.clip) == (defaults.variance_type, clip)


def test_as_json(tiny_sampler):
    found = variational_bound(tiny_sampler(), levels(1, (1, 8, 8)), 1, timesteps=2)
    assert math.isnan(found.total_stderr)  # of one image
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["total"] == found.total and plain["total_stderr"] is None
    assert plain["terms"] == list(found.terms) and plain["timesteps"] == [0, 50]
    assert plain.keys() == Bound.__dataclass_fields__.keys()


def test_not_finite_says_where():
    def network(x_t, t):
        out = x_t.clone()
        out[t == 3, :, 0, 0] = torch.nan
        return out

    sampler = fd.Sampler(network, SHORT, shape=(1, 4, 4), device="cpu")
    with pytest.raises(FloatingPointError, match="of image 0 at timestep 3 is not finite, of 2 "):
        variational_bound(sampler, levels(2, (1, 4, 4)))


GOOD = levels(2, (1, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": GOOD.float()}, r"images of torch.float32 and shape .*must be uint8 of shape"),
        ({"images": GOOD.to(torch.int16)}, "images of torch.int16"),
        ({"images": GOOD[:, 0]}, r"images of torch.uint8 and shape \(2, 8, 8\)"),
        ({"images": GOOD[..., :7]}, r"must be uint8 of shape \(N, 1, 8, 8\)"),
        ({"images": GOOD[:0]}, "images: must hold at least one"),
        ({"images": GOOD.numpy()}, "images of ndarray: must be a uint8 tensor"),
        ({"labels": [1, 2, 0]}, "labels: 3 labels for 2"),
        ({"labels": 3}, "labels=3"),
        ({"timesteps": 1}, "timesteps=1: must be in 2..100"),
        ({"timesteps": 101}, "timesteps=101: must be in 2..100"),
        ({"timesteps": 2.0}, "timesteps=2.0: must be an integer"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"progress": 1}, "progress=1"),
        ({"clip": -1.0}, "clip=-1"),
        ({"variance_type": "fixed"}, "variance_type='fixed'"),
        ({"variance_type": "learned"}, "variance_type='learned': must be fixed_small"),
    ],
)
def test_bad_arguments(tiny_sampler, change, message):
    given = {"images": GOOD, "labels": 1, "timesteps": 2} | change
    with pytest.raises(ValueError, match=message):
        variational_bound(tiny_sampler(), given.pop("images"), given.pop("labels"), **given)


def test_labels_follow_the_samplers_rules(tiny_unet):
    sampler = fd.Sampler(
        tiny_unet(num_class_embeds=3),
        COSINE,
        shape=(1, 8, 8),
        conditioning=fd.Conditioning(3),
        device="cpu",
    )
    with pytest.raises(ValueError, match="labels=None: this model has no null class"):
        variational_bound(sampler, GOOD, timesteps=2)
    plain = fd.Sampler(tiny_unet(), COSINE, shape=(1, 8, 8), device="cpu")
    assert variational_bound(plain, GOOD, timesteps=2).images == 2
    with pytest.raises(ValueError, match="labels=0: this model is unconditional"):
        variational_bound(plain, GOOD, 0, timesteps=2)
