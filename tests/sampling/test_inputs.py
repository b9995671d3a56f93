"""What images are asked for: noise in the place of the seeds', and arguments of NumPy's."""

import numpy as np
import pytest
import torch

from flashddpm import kernels

LABELS, GUIDANCE = [0, 1, 2], [1.0, 2.5, 1.0]


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddpm"},
        {"solver": "ddim"},
        {"solver": "ddim", "eta": 1.0},
        {"solver": "dpmpp_2m_sde"},
        {"solver": "euler_ancestral", "spacing": "linspace"},
        {"solver": "ddpm", "strength": 0.6},
    ],
    ids=str,
)
def test_the_seeds_own_noise_gives_their_images(tiny_sampler, backend, options):
    sampler = tiny_sampler(backend=backend)
    ask = {"labels": LABELS, "guidance": GUIDANCE, "num_steps": 6, **options}
    seeds = [3, 4, 5]
    if "strength" in options:
        ask["image"] = torch.rand(3, 1, 8, 8) * 2 - 1
    want = sampler.sample(seeds, **ask)
    plan = sampler.plan(
        options["solver"],
        6,
        **{k: v for k, v in options.items() if k not in ("solver", "strength")},
    )
    if "strength" in options:
        plan = plan.from_image(options["strength"])
    asked = []

    def step_noise(i):
        asked.append(i)
        return sampler.step_noise(seeds, int(plan.noise_keys[i])).double()

    given = {"initial_noise": sampler.initial_noise(seeds), "step_noise": step_noise}
    assert torch.equal(sampler.sample([7, 8, 9], **ask, **given), want)
    assert asked == list(range(len(plan)))
    only_start = sampler.sample([7, 8, 9], **ask, initial_noise=given["initial_noise"])
    noisy = plan.rows[:, kernels.Column.SIGMA].any()
    assert torch.equal(only_start, want) == (not noisy)


def test_other_noise_is_other_images_and_chunks_share_the_start(tiny_sampler):
    sampler = tiny_sampler()
    z = torch.randn(5, 1, 8, 8)
    whole = sampler.sample(range(5), 0, num_steps=3, initial_noise=z)
    parts = sampler.sample(range(5), 0, num_steps=3, initial_noise=z, batch_size=2)
    assert (whole - parts).abs().max() <= 1e-5
    assert (whole - sampler.sample(range(5), 0, num_steps=3)).abs().max() > 0.1


def test_bad_noise(tiny_sampler):
    sampler = tiny_sampler()
    for bad in (torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8).long(), [1.0]):
        with pytest.raises(ValueError, match="initial_noise: must be floats of shape"):
            sampler.sample(range(3), 0, num_steps=2, initial_noise=bad)
        with pytest.raises(ValueError, match="step_noise: must be floats of shape"):
            sampler.sample(range(3), 0, num_steps=2, solver="ddpm", step_noise=lambda i, b=bad: b)
    with pytest.raises(ValueError, match="step_noise: returned None for step 0"):
        sampler.sample(0, 0, num_steps=3, solver="ddpm", step_noise=lambda i: None)
    assert sampler.sample(0, 0, num_steps=3, step_noise=lambda i: None).isfinite().all()
    with pytest.raises(ValueError, match="5 seeds must be one batch, of at most batch_size=4"):
        sampler.sample(range(5), 0, batch_size=4, step_noise=lambda i: None)


def test_nothing_is_captured_beside_step_noise(tiny_sampler, monkeypatch):
    sampler = tiny_sampler()
    sampler.executor.capture = True
    monkeypatch.setattr(sampler.executor, "_graph", lambda *a: pytest.fail("captured"))
    got = sampler.sample(range(2), 0, num_steps=3, step_noise=lambda i: None)
    assert (got - tiny_sampler().sample(range(2), 0, num_steps=3)).abs().max() <= 1e-5


def test_numpy_arguments(tiny_sampler):
    sampler = tiny_sampler()
    want = sampler.sample([4, 5], [1, 2], [2.0, 1.0], num_steps=2)
    got = sampler.sample(np.array([4, 5]), np.array([1, 2]), np.array([2.0, 1.0]), num_steps=2)
    assert torch.equal(got, want)
    same = sampler.sample([4, 5], torch.tensor(1), torch.tensor(2.0), num_steps=2)
    assert torch.equal(same, sampler.sample([4, 5], 1, 2.0, num_steps=2))
