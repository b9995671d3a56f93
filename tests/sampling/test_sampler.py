"""The sampler: both backends, any batch, and the noise that it says it uses."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import flashddpm as fd
from flashddpm import kernels
from flashddpm.kernels import reference
from flashddpm.kernels.launch import INTERPRETED
from flashddpm.kernels.tables import Column

RUNS = [
    {"solver": "ddim"},
    {"solver": "ddim", "eta": 1.0},
    {"solver": "ddpm"},
    {"solver": "ddpm", "variance_type": "fixed_large", "spacing": "trailing"},
    {"solver": "dpmpp_2m"},
]
LABELS = [0, 1, 2, 0, 1]
GUIDANCE = [1.0, 2.0, 1.0, 0.0, 1.5]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("guidance", [1.0, 3.0, GUIDANCE], ids=["off", "on", "mixed"])
def test_backends_agree(tiny_sampler, run, guidance):
    fused, plain = tiny_sampler(backend="fused"), tiny_sampler(backend="reference")
    a = fused.sample(range(5), LABELS, guidance, num_steps=10, **run)
    b = plain.sample(range(5), LABELS, guidance, num_steps=10, **run)
    assert a.shape == (5, 1, 8, 8) and a.dtype is torch.float32
    assert a.std() > 0.1
    assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_image_depends_on_its_own_seed_label_and_guidance_only(tiny_sampler, run):
    sampler = tiny_sampler()
    seeds = [5, -3, 2**63, 0, 77]
    together = sampler.sample(seeds, LABELS, GUIDANCE, num_steps=8, **run)
    chunked = sampler.sample(seeds, LABELS, GUIDANCE, num_steps=8, batch_size=2, **run)
    assert (together - chunked).abs().max() <= 1e-5
    for i, seed in enumerate(seeds):
        alone = sampler.sample(seed, LABELS[i], GUIDANCE[i], num_steps=8, **run)
        assert (together[i] - alone[0]).abs().max() <= 1e-5


def test_seeds_wrap_at_64_bits_and_differ(tiny_sampler):
    sampler = tiny_sampler()
    x = sampler.sample([-1, 2**64 - 1, 1], 0, num_steps=2)
    assert torch.equal(x[0], x[1])
    assert (x[0] - x[2]).abs().max() > 0.1


def apply_rows(sampler, network, plan, seeds):
    """The loop of the paper, written out in float64 with the noise the sampler names."""
    x = sampler.initial_noise(seeds).double()
    hist = torch.zeros_like(x)
    for row, key in zip(plan.rows, plan.noise_keys, strict=True):
        out = network(x.float(), int(row[Column.TIMESTEP])).double()
        x0 = row[Column.X0_XT] * x + row[Column.X0_OUT] * out
        if row[Column.CLIP]:
            x0 = x0.clamp(-row[Column.CLIP], row[Column.CLIP])
        z = sampler.step_noise(seeds, int(key)).double()
        x = (
            row[Column.C_X0] * x0
            + row[Column.C_XT] * x
            + row[Column.C_OUT] * out
            + row[Column.C_HIST] * hist
            + row[Column.SIGMA] * z
        )
        hist = x0
    return x


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_sample_is_the_rows_applied_with_the_published_noise(tiny_sampler, run, backend):
    sampler = tiny_sampler(backend=backend)
    labels = torch.tensor([1, 1, 1])
    plan = sampler.plan(num_steps=12, **run)
    want = apply_rows(sampler, lambda x, t: sampler.network(x, t, labels), plan, range(3))
    got = sampler.sample(range(3), 1, num_steps=12, **run)
    assert (got - want).abs().max() <= 1e-4


def test_ddpm_equals_diffusers_on_the_same_noise(tiny_unet, monkeypatch):
    unet = tiny_unet()
    sampler = fd.Sampler(unet, fd.NoiseSchedule.create(), shape=(1, 8, 8), device="cpu")
    theirs = DDPMScheduler()
    theirs.set_timesteps(20)
    seeds = [3, 4]
    x = sampler.initial_noise(seeds)
    for t in theirs.timesteps:
        z = sampler.step_noise(seeds, int(t))
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, z=z, **k: z
        )
        x = theirs.step(unet(x, t), t, x).prev_sample
    ours = sampler.sample(seeds, solver="ddpm", num_steps=20)
    assert (ours - x).abs().max() <= 1e-3 * x.abs().max()


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors then run the reference itself")
@pytest.mark.parametrize("run", RUNS)
def test_triton_kernels_in_the_loop_equal_the_reference(tiny_sampler, run, monkeypatch):
    """Under the interpreter, the very kernels of the CUDA path drive the same sampler."""
    sampler = tiny_sampler(backend="reference")
    want = sampler.sample(range(5), LABELS, GUIDANCE, num_steps=4, **run)
    calls = []
    real = kernels.denoise_step
    monkeypatch.setattr(kernels, "denoise_step", lambda *a: (calls.append(1), real(*a)))
    sampler.executor.ops = kernels
    got = sampler.sample(range(5), LABELS, GUIDANCE, num_steps=4, **run)
    assert len(calls) == 4
    assert torch.equal(got, want)


def test_guidance_selects_or_combines(tiny_sampler):
    sampler = tiny_sampler()
    x, w = sampler.initial_noise([9]), 2.5
    plan = sampler.plan("ddim", 1, spacing="trailing")
    t = torch.tensor([99])
    cond = sampler.network(x, t, torch.tensor([2]))
    uncond = sampler.network(x, t, torch.tensor([3]))

    def x0(out):
        row = plan.rows[0]
        return (row[Column.X0_XT] * x + row[Column.X0_OUT] * out).clamp(-1, 1)

    run = {"solver": plan, "num_steps": 1}
    assert (sampler.sample(9, 2, **run) - x0(cond)).abs().max() <= 1e-5
    assert (sampler.sample(9, None, **run) - x0(uncond)).abs().max() <= 1e-5
    guided = sampler.sample(9, 2, w, **run)
    assert (guided - x0(uncond + w * (cond - uncond))).abs().max() <= 1e-5
    assert (guided - x0(cond)).abs().max() > 1e-3


def test_previews_end_in_the_image(tiny_sampler):
    sampler = tiny_sampler()
    seen = []
    x = sampler.sample(
        range(3), 1, [1, 2, 1], num_steps=6, on_step=lambda i, x0: seen.append((i, x0.clone()))
    )
    assert [i for i, _ in seen] == list(range(6))
    assert torch.equal(seen[-1][1], x)  # the last row of ddim is x0 itself
    assert all(x0.abs().max() <= 1 for _, x0 in seen)
    assert (seen[0][1] - x).abs().max() > 0.01
    assert torch.equal(x, sampler.sample(range(3), 1, [1, 2, 1], num_steps=6))


def test_a_held_result_never_changes(tiny_sampler):
    sampler = tiny_sampler()
    first = sampler.sample(range(4), 0, num_steps=3)
    kept = first.clone()
    sampler.sample(range(4, 8), 1, num_steps=5, solver="ddpm")
    assert torch.equal(first, kept)
    assert torch.equal(sampler.sample(range(4), 0, num_steps=3), kept)


def test_non_finite_output_names_the_seed_and_the_step(tiny_sampler):
    broken = [True]

    def network(x_t, t, labels):
        out = torch.zeros_like(x_t)
        if broken and int(t[0]) == 40:
            out[1, 0, 3, 3] = torch.inf  # clipping would hide it
        return out

    sampler = fd.Sampler(
        network, fd.NoiseSchedule.create("linear", 100), shape=(1, 8, 8), call=network, device="cpu"
    )
    with pytest.raises(fd.NonFiniteError, match="seed 11 is not finite at step 5 of 10") as error:
        sampler.sample([10, 11, 12], num_steps=10)
    assert (error.value.seed, error.value.step) == (11, 5)
    broken.clear()
    assert sampler.sample([10, 11, 12], num_steps=10).isfinite().all()


def test_a_users_own_network(tiny_sampler):
    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, noisy, when):
            assert when.dtype is torch.int64 and when.shape == noisy.shape[:1]
            return noisy * self.scale

    schedule = fd.NoiseSchedule.create("linear", 50)
    kinds = {"shape": (3, 5, 7), "prediction_type": "sample", "device": "cpu"}
    module = fd.Sampler(Denoiser(), schedule, **kinds)
    assert module.executor.choice.compile is False
    called = fd.Sampler(Denoiser(), schedule, call=lambda x, t, labels: x * 0.5, **kinds)
    a, b = (s.sample(range(3), num_steps=5, solver="ddpm") for s in (module, called))
    assert a.shape == (3, 3, 5, 7) and torch.equal(a, b)


def test_update_weights_leaves_nothing_stale(tiny_sampler, tiny_unet):
    sampler, other = tiny_sampler(), tiny_unet(seed=1, num_class_embeds=4)
    before = sampler.sample(range(2), 0, num_steps=4)
    sampler.update_weights(other.state_dict())
    after = sampler.sample(range(2), 0, num_steps=4)
    fresh = fd.Sampler(
        other,
        sampler.schedule,
        shape=sampler.shape,
        prediction_type="v_prediction",
        conditioning=sampler.conditioning,
        device="cpu",
        compile=False,
    )
    assert (before - after).abs().max() > 0.01
    assert torch.equal(after, fresh.sample(range(2), 0, num_steps=4))


def test_global_random_state_is_untouched(tiny_sampler):
    sampler = tiny_sampler()
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sampler.sample(range(2), 0, num_steps=3, solver="ddpm")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    assert random.getstate() == state[2]


def test_what_auto_chose_is_one_log_line(tiny_sampler, caplog):
    with caplog.at_level("INFO", "flashddpm"):
        tiny_sampler(backend="auto")
    assert [record.message for record in caplog.records] == [
        "runs on cpu in torch.float32, fused backend"
    ]


def test_the_models_variance_is_of_ddpm_only(tiny_sampler):
    sampler = tiny_sampler(defaults=fd.SamplingDefaults(variance_type="fixed_large"))
    large, small = (
        sampler.plan("ddpm", 5, variance_type=kind).rows for kind in (None, "fixed_small")
    )
    assert (large[0] != small[0]).any()
    assert len(sampler.plan("ddim", 5)) == len(sampler.plan("dpmpp_2m", 5)) == 5


def test_inference_mode_leaves_nothing_behind(tiny_sampler, tiny_unet):
    sampler = tiny_sampler()
    with torch.inference_mode():
        first = sampler.sample(range(2), 0, num_steps=3)
    assert torch.equal(sampler.sample(range(2), 0, num_steps=3), first)
    sampler.update_weights(tiny_unet(num_class_embeds=4).state_dict())
    assert torch.equal(sampler.sample(range(2), 0, num_steps=3), first)


def test_dropout_is_off(tiny_unet):
    unet = tiny_unet(dropout=0.5).train()
    schedule = fd.NoiseSchedule.create("linear", 10)
    sampler = fd.Sampler(unet, schedule, shape=(1, 8, 8), device="cpu")
    a, b = (sampler.sample(0, num_steps=3) for _ in range(2))
    assert torch.equal(a, b)


def test_only_guided_images_cost_two_evaluations(tiny_sampler):
    lanes = []
    schedule = fd.NoiseSchedule.create("linear", 10)

    def network(x_t, t, labels):
        lanes.append((len(x_t), labels.tolist()))
        return x_t

    sampler = fd.Sampler(
        network,
        schedule,
        shape=(1, 2, 2),
        call=network,
        conditioning=fd.Conditioning(3, 3),
        device="cpu",
    )
    sampler.sample(range(5), [0, 1, 2, 0, 1], [1, 1, 2, 1, 3], num_steps=1, batch_size=2)
    assert lanes == [(2, [0, 1]), (3, [2, 0, 3]), (2, [1, 3])]


def test_threads_take_turns(tiny_sampler):
    sampler = tiny_sampler()
    want = [sampler.sample(seed, 0, num_steps=6, solver="ddpm") for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(sampler.sample, s, 0, num_steps=6, solver="ddpm") for s in range(4)]
        got = [job.result() for job in jobs]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_plan_of_ones_own(tiny_sampler):
    sampler = tiny_sampler()
    plan = sampler.plan("ddpm", 7)
    a, b = (sampler.sample(range(2), 1, solver=s, num_steps=7) for s in (plan, "ddpm"))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="eta=0.5: must not be given beside a Plan"):
        sampler.sample(0, 1, solver=plan, eta=0.5)
    longer = fd.make_plan(fd.NoiseSchedule.create(), "ddim", 9, prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"timesteps must be in 0\.\.99"):
        sampler.sample(0, 1, solver=longer)
    rows = plan.rows.copy()
    rows[0, Column.TIMESTEP] += 0.5  # between the integers too
    c = sampler.sample(range(2), 1, solver=fd.Plan(rows, plan.noise_keys))
    assert not torch.equal(c, a) and (c - a).abs().max() < 0.5


def test_replace_changes_what_is_named(tiny_sampler, tiny_unet):
    sampler = tiny_sampler(
        scheduler={"_class_name": "DDIMScheduler"}, graph_memory=7, capture=False, backend="fused"
    )
    plain = sampler.replace(backend="reference")
    assert (plain.backend, sampler.backend) == ("reference", "fused")
    assert plain.network is sampler.network and plain.scheduler_config == sampler.scheduler_config
    ask = {"labels": [0, 1], "num_steps": 4}
    assert (plain.sample([1, 2], **ask) - sampler.sample([1, 2], **ask)).abs().max() <= 1e-4
    other = sampler.replace(schedule=fd.NoiseSchedule.create("linear", 50))
    assert other.scheduler_config["num_train_timesteps"] == 50  # not the old config's
    assert other.conditioning == sampler.conditioning and other.prediction_type == "v_prediction"
    assert other.executor.graphs._limit == 7
    with pytest.raises(TypeError, match="colour"):
        sampler.replace(colour="grey")
    with pytest.raises(ValueError, match="backend='triton'"):
        sampler.replace(backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS)
def test_captured_graph_equals_the_reference_on_a_gpu(tiny_unet, run):
    def make(**arguments):
        return fd.Sampler(
            tiny_unet(num_class_embeds=4).cuda(),
            fd.NoiseSchedule.create("squaredcos_cap_v2", 100),
            shape=(1, 8, 8),
            prediction_type="v_prediction",
            conditioning=fd.Conditioning(3, 3),
            device="cuda",
            **arguments,
        )

    captured, plain = make(compile=False), make(backend="reference")
    assert captured.executor.capture and not plain.executor.capture
    for seeds in (range(5), range(5, 10)):  # a second call with new seeds replays the same graph
        a = captured.sample(seeds, LABELS, GUIDANCE, num_steps=10, **run)
        b = plain.sample(seeds, LABELS, GUIDANCE, num_steps=10, **run)
        assert (a - b).abs().max() <= 1e-3
    on_cpu = reference.philox(torch.arange(3), torch.zeros(3).long(), (1, 8, 8))
    assert torch.equal(captured.initial_noise(range(3)).cpu(), on_cpu)


@pytest.mark.gpu
def test_compiled_captured_bfloat16_is_near_the_reference_on_a_gpu():
    """The default path on CUDA: PSNR over at least 64 images of 50 steps (numerics.md)."""
    fast = fd.Sampler.from_pretrained(fd.bundled(), "cuda")
    plain = fd.Sampler.from_pretrained(fd.bundled(), "cuda", "float32", backend="reference")
    assert fast.executor.capture and fast.dtype is torch.bfloat16
    labels = [i % 10 for i in range(64)]
    for run in RUNS:  # other solvers and numbers of steps replay the same graph
        a, b = (fd.to_uint8(s.sample(range(64), labels, **run)).double() for s in (fast, plain))
        psnr = 10 * torch.log10(255**2 / (a - b).square().mean())
        assert psnr >= 35, run
    assert len(fast.executor.graphs) <= 2  # of one step, and of as many as pay


@pytest.mark.gpu
def test_previews_and_new_weights_under_a_graph_on_a_gpu(tiny_unet):
    sampler = fd.Sampler(
        tiny_unet(), fd.NoiseSchedule.create("linear", 50), shape=(1, 8, 8), device="cuda"
    )
    first = sampler.sample(range(3), num_steps=5)
    seen = []
    again = sampler.sample(range(3), num_steps=5, on_step=lambda i, x0: seen.append(x0.clone()))
    assert (again - first).abs().max() <= 1e-4 and torch.equal(seen[-1], again)
    sampler.update_weights(tiny_unet(seed=1).state_dict())
    fresh = fd.Sampler(
        tiny_unet(seed=1), sampler.schedule, shape=(1, 8, 8), device="cuda", backend="reference"
    )
    want = fresh.sample(range(3), num_steps=5)
    assert (sampler.sample(range(3), num_steps=5) - want).abs().max() <= 1e-3
    assert (want - first).abs().max() > 0.01
