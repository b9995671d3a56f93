"""The loops alone: both sides give the same before anything is timed."""

import pytest
import torch

import flashddpm as fd
from flashddpm.benchmarks.cases import loops
from flashddpm.benchmarks.measure import harness


@pytest.fixture
def compared(monkeypatch):
    """The sides that are timed, with few steps and no clock."""
    sides = []

    def compare(ours, peer, rounds):
        sides.append((ours, peer))
        return harness.Comparison(1, 2, 2, 2, 2, 0, rounds)

    monkeypatch.setattr(loops, "compare", compare)
    monkeypatch.setattr(loops, "LOOP_STEPS", 10)
    load = fd.Sampler.from_pretrained
    monkeypatch.setattr(fd.Sampler, "from_pretrained", lambda *a, compile: load(*a, compile=False))
    return sides


def test_loops_against_schedulers(compared):
    results = list(loops.against_schedulers("cpu"))
    assert [r.case for r in results] == [
        "loop-ddim", "loop-ddim-share", "loop-ddpm", "loop-ddpm-share"
    ]  # fmt: skip
    ours, peer = compared[0]
    torch.testing.assert_close(ours(), peer(), rtol=0, atol=1e-5)
    assert results[1].values == {"share_of_run": 0.5}


def test_another_loop_is_not_timed(compared, monkeypatch):
    from diffusers import DDIMScheduler

    step = DDIMScheduler.step

    def off(*arguments, **options):
        return (step(*arguments, **options)[0] + 0.01,)

    monkeypatch.setattr(DDIMScheduler, "step", off)
    with pytest.raises(AssertionError, match="not timed"):
        list(loops.against_schedulers("cpu"))


def test_the_loop_of_denoising_diffusion_pytorch(compared, monkeypatch):
    import denoising_diffusion_pytorch as ddpt

    monkeypatch.setattr(loops, "BATCHES", (2,))
    monkeypatch.setattr(loops, "DDPT_STEPS", 25)
    (result,) = loops.against_ddpt("cpu")
    assert result.case == "loop-ddpt-batch-2"
    ours, peer = compared[0]
    assert ours().shape == peer().shape == (2, 3, 32, 32)
    sample = ddpt.GaussianDiffusion.p_sample
    monkeypatch.setattr(ddpt.GaussianDiffusion, "p_sample", lambda *a: (sample(*a)[0] + 0.01, None))
    with pytest.raises(AssertionError, match="not timed"):
        list(loops.against_ddpt("cpu"))
