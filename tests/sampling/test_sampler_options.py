"""What a sampler may be told of its plan: whole runs against diffusers and against one another."""

import diffusers
import pytest
import torch

import flashddpm as fd

SEEDS = [3, 4, 5]


@pytest.fixture
def epsilon_sampler(tiny_unet):
    """A function: an unconditional sampler that predicts epsilon, of a network of so many out."""

    def make(out_channels=1, **options):
        return fd.Sampler(
            tiny_unet(out_channels=out_channels),
            fd.NoiseSchedule.create("linear", 1000),
            shape=(1, 8, 8),
            device="cpu",
            compile=False,
            **options,
        )

    return make


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_learned_range_is_diffusers(epsilon_sampler, monkeypatch, backend):
    """A network of 2C channels: the same noise to both, float32 on both sides."""
    sampler = epsilon_sampler(2, backend=backend)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(10)
    x = sampler.initial_noise(SEEDS)
    for t in scheduler.timesteps:
        noise = sampler.step_noise(SEEDS, int(t))
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, z=noise, **k: z
        )
        x = scheduler.step(sampler.network(x, t), t, x).prev_sample
    ours = sampler.sample(SEEDS, solver="ddpm", variance_type="learned_range", num_steps=10)
    assert (ours - x).abs().max() <= 1e-3
    fixed = sampler.sample(SEEDS, solver="ddpm", num_steps=10)
    assert (ours - fixed).abs().max() > 0.1


@pytest.mark.parametrize("sigmas", [None, "karras"])
def test_euler_is_diffusers(epsilon_sampler, sigmas):
    """Timesteps between the integers, through our U-Net with its hoisted time embedding."""
    sampler = epsilon_sampler()
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        timestep_spacing="linspace",
        use_karras_sigmas=sigmas == "karras",
    )
    scheduler.set_timesteps(12)
    x = sampler.initial_noise(SEEDS) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = sampler.network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x).prev_sample
    options = {"spacing": "linspace", "sigmas": sigmas, "clip": 0.0}
    plan = sampler.plan("euler", 12, **options)
    assert (plan.timesteps != plan.timesteps.round()).any()
    ours = sampler.sample(SEEDS, solver="euler", num_steps=12, **options)
    assert (ours - x).abs().max() <= 2e-3 * x.abs().max()


def test_fractional_and_whole_timesteps_agree_at_the_integers(epsilon_sampler):
    """The table of embeddings and the embedding in the loop are the same function."""
    sampler = epsilon_sampler()
    whole = [800, 500, 200, 0]
    a = sampler.sample(SEEDS, solver="ddim", timesteps=whole)
    b = sampler.sample(SEEDS, solver="ddim", timesteps=[800, 500, 200 + 1e-3, 0])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-2)
    assert not torch.equal(a, b)


def test_image_to_image(epsilon_sampler):
    """Begins at the noised image; at a small strength it stays near; noise is that of x_T."""
    sampler = epsilon_sampler()
    image = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []
    near = sampler.sample(
        SEEDS, num_steps=50, image=image, strength=0.1, on_step=lambda i, x0: seen.append(i)
    )
    assert seen == [0, 1, 2, 3, 4]
    far = sampler.sample(SEEDS, num_steps=50, image=image, strength=1.0)
    assert (near - image).abs().mean() < (far - image).abs().mean()
    plan = sampler.plan("ddim", 50).from_image(0.1)
    a, b = plan.initial
    x = a * image + b * sampler.initial_noise(SEEDS)
    began = sampler.trajectory(SEEDS, num_steps=50, image=image, strength=0.1)
    torch.testing.assert_close(began.x, x, rtol=1e-6, atol=1e-6)
    alone = sampler.sample(SEEDS[1:2], num_steps=50, image=image[1], strength=0.1)
    torch.testing.assert_close(alone, near[1:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "image=None"),
        ({"image": torch.zeros(1, 8, 8)}, "image: must not be given without strength"),
        ({"image": torch.zeros(1, 8, 9), "strength": 0.5}, r"image of shape \(1, 8, 9\)"),
        ({"image": torch.zeros(2, 1, 8, 8), "strength": 0.5}, r"image of shape \(2, 1, 8, 8\)"),
        ({"image": torch.zeros(1, 8, 8).byte(), "strength": 0.5}, "image: must be a tensor of"),
        ({"image": torch.zeros(1, 8, 8), "strength": 1.5}, "strength=1.5"),
        ({"image": torch.zeros(1, 8, 8), "strength": 0.001}, "strength=0.001"),
    ],
)
def test_bad_images_are_refused(epsilon_sampler, options, message):
    with pytest.raises(ValueError, match=message):
        epsilon_sampler().sample(SEEDS, num_steps=10, **options)


def test_guidance_interval(tiny_sampler):
    """Where no step is within it, an image is the unguided one; where all are, the guided one."""
    sampler = tiny_sampler()
    arguments = {"seeds": SEEDS, "labels": 1, "num_steps": 8}
    guided = sampler.sample(**arguments, guidance=3.0)
    unguided = sampler.sample(**arguments)
    all_of_it = sampler.sample(**arguments, guidance=3.0, guidance_interval=(0.0, float("inf")))
    none = sampler.sample(**arguments, guidance=3.0, guidance_interval=(1e6, 1e7))
    some = sampler.sample(**arguments, guidance=3.0, guidance_interval=(0.3, 3.0))
    assert torch.equal(all_of_it, guided)
    torch.testing.assert_close(none, unguided, rtol=0, atol=1e-5)  # two lanes an image, or one
    for other in (guided, unguided):
        assert (some - other).abs().max() > 1e-3


def test_a_model_folders_own_sigmas_are_of_its_solver_only(epsilon_sampler):
    sampler = epsilon_sampler(defaults=fd.SamplingDefaults(solver="euler", sigmas="karras"))
    karras, plain = sampler.plan("euler", 8), sampler.plan("euler", 8, sigmas=None)
    assert (karras.timesteps == plain.timesteps).all()  # None is the model's own
    ddim = sampler.plan("ddim", 8)
    assert (ddim.timesteps == ddim.timesteps.round()).all()


def test_timesteps_between_the_integers_leave_nothing_behind(epsilon_sampler):
    """The next run of the same shape gets whole timesteps, and the bits that it had before."""
    sampler = epsilon_sampler()
    before = sampler.sample(SEEDS, num_steps=5)
    sampler.sample(SEEDS, solver="euler", spacing="linspace", num_steps=5)
    assert torch.equal(sampler.sample(SEEDS, num_steps=5), before)
    told = []

    def network(x_t, t, labels):
        told.append(t.dtype)
        return x_t * 0.5

    foreign = fd.Sampler(network, sampler.schedule, shape=(1, 8, 8), device="cpu", call=network)
    for solver in ("ddim", "euler", "ddim"):
        foreign.sample(SEEDS, solver=solver, spacing="linspace", num_steps=3)
    assert told == [torch.int64] * 3 + [torch.float32] * 3 + [torch.int64] * 3
